"""Dual numbers: a primal and K tangents that ride along with it, in one tensor.

`stacked` holds the primal in row 0 and its tangents in rows 1 to K, so whatever is linear acts on all of
them in one call: a frozen linear map sees one product, a transpose is one view. What is not linear has a
rule (`rules.py`). PyTorch's own forward mode carries one tangent; K of them would cost K primals.
"""

from typing import Any

import torch
from torch import Tensor


class Dual(Tensor):
    """A tensor that carries K tangents through code written for tensors.

    Attributes:
        stacked: (1 + K, *shape): the primal, then its tangents.
    """

    stacked: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stacked: Tensor) -> "Dual":
        """Wrap a stack; its storage is shared, not copied."""
        dual: Dual = Tensor._make_wrapper_subclass(
            cls,
            stacked.shape[1:],
            strides=stacked.stride()[1:],
            dtype=stacked.dtype,
            layout=stacked.layout,
            device=stacked.device,
        )
        return dual

    def __init__(self, stacked: Tensor) -> None:
        self.stacked = stacked

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Every PyTorch operator with a dual among its arguments comes here."""
        from spryfl.forward_mode.rules import apply_rule  # rules are written in terms of Dual

        return apply_rule(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Dual(shape={tuple(self.shape)}, num_tangents={self.num_tangents}, dtype={self.dtype})"

    # A meter finds the storage inside a wrapper by these two.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["stacked"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> "Dual":
        return Dual(inner["stacked"])

    @property
    def num_tangents(self) -> int:
        return self.stacked.shape[0] - 1


def make_dual(primal: Tensor, tangents: Tensor) -> Dual:
    """A dual of a primal and its tangents (K, *primal.shape); both are copied into one stack."""
    return Dual(torch.cat((primal.unsqueeze(0), tangents)))


def split(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """The primal and its tangents (K, ..), None where it carries none."""
    if isinstance(value, Dual):
        return value.stacked[0], value.stacked[1:]
    return value, None


def num_tangents(*values: object) -> int:
    """K of the duals among the values; 0 where there is none."""
    return next((value.num_tangents for value in values if isinstance(value, Dual)), 0)


def new_stack(like: Tensor, k: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Memory for a primal and K tangents of a shape, with the type and device of a tensor."""
    plain = like.stacked if isinstance(like, Dual) else like
    return plain.new_empty((1 + k, *shape))


def carrying_tangents(value: Tensor, k: int) -> Tensor:
    """The value as a dual of K tangents: itself, or with tangents of zero."""
    if not k or isinstance(value, Dual):
        return value
    stack = new_stack(value, k, value.shape)
    stack[0] = value
    stack[1:].zero_()
    return Dual(stack)


def write_rows(target: Tensor | None, part: Tensor, rows: slice, num_rows: int) -> Tensor:
    """Put some rows of an output in their place; the first part decides whether it has tangents."""
    if target is None:
        shape = (num_rows, *part.shape[1:])
        if isinstance(part, Dual):
            target = Dual(part.stacked.new_empty((1 + part.num_tangents, *shape)))
        else:
            target = part.new_empty(shape)
    if isinstance(part, Dual):
        assert isinstance(target, Dual)
        target.stacked[:, rows] = part.stacked
    else:
        target[rows] = part
    return target
