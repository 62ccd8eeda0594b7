"""`spry compare`: perform a suite of runs, or go on with one, and report."""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spryfl.config import load_suite


def compare(
    suite: Annotated[Path, typer.Argument(metavar="SUITE.toml", help="Methods, datasets and seeds; see the docs.")],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the suite's data lie, by name.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only these runs: a dataset, a method, or DATASET/METHOD/SEED with *."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the suite's [base].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The suite's folder, gone on with; runs/SUITE by default.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
) -> None:
    """Compare methods on datasets over seeds. Run it again to go on with what is left."""
    config = load_suite(suite, overrides or [])
    # After the arguments are known to be good: this imports torch.
    from spryfl.compare.cells import Suite, chosen_cells
    from spryfl.compare.running import compare as perform
    from spryfl.tracking.interruption import EXIT_CODE, Interruption
    from spryfl.tracking.suite_console import SuiteConsole

    work = Suite(config, out or Path("runs") / suite.stem, data, _command(suite, data, overrides or [], out))
    cells = chosen_cells(work.cells(), only or [])
    left = {cell.label for cell in cells if not work.is_finished(cell)}
    console = SuiteConsole(left, hidden=quiet or as_json)
    try:
        with console:
            rows = perform(work, cells, [console, Interruption()], console.tell)
    except KeyboardInterrupt:
        report = work.out / "report.html"
        told = f"; {report} has what is done" if report.exists() else ""
        print(f"Stopped{told}. Go on with the same command", file=sys.stderr)
        raise typer.Exit(EXIT_CODE) from None
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif not quiet:
        print((work.out / "report.md").read_text(encoding="utf-8"))
        print(f"{work.out}: report.html, report.md, results.parquet, plots, runs/")


def _command(suite: Path, data: Path | None, overrides: list[str], out: Path | None) -> str:
    """That performs the whole suite, whatever runs were asked for this time."""
    words = ["spry", "compare", str(suite)]
    words += [] if data is None else ["--data", str(data)]
    words += [word for override in overrides for word in ("--set", override)]
    words += [] if out is None else ["--out", str(out)]
    return shlex.join(words)
