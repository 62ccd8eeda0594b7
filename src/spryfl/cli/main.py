"""`spry`: the commands, and how errors reach the user."""

import sys
from typing import Annotated, NoReturn

import typer

from spryfl.cli.bench import bench
from spryfl.cli.check import check
from spryfl.cli.compare import compare
from spryfl.cli.fit_maps import fit_maps
from spryfl.cli.init import init
from spryfl.cli.list import list_
from spryfl.cli.plan import plan
from spryfl.cli.quantize import quantize
from spryfl.cli.run import run
from spryfl.cli.status import status
from spryfl.errors import SpryError, is_full_disk

app = typer.Typer(
    help="Federated finetuning of language models on machines that can afford inference, not training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run)
app.command("compare")(compare)
app.command("init")(init)
app.command("status")(status)
app.command("check")(check)
app.command("plan")(plan)
app.command("list")(list_)
app.command("quantize")(quantize)
app.command("fit-maps")(fit_maps)
app.add_typer(bench, name="bench")

BAD_INPUT = 2


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"spry {version('spryfl')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options that stand before a command."""


def main() -> NoReturn:
    """Run a command; a problem the user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except SpryError as error:
        fail(str(error))
    except OSError as error:
        if is_full_disk(error):
            fail(
                f"no space left on disk ({error.filename or 'while writing'}): free some, then go on with spry run "
                "--resume, or with the same spry compare"
            )
        fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    sys.exit(0)


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
