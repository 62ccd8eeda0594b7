"""Spry's theory, measured on a real model: the variance of a forward gradient, and what splitting does to a round.

Variance. Of Gaussian tangents v, with d numbers perturbed,

    E|(1/K) sum_k s_k v_k - g|^2 = (d + 1) / K |g|^2,    s_k = g . v_k,

and that squared error has itself the variance 2 (d + 3) (d + K + 5) / K^3 |g|^4, from the moments of s and |v|^2 up to
the eighth. So how far a measured mean may be off is known, not estimated from a sample with heavy tails.

Of rounds of several clients see `spryfl.bench.theory_rounds`. Slopes come from forward-mode passes for the variance;
for rounds, whose passes would take hours, they are g . v of gradients by backprop, and the variance's passes say how
near that is to what a pass gives.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spryfl.bench.theory_rounds import measure_bias, measure_draws, measure_errors
from spryfl.config import parse_config
from spryfl.federated.client import BatchLoss, loaded
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.forward import loss_and_slopes
from spryfl.gradients.tangents import Draw
from spryfl.workbench import PartitionData, Workbench

Row = dict[str, Any]
ALPHAS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


@dataclass(frozen=True)
class TheoryBench:
    """What is measured on.

    Attributes:
        rows: shared among clients, `batch` of them in the variance's batch.
        num_tangents: of each d; draws: of each client where the bias is estimated from them.
        num_rounds: drawn for the error of a round; error_alphas: of it, beside IID.
        counts: how many units are perturbed together, from the top.
        clients: in a round; seeds: of partitions; alphas: of the bias, beside IID.
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
    num_rounds: int = 256
    error_alphas: tuple[float, ...] = (1.0,)


def measure_theory(settings: TheoryBench) -> Row:
    """Every figure, by part: `settings`, `variance`, `bias`, `draws`, `errors`."""
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
        "bias": measure_bias(bench, gradients, settings.clients, (*settings.alphas, None), settings.seeds),
        "draws": measure_draws(bench, gradients, settings.clients[0], settings.drawn_alphas, settings.draws),
        "errors": measure_errors(
            bench, gradients, settings.clients, (*settings.error_alphas, None), settings.num_rounds
        ),
    }


def measure_variance(bench: Workbench, settings: TheoryBench) -> list[Row]:
    """Normalized error of forward gradients of more and more units, from slopes of forward-mode passes."""
    loss = _loss(bench, range(settings.batch))
    units = [unit for unit in bench.adapted.units if not unit.is_head]
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


def error_variance(d: int, k: int) -> float:
    """Variance of |(1/K) sum_k s_k v_k - g|^2 over K Gaussian tangents of d numbers, for |g| = 1."""
    return 2 * (d + 3) * (d + k + 5) / k**3


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
        name: value if "lora_B" not in name else 0.1 * _draw(0).numbers(0, f"value of {name}", value.shape)
        for name, value in bench.initial_state().values.items()
    }


def _draw(step: int) -> Draw:
    return DirectionStream(seed=0, round=1, client=0).at_step(step)


def _flat(tensors: Sequence[Tensor], leading: int = 0) -> Tensor:
    """Flattened but for the leading dimensions, one after another, in float64."""
    return torch.cat([tensor.double().flatten(leading) for tensor in tensors], dim=-1)
