"""Combining clients' contributions, unit by unit: the mean, and what a hostile minority cannot move far.

    mean          weighted by numbers of examples
    median        of each coordinate; between the middle two where their number is even
    trimmed_mean  of each coordinate, without the largest and the smallest values (Yin et al. 2018)

The last two count clients alike: a number of examples is its sender's own word. They need three clients of a unit:
of one or two, nobody can say which is the hostile one, and both are then the mean.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from spryfl.federated.method import Aggregation


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


Combine = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""(one parameter's change by each client, their weights) -> its change, float64."""


def _mean(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros(changes[0].shape, dtype=torch.float64)
    for change, weight in zip(changes, weights, strict=True):
        total.add_(change, alpha=weight)
    return total / sum(weights)


def num_trimmed(trim: float, num_clients: int) -> int:
    """How many values are left out at each end: `trim` of them, rounded up, as long as one remains.

    Rounded up so that from three clients on there is always some protection.
    """
    return min(math.ceil(trim * num_clients - 1e-9), (num_clients - 1) // 2)


def _trimmed_mean(trim: float, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    k = num_trimmed(trim, len(changes))
    ordered = torch.stack([change.double() for change in changes]).sort(0).values
    return ordered[k : len(changes) - k].mean(0)


AGGREGATIONS: dict[Aggregation, Callable[[float], Combine]] = {
    "mean": lambda trim: _mean,
    "median": lambda trim: partial(_trimmed_mean, 0.5),
    "trimmed_mean": lambda trim: partial(_trimmed_mean, trim),
}
"""Each makes what combines, from the share of values that is trimmed."""


def aggregate(
    contributions: Sequence[Contribution], kind: Aggregation = "mean", trim: float = 0.1
) -> dict[str, Tensor]:
    """Each parameter's change, combined over the clients that trained it.

    A parameter nobody trained is absent. The order of arrival does not change the result: clients are taken in
    ascending order, in float64.
    """
    combine = AGGREGATIONS[kind](trim)
    changes: dict[str, list[Tensor]] = defaultdict(list)
    weights: dict[str, list[float]] = defaultdict(list)
    for contribution in sorted(contributions, key=lambda c: c.client):
        for name, change in contribution.change.items():
            changes[name].append(change)
            weights[name].append(contribution.weight)
    return {name: combine(own, weights[name]).float() for name, own in changes.items()}


def clipped(contribution: Contribution, bound: float) -> Contribution:
    """A contribution of L2 norm at most `bound` over all its parameters together, in float64.

    A change with a value that is not finite counts as none: there is no telling its direction.
    """
    precise = {name: change.double() for name, change in contribution.change.items()}
    norm = math.sqrt(sum(float(change.square().sum()) for change in precise.values()))
    if not math.isfinite(norm):
        return replace(contribution, change={name: torch.zeros_like(change) for name, change in precise.items()})
    factor = min(1.0, bound / norm) if norm > 0 else 1.0
    return replace(contribution, change={name: change * factor for name, change in precise.items()})
