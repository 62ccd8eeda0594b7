"""Tokenized rows, and what they are in a batch."""

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
        labels: (rows,) class numbers.
    """

    encodings: list[dict[str, list[int]]]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.encodings)
