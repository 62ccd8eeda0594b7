"""The live display of many runs: how many are done, and the one that is under way."""

from collections.abc import Collection

from spryfl.tracking.console import EMPTY, ConsoleObserver
from spryfl.tracking.events import Summary


class SuiteConsole(ConsoleObserver):
    """Two lines, the suite's runs and the present one; each that is finished is told in a line above them.

    Args:
        labels: of the runs that are left to do; others, such as a search's trials, are shown but not counted.
        hidden: show nothing at all.
    """

    _tells_rounds = False

    def __init__(self, labels: Collection[str], *, hidden: bool) -> None:
        super().__init__(["runs"], [len(labels)], hidden=hidden)
        self._labels = labels
        self._all = self._tasks["runs"]
        self._num_done = 0

    def __enter__(self) -> "SuiteConsole":
        super().__enter__()
        self._progress.start_task(self._all)
        return self

    def started(self, label: str, first_round: int, num_rounds: int) -> None:
        """See `Observer.started`."""
        self._remove_present()  # one that failed never finishes
        self._tasks[label] = self._progress.add_task(label, total=num_rounds, start=False, **EMPTY)
        super().started(label, first_round, num_rounds)

    def finished(self, summary: Summary) -> None:
        """See `Observer.finished`."""
        super().finished(summary)
        self._remove_present()
        done = ""
        if summary.label in self._labels:
            self._num_done += 1
            self._progress.update(self._all, completed=self._num_done)
            done = f"[{self._num_done}/{len(self._labels)}] "
        score = "" if summary.score is None else f"{summary.metric} {summary.score:.3f}, "
        text = f"{done}{summary.label}: {score}{summary.client_cpu_seconds:.0f} s of clients' CPU"
        self._say(text)

    def tell(self, problem: str) -> None:
        """A line above the display."""
        self._say(problem, style="red")

    def _remove_present(self) -> None:
        if self._current != self._all:
            self._progress.remove_task(self._current)
            self._current = self._all
