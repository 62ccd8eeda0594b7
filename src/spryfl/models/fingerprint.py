"""What tells one frozen base model from another: a hash of its weights' files."""

import hashlib
from pathlib import Path

from spryfl.config import ModelConfig
from spryfl.models.builtin import sha256_of
from spryfl.models.sources import find_model, local_folder


def base_fingerprint(config: ModelConfig) -> str:
    """The sha256 over the sha256 of each weights file, by name; the same wherever the same files lie.

    Args:
        config: of the model; weights of a hub model that are not stored here yet are fetched.
    """
    source = find_model(config.name)
    folder = Path(source.location) if source.gguf_file else local_folder(config, source)
    files = [folder / source.gguf_file] if source.gguf_file else sorted(folder.glob("*.safetensors"))
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name} {sha256_of(path)}\n".encode())
    return total.hexdigest()
