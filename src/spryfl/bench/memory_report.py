"""The rows of `spry bench memory` as tables and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spryfl.bench.memory_targets import targets_table
from spryfl.bench.works import WORKS

Row = dict[str, Any]
MB = 1e6
CPU = "cpu_seconds_per_step"


def as_markdown(rows: Sequence[Row]) -> str:
    """The targets, one table of all works, one of growth, one of truth; only those that were measured."""
    parts = [targets_table(rows), _works(rows), _growth(rows), _truth(rows)]
    return "\n".join(part for part in parts if part)


def _works(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["work"] not in ("growth", "truth")]
    if not measured:
        return ""
    heads = "activation peak (MB) | resident peak (MB) | CPU seconds a step | times inference | on"
    rule = "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | --- |"
    lines = [f"| work | estimator | K | units | {heads} |", rule]
    # Only CPU seconds are set against each other: by the clock of a shared machine a ratio says nothing.
    inference = {row["work"]: _seconds(row) for row in measured if _is_inference(row) and CPU in row}
    for row in measured:
        name = f"| {row['work']} | {row['estimator']} | {row['k']} | {row['units']} "
        if "error" in row:
            lines.append(f"{name}| {row['error'][:80]} | | | | |")
            continue
        base = inference.get(row["work"])
        times = f"{_seconds(row) / base:.2f}" if base and CPU in row else ""
        lines.append(
            f"{name}| {row['activation_peak_bytes'] / MB:,.1f} | {row['resident_peak_bytes'] / MB:,.0f} | "
            f"{_seconds(row):.2f}{'' if CPU in row else ' by the clock'} | {times} | {row.get('date', '')} |"
        )
    return "\n".join(lines) + "\n"


def _seconds(row: Row) -> float:
    """CPU seconds of all threads; the clock's where an older row has no others."""
    return float(row[CPU] if CPU in row else row["seconds_per_step"])


def _is_inference(row: Row) -> bool:
    return row["estimator"] == "inference" and "error" not in row


def _growth(rows: Sequence[Row]) -> str:
    grown = [row for row in rows if row["work"] == "growth" and "error" not in row]
    if not grown:
        return ""
    layers = sorted({row["layers"] for row in grown})
    heads = " | ".join(f"{count} layers (MB)" for count in layers)
    lines = [f"| estimator | tokens | {heads} |", "| --- | ---: |" + " ---: |" * len(layers)]
    for estimator in dict.fromkeys(row["estimator"] for row in grown):
        for tokens in sorted({row["tokens"] for row in grown}):
            peaks = [_peak(grown, estimator, count, tokens) for count in layers]
            lines.append(f"| {estimator} | {tokens} | " + " | ".join(f"{peak / MB:,.1f}" for peak in peaks) + " |")
    return "\n".join(lines) + "\n"


def _peak(rows: Sequence[Row], estimator: str, layers: int, tokens: int) -> int:
    wanted = (estimator, layers, tokens)
    return next(
        row["activation_peak_bytes"] for row in rows if (row["estimator"], row["layers"], row["tokens"]) == wanted
    )


def _truth(rows: Sequence[Row]) -> str:
    told = [row for row in rows if row["work"] == "truth" and "error" not in row]
    if not told:
        return ""
    lines = ["| estimator | slopes in | against | relative error | cosine |", "| --- | --- | --- | ---: | ---: |"]
    lines += [
        f"| {row['estimator']} | {row['precision']} | {row['against']} | {row['relative_error']:.4f} | "
        f"{row['cosine']:.5f} |"
        for row in told
    ]
    return "\n".join(lines) + "\n"


def plot_growth(rows: Sequence[Row], path: Path) -> None:
    """Activation peak over tokens for each depth, and over depth at each length: two panels."""
    grown = [row for row in rows if row["work"] == "growth" and "error" not in row]
    if not grown:
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_tokens, by_layers = figure.subplots(1, 2)
    styles = {"forward": "-", "backprop_checkpointed": "--"}
    layers, tokens = sorted({r["layers"] for r in grown}), sorted({r["tokens"] for r in grown})
    for estimator, style in styles.items():
        for i, count in enumerate(layers):
            peaks = [_peak(grown, estimator, count, t) / MB for t in tokens]
            by_tokens.plot(tokens, peaks, style, color=f"C{i}", marker=".", label=f"{estimator}, {count}")
        for i, length in enumerate(tokens):
            peaks = [_peak(grown, estimator, count, length) / MB for count in layers]
            by_layers.plot(
                layers, peaks, style, color=f"C{i}", marker="o", markersize=3, label=f"{estimator}, {length}"
            )
    by_tokens.set(
        xlabel="tokens a row", ylabel="activation peak (MB)", title="by depth (layers)", xscale="log", yscale="log"
    )
    by_layers.set(xlabel="layers", ylabel="activation peak (MB)", title="by length (tokens)", yscale="log")
    for axes, ticks in ((by_tokens, tokens), (by_layers, layers)):
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    FigureCanvasAgg(figure).print_png(str(path))


def headline(rows: Sequence[Row]) -> str:
    """The README's table: each work's activation peaks side by side, and forward mode's resident peak; times below."""
    works = dict.fromkeys(row["work"] for row in rows if row["work"] not in ("growth", "truth"))
    columns = ("inference", "forward", "backprop_budgeted", "backprop_checkpointed", "backprop")
    lines = [
        "| activation peak (MB) | " + " | ".join(columns) + " | forward mode's process (MB) |",
        "| --- |" + " ---: |" * (len(columns) + 1),
    ]
    for work in works:
        known = {r["estimator"]: r for r in rows if r["work"] == work and _is_standard(r)}
        cells = [f"{known[c]['activation_peak_bytes'] / MB:,.0f}" if c in known else "" for c in columns]
        resident = f"{known['forward']['resident_peak_bytes'] / MB:,.0f}" if "forward" in known else ""
        first = next(iter(known.values()), None)
        if first is not None:
            place = ", streamed from disk" if first["streamed"] else ""
            size = f"{first['precision']}, batch {first['batch']}, {first['tokens']} tokens"
            depth = f", {first['layers']} layers"
            lines.append(f"| {first['model']} shape{depth}, {size}{place} | " + " | ".join(cells) + f" | {resident} |")
    return "\n".join([*lines, *_times(rows)]) + "\n"


def _times(rows: Sequence[Row]) -> list[str]:
    """A line for each work whose steps are timed apart from metered ones."""
    lines = []
    timed = {name for name, work in WORKS.items() if work.timed_apart}
    for work in dict.fromkeys(row["work"] for row in rows if row["work"] in timed):
        known = {r["estimator"]: r for r in rows if r["work"] == work and _is_standard(r) and CPU in r}
        if "inference" not in known:
            continue
        base = _seconds(known["inference"])
        told = [f"{name} {_seconds(row) / base:.2f}" for name, row in known.items() if name != "inference"]
        lines += ["", f"CPU time of a step, in inferences, {known['inference']['layers']} layers: {', '.join(told)}."]
    return lines


def _is_standard(row: Row) -> bool:
    return "error" not in row and row["k"] == 1 and row["units"] == "all"
