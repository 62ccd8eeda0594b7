"""How the server's learning rate moves over the rounds; names and shapes are those of `transformers.get_scheduler`.

With w rounds of warm-up of N, in round r = 1 .. N the rate is multiplied by

    r <= w:    r / w
    constant:  1
    linear:    1 - p,                p = (r - 1 - w) / (N - w)
    cosine:    (1 + cos(pi p)) / 2

so that every round moves something: the first without warm-up is at the full rate, the last not at zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["constant", "linear", "cosine"]

FACTORS: dict[ScheduleKind, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
}


@dataclass(frozen=True)
class Schedule:
    """A schedule over a run of N rounds, the first w of which warm up; w < N."""

    kind: ScheduleKind = "constant"
    num_rounds: int = 1
    warmup_rounds: int = 0

    def factor(self, round: int) -> float:
        """What the learning rate is multiplied by in a round, counted from 1."""
        if round <= self.warmup_rounds:
            return round / self.warmup_rounds
        passed = round - 1 - self.warmup_rounds
        return FACTORS[self.kind](passed / (self.num_rounds - self.warmup_rounds))


CONSTANT = Schedule()
