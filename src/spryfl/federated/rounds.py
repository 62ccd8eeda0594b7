"""The round loop: the one place that reads top to bottom like the paper's algorithm.

A round takes the federation's state and returns the next; where clients run and what becomes of the
reports is no concern of it.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from spryfl.errors import SpryError, UpdateRefusedError
from spryfl.federated.aggregation import Contribution, weighted_mean
from spryfl.federated.assignment import assign_units
from spryfl.federated.client import LocalTraining
from spryfl.federated.fitting import Deal, Fit, PassSettings, deal_within
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate, Runtime
from spryfl.federated.method import Assignment, Pacing, Upload
from spryfl.federated.pacing import Pool, pooled_mean
from spryfl.federated.sampling import Sampling
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
        last_change: the last mean change of each parameter, where clients choose directions by it.
        pool: what rounds at the present values have gathered, where the server waits for agreement.
    """

    round: int
    values: dict[str, Tensor]
    moments: Moments = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    last_change: dict[str, Tensor] = field(default_factory=dict)
    pool: Pool = field(default_factory=dict)


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

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.num_clients, self.cohort_size, self.sizes)


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    Attributes:
        loss: clients' mean training loss, weighted as their updates.
        num_updates: clients whose updates are valid.
        num_left_out: of these, clients whose gradients vary too much.
        num_pooled: updates that wait for more, so far.
        failures: clients that returned nothing.
        refused: clients whose update failed validation, and why.
        untrained: units nobody trained; they stay as they were.
        unheld: units no client of the cohort has the memory for.
        settings: by client, where memory is a matter or estimators are chosen.
        seconds: wall-clock time; client_seconds, client_cpu_seconds: the clients' computing time, added up.
    """

    round: int
    loss: float
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
    num_left_out: int = 0
    num_pooled: int = 0


def run_round(state: FederatedState, federation: Federation, runtime: Runtime) -> tuple[FederatedState, RoundReport]:
    """One round of any method (Spry, algorithm 1).

    Raises:
        SpryError: no client returned a usable update.
    """
    started = time.perf_counter()
    round = state.round + 1

    # 1. Sample the cohort and assign units to its clients, each no more than its memory holds.
    cohort = federation.sampling.cohort(federation.seed, round)
    start = state.round if federation.rotate else 0
    units, shared = list(federation.units), federation.shared
    assigned = assign_units(federation.assignment, units, cohort, start, shared, federation.blocks)
    deal = deal_within(assigned, units, shared, federation.fit)
    if not deal.units:
        raise SpryError(f"round {round}: no client of the cohort has the memory for any unit: raise clients.memory")

    # 2. Send each client the present values, its units' names and the seed.
    tasks = {client: client_task(state, federation, client, deal) for client in deal.units}

    # 3. Clients train; what they return is validated before anything else.
    updates, failures, refused = _collect(runtime, list(tasks.values()), federation)
    if not updates:
        reasons = [f"client {f.client}: {f.reason}" for f in (*failures, *refused)]
        raise SpryError(f"round {round}: no client returned a usable update; {'; '.join(reasons[:3])}")

    # 4. Each unit's change: the weighted mean over the clients that trained it, if it can be relied on.
    weights = {u.client: federation.sampling.weight(u.client, u.num_examples) for u in updates}
    usable = [u for u in updates if not _varies_too_much(u, federation)]
    contributions = [
        Contribution(u.client, proposed_change(u, tasks[u.client], federation), weights[u.client]) for u in usable
    ]
    change, pool = mean_change(contributions, state.pool, federation)

    # 5. The server optimizer applies it; units nobody trained stay bitwise as they were.
    values, moments = federation.server.apply(state.values, change, state.moments)
    last_change = state.last_change | change if federation.training.num_candidates > 1 else {}

    report = RoundReport(
        round=round,
        loss=sum(u.loss * weights[u.client] for u in sorted(updates, key=lambda u: u.client)) / sum(weights.values()),
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
        num_left_out=len(updates) - len(usable),
        num_pooled=int(pool.get("count", 0)),
    )
    return replace(state, round=round, values=values, moments=moments, last_change=last_change, pool=pool), report


def mean_change(
    contributions: Sequence[Contribution], pool: Pool, federation: Federation
) -> tuple[dict[str, Tensor], Pool]:
    """The change to apply now, and what is kept for the next round's."""
    if federation.pacing == "pool":
        return pooled_mean(pool, contributions, federation.variance_threshold)
    return weighted_mean(contributions), {}


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
    )


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
            validate_update(answer, task, _slopes_shape(answer, task, federation))
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
