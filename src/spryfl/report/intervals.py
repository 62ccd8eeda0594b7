"""Mean and confidence interval over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean, stdev

from scipy.stats import t

CONFIDENCE = 0.95
FEWEST = 3
"""Values that an interval is told of: of two, Student's t is 12.7, and most intervals hold every accuracy there is."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        half_width: of Student's t interval; None of fewer than `FEWEST` values, which say nothing of their spread.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def low(self) -> float | None:
        """The interval's lower end."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """The interval's upper end."""
        return None if self.half_width is None else self.mean + self.half_width

    def shown(self, form: str = ".3f") -> str:
        """As in tables: 0.750 ± 0.043; of several values without an interval their number, 0.750 (2)."""
        if self.half_width is not None:
            return f"{self.mean:{form}} ± {self.half_width:{form}}"
        return f"{self.mean:{form}} ({self.count})" if self.count > 1 and isfinite(self.mean) else f"{self.mean:{form}}"


def interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value, with the interval that covers the true mean of normal values so often."""
    count = len(values)
    if count < FEWEST or not all(map(isfinite, values)):  # an infinite perplexity has no spread either
        return Interval(sum(values) / count, None, count)
    half_width = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * stdev(values) / count**0.5
    return Interval(fmean(values), half_width, count)
