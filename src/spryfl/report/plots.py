"""Plots of one run and of several side by side, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from spryfl.tracking.events import RoundEvent, Summary

MOST_NAMED_CLIENTS = 40
"""With more, their numbers could not be read."""
SHARE_STEPS = 200


def plot_run(events: Sequence[RoundEvent], label: str, folder: Path) -> None:
    """`progress.png`: the main metric and training loss over rounds."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    score, loss = figure.subplots(1, 2)
    _score_over_rounds(score, {label: events})
    for name in ("generalized", "personalized"):
        known = [(e.round, value) for e in events if (value := getattr(e, name)) is not None]
        if known:
            score.plot(*zip(*known, strict=True), marker="s", markersize=3, label=f"{name}, held-out rows")
            score.legend(fontsize=8)
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


def plot_partition(counts: np.ndarray, folder: Path) -> None:
    """`partition.png`: each client's label shares, and how many rows it holds.

    Args:
        counts: (clients, labels) rows; clients that hold none are left out.
    """
    save_figure(partition_figure(counts), folder / "partition.png")


def partition_figure(counts: np.ndarray) -> Figure:
    """See `plot_partition`."""
    counts = counts[counts.sum(axis=1) > 0]
    num_clients, num_labels = counts.shape
    sizes = counts.sum(axis=1)
    shares = counts / sizes[:, None]
    in_order = num_clients <= MOST_NAMED_CLIENTS
    # Many clients are told apart by what they hold, not by their number: alike ones stand together.
    order = np.arange(num_clients) if in_order else np.lexsort((shares.max(axis=1), shares.argmax(axis=1)))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    share, size = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    tops = np.cumsum(shares[order], axis=1)
    heights = (np.arange(SHARE_STEPS) + 0.5) / SHARE_STEPS
    label_at = (heights[:, None, None] > tops[:, :-1]).sum(axis=-1)  # (heights, clients)
    colors = colormaps["tab10" if num_labels <= 10 else "tab20" if num_labels <= 20 else "turbo"]
    palette = colors(np.arange(num_labels) if num_labels <= 20 else np.linspace(0, 1, num_labels))
    # An image, as bars of many clients are thinner than a pixel and slow to draw.
    box = (-0.5, num_clients - 0.5, 0.0, 1.0)
    share.imshow(palette[label_at], origin="lower", extent=box, aspect="auto", interpolation="nearest")
    size.stairs(sizes[order], np.arange(num_clients + 1) - 0.5, fill=True, color="0.4")
    share.set(ylabel="share of each label")
    size.set(ylabel="rows", xlabel="client" if in_order else f"{num_clients:,} clients, ordered by their main label")
    size.set_xticks(range(num_clients) if in_order else [])
    if in_order:
        size.tick_params(axis="x", labelsize=8 if num_clients <= 20 else 6)
    if 1 < num_labels <= 20:
        patches = [Patch(color=palette[label], label=str(label)) for label in range(num_labels)]
        share.legend(
            handles=patches, title="label", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False
        )
    return figure


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
