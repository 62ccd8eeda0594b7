"""Where a run stands, from its directory alone: it may be running, stopped or done."""

from collections import Counter
from dataclasses import dataclass

from spryfl.errors import RunDirectoryError
from spryfl.tracking.run_directory import RunDirectory


@dataclass(frozen=True)
class RunStatus:
    """A run so far.

    Attributes:
        finished: whether its summary is written.
        rounds: done, of num_rounds.
        metric, score: the task's main one at the last evaluation.
        clients: partition ids whose updates were used, of num_clients; None where a column decides.
        failures: tasks that ended without an update, by kind (`federated.failures`).
        num_late: updates that came after their round, and were dropped.
        untrained: units that nobody returned in the last round; they go first in the next.
        bytes_up, bytes_down: payload of all rounds.
    """

    method: str
    finished: bool
    rounds: int
    num_rounds: int
    metric: str | None
    score: float | None
    loss: float | None
    clients: tuple[int, ...]
    num_clients: int | None
    num_updates: int
    failures: dict[str, int]
    num_late: int
    untrained: tuple[str, ...]
    bytes_up: int
    bytes_down: int
    seconds: float


def run_status(directory: RunDirectory) -> RunStatus:
    """Read a run's directory.

    Raises:
        RunDirectoryError: there is no run.
    """
    if not directory.config_file.is_file():
        raise RunDirectoryError(f"{directory.path}: no run here: it has no config.toml")
    config, events = directory.read_config(), directory.read_events()
    clients = {client for event in events for client in event.clients}
    kinds: Counter[str] = Counter()
    for event in events:
        kinds.update(event.failure_kinds)
    evaluated = next((event for event in reversed(events) if event.score is not None), None)
    return RunStatus(
        method=config.label or config.method.name,
        finished=directory.summary_file.is_file(),
        rounds=events[-1].round if events else 0,
        num_rounds=config.server.num_rounds,
        metric=None if evaluated is None else next(iter(evaluated.metrics), "accuracy"),
        score=None if evaluated is None else evaluated.score,
        loss=events[-1].loss if events else None,
        clients=tuple(sorted(clients)),
        num_clients=None if config.partition.kind == "column" else config.partition.num_clients,
        num_updates=sum(event.num_updates for event in events),
        failures=dict(sorted(kinds.items())),
        num_late=sum(len(event.late) for event in events),
        untrained=events[-1].untrained if events else (),
        bytes_up=sum(event.bytes_up for event in events),
        bytes_down=sum(event.bytes_down for event in events),
        seconds=sum(event.seconds for event in events),
    )
