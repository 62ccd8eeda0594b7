"""Writing a model folder: shard by shard into a temporary sibling, under its own name only when complete."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from spryfl.errors import ModelError, is_full_disk
from spryfl.files import force_to_disk
from spryfl.models.checkpoint import INDEX, SINGLE

SHARD_BYTES = 256 * 2**20


class ShardWriter:
    """Collects tensors and writes them in files of at most `shard_bytes`; a larger tensor has its own."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is written, and let go of, when its shard is full."""
        tensor = tensor.detach().cpu().contiguous()
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left and, if there are several files, their index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            (self._folder / _draft(0)).rename(self._folder / SINGLE)
            return
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            (self._folder / _draft(i)).rename(self._folder / name)
        where = {tensor: names[i] for i, tensors in enumerate(self._shards) for tensor in tensors}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": where}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        save_file(self._pending, self._folder / _draft(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


def _draft(index: int) -> str:
    return f"shard-{index:05}.safetensors"


@contextmanager
def new_folder(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its name at the end; removed if anything goes wrong before.

    Args:
        needed_bytes: about what will be written.

    Raises:
        ModelError: the target is there already, or its disk has not, or no longer, the space.
    """
    target = target.expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ModelError(f"{target}: exists already; name another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < needed_bytes:
        raise ModelError(_no_space(target, needed_bytes))
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        draft.chmod(0o755)
        yield draft
        for file in draft.iterdir():
            force_to_disk(file)
        draft.replace(target)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if is_full_disk(error):
            raise ModelError(_no_space(target, needed_bytes)) from error
        raise


def _no_space(target: Path, needed: int) -> str:
    free = shutil.disk_usage(target.parent).free
    return (
        f"{target}: not enough space on its disk: about {needed:,} bytes are needed, {free:,} are free; nothing was "
        "left behind. Free some, or name a folder on another disk"
    )
