"""Weights that stay on disk and pass through layer by layer, the next one prefetched.

A layer's frozen tensors are views of a mapping of their files that is made when the layer is due and dropped
when it is done, so at most two layers are resident: the one that computes and the one being fetched. What is
trained (adapters, the head) is never on disk. Autograd stores where a layer's weights lie, and they are loaded again
for its backward pass.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spryfl.memory.meter import counting_as_weights
from spryfl.models.assembly import Slot
from spryfl.models.checkpoint import Checkpoint
from spryfl.models.saved_weights import SavedWeights

PAGE_BYTES = 4096

Stored = dict[str, Tensor]
"""A layer's tensors as they lie in the checkpoint, by name."""


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

    def fetch(self, layer: int) -> Stored:
        """A layer's tensors as stored, read from disk. Runs in the prefetching thread, and allocates nothing there:
        what one thread frees, glibc keeps for that thread.
        """
        tensors = self._checkpoint.read(name for slot in self.slots[layer] for name in slot.parts.values())
        for tensor in tensors.values():
            _touch(tensor)
        return tensors

    def put(self, layer: int, stored: Stored) -> None:
        """Make a layer's tensors its modules', cast and moved where that is needed."""
        with torch.no_grad():
            for slot in self.slots[layer]:
                slot.put(slot.value(stored, self._dtype, self._device))
                for name in slot.parts.values():
                    del stored[name]  # a layer that is cast never stands twice


class StreamedLayers:
    """Loads each layer before its forward and drops it after, by hooks.

    Prefetching follows the observed direction: up in a forward pass, down in a backward sweep over layers.

    Args:
        layers: in the order of a forward pass; their slots are on the meta device.
    """

    def __init__(self, layers: Sequence[nn.Module], store: LayerStore) -> None:
        self._store = store
        self._empty = [[getattr(slot.module, slot.name) for slot in slots] for slots in store.slots]
        self._holders: Counter[int] = Counter()
        self._saved = SavedWeights(store.slots, self._enter, self._leave)
        self._saving: list[tuple[int, AbstractContextManager[None]]] = []
        self._last = -1
        self._prefetch: _Prefetch | None = None
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before, index))
            layer.register_forward_hook(partial(self._after, index), always_call=True)

    def _before(self, index: int, module: nn.Module, args: Any) -> None:
        self._enter(index)
        # Under a torch.func transform PyTorch allows no such hooks, and nothing is stored for a backward pass of ours.
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            self._saving.append((index, self._saved.of_forward(index)))
            self._saving[-1][1].__enter__()

    def _after(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._saving and self._saving[-1][0] == index:
            self._saving.pop()[1].__exit__(None, None, None)
        self._leave(index)

    def _enter(self, index: int) -> None:
        if self._holders[index] == 0:
            ahead = self._take_prefetch()
            stored = ahead.result() if ahead is not None and ahead.layer == index else None
            del ahead  # a wrong guess goes before the right layer comes
            with counting_as_weights(), torch._C._DisableFuncTorch():  # no matter of a torch.func transform under way
                self._store.put(index, self._store.fetch(index) if stored is None else stored)
            del stored
            following = self._following(index)
            self._last = index
            if following is not None and self._holders[following] == 0:
                self._prefetch = _Prefetch(self._store.fetch, following)
        self._holders[index] += 1

    def _leave(self, index: int) -> None:
        # The hook after a forward runs even where the one before it raised.
        if self._holders[index] > 0:
            self._holders[index] -= 1
            if self._holders[index] == 0:
                for slot, empty in zip(self._store.slots[index], self._empty[index], strict=True):
                    slot.put(empty)

    def _following(self, index: int) -> int | None:
        """The layer that will be called next, as far as the last two tell."""
        step = index - self._last
        if abs(step) > 1 or (step == 0 and index == 0):
            direction = 1  # a pass begins, or a segment is recomputed from a kept input
        else:
            direction = step or -1  # the same layer again: a backward sweep begins
        following = index + direction
        return following if 0 <= following < len(self._store.slots) else None

    def _take_prefetch(self) -> "_Prefetch | None":
        taken, self._prefetch = self._prefetch, None
        if taken is not None:
            taken.wait()
        return taken


class _Prefetch:
    """One layer's read in a thread of its own, which ends with it."""

    def __init__(self, fetch: Callable[[int], Stored], layer: int) -> None:
        self.layer = layer
        self._stored: Stored | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(fetch,), name=f"spry-prefetch-{layer}")
        self._thread.start()

    def _run(self, fetch: Callable[[int], Stored]) -> None:
        try:
            self._stored = fetch(self.layer)
        except BaseException as error:  # handed to whoever asks for the layer
            self._error = error

    def wait(self) -> None:
        self._thread.join()

    def result(self) -> Stored | None:
        """The layer's tensors, given away; None if the thread died without a word.

        Raises:
            BaseException: what the read raised.
        """
        if self._error is not None:
            raise self._error
        stored, self._stored = self._stored, None
        return stored


def _touch(tensor: Tensor) -> None:
    """Make a view of a file resident by reading a byte of each page."""
    if tensor.device.type == "cpu" and tensor.numel():
        tensor.detach().contiguous().view(-1).view(torch.uint8)[::PAGE_BYTES].sum()
