"""How clients do on rows they hold out: the global model ("generalized"), and after local training ("personalized").

As in Spry's experiments (Panchal et al. 2024): means over clients, weighted by their held-out examples. Beside them
stands how much clients differ, each counted once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from spryfl.errors import UpdateRefusedError
from spryfl.federated.assignment import assign_units
from spryfl.federated.fitting import deal_within
from spryfl.federated.messages import ClientEvaluation, ClientFailure, ClientTask, EvaluationTask, Runtime
from spryfl.federated.rounds import client_task
from spryfl.federated.state import FederatedState, Federation
from spryfl.federated.validation import MAX_EXAMPLES, validate_evaluation

_STREAM = 3  # keeps the evaluated clients independent of the other things drawn from the run's seed


@dataclass(frozen=True)
class ClientsEvaluation:
    """How some clients do on rows they hold out.

    Attributes:
        loss, metrics: means weighted by examples, the task's main metric first; None and empty if no client answered.
        std, lowest, highest: of the main metric over these clients, each counted once (std over all of them, n in
            its denominator).
        failures: "client: reason" of those that are missing here.
    """

    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    std: float | None = None
    lowest: float | None = None
    highest: float | None = None
    num_clients: int = 0
    num_examples: int = 0
    failures: tuple[str, ...] = ()

    @property
    def score(self) -> float | None:
        """The task's main metric."""
        return next(iter(self.metrics.values()), None)

    def as_row(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return asdict(self) | {"failures": list(self.failures)}


def sample_evaluated(clients: Sequence[int], max_clients: int | None, seed: int) -> list[int]:
    """The clients that are evaluated: the same at every evaluation, so that figures of a run can be compared."""
    if max_clients is None or max_clients >= len(clients):
        return list(clients)
    bits = np.random.Philox(key=seed, counter=np.array([0, 0, _STREAM, 0], dtype=np.uint64))
    return sorted(np.random.Generator(bits).choice(clients, size=max_clients, replace=False).tolist())


def evaluate_generalized(
    state: FederatedState,
    clients: Sequence[int],
    runtime: Runtime,
    metric: str,
    deadline_seconds: float | None = None,
    most_examples: Mapping[int, int] = MappingProxyType({}),
) -> ClientsEvaluation:
    """The present values on what each client holds out.

    Args:
        metric: the task's main one.
        most_examples: by client, how many it can have held out; any number of those that are not in it.
        deadline_seconds: of each client; who takes longer is missing.
    """
    limit = deadline_seconds
    tasks = [EvaluationTask(state.round, client, state.values, deadline_seconds=limit) for client in clients]
    return _evaluate(tasks, runtime, metric, (), most_examples)


def evaluate_personalized(
    state: FederatedState,
    federation: Federation,
    clients: Sequence[int],
    runtime: Runtime,
    metric: str,
    most_examples: Mapping[int, int] = MappingProxyType({}),
) -> ClientsEvaluation:
    """What each client makes of the present values by training as in the next round, on what it holds out.

    The server keeps nothing of it.
    """
    trainings, unable = _trainings(state, federation, clients)
    tasks = [EvaluationTask(state.round, t.client, state.values, t, t.deadline_seconds) for t in trainings]
    failures = [ClientFailure(client, "it has the memory for no unit") for client in unable]
    return _evaluate(tasks, runtime, metric, failures, most_examples)


def _trainings(
    state: FederatedState, federation: Federation, clients: Sequence[int]
) -> tuple[list[ClientTask], list[int]]:
    """What each client would train if it were in the next round's cohort; clients that can train nothing.

    Clients take the places of a cohort in turn, as many as it has, so that each gets as many units as in a round.
    """
    units, shared = list(federation.units), federation.shared
    start, size = state.round if federation.rotate else 0, federation.cohort_size
    by_place = assign_units(federation.assignment, units, range(size), start, shared, federation.blocks)
    tasks = []
    for first in range(0, len(clients), size):
        assigned = {client: by_place[place] for place, client in enumerate(clients[first : first + size])}
        deal = deal_within(assigned, units, shared, federation.fit)
        tasks += [replace(client_task(state, federation, client, deal), upload="values") for client in deal.units]
    able = {task.client for task in tasks}
    return tasks, [client for client in clients if client not in able]


def _evaluate(
    tasks: Sequence[EvaluationTask],
    runtime: Runtime,
    metric: str,
    unable: Sequence[ClientFailure],
    most_examples: Mapping[int, int],
) -> ClientsEvaluation:
    """Gather the clients' evaluations; one that is malformed, or never comes, counts as a failure."""
    open_tasks = {task.client: task for task in tasks}
    valid, failures = [], list(unable)
    for answer in runtime.evaluate(tasks):
        if isinstance(answer, ClientFailure):
            open_tasks.pop(answer.client, None)
            failures.append(answer)
            continue
        try:
            most = most_examples.get(answer.client, MAX_EXAMPLES)
            validate_evaluation(answer, open_tasks.pop(answer.client, None), metric, most)
        except UpdateRefusedError as error:
            failures.append(ClientFailure(answer.client, str(error)))
        else:
            valid.append(answer)
    failures += [ClientFailure(client, "no answer came", "lost") for client in open_tasks]
    return _summarize(valid, metric, failures)


def _summarize(
    evaluations: Sequence[ClientEvaluation], metric: str, failures: Sequence[ClientFailure]
) -> ClientsEvaluation:
    """Means and spread, in the order of clients, so that the order of arrival changes no last bit."""
    named = tuple(f"{failure.client}: {failure.reason}" for failure in sorted(failures, key=lambda f: f.client))
    if not evaluations:
        return ClientsEvaluation(failures=named)
    ordered = sorted(evaluations, key=lambda evaluation: evaluation.client)
    weights = np.array([evaluation.num_examples for evaluation in ordered], dtype=np.float64)
    names = [metric, *(name for name in ordered[0].metrics if name != metric)]
    common = [name for name in names if all(name in evaluation.metrics for evaluation in ordered)]
    main = np.array([evaluation.metrics[metric] for evaluation in ordered])
    return ClientsEvaluation(
        loss=float(np.average([evaluation.loss for evaluation in ordered], weights=weights)),
        metrics={
            name: float(np.average([evaluation.metrics[name] for evaluation in ordered], weights=weights))
            for name in common
        },
        std=float(main.std()) if np.isfinite(main).all() else np.inf,
        lowest=float(main.min()),
        highest=float(main.max()),
        num_clients=len(ordered),
        num_examples=int(weights.sum()),
        failures=named,
    )
