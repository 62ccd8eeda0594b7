"""LoRA layers without temporaries: y = W x + s B A x added in place, primal and tangent alike.

PEFT's own forward makes three hidden-sized tensors more, and under forward mode PyTorch adds a primal that
has a tangent to one that has none through a slow path that works in float32.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from spryfl.forward_mode.dual import pack, unpack


def use_lean_lora(model: nn.Module) -> None:
    """Give the model's plain LoRA linear layers the lean forward, in place, for passes without a backward one.

    Variants (DoRA and its like), merged and disabled adapters, and several adapters at once keep PEFT's.
    """
    for module in model.modules():
        if type(module) is LoraLinear and not module.lora_variant and "forward" not in vars(module):
            module.forward = _lean(module)


def _lean(layer: Any) -> Callable[..., Tensor]:
    plain = layer.forward

    @wraps(plain)
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = layer.active_adapters
        if torch.is_grad_enabled() or layer.merged or layer.disable_adapters or len(active) != 1 or args or kwargs:
            return plain(x, *args, **kwargs)
        (name,) = active
        weight = layer.lora_A[name].weight
        low = layer.lora_A[name](layer.lora_dropout[name](x.to(weight.dtype)))  # (.., rank)
        return add_scaled(layer.base_layer(x), layer.lora_B[name](low), layer.scaling[name])

    return forward


def add_scaled(result: Tensor, update: Tensor, scaling: float) -> Tensor:
    """Result + scaling * update, overwriting both; either may carry a tangent."""
    primal, tangent = unpack(result)
    update_primal, update_tangent = unpack(update)
    primal.add_(update_primal, alpha=scaling)
    if update_tangent is not None:
        if tangent is None:
            tangent = update_tangent.mul_(scaling).to(primal.dtype)
        else:
            tangent.add_(update_tangent, alpha=scaling)
    return pack(primal, tangent)
