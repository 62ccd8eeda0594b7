"""Backward maps on disk: safetensors that name the base model they were fitted for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spryfl.config import TaskConfig
from spryfl.errors import ModelError
from spryfl.files import write_atomically
from spryfl.gradients.backward_maps import MapSettings
from spryfl.gradients.guesses import BackwardMap, fault_of, tensors_of, with_cosines

BASE, TASK, HORIZON, ACROSS = "base_sha256", "task_sha256", "horizon", "across"


@dataclass(frozen=True)
class Purpose:
    """What maps are good for: others' gradients lie in other directions.

    Attributes:
        base: the base model's fingerprint.
        task: of what the model is made to tell (`task_fingerprint`).
        settings: of the fit.
    """

    base: str
    task: str
    settings: MapSettings


def task_fingerprint(task: TaskConfig) -> str:
    """A hash of the kind of task and, of a prompted one, of its prompt and label words.

    What the prompt's fields are called does not count, only where they stand: public text has other columns.
    """
    numbers = {None: None} | {column: n for n, column in enumerate(dict.fromkeys(c for _, c in task.pieces if c))}
    told = [task.kind, [(text, numbers[column]) for text, column in task.pieces], list(task.label_words or ())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def write_maps(
    path: Path, maps: Mapping[int, BackwardMap], cosines: Mapping[int, float], purpose: Purpose, made_of: str
) -> None:
    """Write maps; a file of that name is replaced only when the new one is whole.

    Args:
        cosines: with true gradients on text held out from the fit, by place.
        made_of: what they were fitted on, for the reader.
    """
    metadata = {BASE: purpose.base, TASK: purpose.task, "made_of": made_of}
    metadata |= {name: str(value) for name, value in asdict(purpose.settings).items()}
    tensors = with_cosines(tensors_of(maps), cosines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def read_maps(path: Path, purpose: Purpose, num_layers: int, hidden: int) -> dict[str, Tensor]:
    """Maps laid out as tensors (`gradients.guesses.with_cosines`).

    Args:
        purpose: of the run; of its settings horizon and across count.
        num_layers, hidden: the model's calls of layers, and the width of its hidden states.

    Raises:
        ModelError: the file is missing or damaged, or it holds no sound maps for this base model, task and horizon.
    """
    try:
        with safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"guide.maps = '{path}': cannot be read as safetensors ({error}): spry fit-maps") from None
    base, horizon, across = purpose.base, purpose.settings.horizon, purpose.settings.across
    if metadata.get(BASE) != base:
        raise ModelError(
            f"guide.maps = '{path}': for another base model (its weights hash to {metadata.get(BASE, '?')[:12]}, "
            f"this run's to {base[:12]}): fit them for this one with spry fit-maps"
        )
    if metadata.get(TASK) != purpose.task:
        raise ModelError(
            f"guide.maps = '{path}': fitted for another task or prompt ({metadata.get('made_of', '?')}): set that "
            "task.template and task.label_words, or fit them for these with spry fit-maps"
        )
    if metadata.get(ACROSS) != str(across):
        raise ModelError(
            f"guide.maps = '{path}': fitted for guide.across = {str(not across).lower()}, not {str(across).lower()}: "
            "set that, or fit them anew with spry fit-maps"
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
