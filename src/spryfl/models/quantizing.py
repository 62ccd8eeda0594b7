"""A checkpoint quantized on disk, tensor by tensor, in the format transformers writes for bitsandbytes."""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from spryfl.config import ModelConfig
from spryfl.errors import ModelError
from spryfl.models.assembly import empty_model, tensors_of
from spryfl.models.checkpoint import Checkpoint
from spryfl.models.classes import quietly
from spryfl.models.heads import head_modules
from spryfl.models.quantization import library_config, packed_bytes, quantize, stored_config
from spryfl.models.shards import ShardWriter, new_folder
from spryfl.models.sources import explained, find_model, local_folder

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
"""What is copied beside the weights: the tokenizer, and code the model brings."""

METADATA_BYTES = 4096
"""Of a quantized weight: its tables, and its entries in the file's header."""

Progress = Callable[[int, int], None]
"""Told bytes read so far and in all."""


@dataclass(frozen=True)
class _Tensors:
    """A model's tensors wherever they are.

    Attributes:
        shapes: by name, with the bytes of an element.
        read: one of them.
    """

    shapes: dict[str, tuple[tuple[int, ...], int]]
    read: Callable[[str], Tensor]

    def num_bytes(self, name: str) -> int:
        shape, size = self.shapes[name]
        return prod(shape) * size


def quantize_checkpoint(source: ModelConfig, target: Path, kind: str, on_progress: Progress | None = None) -> None:
    """Write a quantized copy of a model that transformers and `load_model` open as it is.

    Linear maps are quantized, the head and `lm_head` are not; everything else is kept as stored. Only one tensor
    of the source is in memory at a time, and one shard of the copy. A GGUF file is unpacked whole first.

    Args:
        source: name, revision and whether to run its code.
        target: a new folder; it appears when it is complete.
        kind: nf4 or int8.

    Raises:
        ModelError: the source is missing, corrupt or quantized already, or the target's disk is too small.
    """
    found = find_model(source.name)
    with quietly(), explained(source):
        if found.gguf_file:
            folder, gguf = Path(found.location), {"gguf_file": found.gguf_file}
        else:
            folder, gguf = local_folder(source, found), {}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code, **gguf)
        if not gguf and stored_config(config, source.name) is not None:
            raise ModelError(f"{source.name}: is quantized already")
        tensors = _unpacked(folder, found.gguf_file) if found.gguf_file else _stored(folder)
        linear, skip = _linear_weights(config, tensors.shapes, source.trust_remote_code)
        needed = _needed_bytes(tensors, linear, kind)
        with new_folder(target, needed) as draft:
            writer = ShardWriter(draft)
            _quantize_all(tensors, linear, kind, writer, on_progress or _silent)
            writer.finish()
            if gguf:
                AutoTokenizer.from_pretrained(folder, **gguf).save_pretrained(draft)
            else:
                _copy_small_files(folder, draft)
            config.quantization_config = library_config(kind, skip)
            config.save_pretrained(draft)


def _quantize_all(
    tensors: _Tensors, linear: dict[str, type], kind: str, writer: ShardWriter, on_progress: Progress
) -> None:
    total = sum(tensors.num_bytes(name) for name in tensors.shapes)
    done = 0
    for name in sorted(tensors.shapes, key=natural):
        for written, tensor in as_written(name, tensors.read(name), linear.get(name), kind):
            writer.add(written, tensor)
        done += tensors.num_bytes(name)
        on_progress(done, total)


def as_written(name: str, tensor: Tensor, linear: type | None, kind: str) -> Iterator[tuple[str, Tensor]]:
    """A tensor as it goes into a quantized folder: packed if it is the weight of a module of class `linear`."""
    if linear is None:
        yield name, tensor
        return
    module = name.removesuffix("weight")
    for part, value in quantize(tensor.T if linear is Conv1D else tensor, kind).items():
        yield module + part, value


def _linear_weights(config: Any, names: Iterable[str], trust_remote_code: bool) -> tuple[dict[str, type], list[str]]:
    """The tensors to quantize, with the class of their module; and the modules transformers must leave alone."""
    model = empty_model(config, torch.float32, trust_remote_code=trust_remote_code)
    tensors = tensors_of(model, names)
    missing = [path for path, _ in model.named_parameters() if path not in tensors]
    head = head_modules(model, missing)
    linear: dict[str, type] = {}
    used: set[str] = set()
    for path, parts in tensors.items():
        used.update(parts.values())
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if name == "weight" and type(module) in (nn.Linear, Conv1D) and not _in(owner, head):
            linear[parts["weight"]] = type(module)
    # Heads of other tasks that the checkpoint brings: a model that has them must not look for packed ones.
    others = {name.removesuffix(".weight") for name in names if name not in used and name.endswith(".weight")}
    return linear, sorted({*head, "lm_head", *others})


def _in(path: str, modules: Iterable[str]) -> bool:
    """Whether a module lies in one of these, as transformers reads such a list."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(path, list(modules))


def _stored(folder: Path) -> _Tensors:
    checkpoint = Checkpoint.open(folder)
    shapes = {name: (shape, element_bytes(dtype)) for name, (shape, dtype) in checkpoint.shapes().items()}
    return _Tensors(shapes, lambda name: checkpoint.read([name])[name])


def _unpacked(folder: Path, gguf_file: str) -> _Tensors:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, gguf_file=gguf_file, output_loading_info=True
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in info["missing_keys"]}
    return _Tensors({name: (tuple(t.shape), t.element_size()) for name, t in state.items()}, state.__getitem__)


def _needed_bytes(tensors: _Tensors, linear: Iterable[str], kind: str) -> int:
    packed = set(linear)
    return sum(
        packed_bytes(shape, kind) + METADATA_BYTES if name in packed else tensors.num_bytes(name)
        for name, (shape, _) in tensors.shapes.items()
    )


def _copy_small_files(source: Path, target: Path) -> None:
    for pattern in COPIED:
        for path in source.glob(pattern):
            if path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, target / path.name)


def element_bytes(dtype: str) -> int:
    """Bytes of an element, by safetensors' name of its dtype."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1  # BOOL


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]


def _silent(done: int, total: int) -> None:
    """Tells nobody."""
