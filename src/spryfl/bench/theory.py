"""Spry's theory, measured on a real model: the variance of a forward gradient, and the bias that splitting brings.

Variance. Of Gaussian tangents v, with d numbers perturbed,

    E|(1/K) sum_k s_k v_k - g|^2 = (d + 1) / K |g|^2,    s_k = g . v_k,

and that squared error has itself the variance 2 (d + 3) (d + K + 5) / K^3 |g|^4, from the moments of s and |v|^2 up to
the eighth. So how far a measured mean may be off is known, not estimated from a sample with heavy tails.

Bias. Each s v is unbiased for the gradient of the client that took it, so in a round the estimate of unit u has the
mean of the gradients of the clients C_u that hold u, not of all clients (Panchal et al. 2024, theorem 4.1):

    E g_hat_u = sum_{m in C_u} n_m g_{m,u} / sum_{m in C_u} n_m,    g_u = sum_m n_m g_{m,u} / sum_m n_m.

They are equal where clients' data are alike, and grow apart with heterogeneity. Slopes come from forward-mode passes
for the variance; for the bias, whose passes would take hours, they are g . v of gradients by backprop, and the
variance's passes say how near that is to what a pass gives.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spryfl.config import PartitionConfig, parse_config
from spryfl.data.partition import Partition, label_counts, partition_rows
from spryfl.federated.assignment import assign_units
from spryfl.federated.client import BatchLoss, loaded
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.forward import loss_and_slopes
from spryfl.models.units import HEAD
from spryfl.report.intervals import interval
from spryfl.workbench import PartitionData, Workbench

Row = dict[str, Any]
ALPHAS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


@dataclass(frozen=True)
class TheoryBench:
    """What is measured on.

    Attributes:
        rows: shared among clients, `batch` of them in the variance's batch.
        num_tangents: of each d; draws: of each client where the bias is estimated from them.
        counts: how many units are perturbed together, from the top.
        clients: in a round; seeds: of partitions.
    """

    model: str = "builtin:minilm"
    data: str = "builtin:movie_reviews"
    rows: int = 480
    tokens: int = 16
    batch: int = 8
    num_tangents: int = 1536
    per_pass: int = 64
    group_sizes: tuple[int, ...] = (1, 4, 16)
    counts: tuple[int, ...] = (1, 2, 4, 8, 12)
    alphas: tuple[float, ...] = ALPHAS
    clients: tuple[int, ...] = (12, 24, 48)
    seeds: int = 10
    draws: int = 4096
    drawn_alphas: tuple[float, ...] = (0.1, 1.0, 100.0)


def measure_theory(settings: TheoryBench) -> Row:
    """Every figure, by part: `settings`, `variance`, `bias`, `draws`."""
    bench = Workbench.from_config(
        parse_config(
            {
                "model": {"name": settings.model, "dtype": "float32", "device": "cpu"},
                "data": {"name": settings.data, "max_tokens": settings.tokens, "max_train_examples": settings.rows},
                "partition": {"kind": "iid", "num_clients": 1},
                "server": {"cohort_size": 1},
            }
        )
    )
    with loaded(bench.adapted.model, _values(bench)):
        variance = measure_variance(bench, settings)
        gradients = _row_gradients(bench)
    return {
        "settings": asdict(settings),
        "variance": variance,
        "bias": measure_bias(bench, gradients, settings),
        "draws": measure_draws(bench, gradients, settings),
    }


def measure_variance(bench: Workbench, settings: TheoryBench) -> list[Row]:
    """Normalized error of forward gradients of more and more units, from slopes of forward-mode passes."""
    loss = _loss(bench, range(settings.batch))
    units = [unit for unit in bench.adapted.units if unit.name != HEAD]
    rows = []
    for count in settings.counts:
        names = [name for unit in units[-count:] for name in unit.parameters]
        shapes = {name: bench.adapted.model.get_parameter(name).shape for name in names}
        exact = Backprop().estimate(bench.adapted.model, loss, names, _draw(0), settings.batch).gradients
        gradient = _flat([exact[name] for name in names]).numpy()
        slopes, tangents = [], []
        for step in range(settings.num_tangents // settings.per_pass):
            drawn = _draw(step).stacked(shapes, settings.per_pass)
            slopes.append(loss_and_slopes(bench.adapted.model, loss, drawn)[1].double().numpy())
            tangents.append(_flat([drawn[name] for name in names], leading=1).numpy())
        found, stacked = np.concatenate(slopes), np.concatenate(tangents)
        true = stacked @ gradient
        for size in settings.group_sizes:
            estimates = (found[:, None] * stacked).reshape(-1, size, len(gradient)).mean(axis=1)
            errors = ((estimates - gradient) ** 2).sum(axis=1) / (gradient @ gradient)
            rows.append(
                {
                    "num_units": count,
                    "d": len(gradient),
                    "k": size,
                    "num_estimates": len(errors),
                    "error": float(errors.mean()),
                    "standard_error": (error_variance(len(gradient), size) / len(errors)) ** 0.5,
                    "theory": (len(gradient) + 1) / size,
                    "slope_difference": float(np.linalg.norm(found - true) / np.linalg.norm(true)),
                }
            )
    return rows


def measure_bias(bench: Workbench, gradients: np.ndarray, settings: TheoryBench) -> list[Row]:
    """Exact bias of a round's split estimate, by heterogeneity and number of clients.

    Args:
        gradients: (rows, parameters) of every row.
    """
    rows = []
    for num_clients in settings.clients:
        for alpha in (*settings.alphas, None):
            found = [_bias_of(bench, gradients, num_clients, alpha, seed) for seed in range(settings.seeds)]
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


def measure_draws(bench: Workbench, gradients: np.ndarray, settings: TheoryBench) -> list[Row]:
    """The squared bias of one round estimated from seeded directions, beside its exact value.

    With the means a, b of two disjoint halves of the draws, (a - g) . (b - g) has expectation |bias|^2, free of the
    estimate's own variance.
    """
    num_clients, spans = settings.clients[0], _spans(bench)
    rows = []
    for alpha in settings.drawn_alphas:
        partition = _partition(bench, num_clients, alpha, seed=0)
        own, whole = _client_gradients(gradients, partition)
        assigned = _assigned(bench, num_clients, start=0)
        holders = {unit: [c for c, units in assigned.items() if unit in units] for unit in spans}
        estimate = variance = exact = 0.0
        for unit, span in spans.items():
            if len(holders[unit]) != 1:
                continue  # the head, which all clients train: no bias
            (client,) = holders[unit]
            mine, bias = own[client, span], own[client, span] - whole[span]
            first, second = (_drawn_mean(mine, client, unit, half, settings.draws // 2) for half in (0, 1))
            estimate += (first - whole[span]) @ (second - whole[span])
            variance += product_variance(mine, bias, settings.draws // 2)
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


def error_variance(d: int, k: int) -> float:
    """Variance of |(1/K) sum_k s_k v_k - g|^2 over K Gaussian tangents of d numbers, for |g| = 1."""
    return 2 * (d + 3) * (d + k + 5) / k**3


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


def _bias_of(
    bench: Workbench, gradients: np.ndarray, num_clients: int, alpha: float | None, seed: int
) -> tuple[float, float, float]:
    """Relative bias in a round (root mean square over a rotation) and after it; clients' mean label distance."""
    partition = _partition(bench, num_clients, alpha, seed)
    own, whole = _client_gradients(gradients, partition)
    sizes = np.array([len(rows) for rows in partition], dtype=np.float64)
    spans, squares, means = _spans(bench), [], []
    for start in range(len(spans) - 1):
        assigned = _assigned(bench, num_clients, start)
        mean = np.empty_like(whole)
        for unit, span in spans.items():
            holders = [client for client, units in assigned.items() if unit in units]
            mean[span] = np.average(own[holders][:, span], axis=0, weights=sizes[holders])
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


