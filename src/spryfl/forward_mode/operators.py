"""Lean jvps of the operators a transformer spends its time in: linear maps and layer norms.

PyTorch's own forward derivatives of these are correct but slow (docs/results/operators.md, by
`benchmarks/operators.py`) and leave temporaries. Here each is the primal's fused kernel and one more for the
tangent. PyTorch's derivatives of activations are as lean already.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn

from spryfl.forward_mode.dual import pack, unpack

Jvp = Callable[[nn.Module, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""(module, primal, tangent or None) -> (primal, tangent or None) of the output."""


def linear_jvp(module: nn.Module, primal: Tensor, tangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Y = W x + b,  y' = W x' + W' x + b'; a frozen W and b have no tangents."""
    assert isinstance(module, nn.Linear)
    weight, weight_tangent = unpack(module.weight)
    bias, bias_tangent = (None, None) if module.bias is None else unpack(module.bias)
    output = nn.functional.linear(primal, weight, bias)
    output_tangent = None if tangent is None else nn.functional.linear(tangent, weight)
    if weight_tangent is not None:
        own = nn.functional.linear(primal, weight_tangent)
        output_tangent = own if output_tangent is None else output_tangent.add_(own)
    if bias_tangent is not None:
        spread = bias_tangent.expand_as(output)
        output_tangent = spread.clone() if output_tangent is None else output_tangent.add_(spread)
    return output, output_tangent


def layer_norm_jvp(module: nn.Module, primal: Tensor, tangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Y' = w * J x'. J = (I - 11^T/n - zz^T/n) / s is symmetric, so its backward kernel applies it forward."""
    assert isinstance(module, nn.LayerNorm)
    shape, weight, bias = module.normalized_shape, module.weight, module.bias
    output, mean, rstd = torch.native_layer_norm(primal, shape, weight, bias, module.eps)
    if tangent is None:
        return output, None
    moved, _, _ = torch.ops.aten.native_layer_norm_backward(
        tangent, primal, shape, mean, rstd, None, None, (True, False, False)
    )
    return output, moved if weight is None else moved.mul_(weight)


OPERATORS: dict[type[nn.Module], Jvp] = {
    nn.Linear: linear_jvp,
    nn.LayerNorm: layer_norm_jvp,
}


def use_lean_operators(model: nn.Module) -> None:
    """Give the model's linear maps and layer norms their lean jvps, in place.

    Subclasses keep their own forward: what they change is not known here. Without a tangent every module
    runs as before. A perturbed norm falls back to PyTorch's own derivative.
    """
    for module in model.modules():
        jvp = OPERATORS.get(type(module))
        if jvp is not None and "forward" not in vars(module):
            module.forward = _dispatch(module, jvp)


def _dispatch(module: nn.Module, jvp: Jvp) -> Callable[[Tensor], Tensor]:
    plain = module.forward

    @wraps(plain)
    def forward(input: Tensor) -> Tensor:
        primal, tangent = unpack(input)
        perturbed = any(p is not None and unpack(p)[1] is not None for p in module._parameters.values())
        if tangent is None and not perturbed:
            return plain(input)  # type: ignore[no-any-return]
        if perturbed and jvp is not linear_jvp:
            return plain(input)  # type: ignore[no-any-return]
        return pack(*jvp(module, primal, tangent))

    return forward
