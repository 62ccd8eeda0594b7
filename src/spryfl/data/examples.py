"""Tokenized rows, and what they are in a batch."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Batch = dict[str, Tensor]
"""Model inputs and "labels", each (rows, ..), on the model's device."""


@dataclass(frozen=True)
class Examples:
    """Tokenized rows; they are padded only when batched.

    Attributes:
        encodings: model inputs of one row each, unpadded.
        labels: (rows, ..) what the task predicts: a class number; where an answer begins; where one begins and ends.
        sources: (rows,) the number of the dataset's row that each was made from, in order: long ones make several.
            None where each made one.
        groups: (rows,) the number of what each row belongs to, of which metrics count wholes; None where to nothing.
        num_truncated: how many rows were longer than `data.max_tokens`, so that not all of them is read.
    """

    encodings: list[dict[str, list[int]]]
    labels: np.ndarray
    sources: np.ndarray | None = None
    groups: np.ndarray | None = None
    num_truncated: int = 0

    def __len__(self) -> int:
        return len(self.encodings)

    def made_from(self, sources: np.ndarray) -> np.ndarray:
        """The rows made from some rows of the dataset."""
        return sources if self.sources is None else np.flatnonzero(np.isin(self.sources, sources))


def inputs_of(batch: Batch) -> Batch:
    """What the model is called with: all but the labels."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def numbered(things: Iterable[Hashable]) -> np.ndarray:
    """(things,) a number for each, the same for equal ones, from 0 as they first appear."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(thing, len(known)) for thing in things], dtype=np.int64)
