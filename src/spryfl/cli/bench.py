"""`spry bench`: measurements anyone can repeat."""

import json
from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(help="Measure, on this machine, what the project claims.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Keeps `step` a named command while it is the only one."""


@bench.command("step")
def step(
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Of BERT-large's 24.")] = 24,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each, taken in turn.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write step.json and step.md there.")] = None,
) -> None:
    """Activation peak and seconds of one step on BERT-large's shape: inference, forward mode and its rivals."""
    from spryfl.bench.step import StepBench, as_markdown, measure_steps

    rows = measure_steps(StepBench(batch=batch, tokens=tokens, layers=layers, dtype=dtype, repeats=repeats))
    table = as_markdown(rows)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "step.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        (out / "step.md").write_text(table, encoding="utf-8")
    print(json.dumps(rows, indent=2) if as_json else table)
