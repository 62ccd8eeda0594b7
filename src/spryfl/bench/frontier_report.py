"""Tables and the figure of `spry bench frontier`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spryfl.bench.frontier_works import TASKS, VARIANTS

Row = dict[str, Any]


ALLOWED = 1.5  # times stock inference's activation peak


def as_markdown(rows: Sequence[Row], stock_peaks: Mapping[str, int] = {}) -> str:
    """A table a task: means over seeds, with the spread of accuracy.

    Args:
        stock_peaks: task -> bytes that stock inference takes; no ratios where it is not known.
    """
    parts = []
    for task, own in _by(rows, "task").items():
        reference = (
            mean(r["client_cpu_seconds"] for r in own if r["estimator"] == "backprop split")
            if any(r["estimator"] == "backprop split" for r in own)
            else None
        )
        stock = stock_peaks.get(task)
        lines = [
            f"### {task}, {own[0]['model']}, {own[0]['rounds']} rounds",
            "",
            "| estimator | dial | seeds | accuracy | share of backprop's gain | client CPU seconds | x backprop split "
            "| activation peak (MB) | x inference | up (MB) | down (MB) |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for found in _by(own, "estimator", "dial").values():
            accuracies = [r["accuracy"] for r in found]
            spread = f" ± {stdev(accuracies):.3f}" if len(found) > 1 else ""
            shares = [r["share_recovered"] for r in found if r["share_recovered"] is not None]
            cpu = mean(r["client_cpu_seconds"] for r in found)
            peak = max(r["activation_peak_bytes"] for r in found)
            lines.append(
                f"| {found[0]['estimator']} | {found[0]['dial']} | {len(found)} | {mean(accuracies):.3f}{spread} "
                f"| {f'{mean(shares):.2f}' if shares else ''} | {cpu:,.0f} "
                f"| {f'{cpu / reference:.2f}' if reference else ''} "
                f"| {peak / 1e6:.1f} | {f'{peak / stock:.2f}' if stock else ''} "
                f"| {mean(r['bytes_up'] for r in found) / 1e6:.1f} | {mean(r['bytes_down'] for r in found) / 1e6:.1f} |"
            )
        parts.append("\n".join(lines))
        parts += equal_accuracy(own) + not_run(task, own)
    return "\n\n".join(parts) + "\n"


def not_run(task: str, rows: Sequence[Row]) -> list[str]:
    """One task: a line with the estimators and settings of their dials that have no run, if there are any."""
    missing = [name for name, own in VARIANTS.items() if own.suits(TASKS[task]) and name not in by_name(rows)]
    return [f"Not run on {task}: {'; '.join(missing)}."] if missing else []


CONTENDERS = ("guess maps h=3, by layer", "guess maps h=3, all units", "guess maps h=8, all units, rank 8", "backprop")


def equal_accuracy(rows: Sequence[Row]) -> list[str]:
    """One task: each estimator's best evaluation, and contenders' CPU seconds to be as good, in parts of its own.

    Ratios are of sums over the seeds that both have. Seconds count up to the first evaluation that is as good: rare
    ones are to the disadvantage of whoever learns fast. An estimator that was never better than before its first round
    is left out.

    Returns:
        The lines of a paragraph and a table; nothing where there is no contender.
    """
    curves_of = {name: {r["seed"]: r["curve"] for r in found} for name, found in by_name(rows).items()}
    present = [name for name in CONTENDERS if name in curves_of]
    lines = []
    for name, curves in curves_of.items():
        best, spent = best_evaluations(curves)
        if not all(spent.values()):
            continue
        ratios = {other: seconds_ratio(curves_of[other], best, spent) for other in present if other != name}
        cells = ["" if (ratio := ratios.get(other)) is None else _times(ratio) for other in present]
        lines.append([name, f"{mean(best.values()):.3f}", f"{mean(spent.values()):,.0f}", *cells])
    if not present or not lines:
        return []
    heads = ["estimator", "its best accuracy", "CPU seconds", *(f"x by {contender}" for contender in present)]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))
    return ["Client CPU seconds to be as good as each at its best:", table]


Curve = Sequence[Sequence[Any]]
"""(round, accuracy, client CPU seconds so far) of each evaluation."""


def best_evaluations(curves: Mapping[int, Curve]) -> tuple[dict[int, float], dict[int, float]]:
    """Each seed's best accuracy, and the seconds to it: 0 where no round was better than the start."""
    best = {seed: max(accuracy for _, accuracy, _ in curve) for seed, curve in curves.items()}
    return best, {seed: _seconds_to(curve, best[seed]) for seed, curve in curves.items()}


def seconds_ratio(curves: Mapping[int, Curve], best: Mapping[int, float], spent: Mapping[int, float]) -> float | None:
    """Seconds until curves are as good, over those that were spent, seeds that both have added up.

    Returns:
        Infinity where one of the curves never is as good; None where no seed is shared.
    """
    shared = [seed for seed in best if seed in curves]
    if not shared:
        return None
    return sum(_seconds_to(curves[seed], best[seed]) for seed in shared) / sum(spent[seed] for seed in shared)


def on_shared_rounds(curves: Mapping[int, Curve], others: Mapping[int, Curve]) -> dict[int, Curve]:
    """Of each seed's evaluations those after rounds that another estimator was evaluated at too; shared seeds alone."""
    rounds = {seed: {round for round, _, _ in curve} for seed, curve in others.items()}
    return {seed: [at for at in curve if at[0] in rounds[seed]] for seed, curve in curves.items() if seed in rounds}


