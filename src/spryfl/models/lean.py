"""An adapted model made lean: operators of duals, chunks, and adapted layers without temporaries.

An adapter's update, LoRA's y = W x + s B A x or another's, is added in place, primal and tangents alike; PEFT's
own forward makes three hidden-sized tensors more.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tinylora.layer import TinyLoraLayer
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn

from spryfl.forward_mode.feed_forward import chunk_feed_forward
from spryfl.forward_mode.operators import add_linear, linear, use_lean_operators
from spryfl.forward_mode.packed import DenseWeight
from spryfl.forward_mode.rows import chunk_layers
from spryfl.models.layers import transformer_layers

LINEAR_KINDS = ("Linear", "Linear4bit", "Linear8bitLt")  # PEFT's classes around linear maps, dense and packed
Update = tuple[Tensor, Tensor, float]
"""(low, weight, scaling) of an update scaling * weight low: low (.., rank), weight (out, rank)."""


def make_lean(model: nn.Module, dense_weights: Mapping[type, DenseWeight] | None = None) -> None:
    """Give a model all that makes a forward-mode pass lean, in place, once and for all; no result changes.

    Args:
        dense_weights: how to unpack modules with packed weights, by their class.
    """
    use_lean_operators(model, dense_weights)
    use_lean_adapters(model)
    chunk_feed_forward(model)
    chunk_layers(transformer_layers(model))


def use_lean_adapters(model: nn.Module) -> None:
    """Give the model's adapted linear layers the lean forward, in place, for passes without a backward one.

    Variants (DoRA and its like), merged and disabled adapters, and several adapters at once keep PEFT's.
    """
    for module in model.modules():
        update = next((update for kind, update in UPDATES.items() if isinstance(module, kind)), None)
        plain = type(module).__name__ in LINEAR_KINDS and not getattr(module, "lora_variant", None)
        if update is not None and plain and "forward" not in vars(module):
            module.forward = _lean(module, update)


def _lora(layer: Any, name: str, x: Tensor) -> Update:
    low = layer.lora_A[name](layer.lora_dropout[name](x.to(layer.lora_A[name].weight.dtype)))
    return low, layer.lora_B[name].weight, layer.scaling[name]


def _vera(layer: Any, name: str, x: Tensor) -> Update:
    """B * b as one weight: its tangents are smaller than an update's where texts are longer than the rank."""
    a, b = layer.vera_A[name][:, : layer.in_features], layer.vera_B[name][: layer.out_features]
    low = layer.vera_lambda_d[name] * linear(layer.vera_dropout[name](x.to(a.dtype)), a)
    return low, layer.vera_lambda_b[name].unsqueeze(-1) * b, 1.0


def _tinylora(layer: Any, name: str, x: Tensor) -> Update:
    a, projection = layer.tinylora_A[name], layer.tinylora_P[name]  # (rank, in), (values, rank, rank)
    values = layer.tinylora_v[name][layer._tinylora_v_key[name]]
    between = linear(values, projection.flatten(1).T).view(projection.shape[1:])
    low = linear(linear(layer.tinylora_dropout[name](x.to(a.dtype)), a), between)
    return low, layer.tinylora_B[name], 1.0


UPDATES: dict[type, Callable[[Any, str, Tensor], Update]] = {
    LoraLayer: _lora,
    VeraLayer: _vera,
    TinyLoraLayer: _tinylora,
}


def _lean(layer: Any, update: Callable[[Any, str, Tensor], Update]) -> Callable[..., Tensor]:
    plain = layer.forward

    @wraps(plain)
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = layer.active_adapters
        if torch.is_grad_enabled() or layer.merged or layer.disable_adapters or len(active) != 1 or args or kwargs:
            return plain(x, *args, **kwargs)
        low, weight, scaling = update(layer, active[0], x)
        return add_linear(layer.base_layer(x), low, weight, scaling)

    return forward
