"""Server optimizers on the pseudo-gradient (Reddi et al. 2021, "Adaptive Federated Optimization").

    sgd:      x += lr D
    adagrad:  m = D,                  v = v + D^2
    adam:     m = b1 m + (1 - b1) D,  v = b2 v + (1 - b2) D^2
    yogi:     m as adam's,            v = v - (1 - b2) D^2 sign(v - D^2)
    the adaptive three:  x += lr m / (sqrt(v) + tau)

D is the mean change that a parameter's clients propose (their mean minus the old value, or minus the mean
gradient). v starts at tau^2 and there is no bias correction, as in the paper's algorithm 2. Adagrad has no momentum, as
in its experiments (b1 = 0).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from spryfl.federated.method import Pace, ServerOptimizer
from spryfl.federated.schedule import CONSTANT, Schedule

Moments = dict[str, Tensor]
"""Optimizer state: "m/NAME" and "v/NAME" for every parameter that has been updated."""

SecondMoment = Callable[[Tensor, Tensor, float], Tensor]

SECOND_MOMENTS: dict[ServerOptimizer, SecondMoment] = {
    "adagrad": lambda v, square, beta2: v + square,
    "adam": lambda v, square, beta2: beta2 * v + (1 - beta2) * square,
    "yogi": lambda v, square, beta2: v - (1 - beta2) * square * torch.sign(v - square),
}


def default_learning_rate(kind: ServerOptimizer, pace: Pace) -> float:
    """1 for "sgd" on trained values (the plain mean), 0.1 on gradients; 0.01 for the adaptive ones."""
    if kind == "sgd":
        return 1.0 if pace == "epoch" else 0.1
    return 1e-2


def momentum_of(moments: Moments, parameters: Sequence[str]) -> dict[str, Tensor]:
    """The first moment m of some parameters, as far as they have been updated."""
    return {name: moments[f"m/{name}"] for name in parameters if f"m/{name}" in moments}


@dataclass(frozen=True)
class ServerUpdate:
    """A server optimizer with its settings: a pure function of values, change and moments."""

    kind: ServerOptimizer
    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    schedule: Schedule = CONSTANT

    def at(self, round: int) -> "ServerUpdate":
        """With the learning rate that is due in a round, counted from 1."""
        return replace(self, learning_rate=self.learning_rate * self.schedule.factor(round))

    def apply(
        self,
        values: Mapping[str, Tensor],
        change: Mapping[str, Tensor],
        moments: Moments,
        scales: Mapping[str, float] = MappingProxyType({}),
    ) -> tuple[dict[str, Tensor], Moments]:
        """New values and moments; parameters without a change keep theirs, bitwise.

        Args:
            values: all trainable parameters, float32.
            change: D, of the parameters that were trained.
            moments: as returned before; empty at the start.
            scales: of the step of a parameter; 1 by default.
        """
        new_values, new_moments = dict(values), dict(moments)
        for name, delta in change.items():
            learning_rate = self.learning_rate * scales.get(name, 1.0)
            if self.kind == "sgd":
                new_values[name] = values[name] + learning_rate * delta
                continue
            m = moments.get(f"m/{name}", torch.zeros_like(delta))
            v = moments.get(f"v/{name}", torch.full_like(delta, self.tau**2))
            beta1 = 0.0 if self.kind == "adagrad" else self.beta1
            m = beta1 * m + (1 - beta1) * delta
            v = SECOND_MOMENTS[self.kind](v, delta.square(), self.beta2)
            new_values[name] = values[name] + learning_rate * m / (v.sqrt() + self.tau)
            new_moments[f"m/{name}"], new_moments[f"v/{name}"] = m, v
        return new_values, new_moments
