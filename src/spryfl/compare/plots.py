"""Plots of a suite: where each method ended on each dataset; a dataset's scores over rounds, processor time, bytes."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from spryfl.compare.results import Result, ResultRow
from spryfl.report.intervals import interval
from spryfl.report.plots import save_figure
from spryfl.tracking.events import RoundEvent

Quantity = Callable[[RoundEvent], float]
AXES: tuple[tuple[str, Quantity], ...] = (
    ("round", lambda event: float(event.round > 0)),
    ("client CPU seconds", lambda event: event.client_cpu_seconds),
    ("MB up and down", lambda event: (event.bytes_up + event.bytes_down) / 1e6),
)
"""What a score is drawn over: the label, and what one round adds."""
LINES = ("-", "--", "-.", (0, (1, 1)))
"""Of each ten methods, which colours tell apart."""
MARKERS = "osD^v<>pPX*hd"
MOST_PANELS = 7
"""Side by side, of the overview."""


def plot_overview(
    rows: Sequence[ResultRow], methods: Sequence[str], path: Path, contenders: Sequence[str] = ()
) -> None:
    """A panel for each dataset, a line for each method: every seed's central test, their mean and its interval.

    Args:
        methods: labels in the suite's order, from the top.
        contenders: those that stand out; none: all alike.
    """
    save_figure(overview_figure(rows, methods, contenders), path)


def overview_figure(rows: Sequence[ResultRow], methods: Sequence[str], contenders: Sequence[str]) -> Figure:
    """See `plot_overview`; methods that no dataset has a score of are left out."""
    of_dataset: dict[str, list[ResultRow]] = defaultdict(list)
    for row in rows:
        of_dataset[row.dataset].append(row)
    scored = {row.label for row in rows if row.central_test is not None}
    labels = [method for method in methods if method in scored]
    across = min(len(of_dataset), MOST_PANELS)
    down = -(-len(of_dataset) // across)
    figure = Figure(figsize=(2.4 + 1.9 * across, down * (1 + 0.2 * len(labels))), layout="constrained")
    panels = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
    for axes in panels[len(of_dataset) :]:
        axes.set_visible(False)
    for axes, (dataset, own) in zip(panels, of_dataset.items(), strict=False):
        for place, label in enumerate(labels):
            scores = [row.central_test for row in own if row.label == label and row.central_test is not None]
            stands_out = not contenders or label in contenders
            _draw_scores(axes, [score for score in scores if np.isfinite(score)], place, stands_out)
        target = own[0].target
        if target is not None:
            axes.axvline(target, color="grey", linestyle=":", linewidth=1)
        axes.set(title=dataset, xlabel=f"test {own[0].metric}")
        axes.set(xlim=_span([target, *(row.central_test for row in own)]), ylim=(len(labels) - 0.5, -0.5))
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(alpha=0.3)
    return figure


def _draw_scores(axes: Axes, scores: Sequence[float], place: int, stands_out: bool) -> None:
    """One method on one dataset."""
    if not scores:
        return
    known = interval(scores)
    colour = "C0" if stands_out else "0.45"
    if len(scores) > 1:
        axes.plot(scores, [place] * len(scores), "|", color=colour, markersize=7, alpha=0.6)
    axes.errorbar(known.mean, place, xerr=known.half_width, fmt="o", color=colour, markersize=4.5, linewidth=1.2)


def plot_dataset(results: Sequence[Result], methods: Sequence[str], path: Path, contenders: Sequence[str] = ()) -> None:
    """Three panels of one dataset: a line for each method, the mean over seeds, with its confidence interval.

    The score before training cost nothing, so it stands over the rounds alone.

    Args:
        methods: labels of all the suite's methods, so that each has its colour in every dataset.
        contenders: those that stand out where there are many, and alone have their interval; none: all alike.
    """
    save_figure(dataset_figure(results, methods, contenders), path)


def dataset_figure(results: Sequence[Result], methods: Sequence[str], contenders: Sequence[str]) -> Figure:
    """See `plot_dataset`."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    by_label: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_label[result.row.label].append(result)
    for axes, (label, quantity) in zip(panels, AXES, strict=True):
        for place, method in enumerate(methods):
            if method in by_label:
                _draw(axes, by_label[method], method, quantity, place, not contenders or method in contenders)
        if results[0].row.target is not None:
            axes.axhline(results[0].row.target, color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=f"test {results[0].row.metric}", ylim=scores_seen(results))
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[1:]:
        axes.set_xscale("log", nonpositive="mask")  # costs of methods lie powers of ten apart
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def scores_seen(results: Sequence[Result]) -> tuple[float, float]:
    """From the least to the largest score of any seed, and the target: intervals of few seeds reach far beyond."""
    scores = [event.score for result in results for event in result.events if event.score is not None]
    return _span([*scores, results[0].row.target])


def _span(scores: Iterable[float | None]) -> tuple[float, float]:
    """From the least to the largest known score, and a margin."""
    known = [score for score in scores if score is not None and np.isfinite(score)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = 0.1 * (high - low) or 0.05
    return low - margin, high + margin


def _draw(axes: Axes, results: Sequence[Result], label: str, quantity: Quantity, place: int, stands_out: bool) -> None:
    """One method's line; at each evaluated round the mean over seeds of both coordinates."""
    points: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for result in results:
        taken = accumulate(quantity(event) for event in result.events)
        for event, so_far in zip(result.events, taken, strict=True):
            if event.score is not None:
                points[event.round].append((so_far, event.score))
    rounds = sorted(points)
    x = np.array([np.mean([so_far for so_far, _ in points[round]]) for round in rounds])
    spans = [interval([score for _, score in points[round]]) for round in rounds]
    mean, half = np.array([s.mean for s in spans]), np.array([s.half_width or 0.0 for s in spans])
    colour, line = f"C{place % 10}", LINES[place // 10 % len(LINES)]
    marker = MARKERS[place % len(MARKERS)]
    look: dict[str, Any] = {"linewidth": 1.8, "zorder": 3} if stands_out else {"linewidth": 0.9, "alpha": 0.65}
    axes.plot(x, mean, color=colour, linestyle=line, marker=marker, markersize=3.5, label=label, **look)
    if stands_out and half.any():
        axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
