"""From a configuration to a finished run: rounds, events, run directory.

Everything with a side effect is put together here; what it calls is pure or one edge at a time.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spryfl.config import RunConfig
from spryfl.data.task import Evaluation
from spryfl.errors import ConfigError, RunDirectoryError
from spryfl.evaluation import evaluate_clients
from spryfl.federated.choosing import Calibration
from spryfl.federated.evaluation import ClientsEvaluation
from spryfl.federated.messages import Runtime
from spryfl.federated.rounds import FederatedState, Federation, RoundReport, run_round
from spryfl.map_keeper import MapKeeper
from spryfl.report.plots import plot_partition, plot_run
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.runtime.workers import WorkerRuntime
from spryfl.speeds import measure_speeds
from spryfl.tracking.events import Observer, RoundEvent, Summary
from spryfl.tracking.run_directory import RunDirectory
from spryfl.workbench import Workbench

Connect = Callable[[Workbench, Callable[[], None]], AbstractContextManager[Runtime]]
"""(workbench, called where a run may stop) -> where the run's clients run."""


def run(
    config: RunConfig,
    directory: RunDirectory,
    observers: Sequence[Observer],
    label: str,
    connect: Connect | None = None,
) -> Summary:
    """Perform a run, or go on with it from its last checkpoint; a finished one is only read.

    Args:
        config: without regard to its `compare` entries.
        directory: exists; holds the configuration.
        observers: told of every round.
        label: names the run in displays and tables.
        connect: where clients run; on this machine by default.
    """
    finished = directory.read_summary()
    if finished is not None:
        return finished
    if config.runtime.num_threads is not None:
        torch.set_num_threads(config.runtime.num_threads)
    bench = Workbench.from_config(config)
    keeper = MapKeeper.of(bench)
    state = directory.read_checkpoint() or keeper.start(bench.initial_state())
    federation = _federation(bench, keeper, state, directory)
    events = directory.keep_events(state.round if directory.checkpoint_file.exists() else -1)
    for observer in observers:
        observer.started(label, state.round, config.server.num_rounds)
    if config.partition.kind != "own":  # the server does not know what clients hold
        plot_partition(bench.label_counts, directory.path)

    def before_client() -> None:
        for observer in observers:
            observer.before_client()

    with (connect or on_this_machine)(bench, before_client) as runtime:
        if not events:
            event = _before_training(bench, state)
            event = _with_clients(event, evaluate_clients(bench, state, federation, runtime, event.metrics))
            events.append(_announce(event, directory, observers))
            directory.write_checkpoint(state)
        while state.round < config.server.num_rounds:
            started = time.perf_counter()
            state, report = run_round(state, federation, runtime)
            state, cosine, fitted = keeper.keep(state)
            due = state.round % config.evaluation.every == 0 or state.round == config.server.num_rounds
            evaluated = bench.evaluate(state.values) if due else None
            own = {} if evaluated is None else evaluate_clients(bench, state, federation, runtime, evaluated.metrics)
            event = _round_event(config, report, evaluated, events[-1], time.perf_counter() - started)
            event = replace(event, guess_cosine=cosine, maps_fitted=fitted, **_spent(bench, state.round))
            event = _with_clients(event, own)
            events.append(_announce(event, directory, observers))
            directory.write_checkpoint(state)
    directory.write_adapter(lambda folder: bench.save_adapter(state.values, folder))
    directory.write_samples(bench.samples(state.values))
    plot_run(events, label, directory.path)
    summary = summarize(bench, label, events, directory)
    directory.write_summary(summary)
    for observer in observers:
        observer.finished(summary)
    return summary