def _assigned(bench: Workbench, num_clients: int, start: int) -> dict[int, tuple[str, ...]]:
    units = [unit.name for unit in bench.adapted.units]
    return assign_units("split", units, range(num_clients), start, (HEAD,))


def _spans(bench: Workbench) -> dict[str, slice]:
    """Where each unit's numbers stand in a flat gradient of all."""
    found, begin = {}, 0
    for unit in bench.adapted.units:
        size = sum(bench.adapted.model.get_parameter(name).numel() for name in unit.parameters)
        found[unit.name] = slice(begin, begin + size)
        begin += size
    return found


def _row_gradients(bench: Workbench) -> np.ndarray:
    """(rows, parameters) the gradient of each row's loss, by backprop."""
    names = [name for unit in bench.adapted.units for name in unit.parameters]
    found = []
    for row in range(len(bench.train)):
        exact = Backprop().estimate(bench.adapted.model, _loss(bench, [row]), names, _draw(0), 1).gradients
        found.append(_flat([exact[name] for name in names]).numpy())
    return np.stack(found)


def _loss(bench: Workbench, rows: Sequence[int]) -> BatchLoss[Any]:
    data = PartitionData(bench.task, bench.train, np.arange(len(bench.train)))
    return BatchLoss(data, data.batch(list(rows)), seed=0)


def _values(bench: Workbench) -> dict[str, Tensor]:
    """Initial values with LoRA's B no longer zero, so that every parameter has a gradient."""
    return {
        name: value if "lora_B" not in name else 0.1 * _draw(0)(0, f"value of {name}", value.shape)
        for name, value in bench.initial_state().values.items()
    }


def _draw(step: int) -> Any:
    return DirectionStream(seed=0, round=1, client=0).at_step(step)


def _flat(tensors: Sequence[Tensor], leading: int = 0) -> Tensor:
    """Flattened but for the leading dimensions, one after another, in float64."""
    return torch.cat([tensor.double().flatten(leading) for tensor in tensors], dim=-1)
