"""From a configuration to a finished run: rounds, events, run directory.

Everything with a side effect is put together here; what it calls is pure or one edge at a time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spryfl.config import RunConfig
from spryfl.errors import ConfigError, RunDirectoryError
from spryfl.evaluation import evaluate_clients
from spryfl.federated.choosing import Calibration
from spryfl.federated.messages import Runtime
from spryfl.federated.rounds import run_round
from spryfl.federated.state import FederatedState, Federation
from spryfl.map_keeper import MapKeeper
from spryfl.record import event_before_training, privacy_spent, round_event, summarize, with_clients
from spryfl.report.plots import plot_partition, plot_run
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.runtime.workers import WorkerRuntime
from spryfl.speeds import measure_speeds
from spryfl.tracking.events import Note, NoteKind, Observer, RoundEvent, Summary
from spryfl.tracking.lock import held
from spryfl.tracking.run_directory import RunDirectory
from spryfl.workbench import Workbench

_PATHS = {"model": ("name",), "data": ("name",), "guide": ("maps", "text")}
"""Settings that may be local files or folders."""

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

    Raises:
        RunDirectoryError: another process is at work on it.
    """
    finished = directory.read_summary()
    if finished is not None:
        return finished
    with held(directory.path):
        return _perform(config, directory, observers, label, connect or on_this_machine)


def _perform(
    config: RunConfig, directory: RunDirectory, observers: Sequence[Observer], label: str, connect: Connect
) -> Summary:
    """See `run`."""
    if config.runtime.num_threads is not None:
        torch.set_num_threads(config.runtime.num_threads)
    bench = Workbench.from_config(config)
    keeper = MapKeeper.of(bench)
    begun = time.perf_counter()
    state = directory.read_checkpoint() or keeper.start(bench.initial_state())
    fitting = time.perf_counter() - begun
    federation = _federation(bench, keeper, state, directory)
    events = directory.keep_events(state.round if directory.checkpoint_file.exists() else -1)
    for observer in observers:
        observer.started(label, state.round, config.server.num_rounds)
        for note in _notes(bench):
            observer.noted(note)
    if config.partition.kind != "own":  # the server does not know what clients hold
        plot_partition(bench.label_counts, directory.path)

    def before_client() -> None:
        for observer in observers:
            observer.before_client()

    with connect(bench, before_client) as runtime:
        if not events:
            event = event_before_training(bench, state)
            event = replace(event, seconds=event.seconds + fitting)  # the first maps, as later ones are a round's
            event = with_clients(event, evaluate_clients(bench, state, federation, runtime, event.metrics))
            events.append(_announce(event, directory, observers))
            directory.write_checkpoint(state)
        while state.round < config.server.num_rounds:
            started = time.perf_counter()
            state, report = run_round(state, federation, runtime)
            state, cosine, fitted = keeper.keep(state)
            due = state.round % config.evaluation.every == 0 or state.round == config.server.num_rounds
            evaluated = bench.evaluate(state.values) if due else None
            own = {} if evaluated is None else evaluate_clients(bench, state, federation, runtime, evaluated.metrics)
            event = round_event(config, report, evaluated, events[-1], time.perf_counter() - started)
            event = replace(event, guess_cosine=cosine, maps_fitted=fitted, **privacy_spent(bench, state.round))
            event = with_clients(event, own)
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


def _notes(bench: Workbench) -> list[Note]:
    """What there is to know of the data; what clients bring of their own the server does not know."""
    data, partition = bench.config.data.name, bench.config.partition
    own = partition.kind == "own"
    alpha = f" {partition.alpha:g}" if partition.kind in ("dirichlet", "quantity") else ""
    told: list[tuple[NoteKind, str, str | None]] = [
        ("truncated", data, bench.truncated("test") if own else bench.truncated("train", "test")),
        ("missing_classes", f"{data}, {partition.kind}{alpha}", None if own else bench.missing_classes),
    ]
    return [Note(kind, about, text) for kind, about, text in told if text is not None]


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


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local files and folders by absolute path, so that a run can be resumed from anywhere."""

    def absolute(name: Any) -> Any:
        path = Path(name).expanduser() if isinstance(name, str) else None
        return name if path is None or not path.exists() else str(path.resolve())

    parts: dict[str, Any] = {}
    for part, keys in _PATHS.items():
        own = getattr(config, part)
        parts[part] = own.model_copy(update={key: absolute(getattr(own, key)) for key in keys})
    dotted = {f"{part}.{key}" for part, keys in _PATHS.items() for key in keys}
    parts["compare"] = tuple(
        entry.model_copy(update={"set": {k: absolute(v) if k in dotted else v for k, v in entry.set.items()}})
        for entry in config.compare
    )
    return config.model_copy(update=parts)
