"""The round loop: the one place that reads top to bottom like the paper's algorithm.

A round takes the federation's state and returns the next; where clients run and what becomes of the
reports is no concern of it.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from spryfl.errors import SpryError, UpdateRefusedError
from spryfl.federated.aggregation import Contribution, aggregate, clipped
from spryfl.federated.assignment import assign_units
from spryfl.federated.client import LocalTraining
from spryfl.federated.fitting import Deal, Fit, PassSettings, deal_within
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate, Runtime
from spryfl.federated.method import Aggregation, Assignment, Pacing, Upload
from spryfl.federated.pacing import Pool, pooled_mean
from spryfl.federated.privacy import ClientPrivacy
from spryfl.federated.sampling import Sampling
from spryfl.federated.server_optimizer import Moments, ServerUpdate, momentum_of
from spryfl.federated.validation import require_norm, validate_update
from spryfl.gradients.estimator import gradient_from_slopes
from spryfl.gradients.guesses import maps_for
from spryfl.gradients.tangents import tangent_groups


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
        momentum: whether clients are sent the server's momentum of their parameters.
        sizes: examples of each client, where cohorts are sampled by size; empty for uniform cohorts.
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
    momentum: bool = False
    blocks: tuple[tuple[str, ...], ...] = ()
    sizes: tuple[int, ...] = ()
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
        return Sampling(self.num_clients, self.cohort_size, self.sizes)


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
        seconds: wall-clock time; client_seconds, client_cpu_seconds: the clients' computing time, added up.
    """

    round: int
    loss: float | None
    clients: tuple[int, ...]
    bytes_up: int
    bytes_down: int
    seconds: float
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


def run_round(state: FederatedState, federation: Federation, runtime: Runtime) -> tuple[FederatedState, RoundReport]:
    """One round of any method (Spry, algorithm 1).

    Raises:
        SpryError: fewer clients than the quorum returned a usable update.
    """
    started = time.perf_counter()
    round = state.round + 1

    # 1. Sample the cohort and assign units to its clients, each no more than its memory holds.
    cohort = _cohort(federation, round)
    start = state.round if federation.rotate else 0
    units, shared = list(federation.units), federation.shared
    assigned = assign_units(federation.assignment, units, cohort, start, shared, federation.blocks, state.overdue)
    deal = deal_within(assigned, units, shared, federation.fit)
    if not deal.units:
        raise SpryError(f"round {round}: no client of the cohort has the memory for any unit: raise clients.memory")

    # 2. Send each client the present values, its units' names and the seed.
    tasks = {client: client_task(state, federation, client, deal) for client in deal.units}

    # 3. Clients train; what they return is validated before anything else.
    answers = _collect(runtime, list(tasks.values()), federation)
    _require_quorum(round, answers, len(tasks), federation.quorum)

    # 4. Each unit's change: the weighted mean over the clients that trained it, or what else combines them.
    change, pool = combined_change(answers.contributions, list(tasks.values()), state.pool, federation)

    # 5. The server optimizer applies it; units nobody trained stay bitwise as they were.
    values, moments = federation.server.apply(state.values, change, state.moments)
    last_change = state.last_change | change if federation.training.num_candidates > 1 else {}

    updates = answers.updates
    untrained = tuple(u for u, parameters in federation.units.items() if not change.keys() & set(parameters))
    report = RoundReport(
        round=round,
        loss=_mean_loss(updates, federation.sampling),
        clients=tuple(sorted(u.client for u in updates)),
        bytes_up=sum(u.payload_bytes for u in updates),
        bytes_down=sum(task.payload_bytes for task in tasks.values()),
        seconds=time.perf_counter() - started,
        client_seconds=sum(u.seconds for u in updates),
        client_cpu_seconds=sum(u.cpu_seconds for u in updates),
        peak_activation_bytes=max(u.peak_activation_bytes for u in updates),
        failures=tuple(answers.failures),
        refused=tuple(answers.refused),
        late=tuple(answers.late),
        untrained=untrained,
        unheld=deal.unheld,
        settings={} if federation.fit is None else deal.settings,
        num_left_out=len(updates) - len(answers.contributions),
        num_pooled=int(pool.get("count", 0)),
    )
    overdue = tuple(unit for unit in untrained if unit not in deal.unheld)
    return replace(
        state, round=round, values=values, moments=moments, overdue=overdue, last_change=last_change, pool=pool
    ), report


def combined_change(
    contributions: Sequence[Contribution], tasks: Sequence[ClientTask], pool: Pool, federation: Federation
) -> tuple[dict[str, Tensor], Pool]:
    """The change to apply now, and what is kept for the next round's."""
    if federation.privacy is not None:
        asked = [task.parameters for task in tasks]
        return federation.privacy.noisy_mean(contributions, asked, tasks[0].values), {}
    if federation.clip_norm is not None:
        contributions = [clipped(contribution, federation.clip_norm) for contribution in contributions]
    if federation.pacing == "pool":
        return pooled_mean(pool, contributions, federation.variance_threshold)
    return aggregate(contributions, federation.aggregation, federation.trim), {}


def _varies_too_much(update: ClientUpdate, federation: Federation) -> bool:
    own = update.variance
    return federation.pacing == "leave_out" and own is not None and own > federation.variance_threshold


