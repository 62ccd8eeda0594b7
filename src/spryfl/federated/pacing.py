"""When gradients vary too much to be used (FwdLLM, Xu et al. 2024, section 3.2: variance-controlled pacing).

    V = mean over all numbers of (m_1 - m_2)^2 / 2,    m_1, m_2 the means of one half of the gradients and of the other

which is the sample variance of the two means. FwdLLM's server waits while V exceeds a threshold: clients are asked
for more gradients at the same values, and all are pooled until they agree. As V falls with the number of directions
pooled, more of them are spent where the gradient is large. FwdLLM+ (Panchal et al. 2024) has each client measure V
over its own steps, and leaves out those above the threshold.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spryfl.federated.aggregation import Contribution

Pool = dict[str, Tensor]
"""Float64: "HALF/sum/NAME", weighted sums of gradients in half 0 and 1, and their weights "HALF/weight/NAME"; "count"
of contributions so far."""


class Halves:
    """Gradients summed in two halves, dealt in turn.

    Attributes:
        pool: the sums, as plain tensors, so that they can be kept from round to round.
    """

    def __init__(self, pool: Mapping[str, Tensor] | None = None) -> None:
        self.pool: Pool = dict(pool or {})

    def add(self, gradients: Mapping[str, Tensor], weight: float) -> None:
        """Add one contribution to the half whose turn it is."""
        count = self._sum("count")
        self.pool["count"] = count + 1
        half = int(count) % 2
        for name, gradient in gradients.items():
            total, weights = f"{half}/sum/{name}", f"{half}/weight/{name}"
            self.pool[total] = self._sum(total).add(gradient.double(), alpha=weight)
            self.pool[weights] = self._sum(weights) + weight

    @property
    def variance(self) -> float | None:
        """V, over the tensors that both halves have; None while there are none."""
        both = [name for name in self._names(0) if name in self._names(1)]
        if not both:
            return None
        differences = [self._mean(name, 0) - self._mean(name, 1) for name in both]
        return sum(float(d.square().sum()) for d in differences) / (2 * sum(d.numel() for d in differences))

    def mean(self) -> dict[str, Tensor]:
        """The weighted mean of all contributions, float32."""
        return {name: self._mean(name, 0, 1).float() for name in dict.fromkeys(self._names(0) + self._names(1))}

    def _names(self, half: int) -> list[str]:
        start = f"{half}/sum/"
        return [key.removeprefix(start) for key in self.pool if key.startswith(start)]

    def _mean(self, name: str, *halves: int) -> Tensor:
        totals = [self._sum(f"{half}/sum/{name}") for half in halves]
        weights = [self._sum(f"{half}/weight/{name}") for half in halves]
        return torch.stack(torch.broadcast_tensors(*totals)).sum(0) / torch.stack(weights).sum()

    def _sum(self, key: str) -> Tensor:
        return self.pool.get(key, torch.zeros((), dtype=torch.float64))


def pooled_mean(
    pool: Mapping[str, Tensor], contributions: Sequence[Contribution], threshold: float
) -> tuple[dict[str, Tensor], Pool]:
    """The mean of all that is pooled, and an empty pool; or while they vary too much nothing, and a fuller pool.

    Args:
        pool: of the rounds before, taken at the same values.
        contributions: of this round.
        threshold: the largest V that is good enough.
    """
    halves = Halves(pool)
    for contribution in sorted(contributions, key=lambda c: c.client):
        halves.add(contribution.change, contribution.weight)
    variance = halves.variance
    if variance is None or variance > threshold:
        return {}, halves.pool
    return halves.mean(), {}
