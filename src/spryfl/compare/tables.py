"""The tables of a suite: each dataset's scores and costs, what a target took, and what the searches found."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from spryfl.compare.results import ResultRow
from spryfl.data.task import LOWER_IS_BETTER
from spryfl.report.intervals import CONFIDENCE, FEWEST, interval

Rows = Sequence[ResultRow]
Value = Callable[[ResultRow], float | None]


@dataclass(frozen=True)
class Table:
    """Text in cells; all columns but the first are numbers, to the right."""

    headings: Sequence[str]
    lines: Sequence[Sequence[str]]

    def as_markdown(self) -> str:
        rule = ["---", *("---:" for _ in self.headings[1:])]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in (self.headings, rule, *self.lines)]
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n"

    def as_html(self) -> str:
        head = "".join(f"<th>{escape(heading)}</th>" for heading in self.headings)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in self.lines)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


SCORES: tuple[tuple[str, Value], ...] = (
    ("central test", lambda row: row.central_test),
    ("generalized", lambda row: row.generalized),
    ("personalized", lambda row: row.personalized),
)
COSTS: tuple[tuple[str, Value], ...] = (
    ("client CPU (s)", lambda row: row.client_cpu_seconds),
    ("activation peak (MB)", lambda row: row.activation_peak_bytes / 1e6),
    ("up (MB)", lambda row: row.bytes_up / 1e6),
    ("down (MB)", lambda row: row.bytes_down / 1e6),
)
TO_TARGET: tuple[tuple[str, Value], ...] = (
    ("rounds", lambda row: row.rounds_to_target),
    ("client CPU (s)", lambda row: row.client_cpu_seconds_to_target),
    ("clients' time (s)", lambda row: row.client_seconds_to_target),
    ("up and down (MB)", lambda row: None if row.bytes_to_target is None else row.bytes_to_target / 1e6),
)
"""Heading, and a row's value."""


def overview_tables(rows: Rows) -> list[tuple[str, Table]]:
    """All datasets at a glance, a column each: (what is scored, means over seeds), as far as there is anything."""
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    tables = []
    for heading, value in SCORES:
        lines = []
        for label, own in _by_label(rows):
            known = [_known([row for row in own if row.dataset == dataset], value) for dataset in datasets]
            if any(known):
                lines.append([label, *(interval(scores).shown() if scores else "" for scores in known)])
        if lines:
            tables.append((heading, Table(["method", *datasets], lines)))
    return tables


def results_table(rows: Rows) -> Table:
    """One dataset: a line for each method, means over seeds, scores with their confidence intervals."""
    scores = [(heading, value) for heading, value in SCORES if any(value(row) is not None for row in rows)]
    lines = []
    for label, own in _by_label(rows):
        cells = [interval(known).shown() if (known := _known(own, value)) else "" for _, value in scores]
        costs = [number(interval(_known(own, value)).mean) for _, value in COSTS]
        lines.append([label, str(len(own)), *cells, *costs])
    return Table(["method", "seeds", *(h for h, _ in scores), *(h for h, _ in COSTS)], lines)


def metrics_table(rows: Rows) -> Table | None:
    """One dataset: every metric of the test split, means over seeds; None where there is none but the main one."""
    named = [(row.label, json.loads(row.metrics)) for row in rows]
    names = list(dict.fromkeys(name for _, metrics in named for name in metrics))
    if len(names) < 2:
        return None
    lines = []
    for label in dict.fromkeys(label for label, _ in named):
        own = [[metrics[name] for of, metrics in named if of == label and name in metrics] for name in names]
        lines.append([label, *(interval(values).shown() if values else "" for values in own)])
    return Table(["method", *(name.replace("_", " ") for name in names)], lines)


def target_table(rows: Rows, reference: str | None) -> Table | None:
    """What it took to reach the dataset's target, means over the seeds that did; None where there is no target.

    Args:
        reference: label of the method whose costs stand as 1 in the last two columns, over seeds in which both got
            there.
    """
    if rows[0].target is None:
        return None
    against = [row for row in rows if row.label == reference]
    lines = []
    for label, own in _by_label(rows):
        there = [row for row in own if row.rounds_to_target is not None]
        costs = [number(interval(_known(there, value)).mean) if there else "" for _, value in TO_TARGET]
        ratios = [_ratio(there, against, value) for _, value in (TO_TARGET[1], TO_TARGET[3])] if against else []
        lines.append([label, f"{len(there)} of {len(own)}", *costs, *ratios])
    told = [f"x {reference}'s CPU", f"x {reference}'s bytes"] if against else []
    return Table(["method", "seeds that reached it", *(h for h, _ in TO_TARGET), *told], lines)


def search_table(rows: Rows) -> Table | None:
    """The settings found for each dataset and method, and the trials each had; None where nothing was searched."""
    found = {(row.dataset, row.label): row for row in rows if row.search_trials}
    keys = sorted({key for row in found.values() for key in json.loads(row.settings)})
    lines = [
        [f"{row.dataset}, {row.label}", str(row.search_trials), *(_setting(row, key) for key in keys)]
        for row in found.values()
    ]
    return Table(["dataset, method", "trials", *keys], lines) if found else None


def note(rows: Rows) -> str:
    """What a dataset's table holds, in one line."""
    first = rows[0]
    better = ", less is better" if first.metric in LOWER_IS_BETTER else ""
    shown = sorted({row.alpha for row in rows if row.alpha is not None})
    partition = f"Dirichlet {', '.join(f'{alpha:g}' for alpha in shown)}" if shown else "no Dirichlet partition"
    rounds = sorted({row.rounds for row in rows})
    model = Path(first.model).name if Path(first.model).is_absolute() else first.model
    return (
        f"{model}, {' or '.join(map(str, rounds))} rounds, {partition}; {first.metric}{better}, "
        f"± {CONFIDENCE:.0%} confidence interval of the mean over seeds (Student's t), of {FEWEST} seeds or more; "
        "of fewer their number."
    )


def _by_label(rows: Rows) -> Iterator[tuple[str, list[ResultRow]]]:
    for label in dict.fromkeys(row.label for row in rows):
        yield label, [row for row in rows if row.label == label]


def _known(rows: Rows, value: Value) -> list[float]:
    return [found for row in rows if (found := value(row)) is not None]


def _ratio(rows: Rows, against: Rows, value: Value) -> str:
    """The ratio of both sums over the seeds that both reached the target in."""
    pairs = [
        (own, other)
        for row in rows
        for base in against
        if row.seed == base.seed and (own := value(row)) is not None and (other := value(base)) is not None
    ]
    theirs = sum(other for _, other in pairs)
    return f"{sum(own for own, _ in pairs) / theirs:.2f}" if theirs > 0 else ""


def _setting(row: ResultRow, key: str) -> str:
    value = json.loads(row.settings).get(key, "")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """Three digits or so, whatever the size."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
