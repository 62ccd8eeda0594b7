"""The cohort of a round, and what each of its clients then weighs in the mean.

The mean over a cohort is to be, in expectation, the mean over all clients, weighted by examples. A client that is in
the cohort with probability p therefore weighs n / p for its n examples (Horvitz and Thompson 1952): with uniform
sampling all p are alike, and it weighs n; with p proportional to n, all clients weigh the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_STREAM = 1  # keeps cohorts independent of the other things drawn from the run's seed


@dataclass(frozen=True)
class Sampling:
    """How cohorts are drawn.

    Attributes:
        sizes: examples of each client; empty samples clients uniformly.
    """

    num_clients: int
    cohort_size: int
    sizes: tuple[int, ...] = ()

    def cohort(self, seed: int, round: int) -> list[int]:
        """Draw a round's clients, without replacement, in ascending order."""
        bits = np.random.Philox(key=seed, counter=np.array([0, 0, _STREAM, round], dtype=np.uint64))
        generator = np.random.Generator(bits)
        if self.sizes:
            return _systematic(self._inclusion, generator)
        chosen = generator.choice(self.num_clients, size=min(self.cohort_size, self.num_clients), replace=False)
        return sorted(int(client) for client in chosen)

    def weight(self, client: int, num_examples: int) -> float:
        """What a client of a cohort weighs in the mean.

        Args:
            num_examples: it trained on, as it says; with sampling by size, its size as the server knows it counts.
        """
        if not self.sizes:
            return num_examples
        return float(self.sizes[client] / self._inclusion[client])

    @cached_property
    def _inclusion(self) -> np.ndarray:
        return inclusion(self.sizes, self.cohort_size)


def inclusion(sizes: Sequence[int], cohort_size: int) -> np.ndarray:
    """Each client's probability of being in a cohort: proportional to its size, but no more than 1.

    A client so large that its share would exceed 1 is in every cohort, and the others share what places are left.
    """
    given = np.asarray(sizes, dtype=np.float64)
    certain = np.zeros(len(given), dtype=bool)
    while True:
        places = min(cohort_size, len(given)) - certain.sum()
        found = np.where(certain, 1.0, given * places / max(given[~certain].sum(), 1.0))
        larger = (found >= 1.0) & ~certain
        if not larger.any():
            return found
        certain |= larger


def _systematic(probabilities: np.ndarray, generator: np.random.Generator) -> list[int]:
    """A cohort in which each client is with exactly its probability (Madow 1949, in random order).

    Probabilities are laid end to end; a client is drawn if a point of u, u + 1, u + 2, .. falls on its piece.
    """
    order = generator.permutation(len(probabilities))
    ends = np.round(np.cumsum(probabilities[order]), 9)  # the last is a whole number, but for rounding
    before = np.ceil(ends - generator.random())  # points before the end of each piece
    drawn = np.diff(before, prepend=0.0) > 0
    return sorted(int(client) for client in order[drawn])
