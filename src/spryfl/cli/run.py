"""`spry run`: perform a run, or go on with one."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from spryfl.config import RunConfig, compared_configs, load_config
from spryfl.errors import SpryError
from spryfl.presets import find_preset


def run(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG.toml", help="A run's file, or 'demo'.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: server.num_rounds=10.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Go on with an interrupted run.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run directory; runs/NAME-001 by default.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard event files too.")] = False,
) -> None:
    """Finetune a model federatedly, as a TOML file describes it."""
    loaded, directory = _what_to_run(config, overrides or [], resume, out)
    # After the arguments are known to be good: this imports torch.
    from spryfl.suite import resume_suite, run_suite, suite_labels
    from spryfl.tracking.console import ConsoleObserver, print_results
    from spryfl.tracking.events import Observer
    from spryfl.tracking.interruption import EXIT_CODE, Interruption
    from spryfl.tracking.run_directory import RunDirectory

    console = ConsoleObserver(suite_labels(loaded), _rounds(loaded), hidden=quiet or as_json)

    def observers(of: RunDirectory) -> list[Observer]:
        if not tensorboard:
            return [console, interruption]
        from spryfl.tracking.tensorboard import TensorBoardObserver

        return [console, interruption, TensorBoardObserver(of.path / "tensorboard")]

    interruption = Interruption()
    try:
        with console:
            summaries = (
                resume_suite(RunDirectory(directory), observers) if resume else run_suite(loaded, directory, observers)
            )
    except KeyboardInterrupt:
        print(f"Stopped. Go on with: spry run --resume {directory}", file=sys.stderr)
        raise typer.Exit(EXIT_CODE) from None
    if as_json:
        main, *compared = [summary.as_row() for summary in summaries]
        print(json.dumps(main | ({"compared": compared} if compared else {}), indent=2))
    elif not quiet:
        print_results(summaries, directory)


def _what_to_run(
    config: str | None, overrides: list[str], resume: Path | None, out: Path | None
) -> tuple[RunConfig, Path]:
    """The configuration and the run directory that the arguments mean."""
    if resume is not None:
        if config is not None or overrides or out is not None:
            raise SpryError("--resume takes everything from the run directory: leave out CONFIG, --set and --out")
        file = resume / "config.toml"
        if not file.is_file():
            raise SpryError(f"--resume {resume}: no run there (it has no config.toml)")
        return load_config(file), resume
    if config is None:
        raise SpryError("name a run's file, or 'demo'; or --resume RUN_DIR. Start a file with: spry init my.toml")
    path = find_preset(config) or Path(config)
    return load_config(path, overrides), out or _free_directory(path.stem)


def _free_directory(stem: str) -> Path:
    """runs/STEM-001, or the first number not in use."""
    number = 1
    while (path := Path("runs") / f"{stem}-{number:03d}").exists():
        number += 1
    return path


def _rounds(config: RunConfig) -> list[int]:
    return [config.server.num_rounds, *(other.server.num_rounds for other in compared_configs(config).values())]
