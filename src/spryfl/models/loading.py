"""A name -> a frozen base model with an adapter, its tokenizer and its units.

Weights come as safetensors (or a verified GGUF file), never as pickle, and no code from a repository
runs unless the user asks for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from spryfl.config import AdapterConfig, ModelConfig, TaskKind
from spryfl.errors import ModelError
from spryfl.forward_mode.attention import ATTENTION_NAME, register_attention
from spryfl.models.adapters import adapt, frozen_tensors, require_weights
from spryfl.models.assembly import hollow
from spryfl.models.building import BuiltModel, build, quantize_in_place
from spryfl.models.builtin import PREFIX, locate
from spryfl.models.checkpoint import Checkpoint
from spryfl.models.classes import MODEL_CLASSES, quietly, require_class
from spryfl.models.heads import head_modules
from spryfl.models.lean import make_lean
from spryfl.models.quantization import dense_weights
from spryfl.models.shapes import PREFIX as SHAPE_PREFIX
from spryfl.models.shapes import shape_config
from spryfl.models.streaming import StreamedLayers
from spryfl.models.units import Unit, trainable_units

FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
"""Of a hub model that is quantized or streamed."""


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


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        location: a local folder or a hub id.
        published: the name written into the saved adapter, so that others can load it.
        gguf_file: the weights, where they are not safetensors.
    """

    location: str
    published: str
    gguf_file: str | None = None


def find_model(name: str) -> Source:
    """Resolve `builtin:NAME`, a local folder or a hub id to where its files are."""
    if name.startswith(PREFIX):
        folder, builtin = locate(name)
        gguf = builtin.weights if builtin.weights.endswith(".gguf") else None
        return Source(str(folder), builtin.hub_id, gguf)
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(str(path), name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model.name = '{name}': no such folder")
    return Source(name, name)


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
    make_lean(model, dense_weights())
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
        built = _whole(config, source, num_labels, dtype, task)
        require_class(built.base.config, config.name, task)
        if config.quantization != "none":
            quantize_in_place(built.base, config.quantization, built.head)
        built.base.to(device)
        return built
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    loaded = AutoConfig.from_pretrained(source.location, num_labels=num_labels, **options)
    require_class(loaded, config.name, task)
    quantized = config.quantization != "none" or getattr(loaded, "quantization_config", None) is not None
    if quantized or config.streamed:
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


def local_folder(config: ModelConfig, source: Source) -> Path:
    """The folder of a model's files; those of a hub model are fetched."""
    if Path(source.location).is_dir():
        return Path(source.location)
    return Path(
        snapshot_download(
            source.location, revision=config.revision, allow_patterns=list(FETCHED), ignore_patterns=["*/*"]
        )
    )


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
        fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
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
    tokenizer.model_max_length = min(tokenizer.model_max_length, most or tokenizer.model_max_length)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial values from this seed, the caller's generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def explained(config: ModelConfig) -> Iterator[None]:
    """Turn what the libraries raise for a wrong name, no network or unsafe files into one clear line."""
    try:
        yield
    except SafetensorError as error:
        raise ModelError(
            f"model.name = '{config.name}': a weights file is corrupt or truncated ({error}): fetch it again"
        ) from error
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            remedy = "its repository brings its own code: read it, then set model.trust_remote_code = true"
        elif "safetensors" in text:
            remedy = "only safetensors weights are loaded: convert it with model.save_pretrained(...)"
        elif Path(config.name).expanduser().is_dir():
            remedy = f"not a complete model folder: {text[:200]}"
        elif isinstance(error, OSError):
            remedy = (
                "not on the hub, or the hub cannot be reached: check the name, or give a local folder or builtin:minilm"
            )
        else:
            remedy = text[:300]
        raise ModelError(f"model.name = '{config.name}': {remedy}") from error


def skeleton(config: ModelConfig, num_labels: int = 2, task: TaskKind = "classification") -> PreTrainedModel:
    """The model with weights that take no memory: its configuration is all that is read.

    Every parameter is one zero seen through strides of 0, so a model of any size can be built, and run on
    a few tokens, on the smallest machine.
    """
    read = read_config(config, num_labels)
    require_class(read, config.name, task)
    return hollow_model(read, task=task)


def read_config(config: ModelConfig, num_labels: int = 2) -> Any:
    """A model's transformers configuration, and nothing else of it; `shape:NAME` needs no files at all."""
    if config.name.startswith(SHAPE_PREFIX):
        return shape_config(config.name, num_labels)
    source = find_model(config.name)
    with quietly(), explained(config):
        extra = {"gguf_file": source.gguf_file} if source.gguf_file else {}
        return AutoConfig.from_pretrained(
            source.location,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            num_labels=num_labels,
            **extra,
        )


def hollow_model(config: Any, dtype: torch.dtype | None = None, task: TaskKind = "classification") -> PreTrainedModel:
    """A task's model of a transformers configuration, all zeros, in next to no memory.

    Args:
        dtype: of its parameters; the configuration's own by default.
    """
    register_attention()
    config.use_cache = False
    config.pad_token_id = config.pad_token_id or 0
    with torch.device("meta"):
        model: PreTrainedModel = MODEL_CLASSES[task].auto.from_config(
            config, attn_implementation=ATTENTION_NAME, dtype=dtype
        )
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            hollow = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(hollow, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    model.tie_weights()
    return model.eval()
