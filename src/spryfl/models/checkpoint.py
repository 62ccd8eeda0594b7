"""A folder of safetensors files, read tensor by tensor as memory-mapped views."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from spryfl.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model's folder, by name; every file's header and length have been checked.

    Attributes:
        files: the file that holds each tensor.
    """

    folder: Path
    files: Mapping[str, Path]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Find the folder's tensors.

        Raises:
            ModelError: no safetensors there, a file missing, corrupt or truncated.
        """
        found: dict[str, Path] = {}
        for path in _weight_files(folder):
            with open_weights(path) as handle:
                found.update(dict.fromkeys(handle.keys(), path))
        return cls(folder, found)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, as views of a private mapping of their files.

        Only pages that are touched become resident; they are given back when the last view of a file that
        this call returned is dropped. Each call maps anew, so that one reader's pages are not another's.
        """
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.files[name]].append(name)
        tensors = {}
        for path, wanted in by_file.items():
            with open_weights(path) as handle:
                tensors.update({name: handle.get_tensor(name) for name in wanted})
        return tensors

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Each tensor's shape and its dtype by safetensors' name (F32, BF16, U8, ..)."""
        found = {}
        for path in sorted(set(self.files.values())):
            with open_weights(path) as handle:
                for name in handle.keys():  # noqa: SIM118  # not a mapping
                    view = handle.get_slice(name)
                    found[name] = (tuple(view.get_shape()), str(view.get_dtype()))
        return found


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """One safetensors file; what is wrong with it is one line that names it."""
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ModelError(f"{path}: corrupt or truncated weights ({reason}): fetch or write this file again") from error
    except OSError as error:
        raise ModelError(f"{path}: weights cannot be read: {error.strerror or error}") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        raise ModelError(
            f"{folder}: no {SINGLE} there; only safetensors weights are loaded: convert it with "
            "model.save_pretrained(...)"
        )
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ModelError(f"{index}: not an index of weights: fetch or write this file again") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ModelError(f"{folder}: {len(missing)} of {len(names)} weight files are missing, such as {missing[0]}")
    return [folder / name for name in sorted(names)]
