"""Base models that are quantized or streamed: built empty, then filled from a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spryfl.config import ModelConfig, TaskKind
from spryfl.errors import ModelError
from spryfl.models.assembly import Slot, empty_model, fill, initialize, prepare, tensors_of
from spryfl.models.checkpoint import Checkpoint
from spryfl.models.classes import output_head
from spryfl.models.heads import head_modules
from spryfl.models.layers import transformer_layers
from spryfl.models.quantization import (
    kind_of,
    library_config,
    packed_parameter,
    quantize,
    replace_linear,
    stored_config,
)
from spryfl.models.streaming import LayerStore


@dataclass(frozen=True)
class BuiltModel:
    """A base model without its adapter.

    Attributes:
        head: modules to train in full.
        layers: the repeated layers, if their weights stay on disk; they are on the meta device now.
        store: where those weights are.
    """

    base: PreTrainedModel
    head: list[str]
    layers: Sequence[nn.Module] = ()
    store: LayerStore | None = None

    @property
    def streamed_slots(self) -> list[Slot]:
        return [slot for slots in self.store.slots for slot in slots] if self.store else []


def build(
    config: ModelConfig,
    checkpoint: Checkpoint,
    model_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    task: TaskKind = "classification",
) -> BuiltModel:
    """Build a task's model whose weights never lie in memory in full precision all at once.

    Args:
        model_config: transformers' own, with the number of labels.
        dtype: what the model computes in.

    Raises:
        ModelError: the settings contradict the checkpoint, it lacks a layer's weights, or the model's layers
            cannot be streamed.
    """
    stored = stored_config(model_config, config.name)
    check_precision(config, None if stored is None else kind_of(stored))
    kind = config.quantization if stored is None and config.quantization != "none" else None
    if kind is not None and config.streamed:
        raise ModelError(
            f"model.streamed: weights pass through as they lie on disk, and {config.name} is not quantized there; "
            f"quantize it first: spry quantize {config.name} OUT_DIR --precision {kind}"
        )
    base = empty_model(model_config, dtype, trust_remote_code=config.trust_remote_code, task=task)
    tensors = tensors_of(base, checkpoint.files)
    # What is tied to a tensor that is there need not be there itself.
    there = {*tensors, *(path for path, source in base.all_tied_weights_keys.items() if source in tensors)}
    missing = [path for path, _ in base.named_parameters() if path not in there]
    layers = transformer_layers(base)
    _check_layers(config, base, layers, missing)
    head = head_modules(base, missing, task)
    wanted = stored if kind is None else library_config(kind, head)
    outside, inside = prepare(base, tensors, layers, library_config=wanted, kind=kind)
    # All at once: where pages are mapped twice, the kernel counts them twice.
    fill(checkpoint, outside if config.streamed else [*outside, *chain(*inside)], dtype, device)
    _tie(base, dtype, task)
    initialize(base, missing, dtype, device)
    _move_buffers(base, device)
    if config.streamed:
        return BuiltModel(base, head, layers, LayerStore(checkpoint, inside, dtype, device))
    return BuiltModel(base, head)


def check_precision(config: ModelConfig, stored: str | None) -> None:
    """Raise ModelError if a checkpoint quantized as `stored` is asked for in another precision."""
    if stored is not None and config.quantization not in ("none", stored):
        raise ModelError(
            f"model.quantization = '{config.quantization}': {config.name} is stored as {stored}; leave the setting "
            "out to use it so, or name the model it was made from"
        )


def quantize_in_place(base: PreTrainedModel, kind: str, head: Sequence[str], device: torch.device) -> None:
    """Quantize a loaded model's linear maps one by one, each freed before the next; the head stays.

    Args:
        device: of the packed weights, whose scales `module.to` would leave behind.
    """
    linear = {path: module for path, module in base.named_modules() if type(module) in (nn.Linear, Conv1D)}
    replace_linear(base, library_config(kind, head), packed=False)
    for path in list(linear):
        old, new = linear.pop(path), base.get_submodule(path)
        if new is old:
            continue
        weight = old.weight.T if isinstance(old, Conv1D) else old.weight
        new.weight = packed_parameter(quantize(weight, kind), device)
        new.quant_state = getattr(new.weight, "quant_state", None)
        new.bias = None if old.bias is None else nn.Parameter(old.bias.data, requires_grad=False)


def _check_layers(
    config: ModelConfig, base: PreTrainedModel, layers: Sequence[nn.Module], missing: Sequence[str]
) -> None:
    """Layers are neither trained in full, as whatever else a checkpoint lacks is, nor streamed to no avail."""
    frozen = {parameter for layer in layers for parameter in layer.parameters()}
    lacking = [path for path in missing if base.get_parameter(path) in frozen]
    if lacking:
        raise ModelError(
            f"model.name = '{config.name}': not a complete model folder: its files lack {len(lacking)} tensors of "
            f"its layers, such as {lacking[0]}"
        )
    depth = getattr(base.config, "num_hidden_layers", len(layers))
    if config.streamed and len(layers) < depth:
        raise ModelError(
            f"model.streamed: {config.name} shares {len(layers)} set of weights among its {depth} layers, which would "
            f"be read {depth} times a pass to save nothing: leave the setting out"
        )


def _tie(base: PreTrainedModel, dtype: torch.dtype, task: TaskKind) -> None:
    """Make one of what the model shares, and let a head that is an embedding table too bear how the table lies.

    A language model multiplies with all of it at every step, so it is cast once; others ask for a few of its rows.
    """
    base.tie_weights()
    path = output_head(base)
    head: Any = None if path is None else base.get_submodule(path)
    if head is None or head.weight.dtype == dtype:
        return
    if task == "language_model":
        head.weight = nn.Parameter(head.weight.to(dtype), requires_grad=False)
    else:
        head.forward = lambda x: nn.functional.linear(x, head.weight.to(x.dtype), head.bias)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
