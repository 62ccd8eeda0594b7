"""Local training, the server's rounds, evaluation, and the machines they run on."""

from typing import Literal

from pydantic import Field, model_validator

from spryfl.config.part import Part, Positive, PositiveFloat, Size
from spryfl.federated.method import Aggregation, SamplingKind
from spryfl.federated.schedule import ScheduleKind


class LocalConfig(Part):
    """A client's local training."""

    epochs: Positive = Field(
        1, description="passes over a client's examples a round; per-iteration methods take 1 step"
    )
    batch_size: Positive = Field(8, description="examples a step, at most what a client holds")
    optimizer: Literal["sgd", "adam", "adamw"] = Field("adamw", description="of clients, anew each round")
    learning_rate: PositiveFloat = Field(1e-3, description="of clients' steps")
    weight_decay: float = Field(0.0, ge=0, description="adamw: apart from the gradient; sgd, adam: added to it")
    logit_adjustment: float = Field(
        0.0,
        ge=0,
        description="of classes: this times the log of a client's label shares is added to its logits in training, so "
        "that skewed clients agree more; 1 is usual",
    )


class ServerConfig(Part):
    """The rounds, and what the server does with their updates."""

    num_rounds: Positive = Field(30, description="of which each asks a cohort once")
    cohort_size: Positive = Field(10, description="clients a round")
    sampling: SamplingKind = Field(
        "uniform", description="of cohorts: clients alike, or by their number of examples, who then weigh alike"
    )
    optimizer: Literal["sgd", "adagrad", "adam", "yogi"] | None = Field(None, description="the method's by default")
    learning_rate: PositiveFloat | None = Field(None, description="0.01; sgd: 1 on values (the mean), 0.1 on gradients")
    schedule: ScheduleKind = Field("constant", description="of the learning rate over the rounds")
    schedule_rounds: Positive | None = Field(
        None, description="over which the schedule runs: num_rounds by default, more for the beginning of a longer run"
    )
    warmup_rounds: int = Field(0, ge=0, description="in which the learning rate rises evenly")
    beta1: float = Field(0.9, ge=0, lt=1, description="adam, yogi: momentum")
    beta2: float = Field(0.99, ge=0, lt=1, description="adam, yogi: of the second moment")
    tau: PositiveFloat = Field(1e-3, description="adaptivity: added to the denominator")
    deadline_seconds: PositiveFloat | None = Field(
        None, description="a client stops itself when its task takes longer; the round goes on without it"
    )
    quorum: float = Field(
        0.0, ge=0, le=1, description="least share of a round's clients that must bring a usable update; one at least"
    )
    max_update_norm: PositiveFloat | None = Field(
        None, description="an update that moves its parameters further (L2, all together) is refused"
    )
    aggregation: Aggregation = Field(
        "mean", description="of a unit's clients; median and trimmed_mean, of each coordinate, bear a hostile minority"
    )
    trim: float = Field(0.1, gt=0, lt=0.5, description="trimmed_mean: share of values left out at each end, rounded up")
    clip_norm: PositiveFloat | None = Field(
        None, description="scale each client's change down to this L2 norm, over all its units together"
    )

    @model_validator(mode="after")
    def _schedule_covers_the_run(self) -> "ServerConfig":
        if self.own_schedule_rounds < self.num_rounds:
            raise ValueError(
                f"schedule_rounds = {self.schedule_rounds} is less than num_rounds = {self.num_rounds}: raise it, or "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _rounds_are_left_after_the_warmup(self) -> "ServerConfig":
        if self.warmup_rounds >= self.own_schedule_rounds:
            raise ValueError(
                f"warmup_rounds = {self.warmup_rounds} of {self.own_schedule_rounds} rounds: warm up for fewer"
            )
        return self

    @model_validator(mode="after")
    def _trim_belongs_to_trimmed_mean(self) -> "ServerConfig":
        if self.aggregation != "trimmed_mean" and self.trim != type(self).model_fields["trim"].default:
            raise ValueError(f"trim belongs to aggregation = 'trimmed_mean', not '{self.aggregation}': leave it out")
        return self

    @property
    def own_schedule_rounds(self) -> int:
        """What was asked for, or the run's own number."""
        return self.schedule_rounds or self.num_rounds


When = Literal["never", "end", "every"]


class EvaluationConfig(Part):
    """What the global model, and what clients make of it, is evaluated on, and how often."""

    every: Positive = Field(5, description="rounds between evaluations on the test split; the last one always is")
    batch_size: Positive = Field(64, description="examples a pass; changes no score")
    held_out: float = Field(
        0.0, ge=0, lt=1, description="the part of each client's rows kept for its evaluation; 0: all are trained on"
    )
    generalized: When = Field("end", description="the global model on clients' held-out rows; every: as the test split")
    personalized: When = Field("end", description="after each client's local training; costs more than a round")
    max_clients: Positive | None = Field(None, description="evaluated, drawn once from the seed; all by default")
    num_samples: int = Field(
        3,
        ge=0,
        description="test rows whose answers go into samples.jsonl at the end, where the task has any",
    )

    @model_validator(mode="after")
    def _clients_hold_something_out(self) -> "EvaluationConfig":
        asked = [name for name in ("generalized", "personalized") if getattr(self, name) == "every"]
        asked += ["max_clients"] if self.max_clients is not None else []
        if self.held_out == 0 and asked:
            raise ValueError(f"{' and '.join(asked)}: clients hold out no rows to evaluate on; set held_out = 0.2")
        if self.held_out > 0 and self.generalized == self.personalized == "never":
            raise ValueError("held_out keeps rows from training that nothing evaluates: leave it out")
        return self


class ClientsConfig(Part):
    """What the clients' machines are."""

    memory: tuple[Size, ...] = Field(
        (), description="resident memory, dealt to clients in turn: ['700MB', '2GB']; by default it is no matter"
    )


class RuntimeConfig(Part):
    """Where clients run on this machine."""

    num_workers: Positive = Field(1, description="processes; each holds a copy of the model, so 1 for large ones")
    num_threads: Positive | None = Field(None, description="of each process; PyTorch's choice by default")