def _seconds_to(curve: Curve, accuracy: float) -> float:
    """Seconds of a curve until it is as good; infinity if it never is."""
    return next((float(seconds) for _, reached, seconds in curve if reached >= accuracy), inf)


def _times(ratio: float) -> str:
    return "never" if ratio == inf else f"{ratio:.2f}"


SHOWN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("head alone", ("head alone",)),
    ("guesses, split by layer", ("guess maps h=3, by layer",)),
    ("guesses, all units", ("guess maps h=3, all units", "guess maps h=3, all units, rank 4")),
    ("forward gradients, split (Spry)", ("forward K=1",)),
    (
        "zeroth order, all units, 150 rounds (FedMeZO)",
        (
            "zeroth order 150 rounds",
            "zeroth order 150 rounds, rate 0.002",
            "zeroth order 150 rounds, falling rate",
        ),
    ),
    ("backprop, split by layer", ("backprop split by layer",)),
    ("backprop, all units, two hidden states kept", ("backprop, budgeted 2 states",)),
    ("backprop, all units, checkpointed", ("backprop",)),
)
"""In the README: (told, the estimators and dials of which the most accurate stands)."""


def headline(rows: Sequence[Row]) -> str:
    """The README's table: a line for some estimators, accuracy, CPU seconds and activation peak of each task."""
    tasks = {task: own for task, own in _by(rows, "task").items() if any(r["estimator"] == "backprop" for r in own)}
    lines = [f"| accuracy; CPU s; peak (MB) | {' | '.join(tasks)} |", "| --- |" + " ---: |" * len(tasks)]
    for told, names in SHOWN:
        cells = [_best_cell([found for name in names if (found := by_name(own).get(name))]) for own in tasks.values()]
        if any(cells):
            lines.append(f"| {told} | {' | '.join(cells)} |")
    zero_shot = [f"{task} {_zero_shot(own)}" for task, own in tasks.items() if not TASKS[task].has_head]
    note = f"\nBefore any training: {', '.join(zero_shot)}.\n" if zero_shot else ""
    return "\n".join(lines) + "\n" + note


def _best_cell(settings: Sequence[Sequence[Row]]) -> str:
    """The most accurate of an estimator's settings; nothing where none was run."""
    if not settings:
        return ""
    best = max(settings, key=lambda found: mean(r["accuracy"] for r in found))
    seeds = f" ({len(best)})" if len(best) > 1 else ""
    cpu = mean(r["client_cpu_seconds"] for r in best)
    peak = max(r["activation_peak_bytes"] for r in best) / 1e6
    return f"{mean(r['accuracy'] for r in best):.3f}{seeds}; {cpu:,.0f}; {peak:.1f}"


def _zero_shot(rows: Sequence[Row]) -> str:
    before = {row["seed"]: row["accuracy_before"] for row in rows}
    return f"{mean(before.values()):.3f}" + (f" ({len(before)})" if len(before) > 1 else "")


def plot_frontier(rows: Sequence[Row], path: Path, stock_peaks: Mapping[str, int] = {}) -> None:
    """Accuracy against activation peak and against client compute: a curve for each estimator along its dial.

    A dotted line stands where the peak is `ALLOWED` times stock inference's.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = _by(rows, "task")
    if not tasks:
        return
    figure, axes = pyplot.subplots(len(tasks), 2, figsize=(11, 3.6 * len(tasks)), squeeze=False)
    curves = list(dict.fromkeys(_curve_of(row)[0] for row in rows))
    colours = {name: pyplot.get_cmap("tab20")(i % 20) for i, name in enumerate(curves)}
    quantities = (
        ("activation_peak_bytes", 1e6, "activation peak (MB)"),
        ("client_cpu_seconds", 1, "client CPU seconds"),
    )
    for line, (task, own) in zip(axes, tasks.items(), strict=True):
        for axis, (key, unit, label) in zip(line, quantities, strict=True):
            for name in curves:
                found = [row for row in own if _curve_of(row)[0] == name]
                points = sorted(
                    (mean(r[key] for r in same) / unit, mean(r["accuracy"] for r in same), _curve_of(same[0])[1])
                    for same in _by(found, "dial").values()
                )
                if not points:
                    continue
                axis.plot(
                    [p[0] for p in points], [p[1] for p in points], "o-", color=colours[name], label=name, markersize=4
                )
                for x, y, dial in points:
                    if dial:
                        axis.annotate(dial, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
            if key == "activation_peak_bytes" and task in stock_peaks:
                axis.axvline(ALLOWED * stock_peaks[task] / unit, color="grey", linestyle=":", linewidth=1)
            axis.set(xlabel=label, ylabel="accuracy", title=task)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.12 / len(tasks) + 0.02, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curve_of(row: Row) -> tuple[str, str]:
    """(the curve it is a point of, what its dial says beside): how units are dealt makes a curve of its own."""
    dealt = [part for part in row["dial"].split(", ") if part in ("by layer", "all units")]
    rest = [part for part in row["dial"].split(", ") if part not in dealt]
    return ", ".join([row["estimator"], *dealt]), ", ".join(rest)


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each estimator at each setting of its dial."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[f"{row['estimator']} {row['dial']}".strip()].append(row)
    return found


def _by(rows: Sequence[Row], *keys: str) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        found[row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)].append(row)
    return found
