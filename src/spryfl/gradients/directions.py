"""Seeded numbers for directions: (seed, round, client, step, k, parameter) -> tensor, the same everywhere.

Bits come from Philox, a counter-based generator (Salmon et al. 2011): the address of a number is
its counter, so no generator state has to travel or be kept in step. NumPy guarantees the raw bits of
a bit generator across versions, but not the streams of its distributions, so the two distributions
are computed here from raw bits.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from spryfl.gradients.kinds import Distribution
from spryfl.gradients.tangents import Draw, Groups

EVERYONE = 2**32 - 1


@dataclass(frozen=True)
class DirectionStream:
    """The directions of one client in one round.

    Attributes:
        seed: the run's seed.
        round: the round, from 1.
        client: the client's partition id; EVERYONE for directions that all clients of a round share.
        distribution: all have mean 0 and covariance I, so E[(g . v) v] = g.
        groups, shrinkage, num_candidates, known: see `Draw`.
    """

    seed: int
    round: int
    client: int
    distribution: Distribution = "gaussian"
    groups: Groups | None = None
    shrinkage: bool = False
    num_candidates: int = 1
    known: Mapping[str, Tensor] = field(default_factory=dict)

    def draw(self, step: int, k: int, parameter: str, shape: torch.Size) -> Tensor:
        """Return the numbers of direction k of local step `step` for a parameter: float32, on the CPU.

        They are Gaussian, or signs; directions that are drawn jointly are made of them by `Draw`.

        Args:
            step: local step, from 0.
            k: which of the step's K directions, from 0.
            parameter: the parameter's full name; distinct names give independent directions.
            shape: the parameter's shape.
        """
        count = math.prod(shape)
        signs = self.distribution == "rademacher"
        # One 64-bit word gives two Gaussian numbers, or 64 signs.
        words = self.words(step, k, parameter, -(-count // (64 if signs else 2)))
        numbers = _rademacher(words) if signs else _gaussian(words)
        return torch.from_numpy(numbers[:count]).reshape(shape)

    def words(self, step: int, k: int, parameter: str, count: int) -> np.ndarray:
        """Return the first random 64-bit words at an address."""
        return _philox(self.seed, parameter, self.round, self.client, step, k).random_raw(count)

    def at_step(self, step: int) -> Draw:
        """The directions of one local step, as estimators draw them."""
        numbers, words = partial(self.draw, step), partial(self.words, step)
        return Draw(numbers, words, self.distribution, self.groups, self.shrinkage, self.num_candidates, self.known)


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
