"""Combining clients' contributions, unit by unit."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contribution:
    """What one client proposes for the parameters it trained.

    Attributes:
        change: by parameter name: trained minus old value, or minus the gradient.
        weight: its number of examples, or what a sampling makes of it (`sampling.Sampling`).
    """

    client: int
    change: dict[str, Tensor]
    weight: float


def weighted_mean(contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """Each parameter's mean over the clients that trained it, each with its weight.

    A parameter nobody trained is absent. The order of arrival does not change the result: clients are
    summed in ascending order, in float64.
    """
    totals: dict[str, Tensor] = {}
    weights: dict[str, float] = defaultdict(float)
    for contribution in sorted(contributions, key=lambda c: c.client):
        for name, change in contribution.change.items():
            if name not in totals:
                totals[name] = torch.zeros(change.shape, dtype=torch.float64)
            totals[name].add_(change, alpha=contribution.weight)
            weights[name] += contribution.weight
    return {name: (total / weights[name]).float() for name, total in totals.items()}
