"""What the round loop passes on: the federation's state, what stays the same in every round, and a round's report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from spryfl.federated.client import LocalTraining
from spryfl.federated.fitting import Fit, PassSettings
from spryfl.federated.messages import ClientFailure
from spryfl.federated.method import Aggregation, Assignment, Pacing, Upload
from spryfl.federated.pacing import Pool
from spryfl.federated.privacy import ClientPrivacy
from spryfl.federated.sampling import Sampling
from spryfl.federated.server_optimizer import Moments, ServerUpdate


@dataclass(frozen=True)
class FederatedState:
    """All that a later round depends on.

    Attributes:
        round: rounds done.
        values: every trainable parameter, float32 on the CPU.
        moments: of the server optimizer.
        maps: backward maps of all layers, for guided tangents.
        last_change: the last mean change of each parameter, where clients choose directions by it.
        pool: what rounds at the present values have gathered, where the server waits for agreement.
        overdue: units that nobody returned in the last round; they are dealt first in the next.
    """

    round: int
    values: dict[str, Tensor]
    moments: Moments = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    last_change: dict[str, Tensor] = field(default_factory=dict)
    pool: Pool = field(default_factory=dict)
    overdue: tuple[str, ...] = ()


@dataclass(frozen=True)
class Federation:
    """What stays the same from round to round.

    Attributes:
        units: unit name -> its parameters, from the lowest layer up.
        shared: units every client of the cohort trains (the head, by default).
        blocks: units that are dealt together; by default each alone.
        rotate: start the cycle of units one further each round; the released code always starts at 0.
        fit: what a client can hold, where memory is a matter.
        places: unit -> the calls of layers it lies in, whose backward maps its clients need.
        trust: the power of its map's cosine by which the step of a unit that trains along a guess is scaled.
        momentum: whether clients are sent the server's momentum of their parameters.
        sizes: examples that each client trains on; empty where the server cannot know.
        by_size: sample cohorts by them, not uniformly.
        pacing, variance_threshold: what becomes of gradients that vary too much (`federated.pacing`).
        deadline_seconds: of each task; None: clients take what time they need.
        quorum: the least share of a round's tasks that must bring a usable update; one update at least.
        max_update_norm: of the change that a client may propose.
        aggregation, trim: of a unit's clients (`aggregation.AGGREGATIONS`).
        clip_norm: to which clients' changes are scaled down; None leaves them.
        privacy: of clients, in place of the aggregation.
    """

    seed: int
    num_clients: int
    cohort_size: int
    units: dict[str, tuple[str, ...]]
    shared: tuple[str, ...]
    assignment: Assignment
    rotate: bool
    upload: Upload
    training: LocalTraining
    server: ServerUpdate
    fit: Fit | None = None
    places: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    trust: float = 0.0
    momentum: bool = False
    blocks: tuple[tuple[str, ...], ...] = ()
    sizes: tuple[int, ...] = ()
    by_size: bool = False
    pacing: Pacing = "none"
    variance_threshold: float = math.inf
    deadline_seconds: float | None = None
    quorum: float = 0.0
    max_update_norm: float | None = None
    aggregation: Aggregation = "mean"
    trim: float = 0.1
    clip_norm: float | None = None
    privacy: ClientPrivacy | None = None

    @cached_property
    def sampling(self) -> Sampling:
        return Sampling(self.num_clients, self.cohort_size, self.sizes if self.by_size else ())


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    Attributes:
        loss: clients' mean training loss, weighted as their updates; None where they do not tell it.
        clients: those whose updates are valid.
        num_left_out: of these, clients whose gradients vary too much.
        num_pooled: updates that wait for more, so far.
        failures: clients that returned nothing.
        refused: clients whose update failed validation, and why.
        late: updates of earlier rounds that came in this one, and were dropped.
        untrained: units nobody trained; they stay as they were.
        unheld: units no client of the cohort has the memory for.
        settings: by client, where memory is a matter or estimators are chosen.
        client_seconds, client_cpu_seconds: the clients' computing time, added up.
    """

    round: int
    loss: float | None
    clients: tuple[int, ...]
    bytes_up: int
    bytes_down: int
    client_seconds: float
    client_cpu_seconds: float
    peak_activation_bytes: int
    failures: tuple[ClientFailure, ...]
    refused: tuple[ClientFailure, ...]
    late: tuple[ClientFailure, ...]
    untrained: tuple[str, ...]
    unheld: tuple[str, ...] = ()
    settings: dict[int, PassSettings] = field(default_factory=dict)
    num_left_out: int = 0
    num_pooled: int = 0

    @property
    def num_updates(self) -> int:
        return len(self.clients)
