"""Lean operators of duals for what a transformer spends its time in: linear maps and norms.

A frozen linear map acts on primal and tangents in one product, one with a packed weight (`packed.py`) in blocks
that are unpacked once for all of them. A norm takes one kernel for the primal and one for each tangent.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from spryfl.forward_mode.dual import Dual, carrying_tangents, new_stack, num_tangents, split
from spryfl.forward_mode.packed import UnpackRows, packed_linear

Operator = Callable[[Any, Any], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Y = W x + b,  y' = W x' + W' x + b'; any of the three may be a dual.

    Args:
        x: (.., in).
        weight: (out, in).
        bias: (out,).
    """
    k = num_tangents(x, weight, bias)
    (plain_weight, _), (plain_bias, bias_tangents) = split(weight), _split_or_none(bias)
    if k == 0:
        return nn.functional.linear(x, plain_weight, plain_bias)
    if isinstance(x, Dual):
        # Contiguous first: a strided stack would be multiplied matrix by matrix, each with its own weight.
        stack = nn.functional.linear(x.stacked.contiguous(), plain_weight)
        if plain_bias is not None:
            stack[0] += plain_bias
    else:
        output = nn.functional.linear(x, plain_weight, plain_bias)
        stack = new_stack(output, k, output.shape)
        stack[0] = output
        stack[1:].zero_()
    if isinstance(weight, Dual):
        add_weight_tangents(stack, split(x)[0], weight, 1.0)
    if bias_tangents is not None:
        stack[1:] += bias_tangents.view(k, *(1,) * (stack.dim() - 2), -1)
    return Dual(stack)


def add_weight_tangents(stack: Tensor, x: Tensor, weight: Dual, scaling: float) -> None:
    """Add scaling * W'_k x to each tangent of a stack (1 + K, .., out), in place and without temporaries."""
    rows = x.reshape(-1, x.shape[-1])
    for k in range(1, stack.shape[0]):
        stack[k].view(-1, stack.shape[-1]).addmm_(rows, weight.stacked[k].t(), alpha=scaling)


def add_linear(y: Tensor, x: Tensor, weight: Tensor, scaling: float) -> Tensor:
    """Y + scaling * W x, overwriting y; the LoRA update without an update-sized temporary.

    Args:
        y: (.., out), contiguous.
        x: (.., rank).
        weight: (out, rank).
    """
    y = carrying_tangents(y, num_tangents(y, x, weight))
    plain_weight = split(weight)[0]
    target = y.stacked if isinstance(y, Dual) else y
    source = x.stacked if isinstance(x, Dual) else x
    if isinstance(y, Dual) and not isinstance(x, Dual):
        target = target[0]
    target.view(-1, target.shape[-1]).addmm_(source.reshape(-1, source.shape[-1]), plain_weight.t(), alpha=scaling)
    if isinstance(weight, Dual):
        assert isinstance(y, Dual)
        add_weight_tangents(y.stacked, split(x)[0], weight, scaling)
    return y


def scale_linear(y: Tensor, scale: Tensor) -> Tensor:
    """S * y, (s * y)' = s * y' + s' * y, overwriting y.

    Args:
        y: (.., out), contiguous.
        scale: (out,).
    """
    y = carrying_tangents(y, num_tangents(y, scale))
    plain_scale, tangents = split(scale)
    if not isinstance(y, Dual):
        return y.mul_(plain_scale)
    y.stacked[1:] *= plain_scale
    for k in range(y.num_tangents if tangents is not None else 0):
        y.stacked[1 + k].addcmul_(y.stacked[0], tangents[k])  # type: ignore[index]
    y.stacked[0] *= plain_scale
    return y


def layer_norm(module: Any, x: Tensor) -> Tensor:
    """Y = w * z + b,  y' = w * J x' + w' * z + b'; any of x, w and b may be a dual.

    J = (I - 11^T/n - zz^T/n) / s is symmetric, so its backward kernel applies it forward.
    """
    shape, eps = module.normalized_shape, module.eps
    (weight, weight_tangents), (bias, bias_tangents) = _split_or_none(module.weight), _split_or_none(module.bias)
    primal = split(x)[0]
    output, mean, rstd = torch.native_layer_norm(primal, shape, weight, bias, eps)
    stack = new_stack(output, num_tangents(x, module.weight, module.bias), output.shape)
    stack[0] = output
    if not isinstance(x, Dual):
        stack[1:].zero_()
    else:
        for k in range(1, stack.shape[0]):
            moved, _, _ = torch.ops.aten.native_layer_norm_backward(
                x.stacked[k], primal, shape, mean, rstd, None, None, (True, False, False)
            )
            torch.mul(moved, 1.0 if weight is None else weight, out=stack[k])
    if weight_tangents is not None:
        normed = torch.native_layer_norm(primal, shape, None, None, eps)[0]
        for k in range(1, stack.shape[0]):
            stack[k].addcmul_(normed, weight_tangents[k - 1])
    if bias_tangents is not None:
        stack[1:] += bias_tangents.view(len(bias_tangents), *(1,) * (output.dim() - len(shape)), *shape)
    return Dual(stack)


