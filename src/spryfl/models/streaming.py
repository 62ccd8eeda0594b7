"""Weights that stay on disk and pass through layer by layer, the next one prefetched.

A layer's frozen tensors are views of a mapping of their files that is made when the layer is due and dropped
when it is done, so at most two layers are resident: the one that computes and the one being fetched. What is
trained (adapters, the head) is never on disk.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spryfl.errors import ModelError
from spryfl.models.assembly import Slot
from spryfl.models.checkpoint import Checkpoint

PAGE_BYTES = 4096

Values = list[Tensor]
"""A layer's frozen tensors, in the order of its slots."""


class LayerStore:
    """The repeated layers' frozen tensors on disk.

    Args:
        slots: of each layer.
        dtype: what the model computes in; tensors stored otherwise are cast, quantized ones are not.
    """

    def __init__(
        self, checkpoint: Checkpoint, slots: Sequence[Sequence[Slot]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device

    def load(self, layer: int) -> Values:
        """A layer's tensors, in memory. Runs in the prefetching thread."""
        slots = self.slots[layer]
        tensors = self._checkpoint.read(name for slot in slots for name in slot.parts.values())
        values = [slot.value(tensors, self._dtype, self._device) for slot in slots]
        for tensor in tensors.values():
            _touch(tensor)
        return values


class StreamedLayers:
    """Loads each layer before its forward and drops it after, by hooks.

    Prefetching follows the observed direction: up in a forward pass, down in a backward sweep over layers.
    A caller that needs a layer beyond its forward, or calls it several times, holds it with `resident`.

    Args:
        layers: in the order of a forward pass; their slots are on the meta device.
    """

    def __init__(self, layers: Sequence[nn.Module], store: LayerStore) -> None:
        self._layers = {layer: index for index, layer in enumerate(layers)}
        self._store = store
        self._empty = [[getattr(slot.module, slot.name) for slot in slots] for slots in store.slots]
        self._holders: Counter[int] = Counter()
        self._last = -1
        self._prefetch: _Prefetch | None = None
        self._closed = False
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before, index))
            layer.register_forward_hook(partial(self._after, index), always_call=True)

    @contextmanager
    def resident(self, layer: nn.Module) -> Iterator[None]:
        """Keep a layer in memory for several calls, or from its forward to its backward pass."""
        index = self._layers[layer]
        self._enter(index)
        try:
            yield
        finally:
            self._leave(index)

    def close(self) -> None:
        """Wait for the prefetch under way and drop it; the layers can no longer be called."""
        self._closed = True
        self._take_prefetch()

    def _before(self, index: int, module: nn.Module, args: Any) -> None:
        self._enter(index)

    def _after(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self._leave(index)

    def _enter(self, index: int) -> None:
        if self._closed:
            raise ModelError("this streamed model was closed: load it again")
        if self._holders[index] == 0:
            ahead = self._take_prefetch()
            values = ahead.result() if ahead is not None and ahead.layer == index else None
            del ahead  # a wrong guess goes before the right layer comes
            self._put(index, self._store.load(index) if values is None else values)
            following = self._following(index)
            self._last = index
            if following is not None and self._holders[following] == 0:
                self._prefetch = _Prefetch(self._store.load, following)
        self._holders[index] += 1

    def _leave(self, index: int) -> None:
        # The hook after a forward runs even where the one before it raised.
        if self._holders[index] > 0:
            self._holders[index] -= 1
            if self._holders[index] == 0:
                self._put(index, self._empty[index])

    def _put(self, index: int, values: Sequence[Tensor]) -> None:
        for slot, value in zip(self._store.slots[index], values, strict=True):
            slot.put(value)

    def _following(self, index: int) -> int | None:
        """The layer that will be called next, as far as the last two tell."""
        step = index - self._last
        if index == 0 or abs(step) > 1:
            direction = 1  # a pass begins, or a segment is recomputed
        else:
            direction = step or -1  # the same layer again: a backward sweep begins
        following = index + direction
        return following if 0 <= following < len(self._layers) else None

    def _take_prefetch(self) -> "_Prefetch | None":
        taken, self._prefetch = self._prefetch, None
        if taken is not None:
            taken.wait()
        return taken


class _Prefetch:
    """One layer's load in a thread of its own, which ends with it."""

    def __init__(self, load: Callable[[int], Values], layer: int) -> None:
        self.layer = layer
        self._values: Values | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(load,), name=f"spry-prefetch-{layer}")
        self._thread.start()

    def _run(self, load: Callable[[int], Values]) -> None:
        try:
            with torch.no_grad():
                self._values = load(self.layer)
        except BaseException as error:  # handed to whoever asks for the layer
            self._error = error

    def wait(self) -> None:
        self._thread.join()

    def result(self) -> Values | None:
        """The layer's tensors, given away; None if the thread died without a word.

        Raises:
            BaseException: what the load raised.
        """
        if self._error is not None:
            raise self._error
        values, self._values = self._values, None
        return values


def _touch(tensor: Tensor) -> None:
    """Make a view of a file resident by reading a byte of each page."""
    if tensor.device.type == "cpu" and tensor.numel():
        tensor.detach().contiguous().view(-1).view(torch.uint8)[::PAGE_BYTES].sum()
