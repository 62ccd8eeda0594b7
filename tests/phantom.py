"""An accelerator that is none: a device of its own, whose tensors lie on the CPU behind its back.

On it a tensor that was made on the wrong device shows as on a GPU: an operator that is given tensors of both refuses
them, but for numbers (0-d tensors of the CPU). What it computes are the CPU's kernels, so results can be compared.
Autograd's thread for it aborts where it meets hooks on saved tensors, and bitsandbytes' parameters cannot be its
tensors: backprop over streamed layers, a language model's checkpointed loss and packed weights cannot be tried on it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from spryfl.forward_mode.dual import Dual

NAME = "phantom"
TRANSFERS = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
"""Operators that may see both devices."""


class OnPhantom(Tensor):
    """A tensor on the phantom; `behind` is where its data are."""

    behind: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnPhantom":
        made: OnPhantom = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        return made

    def __init__(self, inner: Tensor) -> None:
        self.behind = inner

    def tolist(self) -> Any:
        return self.behind.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnPhantom({self.behind})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _perform(func, args, kwargs or {})


def _perform(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(isinstance(tensor, Dual) for tensor in tensors):
        return NotImplemented  # it has rules of its own
    here = any(isinstance(tensor, OnPhantom) for tensor in tensors)
    if here and func not in TRANSFERS:
        for tensor in tensors:
            if not isinstance(tensor, OnPhantom) and tensor.dim() > 0:
                raise RuntimeError(f"{func}: expected all tensors on one device, got {NAME} and {tensor.device}")
    inner_args, inner_kwargs = tree_unflatten(
        [leaf.behind if isinstance(leaf, OnPhantom) else leaf for leaf in leaves], spec
    )
    if inner_kwargs.get("device") is not None:
        here = torch.device(inner_kwargs["device"]).type == NAME
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")} if here else inner_kwargs
    given = {id(tensor.behind): tensor for tensor in tensors if isinstance(tensor, OnPhantom)}

    def wrapped(value: Any) -> Any:
        if id(value) in given:  # changed in place
            return given[id(value)]
        return OnPhantom(value) if here and isinstance(value, Tensor) else value

    return tree_map(wrapped, func(*inner_args, **inner_kwargs))


class _Module(backend_registration._DummyBackendModule):
    """`torch.phantom`: its generator is the CPU's."""

    def is_available(self) -> bool:
        return False  # or `device = "auto"` of other tests would take it

    def device(self, index: int) -> Any:
        return nullcontext()

    def get_rng_state(self, device: int = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: int = 0) -> None:
        torch.set_rng_state(state)


class _NoGrad(torch.no_grad):
    """For `torch.inference_mode`, which tensors that wrap others do not know."""

    def __new__(cls, mode: bool = True) -> "_NoGrad":  # type: ignore[misc]
        return super().__new__(cls)

    def __init__(self, mode: bool = True) -> None:
        super().__init__()


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> OnPhantom:
    return OnPhantom(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> OnPhantom:
    return OnPhantom(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    inner = [tensor.behind if isinstance(tensor, OnPhantom) else tensor for tensor in (source, target)]
    inner[1].copy_(inner[0])
    return target


# At import: autograd starts a thread for each device that is there when it is first used.
backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


@contextmanager
def on_any_device() -> Iterator[None]:
    """Inside, attention takes the same kernels everywhere, and `torch.inference_mode` is what a phantom bears."""
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(torch, "inference_mode", _NoGrad)
        yield
