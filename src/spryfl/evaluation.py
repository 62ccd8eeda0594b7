"""Which evaluations of clients are due in a run, and having them done where its clients run."""

from collections.abc import Mapping
from dataclasses import replace

from spryfl.config import EvaluationConfig
from spryfl.data.task import NOT_AVERAGED
from spryfl.federated.evaluation import (
    ClientsEvaluation,
    evaluate_generalized,
    evaluate_personalized,
    sample_evaluated,
)
from spryfl.federated.messages import Runtime
from spryfl.federated.state import FederatedState, Federation
from spryfl.workbench import Workbench


def evaluate_clients(
    bench: Workbench, state: FederatedState, federation: Federation, runtime: Runtime, metrics: Mapping[str, float]
) -> dict[str, ClientsEvaluation]:
    """The evaluations of clients that are due in a round whose test split is evaluated, by name.

    Args:
        state: after the round.
        federation: the run's, with what its choice of estimators rests on.
        metrics: of the test split, the task's main one first.
    """
    config, metric = bench.config.evaluation, next(iter(metrics))
    last = state.round == bench.config.server.num_rounds
    holders = [client for client, rows in enumerate(bench.held_out) if len(rows)]
    clients = sample_evaluated(holders, config.max_clients, bench.config.seed)
    known = {} if bench.config.partition.kind == "own" else {client: len(bench.held_out[client]) for client in clients}
    found = {}
    if _is_due(config, "generalized", last):
        limit = federation.deadline_seconds
        found["generalized"] = evaluate_generalized(state, clients, runtime, metric, limit, known)
    if _is_due(config, "personalized", last):
        found["personalized"] = evaluate_personalized(state, federation, clients, runtime, metric, known)
    return {name: _averaged(own, metric) for name, own in found.items()}


def _averaged(own: ClientsEvaluation, metric: str) -> ClientsEvaluation:
    """Without what is no mean over clients."""
    kept = {name: value for name, value in own.metrics.items() if name == metric or name not in NOT_AVERAGED}
    return replace(own, metrics=kept)


def _is_due(config: EvaluationConfig, kind: str, last: bool) -> bool:
    when = getattr(config, kind)
    return config.held_out > 0 and (when == "every" or (when == "end" and last))
