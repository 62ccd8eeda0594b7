"""Rounds of clients with unlike data: the bias that splitting brings, and what splitting does to a round's error.

Bias. Each s v is unbiased for the gradient of the client that took it, so in a round the estimate of unit u has the
mean of the gradients of the clients C_u that hold u, not of all clients (Panchal et al. 2024, theorem 4.1):

    E g_hat_u = sum_{m in C_u} n_m g_{m,u} / sum_{m in C_u} n_m,    g_u = sum_m n_m g_{m,u} / sum_m n_m.

They are equal where clients' data are alike, and grow apart with heterogeneity.

Error. A client that perturbs the units U_m adds the covariance |g_{m,U_m}|^2 I + g g^T to their d_u numbers, so with
w_{m,u} = n_m / sum_{C_u} n and K = 1

    E|g_hat - g|^2 = |bias|^2 + sum_m sum_{u in U_m} w_{m,u}^2 (d_u |g_{m,U_m}|^2 + |g_{m,u}|^2).

Where clients are alike and all M of them get all d numbers, that is (d + 1) / M |g|^2; where d is dealt among them,
each unit's error is that of d / M numbers, but from one client: the same. Splitting takes work off a client, not error
off a round. A unit that all of them perturb beside their own (the head) puts its part of the slope's noise on each.

Slopes are g . v of gradients by backprop: `spryfl.bench.theory` tells how near a forward-mode pass comes to that.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from spryfl.config import PartitionConfig
from spryfl.data.partition import Partition, label_counts, partition_rows
from spryfl.federated.assignment import assign_units
from spryfl.federated.method import Assignment
from spryfl.gradients.directions import DirectionStream
from spryfl.models.units import HEAD
from spryfl.report.intervals import interval
from spryfl.workbench import Workbench

Row = dict[str, Any]
Spans = dict[str, slice]
ROUNDS: tuple[tuple[str, Assignment, bool], ...] = (
    ("all units to each", "all", False),
    ("units dealt", "split", False),
    ("all units to each, head exact", "all", True),
    ("units dealt, head exact", "split", True),
)
"""(told, who gets what, whether the head's gradient is exact instead of along the direction)."""


def measure_bias(
    bench: Workbench, gradients: np.ndarray, clients: Sequence[int], alphas: Sequence[float | None], seeds: int
) -> list[Row]:
    """Exact bias of a round's split estimate, by heterogeneity and number of clients.

    Args:
        gradients: (rows, parameters) of every row.
        alphas: of Dirichlet partitions; None: IID.
        seeds: partitions of each.
    """
    rows = []
    for num_clients in clients:
        for alpha in alphas:
            found = [_bias_of(bench, gradients, num_clients, alpha, seed) for seed in range(seeds)]
            in_round, after, distance = (interval(list(own)) for own in zip(*found, strict=True))
            rows.append(
                {
                    "num_clients": num_clients,
                    "alpha": alpha,
                    "bias": in_round.mean,
                    "bias_low": in_round.low,
                    "bias_high": in_round.high,
                    "bias_after_rotation": after.mean,
                    "label_distance": distance.mean,
                }
            )
    return rows


def measure_draws(
    bench: Workbench, gradients: np.ndarray, num_clients: int, alphas: Sequence[float | None], draws: int
) -> list[Row]:
    """The squared bias of one round estimated from seeded directions, beside its exact value.

    With the means a, b of two disjoint halves of the draws, (a - g) . (b - g) has expectation |bias|^2, free of the
    estimate's own variance.
    """
    rows, spans = [], _spans(bench)
    for alpha in alphas:
        partition = _partition(bench, num_clients, alpha, seed=0)
        own, whole = _client_gradients(gradients, partition)
        assigned = _assigned(bench, "split", num_clients)
        holders = {unit: [c for c, units in assigned.items() if unit in units] for unit in spans}
        estimate = variance = exact = 0.0
        for unit, span in spans.items():
            if len(holders[unit]) != 1:
                continue  # the head, which all clients train: no bias
            (client,) = holders[unit]
            mine, bias = own[client, span], own[client, span] - whole[span]
            first, second = (_drawn_mean(mine, client, unit, half, draws // 2) for half in (0, 1))
            estimate += (first - whole[span]) @ (second - whole[span])
            variance += product_variance(mine, bias, draws // 2)
            exact += bias @ bias
        scale = float(whole @ whole)
        rows.append(
            {
                "num_clients": num_clients,
                "alpha": alpha,
                "squared_bias": exact / scale,
                "estimate": float(estimate / scale),
                "standard_error": float(variance**0.5 / scale),
            }
        )
    return rows


def measure_errors(
    bench: Workbench, gradients: np.ndarray, clients: Sequence[int], alphas: Sequence[float | None], num_rounds: int
) -> list[Row]:
    """The normalized error of a round's estimate, one tangent a client: in closed form, and the mean of seeded rounds.

    Returns:
        `theory` and `error` in |g|^2, `squared_bias` as a part of the former, `standard_error` of the latter over the
        rounds; `d`, how many numbers a client perturbs, in the mean.
    """
    rows, spans = [], _spans(bench)
    for num_clients in clients:
        for alpha in alphas:
            partition = _partition(bench, num_clients, alpha, seed=0)
            own, whole = _client_gradients(gradients, partition)
            sizes = np.array([len(of) for of in partition], dtype=np.float64)
            scale = whole @ whole
            for told, kind, exact_head in ROUNDS:
                weights = _weights(_assigned(bench, kind, num_clients), spans, sizes)
                drawn = np.ones(len(whole), dtype=bool)
                drawn[spans[HEAD]] = not exact_head
                bias = (((weights * own).sum(axis=0) - whole) ** 2).sum()
                errors = _drawn_errors(own, whole, weights, drawn, num_rounds) / scale
                rows.append(
                    {
                        "num_clients": num_clients,
                        "alpha": alpha,
                        "round": told,
                        "d": float(np.count_nonzero(weights[:, drawn], axis=1).mean()),
                        "theory": float((bias + round_variance(own, weights, drawn)) / scale),
                        "squared_bias": float(bias / scale),
                        "error": float(errors.mean()),
                        "standard_error": float(errors.std(ddof=1) / num_rounds**0.5),
                    }
                )
    return rows


def round_variance(own: np.ndarray, weights: np.ndarray, drawn: np.ndarray) -> float:
    """E|g_hat - E g_hat|^2 of a round in which each client takes one Gaussian tangent.

    Args:
        own: (clients, parameters) gradients; weights: of the same shape, 0 where a client does not train it.
        drawn: (parameters,) whether it is perturbed; else its gradient is exact.
    """
    perturbed = (weights > 0) & drawn
    squares = np.where(perturbed, own**2, 0.0)
    return float((np.where(perturbed, weights, 0.0) ** 2 * (squares.sum(axis=1, keepdims=True) + squares)).sum())


def product_variance(own: np.ndarray, bias: np.ndarray, count: int) -> float:
    """Variance of (a - g) . (b - g), a and b means of `count` forward gradients of `own` each, bias = own - g.

    With C = (|own|^2 I + own own^T) / count, the covariance of either, it is 2 bias^T C bias + tr C^2.
    """
    square = own @ own
    along = square * (bias @ bias) + (own @ bias) ** 2
    return float(2 * along / count + (len(own) + 3) * square**2 / count**2)


def _drawn_mean(own: np.ndarray, client: int, unit: str, step: int, count: int) -> np.ndarray:
    """The mean of forward gradients of `own` along the directions of one step."""
    draw = DirectionStream(seed=0, round=1, client=client).at_step(step)
    tangents = draw.stacked({unit: torch.Size([len(own)])}, count)[unit].double().numpy()
    return np.asarray((tangents @ own) @ tangents / count)


def _drawn_errors(
    own: np.ndarray, whole: np.ndarray, weights: np.ndarray, drawn: np.ndarray, num_rounds: int
) -> np.ndarray:
    """(num_rounds,) |g_hat - g|^2 of rounds along seeded directions."""
    errors = np.tile(np.where(drawn, 0.0, (weights * own).sum(axis=0)) - whole, (num_rounds, 1))
    for client, gradient in enumerate(own):
        (held,) = np.nonzero((weights[client] > 0) & drawn)
        draw = DirectionStream(seed=0, round=1, client=client).at_step(0)
        tangents = draw.stacked({"all": torch.Size([len(held)])}, num_rounds)["all"].double().numpy()
        errors[:, held] += (tangents @ gradient[held])[:, None] * (weights[client, held] * tangents)
    return np.asarray((errors**2).sum(axis=1))


def _bias_of(
    bench: Workbench, gradients: np.ndarray, num_clients: int, alpha: float | None, seed: int
) -> tuple[float, float, float]:
    """Relative bias in a round (root mean square over a rotation) and after it; clients' mean label distance."""
    partition = _partition(bench, num_clients, alpha, seed)
    own, whole = _client_gradients(gradients, partition)
    sizes = np.array([len(rows) for rows in partition], dtype=np.float64)
    spans, squares, means = _spans(bench), [], []
    for start in range(len(spans) - 1):
        mean = (_weights(_assigned(bench, "split", num_clients, start), spans, sizes) * own).sum(axis=0)
        squares.append(((mean - whole) ** 2).sum())
        means.append(mean)
    scale = np.linalg.norm(whole)
    labels = bench.train.labels
    counts = label_counts(partition, labels, len(bench.label_names))
    distances = 0.5 * np.abs(counts / sizes[:, None] - counts.sum(axis=0) / len(labels)).sum(axis=1)
    return (
        float(np.sqrt(np.mean(squares)) / scale),
        float(np.linalg.norm(np.mean(means, axis=0) - whole) / scale),
        float(np.average(distances, weights=sizes)),
    )


def _partition(bench: Workbench, num_clients: int, alpha: float | None, seed: int) -> Partition:
    """Of an alpha; None: IID."""
    config = PartitionConfig(kind="iid", num_clients=num_clients, min_examples=1)
    if alpha is not None:
        config = PartitionConfig(alpha=alpha, num_clients=num_clients, min_examples=1)
    return partition_rows(config, bench.train.labels, None, seed)


def _client_gradients(gradients: np.ndarray, partition: Partition) -> tuple[np.ndarray, np.ndarray]:
    """(clients, parameters) of each client's data, and (parameters,) of all."""
    return np.stack([gradients[rows].mean(axis=0) for rows in partition]), gradients.mean(axis=0)


def _assigned(bench: Workbench, kind: Assignment, num_clients: int, start: int = 0) -> dict[int, tuple[str, ...]]:
    units = [unit.name for unit in bench.adapted.units]
    return assign_units(kind, units, range(num_clients), start, (HEAD,))


def _weights(assigned: dict[int, tuple[str, ...]], spans: Spans, sizes: np.ndarray) -> np.ndarray:
    """(clients, parameters) the part of each client's gradient in the round's; 0 where it does not train it."""
    weights = np.zeros((len(sizes), max(span.stop for span in spans.values())))
    for client, units in assigned.items():
        for unit in units:
            weights[client, spans[unit]] = sizes[client]
    return weights / weights.sum(axis=0)


def _spans(bench: Workbench) -> Spans:
    """Where each unit's numbers stand in a flat gradient of all."""
    found, begin = {}, 0
    for unit in bench.adapted.units:
        size = sum(bench.adapted.model.get_parameter(name).numel() for name in unit.parameters)
        found[unit.name] = slice(begin, begin + size)
        begin += size
    return found
