"""The round loop: the one place that reads top to bottom like the paper's algorithm.

A round takes the federation's state and returns the next; where clients run and what becomes of the
reports is no concern of it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from spryfl.errors import SpryError
from spryfl.federated.aggregation import Contribution, aggregate, clipped
from spryfl.federated.answers import Answers, collect_answers
from spryfl.federated.assignment import assign_units
from spryfl.federated.fitting import Deal, deal_within
from spryfl.federated.messages import ClientTask, ClientUpdate, Runtime
from spryfl.federated.pacing import Pool, pooled_mean
from spryfl.federated.sampling import Sampling
from spryfl.federated.server_optimizer import momentum_of
from spryfl.federated.state import FederatedState, Federation, RoundReport
from spryfl.gradients.guesses import cosines_of, maps_for
from spryfl.gradients.tangents import tangent_groups


def run_round(state: FederatedState, federation: Federation, runtime: Runtime) -> tuple[FederatedState, RoundReport]:
    """One round of any method (Spry, algorithm 1).

    Raises:
        SpryError: fewer clients than the quorum returned a usable update.
    """
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
    answers = collect_answers(runtime, list(tasks.values()), federation)
    _require_quorum(round, answers, len(tasks), federation.quorum)

    # 4. Each unit's change: the weighted mean over the clients that trained it, or what else combines them.
    change, pool = combined_change(answers.contributions, list(tasks.values()), state.pool, federation)

    # 5. The server optimizer applies it; units nobody trained stay bitwise as they were.
    server = federation.server.at(round)
    values, moments = server.apply(state.values, change, state.moments, trusted_steps(state, federation))
    last_change = state.last_change | change if federation.training.num_candidates > 1 else {}

    updates = answers.updates
    pooled = int(pool.get("count", 0))  # what was trained then waits for the rounds to come
    untrained = tuple(u for u, own in federation.units.items() if not pooled and not change.keys() & set(own))
    report = RoundReport(
        round=round,
        loss=_mean_loss(updates, federation.sampling),
        clients=tuple(sorted(u.client for u in updates)),
        bytes_up=answers.bytes_up,
        bytes_down=sum(task.payload_bytes for task in tasks.values()),
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
        num_pooled=pooled,
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


def trusted_steps(state: FederatedState, federation: Federation) -> dict[str, float]:
    """Parameter -> by how much its step is scaled: cosine ** trust, of units whose gradient comes from a guess.

    Along a direction at cosine c to the gradient g a step of c |g| / L lowers a loss of curvature L the most, and
    adaptive servers take steps of one size whatever the guess is worth.
    """
    if federation.trust == 0:
        return {}
    cosines = cosines_of(state.maps)
    scales: dict[str, float] = {}
    for unit, places in federation.places.items():
        guessed = [max(cosines[place], 0.0) for place in places if place in cosines]
        if guessed:
            scales |= dict.fromkeys(federation.units[unit], min(guessed) ** federation.trust)
    return scales


def client_task(state: FederatedState, federation: Federation, client: int, deal: Deal) -> ClientTask:
    """What the server asks of a client in the next round."""
    units = deal.units[client]
    parameters = tuple(name for unit in units for name in federation.units[unit])
    settings = deal.settings[client]
    guided = settings.estimator in (None, "guided")  # others would not look at what guides
    guessed = {place for unit in units for place in federation.places.get(unit, ())} if guided else set()
    return ClientTask(
        round=state.round + 1,
        client=client,
        seed=federation.seed,
        units=tuple(units),
        parameters=parameters,
        values=state.values,
        upload=federation.upload,
        settings=settings,
        maps=maps_for(state.maps, guessed),
        momentum=momentum_of(state.moments, parameters) if federation.momentum and guided else {},
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


def _require_quorum(round: int, answers: Answers, num_tasks: int, quorum: float) -> None:
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
