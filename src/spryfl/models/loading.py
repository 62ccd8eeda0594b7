"""A name -> a frozen base model with an adapter, its tokenizer and its units."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from spryfl.config import AdapterConfig, ModelConfig, TaskKind
from spryfl.errors import ModelError
from spryfl.forward_mode.attention import ATTENTION_NAME, register_attention
from spryfl.forward_mode.packed import has_matrix_unit
from spryfl.memory.allocator import return_large_blocks
from spryfl.models.adapters import adapt, frozen_tensors, require_weights
from spryfl.models.assembly import hollow
from spryfl.models.building import BuiltModel, build, quantize_in_place
from spryfl.models.checkpoint import Checkpoint
from spryfl.models.classes import MODEL_CLASSES, quietly, require_class
from spryfl.models.heads import head_modules
from spryfl.models.lean import make_lean
from spryfl.models.quantization import unpackers
from spryfl.models.sources import Source, explained, find_model, local_folder
from spryfl.models.streaming import StreamedLayers
from spryfl.models.units import Unit, trainable_units


@dataclass(frozen=True)
class AdaptedModel:
    """A frozen base model with its adapter and head.

    Attributes:
        model: in evaluation mode; only the adapter and the head require gradients.
        tokenizer: with a padding token.
        units: what the server assigns, from the lowest layer up.
        dtype: what the base model computes in.
        streamed: the layers whose weights stay on disk; None if all are in memory.
    """

    model: PeftModel
    tokenizer: Any
    units: tuple[Unit, ...]
    dtype: torch.dtype
    streamed: StreamedLayers | None = None

    @property
    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def load_model(
    config: ModelConfig,
    adapter: AdapterConfig,
    num_labels: int,
    seed: int,
    *,
    low_precision: bool = True,
    task: TaskKind = "classification",
) -> AdaptedModel:
    """Load a base model for a task and put an adapter on it.

    Args:
        num_labels: classes; the width of a classification head.
        seed: of the head's and the adapter's initial values.
        low_precision: whether dtype "auto" may choose bfloat16; finite differences cannot bear it.

    Raises:
        ModelError: the model is missing, unsafe, unsuited, or offline and not stored locally.
    """
    require_weights(adapter, streamed=config.streamed)
    register_attention()
    source = find_model(config.name)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device, low_precision)
    with _seeded(seed), quietly(), explained(config):
        options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        if source.gguf_file:
            options["gguf_file"] = source.gguf_file
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
        built = _base_model(config, source, num_labels, dtype, device, task)
        _prepare(built.base, tokenizer)
        built.base.name_or_path = source.published
        with hollow(built.streamed_slots, device):
            model = adapt(built.base, adapter, built.head, task)
    for tensor in (*(p for p in model.parameters() if p.requires_grad), *frozen_tensors(model)):
        tensor.data = tensor.data.to(device, dtype)  # beside packed weights PEFT makes float32
    model.eval()
    make_lean(model, unpackers())
    streamed = StreamedLayers(built.layers, built.store) if built.store else None
    return AdaptedModel(model, tokenizer, trainable_units(model), dtype, streamed)


def _base_model(
    config: ModelConfig, source: Source, num_labels: int, dtype: torch.dtype, device: torch.device, task: TaskKind
) -> BuiltModel:
    """The frozen model: as transformers loads it, or built empty if it is quantized or streamed."""
    if source.gguf_file:
        if config.streamed:
            raise ModelError(
                f"model.streamed: {config.name} is a GGUF file, whose weights cannot be used as they lie there; "
                f"convert it first: spry quantize {config.name} OUT_DIR, or model.save_pretrained(OUT_DIR)"
            )
        packed = config.quantization != "none"
        if packed:
            return_large_blocks()  # as below
        # Packed bytes come from the weights as stored, not from what the model computes in.
        built = _whole(config, source, num_labels, torch.float32 if packed else dtype, task)
        require_class(built.base.config, config.name, task)
        if packed:
            quantize_in_place(built.base, config.quantization, built.head, device)
            _compute_in(built.base, dtype)
        built.base.to(device)
        return built
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    loaded = AutoConfig.from_pretrained(source.location, num_labels=num_labels, **options)
    require_class(loaded, config.name, task)
    quantized = config.quantization != "none" or getattr(loaded, "quantization_config", None) is not None
    if quantized or config.streamed:
        return_large_blocks()  # else what is read or unpacked stays resident; a dense model would only pay in time
        return build(config, Checkpoint.open(local_folder(config, source)), loaded, dtype, device, task)
    folder = Path(source.location)
    if any(folder.glob("*.safetensors")):
        Checkpoint.open(folder)  # names the file if one is corrupt
    built = _whole(config, source, num_labels, dtype, task)
    built.base.to(device)
    return built


def _whole(config: ModelConfig, source: Source, num_labels: int, dtype: torch.dtype, task: TaskKind) -> BuiltModel:
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    options |= {"gguf_file": source.gguf_file} if source.gguf_file else {"use_safetensors": True}
    base, info = MODEL_CLASSES[task].auto.from_pretrained(
        source.location,
        num_labels=num_labels,
        dtype=dtype,
        attn_implementation=ATTENTION_NAME,
        output_loading_info=True,
        **options,
    )
    return BuiltModel(base, head_modules(base, info["missing_keys"], task))


def _compute_in(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give what is not packed another type; buffers, such as rotary frequencies, keep theirs."""
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    base.config.dtype = dtype


def resolve_device(name: str) -> torch.device:
    """The device to compute on; "auto" takes an accelerator if there is one."""
    if name == "auto":
        # A CUDA build names its accelerator even where there is none: ask for availability first.
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"model.device = '{name}' cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def resolve_dtype(name: str, device: torch.device, low_precision: bool = True) -> torch.dtype:
    """What the frozen model computes in; "auto" is bfloat16 where the hardware multiplies it fast."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and has_matrix_unit()
    return torch.bfloat16 if fast and low_precision else torch.float32


def _prepare(base: PreTrainedModel, tokenizer: Any) -> None:
    """Padding and length known to model and tokenizer; no key-value cache and no list of hidden states.

    Both of these would keep every layer's; and a hidden state with tangents is overwritten by the layer it goes into.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base.config.pad_token_id = tokenizer.pad_token_id
    base.config.use_cache = False
    base.config.output_hidden_states = False
    # Tokenizers of decoders often state no limit, and what lies beyond the model's is an index error at best.
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if most is not None:  # RoBERTa's positions begin after the padding's
        most -= max((m.padding_idx + 1 for m in _position_embeddings(base) if m.padding_idx is not None), default=0)
    tokenizer.model_max_length = min(tokenizer.model_max_length, most or tokenizer.model_max_length)


def _position_embeddings(base: PreTrainedModel) -> Iterator[nn.Embedding]:
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            yield module


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial values from this seed, the caller's generator of the CPU untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
