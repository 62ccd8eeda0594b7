"""Figures of runs that differ in their seed alone: mean, standard deviation, confidence interval."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class OverSeeds:
    """A figure over runs of several seeds.

    Attributes:
        std: of the sample, n - 1 in its denominator; None of a single run.
        low, high: Student's t confidence interval of the mean; None of a single run, which tells nothing of it.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    num_seeds: int

    def __str__(self) -> str:
        """`0.712 ± 0.034 (n = 3)`: half the interval's width; `0.712 (n = 1)` of a single run."""
        margin = "" if self.high is None else f" ± {self.high - self.mean:.3f}"
        return f"{self.mean:.3f}{margin} (n = {self.num_seeds})"


def over_seeds(values: Sequence[float], confidence: float = 0.95) -> OverSeeds:
    """Mean and spread of one figure, a value a seed.

    Args:
        values: at least one.
        confidence: of the interval, within (0, 1).
    """
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return OverSeeds(mean, None, None, None, 1)
    std = statistics.stdev(values)
    margin = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * std / count**0.5
    return OverSeeds(mean, std, mean - margin, mean + margin, count)
