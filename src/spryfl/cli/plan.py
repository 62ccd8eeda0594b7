"""`spry plan`: what training a model will take, before anything is downloaded or run."""

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spryfl.config import TaskKind
from spryfl.sizes import parse_rate, parse_size, short_size

if TYPE_CHECKING:
    from rich.table import Table

    from spryfl.memory.plan import Prediction
    from spryfl.plan import Plan

ALL = 1_000  # columns, more than any table here takes


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
    task: Annotated[TaskKind, typer.Option(help="What it is to do; see: spry list tasks.")] = "classification",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Predict peak memory, time a step and traffic of every way to train a model, from its configuration alone."""
    budget_bytes = None if budget is None else parse_size(budget)
    bytes_per_second = None if bandwidth is None else parse_rate(bandwidth)
    # After the arguments are known to be good: this imports torch.
    from spryfl.config import AdapterConfig, parse_config
    from spryfl.models.classes import require_class
    from spryfl.models.loading import resolve_device, resolve_dtype
    from spryfl.models.quantization import stored_config
    from spryfl.models.sources import find_model, read_config
    from spryfl.models.weights import packed_precision
    from spryfl.plan import PlanRequest, make_plan

    config = parse_config({"model": {"name": model, "dtype": dtype}}).model
    read = read_config(config)
    require_class(read, model, task)
    request = PlanRequest(
        config=read,
        adapter=AdapterConfig(rank=rank),
        batch=batch,
        tokens=tokens,
        num_tangents=k,
        cohort_size=cohort,
        budget_bytes=budget_bytes,
        dtype=resolve_dtype(config.dtype, resolve_device("cpu")),
        task=task,
        stored=packed_precision(stored_config(read, model)),
        mappable=find_model(model).gguf_file is None,
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

    request = plan.request
    console = Console()
    table = plan_table(plan, model, bytes_per_second)
    needed = Console(width=ALL).measure(table).maximum
    if not console.is_terminal:
        console = Console(width=needed)
    elif console.width < needed:  # fewer columns rather than figures cut short
        table = plan_table(plan, model, bytes_per_second, narrow=True)
    console.print(table)
    chosen = plan.require_fit()
    for line in (
        f"→ {plan.reason}{f' It {chosen.note}.' if chosen.note else ''}",
        "Peak: a client's resident peak, the sum of weights, activations (unpacked weights included), adapter with its "
        f"optimizer, and {short_size(chosen.process_bytes)} of the process without a model.",
        "Time: a step's floating-point operations over inference's, without unpacking and reading weights. Read: from "
        "disk, a step.",
        "Up, down: a client's round, as values; as slopes, forward and zeroth_order send "
        f"{short_size(4 * request.num_tangents)} a step up.",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def plan_table(plan: "Plan", model: str, bytes_per_second: int | None, narrow: bool = False) -> "Table":
    """One row a way to train.

    Args:
        narrow: for 80 columns: without the parts of peaks, what comes down, and what goes up where its time shows.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    request = plan.request
    title = f"{model}: {plan.num_layers} layers, batch {request.batch}, {request.tokens} tokens, K = "
    title += f"{request.num_tangents}, LoRA r {request.adapter.rank}"
    title += "" if request.budget_bytes is None else f", budget {short_size(request.budget_bytes)}"
    table = Table(title=title, title_justify="left", box=SIMPLE, collapse_padding=narrow, pad_edge=not narrow)
    table.add_column("", min_width=1)
    for heading in ("estimator", "weights are"):
        table.add_column(heading, no_wrap=True)
    rows = [_figures(row, bytes_per_second, narrow) for row in plan.rows]
    for heading in rows[0]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, figures in zip(plan.rows, rows, strict=True):
        fits, chosen = row.fits(request.budget_bytes), row is plan.recommended
        table.add_row(
            "→" if chosen else "✓" if fits else "",
            row.estimator,
            f"{row.precision}, streamed" if row.streamed else row.precision,
            *figures.values(),
            style="bold" if chosen else None if fits else "dim",
        )
    return table


def _figures(row: "Prediction", bytes_per_second: int | None, narrow: bool) -> dict[str, str]:
    """A row's figures by their headings; empty where there is nothing."""
    parts = {"weights": row.weights_bytes, "activations": row.activation_bytes, "adapter": row.adapter_bytes}
    figures = {"peak": short_size(row.peak_bytes)}
    figures |= {} if narrow else {heading: _size(count) for heading, count in parts.items()}
    figures |= {"time": f"{row.relative_time:.2f} x", "read": _size(row.read_bytes)}
    if not narrow or bytes_per_second is None:
        figures["up"] = _size(row.bytes_up)
    if not narrow:
        figures["down"] = _size(row.bytes_down)
    if bytes_per_second is not None:
        figures["sent in"] = _time(row.transfer_bytes / bytes_per_second)
    return figures


def _size(count: int) -> str:
    return short_size(count) if count else ""


def _time(seconds: float) -> str:
    return "" if seconds == 0 else f"{seconds:.2f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
