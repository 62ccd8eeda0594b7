"""The live display of a run, and the table at its end."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from spryfl.tracking.events import Note, Observer, RoundEvent, Summary

WIDE = 92  # columns; narrower terminals go without the bar
_SHORT = {"accuracy": "acc", "perplexity": "ppl"}
EMPTY: dict[str, Any] = {"loss": "", "score": "", "up": "", "down": "", "peak": ""}


class ConsoleObserver(Observer):
    """One line a run: round, loss, accuracy, bytes up and down, activation peak, time left.

    Off a terminal each evaluated round is told instead.

    Args:
        labels: of the runs to come, in order; num_rounds: of each.
        hidden: show nothing at all.
    """

    _tells_rounds = True

    def __init__(self, labels: Sequence[str], num_rounds: Sequence[int], *, hidden: bool) -> None:
        self._console = Console(stderr=True, quiet=hidden)
        self._say = _as_it_stands(self._console)
        bar = (BarColumn(bar_width=12),) if self._console.width >= WIDE else ()
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            *bar,
            MofNCompleteColumn(),
            TextColumn("[yellow]{task.fields[loss]}"),
            TextColumn("[green]{task.fields[score]}"),
            TextColumn("{task.fields[up]}"),
            TextColumn("{task.fields[down]}"),
            TextColumn("[cyan]{task.fields[peak]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._console,
            disable=hidden or not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {
            label: self._progress.add_task(label, total=total, start=False, **EMPTY)
            for label, total in zip(labels, num_rounds, strict=True)
        }
        self._current: TaskID = TaskID(0)
        self._label = ""
        self._up = self._down = 0
        self._unheld: tuple[str, ...] = ()
        self._chosen: set[tuple[str, ...]] = set()
        self._noted: set[tuple[str, str]] = set()

    def __enter__(self) -> "ConsoleObserver":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, label: str, first_round: int, num_rounds: int) -> None:
        """See `Observer.started`."""
        self._label, self._current, self._up, self._down = label, self._tasks[label], 0, 0
        self._progress.start_task(self._current)
        self._progress.update(self._current, completed=first_round)

    def noted(self, note: Note) -> None:
        """See `Observer.noted`; of several runs on the same data the first alone."""
        if (note.kind, note.about) not in self._noted:
            self._noted.add((note.kind, note.about))
            self._say(f"{note.about}: {note.text}")

    def round_finished(self, event: RoundEvent) -> None:
        """See `Observer.round_finished`."""
        self._up += event.bytes_up
        self._down += event.bytes_down
        fields: dict[str, Any] = {
            "up": f"↑{_short(self._up)}",
            "down": f"↓{_short(self._down)}",
            "peak": f"mem {_short(event.peak_activation_bytes)}",
        }
        if event.loss is not None:
            fields["loss"] = f"loss {event.loss:.3f}".replace(" 0.", " .")
        metric = next(iter(event.metrics), "accuracy")
        if event.score is not None:
            fields["score"] = f"{_SHORT.get(metric, metric)} {event.score:.3f}".replace(" 0.", " .")
        self._progress.update(self._current, completed=event.round, **fields)
        for problem in (*event.failures, *event.refused):
            self._say(f"round {event.round}: client {problem}", style="red")
        if event.unheld and event.unheld != self._unheld:
            self._unheld = event.unheld
            text = f"round {event.round}: no client of the cohort has the memory for {', '.join(event.unheld)}"
            self._say(text, style="yellow")
        self._print_choices(event)
        if self._tells_rounds and not self._console.is_terminal and event.score is not None:
            loss = "" if event.loss is None else f", loss {event.loss:.3f}"
            self._say(
                f"{self._label}: round {event.round}{loss}, {metric} {event.score:.3f}, {fields['up']}, "
                f"{fields['down']}, {fields['peak']}"
            )

    def _print_choices(self, event: RoundEvent) -> None:
        """Each chosen estimator of each budget once, with the reason where it was first chosen."""
        for own in event.settings:
            name, _, why = str(own.get("reason", "")).partition(": ")
            key = (name, why.partition(" with ")[0] if why.startswith("fits ") else "")
            if name and (self._label, *key) not in self._chosen:
                self._chosen.add((self._label, *key))
                self._say(f"round {event.round}: client {own['client']} uses {name}: {why}")

    def finished(self, summary: Summary) -> None:
        """See `Observer.finished`."""
        self._progress.stop_task(self._current)


def print_results(summaries: Sequence[Summary], directory: Path, console: Console | None = None) -> None:
    """The table at the end of a run, and where everything lies; on standard output by default."""
    console = console or Console()
    say = _as_it_stands(console)
    console.print(results_table(summaries))
    first = summaries[0]
    say(
        f"{first.model} on {first.dataset}: {first.rounds} rounds, {first.cohort_size} of {first.num_clients} clients "
        f"a round, {first.trainable_parameters:,} trainable parameters, seed {first.seed}",
        soft_wrap=False,
    )
    for summary in summaries:
        for text in _held_out_lines(summary):
            say(text)
    if first.unheld_units:
        say(f"Untrained, as no client has the memory: {', '.join(first.unheld_units)}")
    for s in summaries:
        if s.epsilon is not None:
            say(
                f"{s.label}: differential privacy of each {s.privacy}, epsilon {s.epsilon:.3g} at delta {s.delta:g} "
                "(docs/privacy.md says what that covers)"
            )
    say(f"Run directory: {directory} (adapter/, events.jsonl, summary.json, plots)")


def _as_it_stands(console: Console) -> Callable[..., None]:
    """Prints text as it is: names and reasons may hold brackets, which are no markup."""
    return partial(console.print, highlight=False, soft_wrap=True, markup=False)


def _held_out_lines(summary: Summary) -> list[str]:
    """What clients' own evaluations came to, if there were any."""
    lines = []
    for name, own in summary.held_out.items():
        score = getattr(summary, name)
        if score is not None:
            lines.append(
                f"{summary.label}: {name} {summary.metric} {score:.3f} on {own['num_examples']:,} held-out rows of "
                f"{own['num_clients']:,} clients, whose own are {own['lowest']:.3f} to {own['highest']:.3f}, standard "
                f"deviation {own['std']:.3f}"
            )
        if own["failures"]:
            lines.append(f"{summary.label}: {name}: {len(own['failures'])} clients are missing, {own['failures'][0]}")
    return lines


def results_table(summaries: Sequence[Summary]) -> Table:
    """One row a run; bytes are a client's in one round."""
    metric = summaries[0].metric.capitalize()
    table = Table(
        title=f"{metric} before and after, activation peak, bytes a client sends up and is sent each round",
        title_justify="left",
    )
    table.add_column("method")
    for heading in ("before", "after", "peak", "up", "down", "client time"):
        table.add_column(heading, justify="right")
    for s in summaries:
        table.add_row(
            escape(s.label),
            f"{s.score_before:.3f}",
            f"[bold]{s.score:.3f}",
            decimal(s.peak_activation_bytes),
            decimal(round(s.bytes_up_per_client_round)),
            decimal(round(s.bytes_down_per_client_round)),
            f"{s.client_seconds:.0f} s",
        )
    return table


def _short(count: int) -> str:
    """Bytes in few characters: 4.0MB."""
    return decimal(count).replace(" bytes", "B").replace(" ", "")
