"""Packed weights (4-bit, 8-bit): unpacked once for primal and tangents, kept only while they are needed.

Inside `staged` an unpacked weight stays until the end, for blocks that run in several chunks: each weight is
then unpacked once a block. Outside, it lives for one product. A backward pass unpacks again instead of
keeping a dense weight for every layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

DenseWeight = Callable[[nn.Module, torch.dtype], Tensor]
"""(module, dtype) -> its frozen weight, dense: (out, in)."""

_staged: ContextVar[dict[nn.Module, Tensor] | None] = ContextVar("staged", default=None)


@contextmanager
def staged(wanted: bool = True) -> Iterator[None]:
    """Keep weights unpacked until the end of the outermost `staged`; does nothing where not wanted."""
    if not wanted or _staged.get() is not None:
        yield
        return
    token = _staged.set({})
    try:
        yield
    finally:
        _staged.reset(token)


def weight_of(module: nn.Module, unpack: DenseWeight, dtype: torch.dtype) -> Tensor:
    """The module's dense weight, from the stage if there is one."""
    stage = _staged.get()
    if stage is None:
        return unpack(module, dtype)
    if module not in stage:
        stage[module] = unpack(module, dtype)
    return stage[module]


def dense_bytes(block: nn.Module, itemsize: int) -> int:
    """What a block's packed weights take when all are unpacked; 0 where none is packed."""
    modules: list[Any] = [module for module in block.modules() if "_packed" in vars(module)]
    return sum(module.in_features * module.out_features * itemsize for module in modules)


def packed_linear(module: Any, unpack: DenseWeight, linear: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """The forward of a linear map with a packed frozen weight: duals, plain tensors and backward passes alike."""
    vars(module)["_packed"] = True

    @wraps(module.forward)
    def forward(input: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.to(input.dtype)
        if torch.is_grad_enabled() and input.requires_grad:
            output: Tensor = _PackedLinear.apply(input, module, unpack)  # type: ignore[no-untyped-call]
            return output if bias is None else output + bias
        return linear(input, weight_of(module, unpack, input.dtype), bias)

    return forward


class _PackedLinear(torch.autograd.Function):
    """W x whose backward pass unpacks W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, unpack: DenseWeight) -> Tensor:
        ctx.module, ctx.unpack, ctx.dtype = module, unpack, x.dtype
        ctx.save_for_backward(module.weight)  # so that hooks on saved tensors know that it will be needed
        return nn.functional.linear(x, weight_of(module, unpack, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _ = ctx.saved_tensors  # a streamed layer's weight is the module's again from here on
        return gradient @ weight_of(ctx.module, ctx.unpack, ctx.dtype), None, None
