"""`spry bench`: measurements anyone can repeat."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

bench = typer.Typer(help="Measure, on this machine, what the project claims.", no_args_is_help=True)


@bench.command("step")
def step(
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Of BERT-large's 24.")] = 24,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="What it computes in.")] = "float32",
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


@bench.command("memory")
def memory(
    work: Annotated[list[str] | None, typer.Option(help="Only these works; --work list names them.")] = None,
    estimator: Annotated[list[str] | None, typer.Option(help="Only these estimators.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where memory.{json,md,png} go, beside what is there; and what a stopped run goes on from.",
        ),
    ] = Path("runs/bench-memory"),
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="Random checkpoints: 14 GB for all works.")] = None,
) -> None:
    """Activation peak, resident peak and seconds of a step: every estimator on models up to 13B. Takes hours."""
    from spryfl.bench.memory import NAMES, default_cache, read_rows, run_works, with_kept
    from spryfl.bench.memory_report import as_markdown, plot_growth
    from spryfl.files import write_atomically

    if work == ["list"]:
        print("\n".join(NAMES))
        return
    out.mkdir(parents=True, exist_ok=True)
    partial, results = out / "memory.partial.jsonl", out / "memory.json"
    measured = run_works(
        work or NAMES,
        estimator or [],
        partial,
        cache or default_cache(),
        lambda text: print(f"measuring {text}", file=sys.stderr, flush=True),
    )
    rows = with_kept(measured, read_rows(results))
    table = as_markdown(rows)
    write_atomically(results, f"{json.dumps(rows, indent=2)}\n".encode())
    write_atomically(out / "memory.md", table.encode())
    plot_growth(rows, out / "memory-growth.png")
    if not any("error" in row for row in measured):  # a bench that is run again measures again
        partial.unlink(missing_ok=True)
    print(json.dumps(rows, indent=2) if as_json else table)


@bench.command("frontier")
def frontier(
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folders snli, mnli, ag_news, sst2, dolly_15k of Parquet.")],
    task: Annotated[list[str] | None, typer.Option(help="Only these tasks; --task list names them.")] = None,
    estimator: Annotated[list[str] | None, typer.Option(help="Only these; --estimator list names them.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, max=2, help="Only these seeds of 0, 1, 2.")] = None,
    quality: Annotated[bool, typer.Option("--quality", help="Measure gradients by layer, after the runs.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Search learning rates, an equal search for each.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Runs, and frontier.{json,md,png}; a stopped bench goes on from it.")
    ] = Path("runs/bench-frontier"),
) -> None:
    """Accuracy, memory and compute of every estimator in real federated runs. Takes hours; resumable."""
    from spryfl.bench.frontier import ROWS_FILE, run_frontier
    from spryfl.bench.frontier import tune as tune_rates
    from spryfl.bench.frontier_inference import stock_peaks
    from spryfl.bench.frontier_report import as_markdown, plot_frontier
    from spryfl.bench.frontier_works import SEEDS, TASKS, VARIANTS
    from spryfl.bench.gradient_quality import measure_quality, quality_markdown

    for asked, known in ((task, TASKS), (estimator, VARIANTS)):
        if asked == ["list"]:
            print("\n".join(known))
            return
    out.mkdir(parents=True, exist_ok=True)
    say = lambda text: print(f"running {text}", file=sys.stderr, flush=True)  # noqa: E731
    tasks, variants = task or list(TASKS), estimator or list(VARIANTS)
    if tune:
        print(json.dumps(tune_rates(tasks, variants, data, out, say), indent=2))
        return
    if quality:
        file = out / "gradient-quality.json"
        measured = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        for name in tasks:
            found = measure_quality(name, data, out, say)
            measured = [row for row in measured if row["task"] != name] + found
            file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
            (out / "gradient-quality.md").write_text(quality_markdown(measured), encoding="utf-8")
        print(json.dumps(measured, indent=1) if as_json else quality_markdown(measured))
        return
    rows = run_frontier(tasks, variants, seed or SEEDS, data, out, say)
    peaks = stock_peaks(list(dict.fromkeys(row["task"] for row in rows)), data, out)
    table = as_markdown(rows, peaks)
    (out / ROWS_FILE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / "frontier.md").write_text(table, encoding="utf-8")
    plot_frontier(rows, out / "frontier.png", peaks)
    print(json.dumps(rows, indent=1) if as_json else table)


@bench.command("theory")
def theory(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write theory.{json,md,png} there.")] = None,
) -> None:
    """Variance of forward gradients against d, and bias of a split round against heterogeneity. Takes minutes."""
    from spryfl.bench.theory import TheoryBench, measure_theory
    from spryfl.bench.theory_report import as_markdown, disagreements, plot_theory

    measured = measure_theory(TheoryBench())
    table = as_markdown(measured)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "theory.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        (out / "theory.md").write_text(table, encoding="utf-8")
        plot_theory(measured, out / "theory.png")
    print(json.dumps(measured, indent=1) if as_json else table)
    for problem in disagreements(measured):
        print(f"disagrees with theory: {problem}", file=sys.stderr)