def _split_or_none(value: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if value is None else split(value)


# Transformers' RMS norms by class name: what is added to the weight.
RMS_NORMS: dict[str, float] = {
    "LlamaRMSNorm": 0.0,
    "MistralRMSNorm": 0.0,
    "Qwen2RMSNorm": 0.0,
    "Qwen3RMSNorm": 0.0,
    "GemmaRMSNorm": 1.0,
    "Gemma2RMSNorm": 1.0,
    "Gemma3RMSNorm": 1.0,
}


def rms_norm(module: Any, x: Dual) -> Tensor:
    """Y = w n with n = r x and r = 1 / sqrt(mean x^2 + e);  y' = w r (x' - n mean(n x')).

    In float32 at least, as transformers computes it; the weight is applied where each family applies it.
    """
    offset = RMS_NORMS[type(module).__name__]
    wide = torch.promote_types(x.dtype, torch.float32)
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    normed = x.stacked[0].to(wide)
    scale = torch.rsqrt(normed.square().mean(-1, keepdim=True).add_(epsilon))
    normed = normed * scale
    weight = module.weight if offset == 0 else module.weight.to(wide) + offset
    stack = torch.empty_like(x.stacked)
    stack[0] = normed * weight if offset else normed.to(x.dtype) * weight
    for k in range(1, stack.shape[0]):
        tangent = x.stacked[k].to(wide)
        along = (normed * tangent).mean(-1, keepdim=True)
        stack[k] = torch.addcmul(tangent, normed, along, value=-1).mul_(scale).mul_(weight)
    return Dual(stack)


def use_lean_operators(model: nn.Module, unpackers: Mapping[type, UnpackRows] | None = None) -> None:
    """Give the model's linear maps and norms their lean operators, in place.

    Subclasses keep their own forward: what they change is not known here. Without a tangent a module runs as
    before, but for packed ones, whose weight is unpacked in every pass, backward ones included.

    Args:
        model: changed once and for all; its values and results are not.
        unpackers: class of a module with a packed weight -> how to unpack it.
    """
    packed = dict(unpackers or {})
    modules: list[Any] = list(model.modules())
    for module in modules:
        if "_lean" in vars(module):
            continue
        if type(module) in packed:
            forward = packed_linear(module, packed[type(module)])
        elif type(module) is nn.Linear:
            forward = _of_duals(module, lambda m, x: linear(x, m.weight, m.bias))
        elif type(module) is nn.LayerNorm:
            forward = _of_duals(module, layer_norm)
        elif type(module).__name__ in RMS_NORMS:
            forward = _unless_perturbed(module, rms_norm)
        else:
            continue
        module.forward = forward
        vars(module)["_lean"] = True


def _of_duals(module: Any, operator: Operator) -> Callable[[Tensor], Tensor]:
    """The module's forward, with an operator of ours wherever a dual comes in or a parameter is one."""
    plain = module.forward

    @wraps(plain)
    def forward(input: Tensor) -> Tensor:
        if isinstance(input, Dual) or _is_perturbed(module):
            return operator(module, input)
        return plain(input)  # type: ignore[no-any-return]

    return forward


def _unless_perturbed(module: Any, operator: Operator) -> Callable[[Tensor], Tensor]:
    """As above for RMS norms; one that is perturbed itself takes PyTorch's derivative, operator by operator."""
    plain = module.forward

    @wraps(plain)
    def forward(input: Tensor) -> Tensor:
        if isinstance(input, Dual) and not _is_perturbed(module):
            return operator(module, input)
        return plain(input)  # type: ignore[no-any-return]

    return forward


def _is_perturbed(module: nn.Module) -> bool:
    return any(isinstance(parameter, Dual) for parameter in module._parameters.values())
