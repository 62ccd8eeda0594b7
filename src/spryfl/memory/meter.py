"""The measured peak of live tensor bytes, on any device.

Every operator that reaches PyTorch's dispatcher, tangents' included, is seen; a storage counts from the
operator that first returns it until it is freed. Storages that stood before (weights, inputs) count
nothing. Scratch space inside a kernel is not seen.
"""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class ActivationMeter(TorchDispatchMode):
    """Measures what runs inside `with ActivationMeter() as meter:`.

    Attributes:
        live_bytes: tensors made inside and alive now.
        peak_bytes: the most that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass(leaf) for leaf in tree_leaves((args, kwargs))):
            return NotImplemented  # a dual number first takes itself apart; its parts come back here
        self._meet((args, kwargs), new=False)
        output = func(*args, **(kwargs or {}))
        self._meet(output, new=True)
        return output

    def _meet(self, tree: Any, new: bool) -> None:
        """Get to know the storages of a tree's tensors; those met as an input first are not ours."""
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            address = storage._cdata
            if address in self._known:
                continue
            size = storage.nbytes() if new else 0
            self._known[address] = size
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            # A storage's Python object lives as long as the storage, so this fires when it is freed.
            weakref.finalize(storage, self._freed, address).atexit = False

    def _freed(self, address: int) -> None:
        self.live_bytes -= self._known.pop(address)
