"""Backward maps on disk: safetensors that name the base model they were fitted for."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spryfl.errors import ModelError
from spryfl.gradients.backward_maps import MapSettings
from spryfl.gradients.guesses import BackwardMap, fault_of, tensors_of

BASE, HORIZON = "base_sha256", "horizon"


def write_maps(path: Path, maps: Mapping[int, BackwardMap], settings: MapSettings, base: str, made_of: str) -> None:
    """Write maps; a file of that name is replaced only when the new one is whole.

    Args:
        base: the base model's fingerprint.
        made_of: what they were fitted on, for the reader.
    """
    metadata = {BASE: base, "made_of": made_of} | {name: str(value) for name, value in asdict(settings).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors_of(maps).items()}, fresh, metadata)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def read_maps(path: Path, base: str, horizon: int, num_layers: int, hidden: int) -> dict[str, Tensor]:
    """Maps laid out as tensors (`gradients.guesses.tensors_of`).

    Args:
        base: the base model's fingerprint.
        horizon: layers passed through exactly.
        num_layers, hidden: the model's calls of layers, and the width of its hidden states.

    Raises:
        ModelError: the file is missing or damaged, or it holds no sound maps for this base model and horizon.
    """
    try:
        with safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"guide.maps = '{path}': cannot be read as safetensors ({error}): spry fit-maps") from None
    if metadata.get(BASE) != base:
        raise ModelError(
            f"guide.maps = '{path}': for another base model (its weights hash to {metadata.get(BASE, '?')[:12]}, "
            f"this run's to {base[:12]}): fit them for this one with spry fit-maps"
        )
    if metadata.get(HORIZON) != str(horizon):
        raise ModelError(
            f"guide.maps = '{path}': fitted for guide.horizon = {metadata.get(HORIZON)}, not {horizon}: set that, or "
            f"fit them anew with spry fit-maps --horizon {horizon}"
        )
    fault = fault_of(tensors, num_layers - 1 - horizon, hidden)
    if fault is not None:
        raise ModelError(f"guide.maps = '{path}': no sound backward maps ({fault}): write them with spry fit-maps")
    return tensors
