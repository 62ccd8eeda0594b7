"""A base model built empty and filled tensor by tensor from a checkpoint, so that it is never there twice.

`from_pretrained` maps all files at once and keeps them mapped, so a model quantized on the way lies in memory
in full precision too (as pages of its files); and it knows no layers that stay on disk.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from spryfl.config import TaskKind
from spryfl.errors import ModelError
from spryfl.forward_mode.attention import ATTENTION_NAME, register_attention
from spryfl.models.checkpoint import Checkpoint
from spryfl.models.classes import MODEL_CLASSES
from spryfl.models.quantization import packed_parameter, quantize, replace_linear

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)"
    r"|SCB|weight_format)"
)


@dataclass(frozen=True)
class Slot:
    """One parameter or persistent buffer of a model, and the checkpoint's tensors for it.

    Attributes:
        module: that owns it; stays the same when an adapter is put around it.
        name: of the attribute.
        parts: what follows the module's path ("weight", "weight.absmax", "SCB", ..) -> the tensor's name.
        quantize: the kind to quantize to while loading; None leaves it as stored.
    """

    module: nn.Module
    name: str
    parts: Mapping[str, str]
    quantize: str | None = None

    def value(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The parameter or buffer made of tensors as stored; a view of them where nothing has to change."""
        parts = {part: tensors[name] for part, name in self.parts.items()}
        if self.quantize is not None:
            weight = parts["weight"].to(device)
            # GPT-2's Conv1D holds its weight transposed.
            parts = quantize(weight.T if self.module.source_cls is Conv1D else weight, self.quantize)
        if len(parts) > 1:
            return packed_parameter(parts, device)
        (tensor,) = parts.values()
        expected = getattr(self.module, self.name).shape
        if tensor.shape != expected:
            (stored,) = self.parts.values()
            raise ModelError(
                f"{stored} is {tuple(tensor.shape)} in the checkpoint, but its configuration, or the number of "
                f"labels in the data, makes it {tuple(expected)}"
            )
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        return tensor if self.name in self.module._buffers else nn.Parameter(tensor, requires_grad=False)

    def put(self, value: Tensor) -> None:
        """Make it the module's."""
        setattr(self.module, self.name, value)
        if hasattr(self.module, "quant_state"):  # bitsandbytes' Linear4bit keeps the state twice
            setattr(self.module, "quant_state", getattr(value, "quant_state", None))  # noqa: B010  # not nn.Module's


def empty_model(
    config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False, task: TaskKind = "classification"
) -> PreTrainedModel:
    """A task's model whose parameters are on the meta device and whose buffers are real."""
    register_attention()
    with init_empty_weights(include_buffers=False):
        made: PreTrainedModel = MODEL_CLASSES[task].auto.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=ATTENTION_NAME, trust_remote_code=trust_remote_code
        )
    return made


def tensors_of(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, dict[str, str]]:
    """Which of a checkpoint's tensors make each parameter or persistent buffer, by transformers' own renaming.

    Returns:
        path of the parameter -> what follows its module's path -> the tensor's name. What the model has no
        place for is left out.

    Raises:
        ModelError: transformers would merge or split tensors of this model while loading.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in stored:
        part = _PART.fullmatch(name)
        plain = f"{part['module']}.weight" if part else name
        path, converted = rename_source_key(plain, renamings, converters, model.base_model_prefix, state)
        if path not in state:
            continue
        if converted is not None:
            raise ModelError(
                f"{type(model).__name__}: transformers rearranges {name} while loading, so this model can only be "
                "loaded whole: leave model.quantization and model.streamed out"
            )
        found[path][part["part"] if part else path.rpartition(".")[2]] = name
    return {path: dict(parts) for path, parts in found.items()}


def slots(model: nn.Module, tensors: Mapping[str, Mapping[str, str]], kind: str | None) -> list[Slot]:
    """The places to fill, in the model's order; `kind` quantizes the modules that `replace_linear` put there."""
    found = []
    for path, parts in tensors.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        packed = kind if name == "weight" and hasattr(module, "source_cls") else None
        found.append(Slot(module, name, parts, packed))
    return found


