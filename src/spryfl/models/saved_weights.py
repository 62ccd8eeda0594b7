"""What autograd stores of a streamed layer's weights: the place they are read from again, instead of them.

Plain backprop refers to every layer's weights until its backward pass, which would keep all of them in memory.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks

from spryfl.models.assembly import Slot


@dataclass(frozen=True)
class Place:
    """A view of a layer's frozen tensor.

    Attributes:
        slot: of the layer's, by its index.
        offset: from the tensor's first element, in elements.
    """

    layer: int
    slot: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class SavedWeights:
    """Hooks on what autograd saves, by which a layer's weights are there again while its backward pass needs them.

    The layer asked for last is held until another is, or until the backward pass ends.

    Args:
        slots: of each layer.
        enter, leave: hold a layer in memory, and let it go.
    """

    def __init__(
        self, slots: Sequence[Sequence[Slot]], enter: Callable[[int], None], leave: Callable[[int], None]
    ) -> None:
        self._slots = slots
        self._enter = enter
        self._leave = leave
        self._held: int | None = None

    def of_forward(self, layer: int) -> AbstractContextManager[None]:
        """While a layer, in memory, is called under autograd."""
        return saved_tensors_hooks(partial(self._pack, layer), self._unpack)

    def _pack(self, layer: int, tensor: Tensor) -> Tensor | Place:
        at = tensor.data_ptr()
        for index, slot in enumerate(self._slots[layer]):
            weight: Tensor = getattr(slot.module, slot.name)
            inside = weight.data_ptr() <= at < weight.data_ptr() + weight.nbytes
            if inside and weight.dtype == tensor.dtype:
                offset = (at - weight.data_ptr()) // weight.itemsize
                return Place(layer, index, tensor.size(), tensor.stride(), offset)
        return tensor

    def _unpack(self, saved: Tensor | Place) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._hold(saved.layer)
        slot = self._slots[saved.layer][saved.slot]
        weight: Tensor = getattr(slot.module, slot.name).data
        return weight.as_strided(saved.size, saved.stride, weight.storage_offset() + saved.offset)

    def _hold(self, layer: int) -> None:
        if self._held == layer:
            return
        self._let_go()
        self._enter(layer)
        self._held = layer
        engine: Any = Variable._execution_engine
        engine.queue_callback(self._let_go)  # runs when the backward pass under way has ended

    def _let_go(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            self._leave(held)
