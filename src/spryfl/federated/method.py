"""Every method is a combination of parts: estimator x assignment x what travels up x server optimizer.

Spry is forward gradients x split x values x Yogi; replace the estimator by backprop and it is
FedYogiSplit; assign all units to all clients and that is FedYogi; let the server take the mean and it
is FedAvg. A new method is one row.
"""

from dataclasses import dataclass
from typing import Literal

Estimator = Literal["forward", "bottleneck", "guided", "zeroth_order", "backprop"]
Assignment = Literal["split", "all"]
Upload = Literal["values", "gradients", "slopes"]
Pace = Literal["epoch", "iteration"]
ServerOptimizer = Literal["sgd", "adagrad", "adam", "yogi"]
Aggregation = Literal["mean", "median", "trimmed_mean"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        estimator: how a client estimates a gradient.
        assignment: which client trains which units.
        upload: what travels up: trained values, one step's gradients, or the slopes alone.
        pace: a round is `local.epochs` passes over the client's data, or one local step.
        server: applied to the pseudo-gradient; "sgd" of rate 1 is the plain mean.
        summary: one line, with the paper.
    """

    estimator: Estimator
    assignment: Assignment
    upload: Upload
    pace: Pace
    server: ServerOptimizer
    summary: str


METHODS: dict[str, Method] = {
    "spry": Method("forward", "split", "values", "epoch", "yogi", "Spry, per epoch (Panchal et al. 2024)"),
    "spry_per_iteration": Method(
        "forward", "split", "slopes", "iteration", "yogi", "Spry, per iteration: K scalars and a seed travel up"
    ),
    "spry_bottleneck": Method(
        "bottleneck", "split", "values", "epoch", "yogi", "Spry with tangents at LoRA's A x, a slope for every example"
    ),
    "spry_guided": Method(
        "guided", "split", "values", "epoch", "yogi", "Spry along guessed gradients instead of random directions"
    ),
    "fedfgd": Method("forward", "all", "values", "epoch", "yogi", "forward gradients without splitting"),
    "fedavg": Method("backprop", "all", "values", "epoch", "sgd", "FedAvg (McMahan et al. 2017)"),
    "fedyogi": Method("backprop", "all", "values", "epoch", "yogi", "FedYogi (Reddi et al. 2021)"),
    "fedavg_split": Method("backprop", "split", "values", "epoch", "sgd", "FedAvg with Spry's assignment"),
    "fedyogi_split": Method("backprop", "split", "values", "epoch", "yogi", "FedYogi with Spry's assignment"),
    "fedsgd": Method("backprop", "all", "gradients", "iteration", "sgd", "FedSGD: one gradient a round"),
    "fedmezo": Method(
        "zeroth_order", "all", "values", "epoch", "sgd", "FedMeZO: central differences (Ling et al. 2024)"
    ),
}
