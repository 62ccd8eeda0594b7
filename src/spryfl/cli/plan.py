"""`spry plan`: what training a model will take, before anything is downloaded or run."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spryfl.sizes import parse_rate, parse_size

if TYPE_CHECKING:
    from spryfl.plan import Plan

WIDE = 140  # columns, so that a table in a file is not folded


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="builtin:NAME, shape:NAME, a hub id, or a folder with config.json.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 512,
    budget: Annotated[str | None, typer.Option(metavar="SIZE", help="What a client may take: 4GiB.")] = None,
    bandwidth: Annotated[str | None, typer.Option(metavar="RATE", help="Of a client's connection: 20MB/s.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA r, on query and value.")] = 1,
    k: Annotated[int, typer.Option("--k", min=1, help="Tangents a step, and directions of zeroth order.")] = 1,
    cohort: Annotated[int, typer.Option(min=1, help="Clients among which a round's units are split.")] = 1,
    dtype: Annotated[str, typer.Option(help="What packed weights compute in: auto, float32 or bfloat16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Predict peak memory, time a step and traffic of every way to train a model, from its configuration alone."""
    budget_bytes = None if budget is None else parse_size(budget)
    bytes_per_second = None if bandwidth is None else parse_rate(bandwidth)
    # After the arguments are known to be good: this imports torch.
    from spryfl.config import AdapterConfig, parse_config
    from spryfl.models.loading import read_config, resolve_device, resolve_dtype
    from spryfl.plan import PlanRequest, make_plan

    config = parse_config({"model": {"name": model, "dtype": dtype}}).model
    request = PlanRequest(
        config=read_config(config),
        adapter=AdapterConfig(rank=rank),
        batch=batch,
        tokens=tokens,
        num_tangents=k,
        cohort_size=cohort,
        budget_bytes=budget_bytes,
        dtype=resolve_dtype(config.dtype, resolve_device("cpu")),
    )
    made = make_plan(request)
    made.require_fit()
    if as_json:
        print(json.dumps(as_rows(made, model, bytes_per_second), indent=2))
    else:
        print_plan(made, model, bytes_per_second)


def as_rows(plan: "Plan", model: str, bytes_per_second: int | None) -> list[dict[str, Any]]:
    """One JSON row a way to train, named as in `spry bench memory`."""
    request = plan.request
    return [
        {
            "model": model,
            "estimator": row.estimator,
            "precision": row.precision,
            "streamed": row.streamed,
            "batch": request.batch,
            "tokens": request.tokens,
            "layers": plan.num_layers,
            "k": request.num_tangents,
            "peak_bytes": row.peak_bytes,
            "weights_bytes": row.weights_bytes,
            "activation_peak_bytes": row.activation_bytes,
            "adapter_bytes": row.adapter_bytes,
            "process_bytes": row.process_bytes,
            "relative_time": round(row.relative_time, 3),
            "read_bytes": row.read_bytes,
            "bytes_up": row.bytes_up,
            "bytes_up_slopes_per_step": row.bytes_up_slopes,
            "bytes_down": row.bytes_down,
            "transfer_seconds": None if bytes_per_second is None else row.transfer_bytes / bytes_per_second,
            "note": row.note,
            "fits": row.fits(request.budget_bytes),
            "recommended": row is plan.recommended,
            "reason": plan.reason if row is plan.recommended else None,
        }
        for row in plan.rows
    ]


def print_plan(plan: "Plan", model: str, bytes_per_second: int | None) -> None:
    """The table, the recommendation, and what the figures mean."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    request = plan.request
    budget = "" if request.budget_bytes is None else f", budget {decimal(request.budget_bytes)}"
    title = f"{model}: {plan.num_layers} layers, batch {request.batch}, {request.tokens} tokens, LoRA r "
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    table = Table(title=f"{title}{request.adapter.rank}{budget}", title_justify="left", box=None, pad_edge=False)
    for heading in ("fits", "estimator", "precision", "streamed"):
        table.add_column(heading, no_wrap=True)
    # A narrow terminal has room for what decides; --json has the rest.
    parts = ("weights", "activations", "adapter") if console.width >= WIDE else ()
    sizes = ("peak", *parts, "time", "read", "up", "down")
    for heading in (*sizes, *(() if bytes_per_second is None else ("transfer",))):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in plan.rows:
        if last not in (None, (row.precision, row.streamed)):
            table.add_section()
        last = (row.precision, row.streamed)
        fits = row.fits(request.budget_bytes)
        figures = [row.weights_bytes, row.activation_bytes, row.adapter_bytes] if parts else []
        process_bytes = row.process_bytes
        table.add_row(
            "→" if row is plan.recommended else "✓" if fits else "",
            row.estimator,
            row.precision,
            "yes" if row.streamed else "",
            *map(_short, (row.peak_bytes, *figures)),
            f"{row.relative_time:.2f}x",
            *map(_short, (row.read_bytes, row.bytes_up, row.bytes_down)),
            *(() if bytes_per_second is None else (f"{row.transfer_bytes / bytes_per_second:.2f} s",)),
            style="bold" if row is plan.recommended else None if fits else "dim",
        )
    console.print(table)
    chosen = plan.require_fit()
    for line in (
        f"→ {plan.reason}{f' It {chosen.note}.' if chosen.note else ''}",
        "Peak is the resident peak of a client: weights, activations, adapter and optimizer, and the process itself, "
        f"{_short(process_bytes)}.",
        "Time is a step's floating-point operations over inference's; unpacking and reading weights are not in it.",
        "Up and down are a client's round of values; "
        f"as slopes, forward and zeroth_order send {decimal(4 * request.num_tangents)} a step up.",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _short(count: int) -> str:
    """Bytes in few characters: 4.0MB; nothing for none."""
    from rich.filesize import decimal

    return decimal(count).replace(" bytes", "B").replace(" ", "") if count else ""
