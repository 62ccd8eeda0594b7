"""What goes on record of a run: an event for each round, and its summary."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from spryfl.config import RunConfig
from spryfl.data.task import Evaluation
from spryfl.federated.evaluation import ClientsEvaluation
from spryfl.federated.state import FederatedState, RoundReport
from spryfl.tracking.events import RoundEvent, Summary
from spryfl.tracking.run_directory import RunDirectory
from spryfl.workbench import Workbench


def event_before_training(bench: Workbench, state: FederatedState) -> RoundEvent:
    """Round 0: the untrained model's evaluation."""
    started = time.perf_counter()
    evaluated = bench.evaluate(state.values)
    return RoundEvent(
        round=0,
        method=bench.config.method.name,
        loss=None,
        accuracy=evaluated.metrics.get("accuracy"),
        test_loss=evaluated.loss,
        metrics=dict(evaluated.metrics),
        bytes_up=0,
        bytes_down=0,
        seconds=time.perf_counter() - started,
        client_seconds=0.0,
        peak_activation_bytes=0,
        num_updates=0,
    )


def with_clients(event: RoundEvent, evaluations: Mapping[str, ClientsEvaluation]) -> RoundEvent:
    """An event that also tells how clients do on what they hold out."""
    scores = {name: own.score for name, own in evaluations.items()}
    return replace(
        event,
        central_test=event.score,
        generalized=scores.get("generalized"),
        personalized=scores.get("personalized"),
        held_out={name: own.as_row() for name, own in evaluations.items()},
    )


def round_event(
    config: RunConfig,
    report: RoundReport,
    evaluated: Evaluation | None,
    previous: RoundEvent,
    seconds: float,
) -> RoundEvent:
    """A round's report and what was evaluated after it; the activation peak is that of all rounds so far."""
    return RoundEvent(
        round=report.round,
        method=config.method.name,
        loss=report.loss,
        accuracy=None if evaluated is None else evaluated.metrics.get("accuracy"),
        test_loss=None if evaluated is None else evaluated.loss,
        metrics={} if evaluated is None else dict(evaluated.metrics),
        bytes_up=report.bytes_up,
        bytes_down=report.bytes_down,
        seconds=seconds,
        client_seconds=report.client_seconds,
        client_cpu_seconds=report.client_cpu_seconds,
        peak_activation_bytes=max(report.peak_activation_bytes, previous.peak_activation_bytes),
        num_updates=report.num_updates,
        clients=report.clients,
        failures=tuple(f"{f.client}: {f.reason}" for f in report.failures),
        refused=tuple(f"{f.client}: {f.reason}" for f in report.refused),
        late=tuple(f"{f.client}: {f.reason}" for f in report.late),
        failure_kinds=dict(Counter(f.kind for f in (*report.failures, *report.refused))),
        untrained=report.untrained,
        unheld=report.unheld,
        settings=tuple({"client": client} | own.as_row() for client, own in sorted(report.settings.items())),
        num_left_out=report.num_left_out,
        num_pooled=report.num_pooled,
    )


def summarize(bench: Workbench, label: str, events: Sequence[RoundEvent], directory: RunDirectory) -> Summary:
    """A run's summary, from its events alone and what its configuration says."""
    config = bench.config
    rounds = [event for event in events if event.round > 0]
    client_rounds = sum(event.num_updates for event in rounds)
    asked = sum(event.num_updates + len(event.failures) + len(event.refused) for event in rounds)
    last = events[-1]
    return Summary(
        method=config.method.name,
        label=label,
        model=config.model.name,
        dataset=config.data.name,
        adapter=config.adapter.kind,
        rounds=last.round,
        seed=config.seed,
        dtype=str(bench.adapted.dtype).removeprefix("torch."),
        estimator=config.method.own_estimator,
        checkpointing=config.method.checkpointing if config.method.own_estimator == "backprop" else None,
        checkpoint_budget_bytes=config.method.budget if config.method.own_estimator == "backprop" else None,
        unheld_units=bench.unheld_units,
        client_memory=config.clients.memory,
        num_clients=bench.federation.num_clients,
        cohort_size=bench.federation.cohort_size,
        accuracy_before=events[0].accuracy,
        accuracy=last.accuracy,
        metric=next(iter(last.metrics), "accuracy"),
        score_before=_known(events[0].score),
        score=_known(last.score),
        metrics=last.metrics,
        central_test=last.central_test,
        generalized=last.generalized,
        personalized=last.personalized,
        held_out=last.held_out,
        privacy=config.privacy.level,
        epsilon=last.epsilon,
        delta=last.delta,
        loss=last.loss,
        test_loss=_known(last.test_loss),
        trainable_parameters=bench.adapted.num_trainable,
        bytes_up_per_client_round=sum(event.bytes_up for event in rounds) / client_rounds,
        bytes_down_per_client_round=sum(event.bytes_down for event in rounds) / asked,
        bytes_up=sum(event.bytes_up for event in rounds),
        bytes_down=sum(event.bytes_down for event in rounds),
        peak_activation_bytes=last.peak_activation_bytes,
        seconds=sum(event.seconds for event in events),
        client_seconds=sum(event.client_seconds for event in events),
        client_cpu_seconds=sum(event.client_cpu_seconds for event in events),
        num_map_fits=sum(event.maps_fitted for event in events),
        num_failures=sum(len(event.failures) for event in rounds),
        num_refused=sum(len(event.refused) for event in rounds),
        num_late=sum(len(event.late) for event in rounds),
        run_directory=str(directory.path),
        date=date.today().isoformat(),
    )


def _known(value: float | None) -> float:
    assert value is not None
    return value


def privacy_spent(bench: Workbench, round: int) -> dict[str, Any]:
    """Epsilon and delta after a round, where there is privacy."""
    accountant = bench.accountant
    return {} if accountant is None else {"epsilon": accountant.epsilon(round), "delta": accountant.delta}