def prepare(
    model: PreTrainedModel,
    tensors: Mapping[str, Mapping[str, str]],
    layers: Sequence[nn.Module],
    *,
    library_config: Any,
    kind: str | None,
) -> tuple[list[Slot], list[list[Slot]]]:
    """Put quantized modules where they belong, and sort all slots into those outside the layers and each layer's.

    Args:
        library_config: of the quantization; None for a model in full precision.
        kind: what to quantize to while loading; None if the checkpoint is as the model will be.
    """
    if library_config is not None:
        replace_linear(model, library_config, packed=kind is None)
    owner = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
    outside: list[Slot] = []
    inside: list[list[Slot]] = [[] for _ in layers]
    for slot in slots(model, tensors, kind):
        (outside if slot.module not in owner else inside[owner[slot.module]]).append(slot)
    return outside, inside


def fill(checkpoint: Checkpoint, places: Sequence[Slot], dtype: torch.dtype, device: torch.device) -> None:
    """Load the slots' tensors, one slot at a time where it is quantized on the way."""
    as_stored = [slot for slot in places if slot.quantize is None]
    tensors = checkpoint.read(name for slot in as_stored for name in slot.parts.values())
    for slot in as_stored:
        if _is_lookup(slot, device):
            slot.put(_lookup(slot, tensors[slot.parts["weight"]], dtype))
        else:
            slot.put(slot.value(tensors, dtype, device))
    for slot in places:
        if slot.quantize is not None:
            slot.put(slot.value(checkpoint.read(slot.parts.values()), dtype, device))


def _is_lookup(slot: Slot, device: torch.device) -> bool:
    """Whether only the rows looked up need to be in memory. Subclasses may compute with the table's dtype."""
    return type(slot.module) is nn.Embedding and slot.name == "weight" and device.type == "cpu"


def _lookup(slot: Slot, table: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """The table as it lies in the file; only what is looked up is cast."""
    if table.shape != slot.module.weight.shape:
        return slot.value({slot.parts["weight"]: table}, dtype, table.device)  # type: ignore[return-value]  # raises
    if table.dtype != dtype:
        slot.module.register_forward_hook(partial(_cast, dtype))
    return nn.Parameter(table, requires_grad=False)


def _cast(dtype: torch.dtype, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def initialize(model: PreTrainedModel, missing: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
    """Draw what the checkpoint lacks from the CPU's global generator, as transformers does: alike on any device."""
    for path in missing:
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        empty = torch.empty(getattr(module, name).shape, dtype=dtype)
        setattr(module, name, nn.Parameter(empty))
        module._is_hf_initialized = False
    held = set(missing)
    for path, parameter in model.named_parameters():
        parameter._is_hf_initialized = path not in held
    model.initialize_weights()
    for path in missing:
        owner, _, name = path.rpartition(".")
        drawn = model.get_parameter(path).detach()
        setattr(model.get_submodule(owner), name, nn.Parameter(drawn.to(device)))


@contextmanager
def hollow(places: Sequence[Slot], device: torch.device) -> Iterator[None]:
    """Stand-ins of no memory on the real device, while PEFT puts its layers on: it follows weights to theirs."""
    empty = [(slot, getattr(slot.module, slot.name)) for slot in places]
    for slot, meta in empty:
        meta.requires_grad_(False)
        zeros = torch.zeros((), dtype=meta.dtype, device=device).expand(meta.shape)
        setattr(slot.module, slot.name, _like(meta, zeros))
    try:
        yield
    finally:
        for slot, meta in empty:
            setattr(slot.module, slot.name, meta)


def _like(meta: Tensor, data: Tensor) -> Tensor:
    if not isinstance(meta, nn.Parameter):
        return data
    # bitsandbytes' parameters carry settings that PEFT reads.
    return type(meta)(data, requires_grad=False, **(vars(meta) if type(meta) is not nn.Parameter else {}))