def proposed_change(update: ClientUpdate, task: ClientTask, federation: Federation) -> dict[str, Tensor]:
    """What a validated update proposes: trained minus old values, or minus one step's gradient.

    From slopes alone the server rebuilds the client's gradients, and for methods that train for an
    epoch replays its local optimizer over them.
    """
    training = federation.training
    old = {name: task.values[name] for name in task.parameters}
    if update.slopes is not None:
        directions = training.directions(task)
        shapes = {name: value.shape for name, value in old.items()}
        optimizer = training.new_optimizer(old)
        for step, slopes in enumerate(update.slopes):
            gradients = gradient_from_slopes(slopes, shapes, directions.at_step(step))
            if training.pace == "iteration":
                return {name: -gradient for name, gradient in gradients.items()}
            optimizer.step(gradients)
        return {name: optimizer.values[name] - value for name, value in old.items()}
    if task.upload == "gradients":
        return {name: -gradient for name, gradient in update.tensors.items()}
    return {name: update.tensors[name] - value for name, value in old.items()}


def client_task(state: FederatedState, federation: Federation, client: int, deal: Deal) -> ClientTask:
    """What the server asks of a client in the next round."""
    units = deal.units[client]
    parameters = tuple(name for unit in units for name in federation.units[unit])
    return ClientTask(
        round=state.round + 1,
        client=client,
        seed=federation.seed,
        units=tuple(units),
        parameters=parameters,
        values=state.values,
        upload=federation.upload,
        settings=deal.settings[client],
        maps=maps_for(state.maps, {place for unit in units for place in federation.places.get(unit, ())}),
        momentum=momentum_of(state.moments, parameters) if federation.momentum else {},
        last_change={name: state.last_change[name] for name in parameters if name in state.last_change},
        groups=tangent_groups(federation.training.tangents_per, [federation.units[unit] for unit in units]),
        deadline_seconds=federation.deadline_seconds,
    )


def _cohort(federation: Federation, round: int) -> list[int]:
    """Known to all who know the seed, or, where clients are private, to nobody."""
    if federation.privacy is not None:
        return federation.privacy.sample_cohort(federation.num_clients, federation.cohort_size)
    return federation.sampling.cohort(federation.seed, round)


def _mean_loss(updates: Sequence[ClientUpdate], sampling: Sampling) -> float | None:
    told = {u.client: (u.loss, sampling.weight(u.client, u.num_examples)) for u in updates if u.loss is not None}
    total = sum(weight for _, weight in told.values())
    return sum(loss * weight for _, (loss, weight) in sorted(told.items())) / total if told else None


@dataclass
class _Answers:
    """A round's updates that passed validation with what they propose, and what became of the other tasks."""

    updates: list[ClientUpdate] = field(default_factory=list)
    contributions: list[Contribution] = field(default_factory=list)
    failures: list[ClientFailure] = field(default_factory=list)
    refused: list[ClientFailure] = field(default_factory=list)
    late: list[ClientFailure] = field(default_factory=list)


def _collect(runtime: Runtime, tasks: Sequence[ClientTask], federation: Federation) -> _Answers:
    """Everything that comes back, validated and sorted; each task ends in an update, a failure or a refusal."""
    found = _Answers()
    open_tasks = {task.client: task for task in tasks}
    for answer in runtime.run(tasks):
        if isinstance(answer, ClientFailure):
            open_tasks.pop(answer.client, None)
            (found.refused if answer.kind == "refused" else found.failures).append(answer)
            continue
        if isinstance(answer.round, int) and 1 <= answer.round < tasks[0].round:
            found.late.append(ClientFailure(answer.client, f"its update of round {answer.round} came too late"))
            continue
        task = open_tasks.pop(answer.client, None)
        try:
            validate_update(
                answer, task, _slopes_shape(answer, task, federation), tells_loss=federation.training.tells_loss
            )
            assert task is not None
            change = proposed_change(answer, task, federation)
            require_norm(change, federation.max_update_norm)
        except UpdateRefusedError as error:
            found.refused.append(ClientFailure(answer.client, str(error), "refused"))
        else:
            found.updates.append(answer)
            if not _varies_too_much(answer, federation):
                weight = federation.sampling.weight(answer.client, answer.num_examples)
                found.contributions.append(Contribution(answer.client, change, weight))
    found.failures += [ClientFailure(client, "no answer came", "lost") for client in open_tasks]
    return found


def _require_quorum(round: int, answers: _Answers, num_tasks: int, quorum: float) -> None:
    needed = max(1, math.ceil(quorum * num_tasks))
    if len(answers.updates) >= needed:
        return
    reasons = "; ".join(f"client {f.client}: {f.reason}" for f in (*answers.failures, *answers.refused)[:3])
    if needed == 1:
        raise SpryError(f"round {round}: no client returned a usable update; {reasons}")
    raise SpryError(
        f"round {round}: {len(answers.updates)} of {num_tasks} clients returned a usable update, server.quorum = "
        f"{quorum:g} asks for {needed}; {reasons}. Go on from round {round - 1} later, or lower the quorum"
    )


def _slopes_shape(update: ClientUpdate, task: ClientTask | None, federation: Federation) -> tuple[int, int] | None:
    if federation.upload != "slopes":
        return None
    training = federation.training
    steps = training.num_steps(update.num_examples) if isinstance(update.num_examples, int) else 1
    if task is None:  # refused for that
        return steps, training.num_tangents
    own = task.settings.num_tangents or training.num_tangents
    return steps, training.directions(task).at_step(0).num_slopes(task.parameters, own)
