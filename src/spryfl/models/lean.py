"""An adapted model made lean: operators of duals, chunks, and adapted layers without temporaries.

An adapter's update, LoRA's y = W x + s B A x or another's, is added in place, primal and tangents alike; PEFT's
own forward makes three hidden-sized tensors more.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tinylora.layer import TinyLoraLayer
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn

from spryfl.forward_mode.dual import split
from spryfl.forward_mode.feed_forward import chunk_feed_forward
from spryfl.forward_mode.operators import add_linear, linear, scale_linear, use_lean_operators
from spryfl.forward_mode.packed import UnpackRows
from spryfl.forward_mode.rows import chunk_layers
from spryfl.models.layers import transformer_layers

LINEAR_KINDS = ("Linear", "Linear4bit", "Linear8bitLt")  # PEFT's classes around linear maps, dense and packed
Update = tuple[Tensor, Tensor, float]
"""(low, weight, scaling) of an update scaling * weight low: low (.., rank), weight (out, rank)."""
Forward = Callable[[Any, str, Tensor], Tensor]
"""(layer, adapter's name, x) -> its output."""


def make_lean(model: nn.Module, unpackers: Mapping[type, UnpackRows] | None = None) -> None:
    """Give a model all that makes a forward-mode pass lean, in place, once and for all; no result changes.

    Args:
        unpackers: how to unpack modules with packed weights, by their class.
    """
    use_lean_operators(model, unpackers)
    use_lean_adapters(model)
    chunk_feed_forward(model)
    chunk_layers(transformer_layers(model))


def use_lean_adapters(model: nn.Module) -> None:
    """Give the model's adapted linear layers the lean forward, in place, for passes without a backward one.

    Variants of LoRA but DoRA, merged and disabled adapters, and several adapters at once keep PEFT's.
    """
    for module in model.modules():
        forward = next((forward for fits, forward in FORWARDS if fits(module)), None)
        if forward is not None and type(module).__name__ in LINEAR_KINDS and "forward" not in vars(module):
            module.forward = _lean(module, forward)


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


def _updated(update: Callable[[Any, str, Tensor], Update]) -> Forward:
    """W x and an update."""

    def forward(layer: Any, name: str, x: Tensor) -> Tensor:
        low, weight, scaling = update(layer, name, x)
        return add_linear(layer.base_layer(x), low, weight, scaling)

    return forward


def _dora(layer: Any, name: str, x: Tensor) -> Tensor:
    """(m / |V|) (W x + s B A x) + b: the length of V's rows without V, which is as large as W.

    |V|^2 = |W|^2 + 2 s B . (W A^T) + s^2 B . (B A A^T), row by row; a constant, whatever tangents A and B have. Dropout
    lies on A's input; PEFT's own DoRA has none where its layer as a whole is not in training, as here.
    """
    low, weight, scaling = _lora(layer, name, x)
    base, magnitude = layer.base_layer, layer.lora_magnitude_vector[name].weight
    frozen = base.weight.T if layer.fan_in_fan_out else base.weight  # GPT-2's Conv1D holds (in, out)
    with torch.no_grad():
        a, b = split(layer.lora_A[name].weight)[0], split(weight)[0]
        wide = torch.promote_types(a.dtype, torch.float32)
        squares = torch.linalg.vector_norm(frozen, dim=1, dtype=wide).square()
        squares += 2 * scaling * (b * (frozen @ a.T)).sum(1) + scaling**2 * (b * (b @ (a @ a.T))).sum(1)
        lengths = squares.sqrt().to(a.dtype)
    if torch.is_grad_enabled():
        moved = nn.functional.linear(x, frozen) + scaling * nn.functional.linear(low, weight)
        return magnitude / lengths * moved + (0 if base.bias is None else base.bias)
    scaled = scale_linear(add_linear(linear(x, frozen), low, weight, scaling), magnitude / lengths)
    return scaled if base.bias is None else scaled.add_(base.bias)


def _ia3(layer: Any, name: str, x: Tensor) -> Tensor:
    scale = layer.ia3_l[name].flatten()
    return layer.base_layer(x * scale) if layer.is_feedforward else scale_linear(layer.base_layer(x), scale)


def _is_plain(kind: type) -> Callable[[Any], bool]:
    return lambda layer: isinstance(layer, kind) and not getattr(layer, "lora_variant", None)


def _is_dora(layer: Any) -> bool:
    return isinstance(layer, LoraLayer) and bool(getattr(layer, "lora_magnitude_vector", None))


FORWARDS: tuple[tuple[Callable[[Any], bool], Forward], ...] = (
    (_is_dora, _dora),
    (_is_plain(LoraLayer), _updated(_lora)),
    (_is_plain(VeraLayer), _updated(_vera)),
    (_is_plain(TinyLoraLayer), _updated(_tinylora)),
    (_is_plain(IA3Layer), _ia3),
)
"""Which layers each lean forward is for."""


def _lean(layer: Any, lean: Forward) -> Callable[..., Tensor]:
    plain = layer.forward

    @wraps(plain)
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = layer.active_adapters
        backward = torch.is_grad_enabled() and lean is not _dora
        if backward or layer.merged or layer.disable_adapters or len(active) != 1 or args or kwargs:
            return plain(x, *args, **kwargs)
        return lean(layer, active[0], x)

    return forward