def run_in(config: RunConfig, folder: Path, observers: Sequence[Observer] = (), label: str | None = None) -> Summary:
    """Perform a run in a folder of its own, or go on with it there; a finished one is only read.

    Raises:
        RunDirectoryError: the folder holds a run of other settings.
    """
    directory = RunDirectory(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hold_to(directory, config)
    return run(directory.read_config(), directory, observers, label or config.label or config.method.name)


def hold_to(directory: RunDirectory, config: RunConfig) -> None:
    """Write the configuration of a new run, or see that the run that is there has the same."""
    if directory.config_file.exists():
        require_same(directory, config)
    else:
        directory.write_config(config)


def require_same(directory: RunDirectory, config: RunConfig) -> None:
    """Refuse to go on with a run whose settings are others than what it was begun with; its display may differ."""
    differing = directory.read_config().differences(config)
    if differing:
        raise RunDirectoryError(
            f"{directory.path} holds a run of other settings ({'; '.join(differing)}): choose another folder, or "
            "remove that one to run it anew"
        )


def _federation(bench: Workbench, keeper: MapKeeper, state: FederatedState, directory: RunDirectory) -> Federation:
    """The workbench's; where clients' estimators are chosen, with what that rests on: measured once a run."""
    choice = bench.client_choice
    if choice is None:
        return bench.federation
    calibration = directory.read_calibration()
    if calibration is None:
        calibration = Calibration(measure_speeds(bench, state), keeper.cosines(state))
        directory.write_calibration(calibration)
    return replace(bench.federation, fit=choice.calibrated(calibration).fit)


@contextmanager
def on_this_machine(bench: Workbench, before_client: Callable[[], None]) -> Iterator[Runtime]:
    """Clients in this process, or in several of this machine."""
    if bench.config.partition.kind == "own":
        raise ConfigError(
            "partition.kind = 'own': clients that bring their own data are other machines': run it over Flower (spry "
            "init --flower DIR), or choose 'dirichlet', 'quantity', 'iid' or 'column'"
        )
    settings = bench.config.runtime
    if settings.num_workers == 1:
        yield InProcessRuntime(bench.client, bench.batch_tokens, before_client)
        return
    make_local = partial(_local_runtime, bench.config)
    workers = WorkerRuntime(make_local, settings.num_workers, settings.num_threads, before_client)
    try:
        yield workers
    finally:
        workers.close()


def _local_runtime(config: RunConfig) -> Runtime:
    """The runtime of a worker process, which loads model and data of its own."""
    bench = Workbench.from_config(config)
    return InProcessRuntime(bench.client, bench.batch_tokens)


def _announce(event: RoundEvent, directory: RunDirectory, observers: Sequence[Observer]) -> RoundEvent:
    directory.append_event(event)
    for observer in observers:
        observer.round_finished(event)
    return event


def _spent(bench: Workbench, round: int) -> dict[str, Any]:
    """Epsilon and delta after a round, where there is privacy."""
    accountant = bench.accountant
    return {} if accountant is None else {"epsilon": accountant.epsilon(round), "delta": accountant.delta}


def _before_training(bench: Workbench, state: FederatedState) -> RoundEvent:
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


def _with_clients(event: RoundEvent, evaluations: Mapping[str, ClientsEvaluation]) -> RoundEvent:
    """An event that also tells how clients do on what they hold out."""
    scores = {name: own.score for name, own in evaluations.items()}
    return replace(
        event,
        central_test=event.score,
        generalized=scores.get("generalized"),
        personalized=scores.get("personalized"),
        held_out={name: own.as_row() for name, own in evaluations.items()},
    )


def _round_event(
    config: RunConfig,
    report: RoundReport,
    evaluated: Evaluation | None,
    previous: RoundEvent,
    seconds: float,
) -> RoundEvent:
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
    )


def _known(value: float | None) -> float:
    assert value is not None
    return value


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local files and folders by absolute path, so that a run can be resumed from anywhere."""

    def absolute(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.resolve()) if path.exists() else name

    parts: dict[str, Any] = {
        "model": config.model.model_copy(update={"name": absolute(config.model.name)}),
        "data": config.data.model_copy(update={"name": absolute(config.data.name)}),
        "guide": config.guide.model_copy(
            update={key: absolute(name) for key in ("maps", "text") if (name := getattr(config.guide, key)) is not None}
        ),
    }
    return config.model_copy(update=parts)
