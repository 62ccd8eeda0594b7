"""Tidy results: one row a finished run, and what it took to reach a target."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from spryfl.compare.cells import Cell, Suite
from spryfl.compare.search import read_outcome
from spryfl.data.task import LOWER_IS_BETTER
from spryfl.files import write_atomically
from spryfl.tracking.events import RoundEvent
from spryfl.tracking.run_directory import RunDirectory


@dataclass(frozen=True)
class Reached:
    """The first evaluated round whose score is as good as a target, and all it took up to its end.

    Attributes:
        num_bytes: up and down together.
        client_seconds, client_cpu_seconds: of all clients; seconds: wall-clock time, evaluation included.
    """

    round: int
    client_seconds: float
    client_cpu_seconds: float
    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class ResultRow:
    """One run of a suite, by the names of the Parquet file's columns.

    Attributes:
        dataset, variant: the names of the suite's entries; method: the federated method's own name.
        alpha: of the Dirichlet partition; None where there is no such.
        generalized: the global model on clients' held-out parts; personalized: after local training; central_test: the
            global model on the test split. All are the metric's; None where not evaluated.
        metrics: all that the task has of the global model on the test split, by name, as JSON.
        bytes_up, bytes_down: of all clients in all rounds.
        rounds_to_target and those beside it: None where no target is set or it was not reached.
        date: of the run's end, on the machine's clock.
        search_trials: that chose `settings`, the settings found; 0 where none were searched.
    """

    dataset: str
    model: str
    method: str
    variant: str
    label: str
    adapter: str
    alpha: float | None
    seed: int
    rounds: int
    metric: str
    generalized: float | None
    personalized: float | None
    central_test: float | None
    metrics: str
    loss: float | None
    client_seconds: float
    client_cpu_seconds: float
    seconds: float
    bytes_up: int
    bytes_down: int
    activation_peak_bytes: int
    target: float | None
    rounds_to_target: int | None
    client_seconds_to_target: float | None
    client_cpu_seconds_to_target: float | None
    seconds_to_target: float | None
    bytes_to_target: int | None
    date: str
    search_trials: int
    settings: str


@dataclass(frozen=True)
class Result:
    """A finished run of a suite: its row, and its rounds for curves."""

    row: ResultRow
    events: tuple[RoundEvent, ...]


def read_results(suite: Suite) -> list[Result]:
    """Every finished run of a suite, in the order of its file."""
    return [found for cell in suite.cells() if (found := _result(suite, cell)) is not None]


def reached(events: Sequence[RoundEvent], target: float, metric: str) -> Reached | None:
    """When a run's score first was as good as a target; None if it never was."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    first = next((e.round for e in events if e.score is not None and sign * e.score >= sign * target), None)
    if first is None:
        return None
    until = [event for event in events if event.round <= first]
    return Reached(
        round=first,
        client_seconds=sum(event.client_seconds for event in until),
        client_cpu_seconds=sum(event.client_cpu_seconds for event in until),
        seconds=sum(event.seconds for event in until),
        num_bytes=sum(event.bytes_up + event.bytes_down for event in until),
    )


def write_parquet(rows: Sequence[ResultRow], path: Path) -> None:
    """All rows, with the types of `ResultRow` even where a column is empty."""
    import pyarrow
    from pyarrow import parquet

    kinds: dict[Any, Any] = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64()}

    def column(annotation: Any) -> Any:
        inner = next((kind for kind in get_args(annotation) if kind is not NoneType), annotation)
        return kinds[inner]

    schema = pyarrow.schema([(field.name, column(field.type)) for field in fields(ResultRow)])
    table = pyarrow.Table.from_pylist([asdict(row) for row in rows], schema=schema)
    written = pyarrow.BufferOutputStream()
    parquet.write_table(table, written)
    write_atomically(path, written.getvalue().to_pybytes())


def _result(suite: Suite, cell: Cell) -> Result | None:
    directory = RunDirectory(suite.folder(cell))
    summary = directory.read_summary()
    if summary is None:
        return None
    events, config = directory.read_events(), directory.read_config()
    target = cell.dataset.target
    there = None if target is None else reached(events, target, summary.metric)
    outcome = read_outcome(suite, cell)
    row = ResultRow(
        dataset=cell.dataset.name,
        model=summary.model,
        method=summary.method,
        variant=cell.method.name,
        label=cell.method.shown,
        adapter=summary.adapter,
        alpha=config.partition.alpha if config.partition.kind == "dirichlet" else None,
        seed=cell.seed,
        rounds=summary.rounds,
        metric=summary.metric,
        generalized=summary.generalized,
        personalized=summary.personalized,
        central_test=summary.score,
        metrics=json.dumps(summary.metrics),
        loss=summary.loss,
        client_seconds=summary.client_seconds,
        client_cpu_seconds=summary.client_cpu_seconds,
        seconds=summary.seconds,
        bytes_up=summary.bytes_up,
        bytes_down=summary.bytes_down,
        activation_peak_bytes=summary.peak_activation_bytes,
        target=target,
        rounds_to_target=None if there is None else there.round,
        client_seconds_to_target=None if there is None else there.client_seconds,
        client_cpu_seconds_to_target=None if there is None else there.client_cpu_seconds,
        seconds_to_target=None if there is None else there.seconds,
        bytes_to_target=None if there is None else there.num_bytes,
        date=summary.date or date.fromtimestamp(directory.summary_file.stat().st_mtime).isoformat(),
        search_trials=0 if outcome is None else len(outcome.trials),
        settings=json.dumps({} if outcome is None else outcome.settings, sort_keys=True),
    )
    return Result(row, tuple(events))
