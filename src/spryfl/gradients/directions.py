"""Seeded directions: (seed, round, client, step, k, parameter) -> tensor, the same everywhere.

Bits come from Philox, a counter-based generator (Salmon et al. 2011): the address of a number is
its counter, so no generator state has to travel or be kept in step. NumPy guarantees the raw bits of
a bit generator across versions, but not the streams of its distributions, so the two distributions
are computed here from raw bits.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Distribution = Literal["gaussian", "rademacher"]


@dataclass(frozen=True)
class DirectionStream:
    """The directions of one client in one round.

    Attributes:
        seed: the run's seed.
        round: the round, from 1.
        client: the client's partition id.
        distribution: both have mean 0 and covariance I, so E[(g . v) v] = g.
    """

    seed: int
    round: int
    client: int
    distribution: Distribution = "gaussian"

    def draw(self, step: int, k: int, parameter: str, shape: torch.Size) -> Tensor:
        """Return direction k of local step `step` for a parameter: float32, on the CPU.

        Args:
            step: local step, from 0.
            k: which of the step's K directions, from 0.
            parameter: the parameter's full name; distinct names give independent directions.
            shape: the parameter's shape.
        """
        count = math.prod(shape)
        # One 64-bit word gives two Gaussian numbers, or 64 signs.
        num_words = -(-count // (2 if self.distribution == "gaussian" else 64))
        words = _philox(self.seed, parameter, self.round, self.client, step, k).random_raw(num_words)
        numbers = _gaussian(words) if self.distribution == "gaussian" else _rademacher(words)
        return torch.from_numpy(numbers[:count]).reshape(shape)

    def at_step(self, step: int) -> "Callable[[int, str, torch.Size], Tensor]":
        """The directions of one local step, as estimators draw them: (k, parameter, shape) -> tensor."""
        return partial(self.draw, step)


def _philox(seed: int, parameter: str, round: int, client: int, step: int, k: int) -> np.random.Philox:
    """The generator at an address: seed and name are its key, the rest its counter.

    The counter's lowest word counts up as numbers are drawn, so it starts at 0.
    """
    key = np.frombuffer(hashlib.blake2b(f"{seed}/{parameter}".encode(), digest_size=16).digest(), dtype="<u8")
    counter = np.array([0, k, step, (round << 32) | client], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def _gaussian(words: np.ndarray) -> np.ndarray:
    """Box-Muller on the two 32-bit halves of each word.

    Computed in float64 and rounded to float32, so a last-bit difference between two machines'
    mathematics libraries practically never reaches the result.
    """
    uniform = ((words >> np.uint64(32)) + np.float64(1.0)) * 2.0**-32  # (0, 1]
    angle = (words & np.uint64(0xFFFFFFFF)) * (2.0 * math.pi * 2.0**-32)
    radius = np.sqrt(-2.0 * np.log(uniform))
    pairs = np.empty((words.size, 2), dtype=np.float32)
    pairs[:, 0] = radius * np.cos(angle)
    pairs[:, 1] = radius * np.sin(angle)
    return pairs.reshape(-1)


def _rademacher(words: np.ndarray) -> np.ndarray:
    """A sign for each bit, lowest first."""
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
    return bits.astype(np.float32) * 2.0 - 1.0
