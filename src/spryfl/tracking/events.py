"""What a run tells its observers. A round's event is also a line of `events.jsonl`."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class RoundEvent:
    """One round; round 0 is the evaluation before training.

    Attributes:
        loss: clients' mean training loss; None in round 0, and where clients do not tell it.
        accuracy, test_loss, metrics: of the global model on the test split, the task's main metric first; None or
            empty where not evaluated, accuracy also where the task has none.
        bytes_up, bytes_down: of all the round's clients.
        seconds: wall-clock time, evaluation included; client_seconds: computing of all clients;
            client_cpu_seconds: on their processors.
        peak_activation_bytes: the largest measured so far.
        clients: those whose updates were used.
        failures, refused, late: "client: reason"; late are updates of earlier rounds that came in this one.
        failure_kinds: how many of each kind (`federated.failures.FailureKind`), refused ones included.
        untrained: units nobody trained; unheld: units that no client of the cohort has the memory for.
        settings: of each client, where memory is a matter or its estimator is chosen: client, num_tangents,
            chunk_bytes, and of a chosen estimator its name, settings and the reason (`PassSettings`).
        guess_cosine: mean cosine of guessed and true gradients on public text, where the server measured it.
        maps_fitted: whether it fitted the backward maps anew before this round's end.
        num_left_out: updates left out as their gradients vary too much; num_pooled: those that wait for more, so far.
        central_test, generalized, personalized: the main metric on the test split, of the global model on clients'
            held-out rows, and there after each client's local training; None where not evaluated.
        held_out: of the latter two all figures, their spread over clients included (`ClientsEvaluation`).
        epsilon, delta: privacy spent so far (`federated.accounting`); None without privacy.
    """

    round: int
    method: str
    loss: float | None
    accuracy: float | None
    test_loss: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    client_seconds: float
    peak_activation_bytes: int
    num_updates: int
    failures: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    unheld: tuple[str, ...] = ()
    settings: tuple[dict[str, Any], ...] = ()
    client_cpu_seconds: float = 0.0
    guess_cosine: float | None = None
    maps_fitted: bool = False
    clients: tuple[int, ...] = ()
    late: tuple[str, ...] = ()
    failure_kinds: dict[str, int] = field(default_factory=dict)
    num_left_out: int = 0
    num_pooled: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    central_test: float | None = None
    generalized: float | None = None
    personalized: float | None = None
    held_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    epsilon: float | None = None
    delta: float | None = None

    @property
    def score(self) -> float | None:
        """The task's main metric; None where not evaluated."""
        return next(iter(self.metrics.values()), self.accuracy)

    def as_row(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "RoundEvent":
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}
        return cls(**known)


@dataclass(frozen=True)
class Summary:
    """A finished run; the same names as in `summary.json`.

    Attributes:
        metric: the task's main one; accuracy where there is no other. score, score_before: its values at the end and
            before training; accuracy, accuracy_before: None where the task has none.
        metrics: all of them at the end.
        central_test, generalized, personalized, held_out: as in the last round's event; central_test is the score.
        unheld_units: those that no client has the memory for; they stay as they were.
        num_map_fits: how often backward maps were fitted anew.
        client_memory: bytes, dealt to clients in turn; none where memory is no matter.
        privacy: whose; epsilon, delta: what was spent in all.
        date: of the run's end, on the machine's clock; None of runs that are older than this field.
    """

    method: str
    label: str
    model: str
    dataset: str
    adapter: str
    rounds: int
    seed: int
    dtype: str
    estimator: str
    checkpointing: str | None
    num_clients: int
    cohort_size: int
    accuracy_before: float | None
    accuracy: float | None
    loss: float | None
    test_loss: float
    trainable_parameters: int
    bytes_up_per_client_round: float
    bytes_down_per_client_round: float
    bytes_up: int
    bytes_down: int
    peak_activation_bytes: int
    seconds: float
    client_seconds: float
    num_failures: int
    num_refused: int
    run_directory: str
    checkpoint_budget_bytes: int | None = None
    unheld_units: tuple[str, ...] = ()
    client_memory: tuple[int, ...] = ()
    client_cpu_seconds: float = 0.0
    num_map_fits: int = 0
    num_late: int = 0
    metric: str = "accuracy"
    score_before: float | None = None
    score: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    central_test: float | None = None
    generalized: float | None = None
    personalized: float | None = None
    held_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    privacy: str = "none"
    epsilon: float | None = None
    delta: float | None = None
    date: str | None = None

    def as_row(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Summary":
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}
        return cls(**known)


NoteKind = Literal["truncated", "missing_classes"]


@dataclass(frozen=True)
class Note:
    """Something a run's user should know of its data before it trains.

    Attributes:
        about: the data, or how they are shared out: of runs alike in it one need be told.
    """

    kind: NoteKind
    about: str
    text: str


class Observer(Protocol):
    """Someone who is told how a run goes; what a subclass leaves out it does not hear."""

    def started(self, label: str, first_round: int, num_rounds: int) -> None:
        """A run begins, or goes on after `first_round` rounds."""
        return

    def noted(self, note: Note) -> None:
        """Something the run's user should know; of runs on the same data each says it."""
        return

    def before_client(self) -> None:
        """A client is about to train; raising KeyboardInterrupt here stops the run cleanly."""
        return

    def round_finished(self, event: RoundEvent) -> None:
        """A round is done and will be in the checkpoint."""
        return

    def finished(self, summary: Summary) -> None:
        """The run is done."""
        return
