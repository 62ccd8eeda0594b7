"""Every method is a combination of parts: estimator x assignment x what travels up x server optimizer.

Spry is forward gradients x split x values x Yogi; replace the estimator by backprop and it is
FedYogiSplit; assign all units to all clients and that is FedYogi; let the server take the mean and it
is FedAvg. A new method is one row.

Baffle's and FwdLLM's settings are those of their public code and of the scripts behind Spry's paper (K 10, h 1e-4;
K 1 and 20, h 1e-2, ten candidates). What we do otherwise:

- Baffle's clients take one batch a round where its algorithm takes all their data, and the server's Adam has no bias
  correction, as in `server_optimizer`.
- FwdLLM's clients take one batch a round with K directions, where its code takes every batch with one each; and its
  variance is over all trained numbers, where its code looks at one chosen tensor. Its threshold is absolute, so it
  belongs to a model: 0.05 is what its code has for DistilBERT, 0.6 for BERT.
"""

from dataclasses import dataclass
from typing import Literal

Estimator = Literal["forward", "bottleneck", "guided", "zeroth_order", "backprop"]
Assignment = Literal["split", "all"]
Upload = Literal["values", "gradients", "slopes"]
Pace = Literal["epoch", "iteration"]
ServerOptimizer = Literal["sgd", "adagrad", "adam", "yogi"]
Pacing = Literal["none", "pool", "leave_out"]
SamplingKind = Literal["uniform", "size"]
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
        num_tangents, step_size: K and h by default.
        num_candidates: for each direction that is used this many are drawn, and those nearest to the last global
            update are kept (`gradients.tangents`).
        same_directions: all clients of a round take the same directions, so that slopes can be summed unseen.
        pacing: what becomes of a round whose gradients vary too much between one half and the other
            (`federated.pacing`): it is pooled with the next ones, or a client that reports it is left out.
        variance_threshold: how much is too much, by default.
    """

    estimator: Estimator
    assignment: Assignment
    upload: Upload
    pace: Pace
    server: ServerOptimizer
    summary: str
    num_tangents: int = 1
    step_size: float = 1e-3
    num_candidates: int = 1
    same_directions: bool = False
    pacing: Pacing = "none"
    variance_threshold: float | None = None


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
    "fedyogi_guided": Method(
        "guided",
        "all",
        "values",
        "epoch",
        "yogi",
        "FedYogi along guessed gradients: all units, one layer's activations",
    ),
    "fedfgd": Method("forward", "all", "values", "epoch", "yogi", "forward gradients without splitting"),
    "fedavg": Method("backprop", "all", "values", "epoch", "sgd", "FedAvg (McMahan et al. 2017)"),
    "fedyogi": Method("backprop", "all", "values", "epoch", "yogi", "FedYogi (Reddi et al. 2021)"),
    "fedadam": Method("backprop", "all", "values", "epoch", "adam", "FedAdam (Reddi et al. 2021)"),
    "fedadagrad": Method("backprop", "all", "values", "epoch", "adagrad", "FedAdagrad (Reddi et al. 2021)"),
    "fedavg_split": Method("backprop", "split", "values", "epoch", "sgd", "FedAvg with Spry's assignment"),
    "fedyogi_split": Method("backprop", "split", "values", "epoch", "yogi", "FedYogi with Spry's assignment"),
    "fedsgd": Method("backprop", "all", "gradients", "iteration", "sgd", "FedSGD: one gradient a round"),
    "fedmezo": Method(
        "zeroth_order", "all", "values", "epoch", "sgd", "FedMeZO: central differences (Ling et al. 2024)"
    ),
    "baffle": Method(
        "zeroth_order",
        "all",
        "slopes",
        "iteration",
        "adam",
        "Baffle: loss differences along directions all clients share (Feng et al. 2023)",
        num_tangents=10,
        step_size=1e-4,
        same_directions=True,
    ),
    "baffle_plus": Method(
        "zeroth_order",
        "all",
        "values",
        "epoch",
        "yogi",
        "Baffle as Spry's authors compare with it: local epochs",
        num_tangents=10,
        step_size=1e-4,
    ),
    "fwdllm": Method(
        "zeroth_order",
        "all",
        "gradients",
        "iteration",
        "sgd",
        "FwdLLM: directions near the last update, rounds pooled until they agree (Xu et al. 2024)",
        step_size=1e-2,
        num_candidates=10,
        pacing="pool",
        variance_threshold=0.05,
    ),
    "fwdllm_plus": Method(
        "zeroth_order",
        "all",
        "values",
        "epoch",
        "sgd",
        "FwdLLM as Spry's authors compare with it: local epochs, too noisy clients left out",
        num_tangents=20,
        step_size=1e-2,
        num_candidates=10,
        pacing="leave_out",
        variance_threshold=100.0,
    ),
}
