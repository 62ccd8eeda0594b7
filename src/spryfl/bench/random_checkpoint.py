"""Checkpoints of random weights in the shape of models too large to be at hand: memory does not depend on values.

One layer is drawn, and quantized, once; its bytes are written for every layer, as bitsandbytes packs some
tens of millions of weights a second.
"""

import hashlib
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from spryfl.errors import ModelError
from spryfl.models.assembly import empty_model
from spryfl.models.heads import head_modules
from spryfl.models.layers import transformer_layers
from spryfl.models.quantization import library_config, packed_bytes
from spryfl.models.quantizing import METADATA_BYTES, as_written
from spryfl.models.shards import ShardWriter, new_folder

Precision = Literal["float32", "bfloat16", "nf4", "int8"]
MARK = "spry_random.json"
"""Says what a folder of random weights was made from."""


def write_random_checkpoint(config: Any, folder: Path, precision: Precision, seed: int) -> Path:
    """Write a sequence classifier of random weights, without its head, that transformers and `load_model` open.

    At most one tensor is in memory in full precision, beside one layer as it is written and one shard. With nf4
    and int8, what is not quantized is bfloat16. A folder that is there already, made from the same arguments, is
    left as it is.

    Args:
        config: transformers' configuration; its number of layers decides what is written.
        folder: created, its parents too.
        seed: of the one layer and of the embeddings.

    Raises:
        ModelError: the folder holds something else, or its disk is too small.
    """
    mark = _mark(config, precision, seed)
    if folder.exists() and any(folder.iterdir()):
        if (folder / MARK).is_file() and (folder / MARK).read_text(encoding="utf-8") == mark:
            return folder
        raise ModelError(f"{folder}: holds other weights than those asked for; remove it or name another folder")
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model = empty_model(config, dtype)
    head = head_modules(model, [])
    with new_folder(folder, _needed_bytes(model, precision)) as draft:
        writer = ShardWriter(draft)
        for name, tensor in _tensors(model, head, precision, seed):
            writer.add(name, tensor)
        writer.finish()
        saved = type(config).from_dict(config.to_dict())
        saved.dtype = dtype
        saved.architectures = [type(model).__name__]
        if precision in ("nf4", "int8"):
            saved.quantization_config = library_config(precision, [*head, "lm_head"])
        saved.save_pretrained(draft)
        _tokenizer().save_pretrained(draft)
        (draft / MARK).write_text(mark, encoding="utf-8")
    return folder


def _tensors(model: PreTrainedModel, head: list[str], precision: Precision, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Names and values of everything but the head: what lies outside the layers, then layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    deviation = getattr(model.config, "initializer_range", 0.02)
    layers = transformer_layers(model)
    paths = {module: path for path, module in model.named_modules()}
    inside = {module for layer in layers for module in layer.modules()}
    for path, module in model.named_modules():
        if module not in inside and path.split(".")[0] not in head:
            yield from _drawn(module, path, precision, deviation, generator)
    first: list[tuple[str, Tensor]] = []
    for layer in layers:
        if layer is layers[0]:
            for path, module in layer.named_modules():
                first += _drawn(module, path, precision, deviation, generator)
        # Each file needs tensors of its own: safetensors refuses one under two names.
        yield from ((f"{paths[layer]}.{name}", tensor.clone()) for name, tensor in first)


def _drawn(
    module: nn.Module, path: str, precision: Precision, deviation: float, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters, as they are written."""
    linear = type(module) if type(module) in (nn.Linear, Conv1D) and precision in ("nf4", "int8") else None
    for name, parameter in module.named_parameters(recurse=False):
        value = torch.empty(parameter.shape, dtype=parameter.dtype)
        if parameter.dim() > 1:
            value.normal_(0, deviation, generator=generator)
        else:
            value.fill_(float(name == "weight"))  # of a norm; biases are zero
        yield from as_written(f"{path}.{name}", value, linear if name == "weight" else None, precision)


def _needed_bytes(model: PreTrainedModel, precision: Precision) -> int:
    packed = {m.weight for m in model.modules() if type(m) in (nn.Linear, Conv1D) and precision in ("nf4", "int8")}
    return sum(
        packed_bytes(p.shape, precision) + METADATA_BYTES if p in packed else prod(p.shape) * p.element_size()
        for p in model.parameters()
    )


def _mark(config: Any, precision: Precision, seed: int) -> str:
    described = {k: v for k, v in config.to_diff_dict().items() if k not in ("transformers_version", "dtype")}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
    return json.dumps({"config_sha256": digest, "precision": precision, "seed": seed}) + "\n"


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows nothing, so that the folder is complete."""
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
