"""The theory bench's table and plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TOLERANCE = 4.0
"""Standard errors within which Monte Carlo must agree with theory; three sigmas would be missed now and then."""


def as_markdown(measured: Row) -> str:
    """Four tables: variance, exact bias, bias from drawn directions, the error of a round."""
    settings = measured["settings"]
    lines = [
        f"Forward gradients on {settings['model']} (LoRA r 1 on query and value, B drawn) and {settings['rows']} rows "
        f"of {settings['data']}, {settings['tokens']} tokens. Monte Carlo figures must lie within {TOLERANCE:g} "
        "standard errors of theory, which follow from theory too, in closed form; the last column says how many they "
        "are off.",
        "",
        "Normalized error |g_hat - g|^2 / |g|^2 of K Gaussian tangents over d perturbed numbers, slopes from "
        f"forward-mode passes on a batch of {settings['batch']}; theory (d + 1) / K. The {settings['num_tangents']:,} "
        "tangents of a d are the same for every K, so its figures are off together.",
        "",
        "| units | d | K | measured | theory | standard error | off by |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in measured["variance"]:
        lines.append(
            f"| {row['num_units']} | {row['d']:,} | {row['k']} | {row['error']:,.1f} | {row['theory']:,.1f} | "
            f"{row['standard_error']:,.1f} | {sigmas(row['error'], row['theory'], row['standard_error']):+.1f} |"
        )
    worst = max(row["slope_difference"] for row in measured["variance"])
    lines += [
        "",
        f"Slopes of passes differ from g . v of backprop's g by at most {worst:.1e} of their norm.",
        "",
        "Bias |E g_hat - g| / |g| of a round in which each unit is dealt to some of the clients (exact, mean over "
        f"{settings['seeds']} partitions and the rotations of the deal, 95 % interval), and what is left of it in the "
        "mean over a whole rotation. Label distance: total variation between a client's labels and all. IID leaves "
        "labels to chance, so clients are less alike there than at a large alpha.",
        "",
        "| clients | alpha | label distance | bias in a round | interval | after a rotation |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in measured["bias"]:
        lines.append(
            f"| {row['num_clients']} | {_alpha(row)} | {row['label_distance']:.3f} | {row['bias']:.3f} | "
            f"{row['bias_low']:.3f} to {row['bias_high']:.3f} | {row['bias_after_rotation']:.3f} |"
        )
    lines += [
        "",
        f"Squared bias of one round, {measured['draws'][0]['num_clients']} clients: from {settings['draws']:,} seeded "
        "directions a client, and exact.",
        "",
        "| alpha | from directions | exact | standard error | off by |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in measured["draws"]:
        off = sigmas(row["estimate"], row["squared_bias"], row["standard_error"])
        lines.append(
            f"| {row['alpha']:g} | {row['estimate']:.4f} | {row['squared_bias']:.4f} | {row['standard_error']:.4f} | "
            f"{off:+.1f} |"
        )
    lines += [
        "",
        "Normalized error of a round in which each client takes one tangent over what it trains: all units, or those "
        f"dealt to it. In closed form, and the mean of {settings['num_rounds']} rounds along seeded directions; here "
        "alone standard errors are those of the sample. `d`: numbers that a client perturbs. Unless its gradient is "
        "exact, all clients perturb the head beside their units.",
        "",
        "| clients | alpha | round | d | theory | of it squared bias | measured | standard error | off by |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in measured["errors"]:
        off = sigmas(row["error"], row["theory"], row["standard_error"])
        lines.append(
            f"| {row['num_clients']} | {_alpha(row)} | {row['round']} | {row['d']:,.0f} | {row['theory']:,.1f} | "
            f"{row['squared_bias']:.2f} | {row['error']:,.1f} | {row['standard_error']:,.1f} | {off:+.1f} |"
        )
    return "\n".join(lines) + "\n"


def _alpha(row: Row) -> str:
    return "IID" if row["alpha"] is None else f"{row['alpha']:g}"


def sigmas(measured: float, theory: float, standard_error: float) -> float:
    """How many standard errors a figure is off."""
    return (measured - theory) / standard_error


def disagreements(measured: Row) -> list[str]:
    """Monte Carlo figures outside the tolerance."""
    pairs = [(f"variance at d = {r['d']}, K = {r['k']}", r["error"], r["theory"], r) for r in measured["variance"]]
    pairs += [(f"squared bias at alpha = {r['alpha']}", r["estimate"], r["squared_bias"], r) for r in measured["draws"]]
    pairs += [
        (f"error of {r['num_clients']} clients, {r['round']}, alpha = {r['alpha']}", r["error"], r["theory"], r)
        for r in measured["errors"]
    ]
    return [name for name, found, theory, r in pairs if abs(sigmas(found, theory, r["standard_error"])) > TOLERANCE]


def plot_theory(measured: Row, path: Path) -> None:
    """Bias against heterogeneity, and error against d."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    bias, error = figure.subplots(1, 2)
    for index, num_clients in enumerate(dict.fromkeys(row["num_clients"] for row in measured["bias"])):
        own = [row for row in measured["bias"] if row["num_clients"] == num_clients]
        known = [row for row in own if row["alpha"] is not None]
        alphas, values = _column(known, "alpha"), _column(known, "bias")
        bias.plot(alphas, values, "o-", markersize=4, color=f"C{index}", label=f"{num_clients} clients")
        bias.fill_between(
            alphas, _column(known, "bias_low"), _column(known, "bias_high"), color=f"C{index}", alpha=0.2, linewidth=0
        )
        for row in own:
            if row["alpha"] is None:
                bias.axhline(row["bias"], color=f"C{index}", linestyle=":", linewidth=1)
    bias.plot([], [], ":", color="0.4", label="the same, IID")
    bias.set(xscale="log", xlabel="Dirichlet alpha", ylabel="bias |E ĝ − g| / |g| of a round", ylim=(0, None))
    for index, size in enumerate(dict.fromkeys(row["k"] for row in measured["variance"])):
        own = [row for row in measured["variance"] if row["k"] == size]
        margins = [TOLERANCE * row["standard_error"] for row in own]
        error.plot(_column(own, "d"), _column(own, "theory"), "--", color=f"C{index}", linewidth=1)
        points = _column(own, "d"), _column(own, "error"), margins
        error.errorbar(*points, fmt="o", markersize=4, color=f"C{index}", label=f"K = {size}")
    error.plot([], [], "--", color="0.4", label="(d + 1) / K")
    error.set(
        xscale="log",
        yscale="log",
        xlabel="d, perturbed numbers",
        ylabel=f"E|ĝ − g|² / |g|², ± {TOLERANCE:g} standard errors",
    )
    for axes in (bias, error):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))


def _column(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows]
