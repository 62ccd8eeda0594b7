"""Dual numbers at the border of our own operators: a primal and, maybe, a tangent."""

from torch import Tensor
from torch.autograd import forward_ad


def unpack(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a tensor into its primal and its tangent, None where it carries none."""
    primal, tangent = forward_ad.unpack_dual(value)
    return primal, tangent


def pack(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """Join a primal and its tangent into a dual number; without a tangent, the primal itself."""
    return primal if tangent is None else forward_ad.make_dual(primal, tangent)
