"""Local training, the server's rounds, evaluation, and the machines they run on."""

from typing import Literal

from pydantic import Field

from spryfl.config.part import Part, Positive, PositiveFloat, Size


class LocalConfig(Part):
    """A client's local training."""

    epochs: Positive = Field(
        1, description="passes over a client's examples a round; per-iteration methods take 1 step"
    )
    batch_size: Positive = 8
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    weight_decay: float = Field(0.0, ge=0)


class ServerConfig(Part):
    """The rounds, and what the server does with their updates."""

    num_rounds: Positive = 30
    cohort_size: Positive = Field(10, description="clients a round")
    optimizer: Literal["sgd", "adagrad", "adam", "yogi"] | None = Field(None, description="the method's by default")
    learning_rate: PositiveFloat | None = Field(None, description="0.01; sgd: 1 on values (the mean), 0.1 on gradients")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    tau: PositiveFloat = Field(1e-3, description="adaptivity: added to the denominator")


class EvaluationConfig(Part):
    """How often the global model is evaluated on the test split."""

    every: Positive = Field(5, description="rounds; the last round is always evaluated")
    batch_size: Positive = 64
    num_samples: int = Field(
        3,
        ge=0,
        description="test rows whose answers go into samples.jsonl at the end, where the task has any",
    )


class ClientsConfig(Part):
    """What the clients' machines are."""

    memory: tuple[Size, ...] = Field(
        (), description="resident memory, dealt to clients in turn: ['700MB', '2GB']; by default it is no matter"
    )


class RuntimeConfig(Part):
    """Where clients run on this machine."""

    num_workers: Positive = Field(1, description="processes; each holds a copy of the model, so 1 for large ones")
    num_threads: Positive | None = Field(None, description="of each process; PyTorch's choice by default")
