"""The round loop: the one place that reads top to bottom like the paper's algorithm.

A round takes the federation's state and returns the next; where clients run and what becomes of the
reports is no concern of it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from spryfl.errors import SpryError, UpdateRefusedError
from spryfl.federated.aggregation import Contribution, aggregate, clipped
from spryfl.federated.assignment import assign_units
from spryfl.federated.client import LocalTraining
from spryfl.federated.fitting import Deal, Fit, PassSettings, deal_within
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate, Runtime
from spryfl.federated.method import Aggregation, Assignment, Upload
from spryfl.federated.privacy import ClientPrivacy
from spryfl.federated.sampling import sample_cohort
from spryfl.federated.server_optimizer import Moments, ServerUpdate, momentum_of
from spryfl.federated.validation import validate_update
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
    """

    round: int
    values: dict[str, Tensor]
    moments: Moments = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)


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
    aggregation: Aggregation = "mean"
    trim: float = 0.1
    clip_norm: float | None = None
    privacy: ClientPrivacy | None = None


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    Attributes:
        loss: clients' mean training loss, weighted by examples; None where they do not tell it.
        num_updates: clients whose updates were used.
        failures: clients that returned nothing.
        refused: clients whose update failed validation, and why.
        untrained: units nobody trained; they stay as they were.
        unheld: units no client of the cohort has the memory for.
        settings: by client, where memory is a matter or estimators are chosen.
        seconds: wall-clock time; client_seconds, client_cpu_seconds: the clients' computing time, added up.
    """

    round: int
    loss: float | None
    num_updates: int
    bytes_up: int
    bytes_down: int
    seconds: float
    client_seconds: float
    client_cpu_seconds: float
    peak_activation_bytes: int
    failures: tuple[ClientFailure, ...]
    refused: tuple[ClientFailure, ...]
    untrained: tuple[str, ...]
    unheld: tuple[str, ...] = ()
    settings: dict[int, PassSettings] = field(default_factory=dict)


def run_round(state: FederatedState, federation: Federation, runtime: Runtime) -> tuple[FederatedState, RoundReport]:
    """One round of any method (Spry, algorithm 1).

    Raises:
        SpryError: no client returned a usable update.
    """
    started = time.perf_counter()
    round = state.round + 1

    # 1. Sample the cohort and assign units to its clients, each no more than its memory holds.
    cohort = _cohort(federation, round)
    start = state.round if federation.rotate else 0
    units, shared = list(federation.units), federation.shared
    assigned = assign_units(federation.assignment, units, cohort, start, shared, federation.blocks)
    deal = deal_within(assigned, units, shared, federation.fit)
    if not deal.units:
        raise SpryError(f"round {round}: no client of the cohort has the memory for any unit: raise clients.memory")

    # 2. Send each client the present values, its units' names and the seed.
    tasks = {client: _task(state, federation, client, deal) for client in deal.units}

    # 3. Clients train; what they return is validated before anything else.
    updates, failures, refused = _collect(runtime, list(tasks.values()), federation)
    if not updates:
        reasons = [f"client {f.client}: {f.reason}" for f in (*failures, *refused)]
        raise SpryError(f"round {round}: no client returned a usable update; {'; '.join(reasons[:3])}")

    # 4. Each unit's change: the mean over the clients that trained it, or what else combines them.
    contributions = [
        Contribution(u.client, proposed_change(u, tasks[u.client], federation), u.num_examples) for u in updates
    ]
    change = _combined(contributions, list(tasks.values()), federation)

    # 5. The server optimizer applies it; units nobody trained stay bitwise as they were.
    values, moments = federation.server.apply(state.values, change, state.moments)

    report = RoundReport(
        round=round,
        loss=_mean_loss(updates),
        num_updates=len(updates),
        bytes_up=sum(u.payload_bytes for u in updates),
        bytes_down=sum(task.payload_bytes for task in tasks.values()),
        seconds=time.perf_counter() - started,
        client_seconds=sum(u.seconds for u in updates),
        client_cpu_seconds=sum(u.cpu_seconds for u in updates),
        peak_activation_bytes=max(u.peak_activation_bytes for u in updates),
        failures=tuple(failures),
        refused=tuple(refused),
        untrained=tuple(u for u, parameters in federation.units.items() if not change.keys() & set(parameters)),
        unheld=deal.unheld,
        settings={} if federation.fit is None else deal.settings,
    )
    return replace(state, round=round, values=values, moments=moments), report


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


def _task(state: FederatedState, federation: Federation, client: int, deal: Deal) -> ClientTask:
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
        groups=tangent_groups(federation.training.tangents_per, [federation.units[unit] for unit in units]),
    )


def _cohort(federation: Federation, round: int) -> list[int]:
    """Known to all who know the seed, or, where clients are private, to nobody."""
    if federation.privacy is not None:
        return federation.privacy.sample_cohort(federation.num_clients, federation.cohort_size)
    return sample_cohort(federation.num_clients, federation.cohort_size, federation.seed, round)


def _combined(
    contributions: Sequence[Contribution], tasks: Sequence[ClientTask], federation: Federation
) -> dict[str, Tensor]:
    if federation.privacy is not None:
        asked = [task.parameters for task in tasks]
        return federation.privacy.noisy_mean(contributions, asked, tasks[0].values)
    if federation.clip_norm is not None:
        contributions = [clipped(contribution, federation.clip_norm) for contribution in contributions]
    return aggregate(contributions, federation.aggregation, federation.trim)


def _mean_loss(updates: Sequence[ClientUpdate]) -> float | None:
    told = [(u.loss, u.num_examples) for u in sorted(updates, key=lambda u: u.client) if u.loss is not None]
    return sum(loss * count for loss, count in told) / sum(count for _, count in told) if told else None


def _collect(
    runtime: Runtime, tasks: Sequence[ClientTask], federation: Federation
) -> tuple[list[ClientUpdate], list[ClientFailure], list[ClientFailure]]:
    """Updates that passed validation, clients that failed, and clients whose update was refused."""
    updates: list[ClientUpdate] = []
    failures: list[ClientFailure] = []
    refused: list[ClientFailure] = []
    open_tasks = {task.client: task for task in tasks}
    for answer in runtime.run(tasks):
        if isinstance(answer, ClientFailure):
            failures.append(answer)
            continue
        try:
            task = open_tasks.pop(answer.client, None)
            validate_update(
                answer, task, _slopes_shape(answer, task, federation), tells_loss=federation.training.tells_loss
            )
        except UpdateRefusedError as error:
            refused.append(ClientFailure(answer.client, str(error)))
        else:
            updates.append(answer)
    return updates, failures, refused


def _slopes_shape(update: ClientUpdate, task: ClientTask | None, federation: Federation) -> tuple[int, int] | None:
    if federation.upload != "slopes":
        return None
    training = federation.training
    steps = training.num_steps(update.num_examples) if isinstance(update.num_examples, int) else 1
    if task is None:  # refused for that
        return steps, training.num_tangents
    own = task.settings.num_tangents or training.num_tangents
    return steps, training.directions(task).at_step(0).num_slopes(task.parameters, own)
