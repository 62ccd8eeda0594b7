"""The repeated layers of a model, as checkpointing, chunks and streaming cut it."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from spryfl.errors import ModelError


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, as checkpointing cuts the model; outermost ones only.

    Those that transformers marks, or else (ALBERT) the members of the outermost module lists.
    """
    marked = _outermost(model, GradientCheckpointingLayer)
    found = marked or [layer for layers in _outermost(model, nn.ModuleList) for layer in layers.children()]
    if not found:
        raise ModelError("checkpointing = 'per_layer': this model has no layers transformers can checkpoint")
    return found


def _outermost(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Modules of a kind that lie in no other of that kind."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, kind) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found
