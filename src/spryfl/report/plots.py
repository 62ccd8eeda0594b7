"""Plots of one run and of several side by side, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spryfl.tracking.events import RoundEvent, Summary


def plot_run(events: Sequence[RoundEvent], label: str, folder: Path) -> None:
    """`progress.png`: the main metric and training loss over rounds."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    score, loss = figure.subplots(1, 2)
    _score_over_rounds(score, {label: events})
    loss.plot([e.round for e in events if e.loss is not None], [e.loss for e in events if e.loss is not None])
    loss.set(xlabel="round", ylabel="clients' mean training loss")
    loss.grid(alpha=0.3)
    save_figure(figure, folder / "progress.png")


def plot_comparison(events: Mapping[str, Sequence[RoundEvent]], summaries: Sequence[Summary], folder: Path) -> None:
    """`comparison.png`: the main metric over rounds, activation peak and bytes up of each run."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    score, memory, up = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    _score_over_rounds(score, events)
    score.legend(fontsize=8)
    labels = [summary.label for summary in summaries]
    bars = (
        (memory, [s.peak_activation_bytes / 1e6 for s in summaries], "activation peak (MB)", "{:.1f}"),
        (up, [s.bytes_up_per_client_round / 1e3 for s in summaries], "sent up by a client a round (kB)", "{:.1f}"),
    )
    for axes, values, title, form in bars:
        drawn = axes.barh(labels, values, color=[f"C{i}" for i in range(len(labels))])
        axes.bar_label(drawn, fmt=form, padding=3, fontsize=8)
        axes.set(xlabel=title)
        axes.margins(x=0.18)
        axes.invert_yaxis()
    up.set_yticklabels([])
    save_figure(figure, folder / "comparison.png")


def _score_over_rounds(axes: Axes, events: Mapping[str, Sequence[RoundEvent]]) -> None:
    for label, rows in events.items():
        known = [(e.round, e.score) for e in rows if e.score is not None]
        axes.plot([r for r, _ in known], [a for _, a in known], marker="o", markersize=3, label=label)
    metric = next((name for rows in events.values() for e in rows for name in e.metrics), "accuracy")
    axes.set(xlabel="round", ylabel=f"test {metric}")
    axes.grid(alpha=0.3)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG beside and rename it: whoever looks sees the old plot or the new."""
    temporary = path.with_suffix(".tmp.png")
    FigureCanvasAgg(figure).print_png(str(temporary))
    temporary.replace(path)
