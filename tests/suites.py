"""What tests of whole suites share."""

import json
from typing import Any

from spryfl.compare.cells import Suite
from spryfl.tracking.events import Observer, RoundEvent


class Watcher(Observer):
    """Notes what is run; stops before the client of a given number."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.started_labels: list[str] = []
        self.rounds: list[tuple[str, int]] = []
        self._left = stop_before

    def started(self, label: str, first_round: int, num_rounds: int) -> None:
        self.started_labels.append(label)

    def before_client(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt

    def round_finished(self, event: RoundEvent) -> None:
        self.rounds.append((self.started_labels[-1], event.round))


def summary_of(suite: Suite, place: int) -> dict[str, Any]:
    """Of the run of a suite's cell."""
    summary: dict[str, Any] = json.loads((suite.folder(suite.cells()[place]) / "summary.json").read_text())
    return summary
