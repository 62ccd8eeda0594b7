"""What a model's frozen weights take, counted from its configuration alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from spryfl.config import TaskKind
from spryfl.models.classes import output_head
from spryfl.models.dry_run import shallower
from spryfl.models.heads import head_modules
from spryfl.models.layers import transformer_layers
from spryfl.models.quantization import kind_of, packed_bytes
from spryfl.models.skeleton import hollow_model

Precision = Literal["float32", "bfloat16", "int8", "nf4"]
PACKED: tuple[Precision, ...] = ("int8", "nf4")
MAPPED_BYTES = 64 * 1024
"""Linux maps so much of a file around a page that is touched (fault_around_bytes), if it is in the page cache."""


@dataclass(frozen=True)
class WeightBytes:
    """A model's frozen weights in one precision.

    Attributes:
        layers: of each repeated layer; a shared one counts once.
        stored: the same as they lie on disk.
        outside: of the rest: embeddings, norms, poolers.
        touched: the same with only those rows of the embeddings that a batch looks up.
        shared: whether layers share weights, which streaming would read again and again.
        mapped: whether embeddings stay on disk though the layers are in memory.
    """

    layers: tuple[int, ...]
    stored: tuple[int, ...]
    outside: int
    touched: int
    shared: bool
    mapped: bool = False

    @property
    def resident(self) -> int:
        """All layers in memory."""
        return sum(self.layers) + (self.touched if self.mapped else self.outside)

    @property
    def streamed(self) -> int:
        """The layer that computes, the one being fetched, and what lies outside, its embeddings mapped from disk."""
        fetched = max(self.stored) if self.stored != self.layers else sum(sorted(self.layers)[-2:-1])
        return max(self.layers) + fetched + self.touched

    @property
    def read_a_visit(self) -> int:
        """Read from disk when every layer is visited once."""
        return sum(self.stored)


def count_weights(
    config: Any,
    precision: Precision,
    dtype: torch.dtype,
    num_tokens: int,
    head: Sequence[str] | None = None,
    task: TaskKind = "classification",
    mappable: bool = True,
) -> WeightBytes:
    """Count a model's frozen weights.

    Args:
        config: transformers' own.
        dtype: of whatever is not packed.
        num_tokens: of a batch: at most so many rows of each embedding are looked up.
        head: modules trained in full, which count as adapter; the known classification heads by default.
        mappable: whether the model's file can be mapped: packed layers then leave embeddings there. GGUF files cannot.
    """
    model = hollow_model(shallower(config, config.get_text_config().num_hidden_layers), dtype, task)
    packed = precision if precision in PACKED else None
    excluded = [model.get_submodule(name) for name in (head_modules(model, (), task) if head is None else head)]
    seen = {parameter for module in excluded for parameter in module.parameters()}
    repeated, before = transformer_layers(model), set(seen)
    layers = tuple(_bytes_of(layer, packed, seen) for layer in repeated)
    stored = layers if packed else tuple(_bytes_of(layer, None, before, _stored_dtype(config)) for layer in repeated)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embedded = sum(e.weight.numel() * e.weight.element_size() for e in embeddings)
    vocabulary = output_head(model)
    outside = 0 if vocabulary is None else _bytes_of(model.get_submodule(vocabulary), None, seen)  # never packed
    outside += _bytes_of(model, packed, seen)
    touched = outside - embedded + sum(_touched(e, num_tokens) for e in embeddings)
    if vocabulary is not None and task == "language_model":  # a head that is a table is multiplied whole
        table = model.get_submodule(vocabulary).weight
        touched += sum(e.weight.numel() * e.weight.element_size() for e in embeddings if e.weight is table)
    calls = model.config.get_text_config().num_hidden_layers
    mapped = packed is not None and mappable
    return WeightBytes(layers, stored, outside, touched, shared=calls > len(layers), mapped=mapped)


def packed_precision(library_config: Any | None) -> Precision | None:
    """How a checkpoint's weights are packed; fp4 takes what nf4 does."""
    if library_config is None:
        return None
    kind = kind_of(library_config)
    return cast(Precision, "nf4" if kind == "fp4" else kind)


def _stored_dtype(config: Any) -> torch.dtype | None:
    """What a checkpoint says that it holds; None where it says nothing."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, found) if isinstance(found, str) else found


def _bytes_of(module: nn.Module, packed: str | None, seen: set[nn.Parameter], dtype: torch.dtype | None = None) -> int:
    """Bytes of a module's parameters not seen before, linear maps packed, or all in a type; they are then seen."""
    total = 0
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            if packed and type(owner) is nn.Linear and name == "weight":
                total += packed_bytes(parameter.shape, packed)
            else:
                total += parameter.numel() * (dtype or parameter.dtype).itemsize
    return total


def _touched(embedding: nn.Embedding, num_tokens: int) -> int:
    """Bytes of what is mapped around a batch's rows, at most."""
    row_bytes = embedding.embedding_dim * embedding.weight.element_size()
    return min(embedding.num_embeddings * row_bytes, num_tokens * -(-row_bytes // MAPPED_BYTES) * MAPPED_BYTES)
