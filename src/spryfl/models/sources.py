"""Where a model's files are, and what its configuration says.

Weights come as safetensors (or a verified GGUF file), never as pickle, and no code from a repository
runs unless the user asks for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig

from spryfl.config import ModelConfig
from spryfl.errors import ModelError
from spryfl.models.builtin import PREFIX, locate
from spryfl.models.classes import quietly
from spryfl.models.shapes import PREFIX as SHAPE_PREFIX
from spryfl.models.shapes import shape_config

FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
"""Of a hub model that is quantized or streamed."""


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


def local_folder(config: ModelConfig, source: Source) -> Path:
    """The folder of a model's files; those of a hub model are fetched."""
    if Path(source.location).is_dir():
        return Path(source.location)
    return Path(
        snapshot_download(
            source.location, revision=config.revision, allow_patterns=list(FETCHED), ignore_patterns=["*/*"]
        )
    )


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
