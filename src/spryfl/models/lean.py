"""An adapted model made lean: operators of duals, chunks, and LoRA layers without temporaries.

LoRA's y = W x + s B A x is added in place, primal and tangents alike; PEFT's own forward makes three
hidden-sized tensors more.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from spryfl.forward_mode.feed_forward import chunk_feed_forward
from spryfl.forward_mode.operators import add_linear, use_lean_operators
from spryfl.forward_mode.packed import DenseWeight
from spryfl.forward_mode.rows import chunk_layers
from spryfl.models.layers import transformer_layers

LINEAR_KINDS = ("Linear", "Linear4bit", "Linear8bitLt")  # PEFT's classes around linear maps, dense and packed


def make_lean(model: nn.Module, dense_weights: Mapping[type, DenseWeight] | None = None) -> None:
    """Give a model all that makes a forward-mode pass lean, in place, once and for all; no result changes.

    Args:
        dense_weights: how to unpack modules with packed weights, by their class.
    """
    use_lean_operators(model, dense_weights)
    use_lean_lora(model)
    chunk_feed_forward(model)
    chunk_layers(transformer_layers(model))


def use_lean_lora(model: nn.Module) -> None:
    """Give the model's plain LoRA linear layers the lean forward, in place, for passes without a backward one.

    Variants (DoRA and its like), merged and disabled adapters, and several adapters at once keep PEFT's.
    """
    for module in model.modules():
        known = isinstance(module, LoraLayer) and type(module).__name__ in LINEAR_KINDS
        if known and not module.lora_variant and "forward" not in vars(module):
            module.forward = _lean(module)


def _lean(layer: Any) -> Callable[..., Tensor]:
    plain = layer.forward

    @wraps(plain)
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = layer.active_adapters
        if torch.is_grad_enabled() or layer.merged or layer.disable_adapters or len(active) != 1 or args or kwargs:
            return plain(x, *args, **kwargs)
        (name,) = active
        low = layer.lora_A[name](layer.lora_dropout[name](x.to(layer.lora_A[name].weight.dtype)))  # (.., rank)
        return add_linear(layer.base_layer(x), low, layer.lora_B[name].weight, layer.scaling[name])

    return forward
