"""Memory, measured: live tensor bytes on any device, split by what they are, and the process's resident peak.

Every operator that reaches PyTorch's dispatcher is seen; a storage counts from the operator that first
returns it until it is freed. Storages that stood before (weights, inputs) and layers read from disk are not
activations: a model's are counted by walking over it. Scratch space inside a kernel is not seen.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from spryfl.forward_mode.dual import Dual


@dataclass
class _Storage:
    """One storage's life: when it was born and died, by the meter's clock, and how much of it is tangents."""

    size: int
    born: int
    tangent_bytes: int = 0
    died: int | None = None


_AS_WEIGHTS = ContextVar("as_weights", default=False)


@contextmanager
def counting_as_weights() -> Iterator[None]:
    """What is made inside are weights, such as a layer that is read again and again, and no meter's activations."""
    token = _AS_WEIGHTS.set(True)
    try:
        yield
    finally:
        _AS_WEIGHTS.reset(token)


class ActivationMeter(TorchDispatchMode):
    """Measures what runs inside `with ActivationMeter() as meter:`.

    Attributes:
        live_bytes: tensors made inside and alive now.
        peak_bytes: the most that were alive at a time, tangents included.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._clock = 0
        self._peak_clock = 0
        self._known: dict[int, _Storage] = {}
        self._with_tangents: list[_Storage] = []

    @property
    def tangent_bytes(self) -> int:
        """How much of the peak was tangents."""
        at = self._peak_clock
        alive = (s for s in self._with_tangents if s.born <= at and (s.died is None or s.died > at))
        return sum(storage.tangent_bytes for storage in alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, Dual):
                self._note_tangents(leaf)
        if any(is_traceable_wrapper_subclass(leaf) for leaf in leaves):
            return NotImplemented  # a dual number first takes itself apart; its parts come back here
        self._meet(leaves, new=False)
        output = func(*args, **(kwargs or {}))
        self._meet(tree_leaves(output), new=not _AS_WEIGHTS.get())
        return output

    def _meet(self, leaves: list[Any], new: bool) -> None:
        """Get to know the storages of tensors; those met as an input first are not ours."""
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                continue
            storage = _unwrapped(leaf).untyped_storage()
            address = storage._cdata
            if address in self._known:
                continue
            self._clock += 1
            found = _Storage(storage.nbytes() if new else 0, self._clock)
            self._known[address] = found
            self.live_bytes += found.size
            if self.live_bytes > self.peak_bytes:
                self.peak_bytes, self._peak_clock = self.live_bytes, self._clock
            # A storage's Python object lives as long as the storage, so this fires when it is freed.
            weakref.finalize(storage, self._freed, address).atexit = False

    def _note_tangents(self, dual: Dual) -> None:
        known = self._known.get(dual.stacked.untyped_storage()._cdata)
        if known is not None and known.size and not known.tangent_bytes:
            known.tangent_bytes = known.size * dual.num_tangents // (1 + dual.num_tangents)
            self._with_tangents.append(known)

    def _freed(self, address: int) -> None:
        storage = self._known.pop(address)
        self._clock += 1
        storage.died = self._clock
        self.live_bytes -= storage.size


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's frozen parameters and buffers in memory, packed ones with their scales.

    Those on the meta device (streamed layers between their visits) and views without memory count nothing;
    a tensor that several modules share counts once.
    """
    frozen = (p for p in model.parameters() if not p.requires_grad)
    return _storage_bytes([*frozen, *model.buffers()])


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of a model's trainable parameters, in the model's own dtype."""
    return _storage_bytes([p for p in model.parameters() if p.requires_grad])


def _storage_bytes(tensors: list[Tensor]) -> int:
    storages: dict[int, int] = {}
    for tensor in tensors:
        # bitsandbytes keeps scales and code tables beside the packed weight, nested once for double quantization.
        state = getattr(tensor, "quant_state", None)
        nested = [vars(state), vars(state.state2) if getattr(state, "state2", None) else {}] if state else []
        scales = [getattr(tensor, "SCB", None), *(value for table in nested for value in table.values())]
        for part in (tensor, *(scale for scale in scales if isinstance(scale, Tensor))):
            if part.device.type != "meta":
                storage = _unwrapped(part).untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of `torch.func`, which have no storage."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


@dataclass(frozen=True)
class MemoryUse:
    """What a piece of work took at its peak, in bytes.

    Attributes:
        weights: frozen, resident as tensors.
        adapter: trainable values; optimizer state lives with the client (`federated.client`).
        activations: made during the work, without tangents.
        tangents: made during the work.
        resident: the process's peak during the work; 0 where the system does not tell.
        resident_before: as it began.
    """

    weights: int
    adapter: int
    activations: int
    tangents: int
    resident: int
    resident_before: int


class MemoryMeter:
    """Measures the work inside `with MemoryMeter(model) as meter:`; afterwards `meter.use` says what it took."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._activations = ActivationMeter()

    def __enter__(self) -> "MemoryMeter":
        self._before = resident_bytes()
        reset_resident_peak()
        self._activations.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._activations.__exit__(*error)  # type: ignore[no-untyped-call]
        tangents = self._activations.tangent_bytes
        self.use = MemoryUse(
            weights=weight_bytes(self._model),
            adapter=adapter_bytes(self._model),
            activations=self._activations.peak_bytes - tangents,
            tangents=tangents,
            resident=resident_peak_bytes(),
            resident_before=self._before,
        )


def resident_bytes() -> int:
    """What the process holds in memory now; 0 where the system does not tell (Linux does)."""
    return _status("VmRSS")


def resident_peak_bytes() -> int:
    """The most the process has held since it started, or since `reset_resident_peak`."""
    return _status("VmHWM")


def reset_resident_peak() -> None:
    """Start the process's resident peak anew, where the system allows it (Linux, /proc)."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:  # noqa: PTH123  # a kernel file
            handle.write("5")
    except OSError:
        pass  # the peak then counts from the process's start: never too low


def _status(key: str) -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as handle:  # noqa: PTH123  # a kernel file
            for line in handle:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0
