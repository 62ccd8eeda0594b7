"""`spry status`: where a run stands."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from spryfl.tracking.status import RunStatus


def status(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Tell where a run stands: rounds, clients seen, failures by kind, bytes."""
    from spryfl.tracking.run_directory import RunDirectory
    from spryfl.tracking.status import run_status

    found = run_status(RunDirectory(run_dir))
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    for name, value in _lines(found):
        print(f"{name:10} {value}")


def _lines(found: "RunStatus") -> list[tuple[str, str]]:
    from rich.filesize import decimal

    values = {"loss": found.loss, str(found.metric): found.score}
    measured = [f"{name} {value:.3f}" for name, value in values.items() if value is not None]
    failures = ", ".join(f"{count} {kind}" for kind, count in found.failures.items()) or "none"
    rounds = f"{found.rounds} of {found.num_rounds}" + (", done" if found.finished else "")
    per_update = decimal(round(found.bytes_up / found.num_updates)) if found.num_updates else "nothing yet"
    rows = [
        ("run", f"{found.method}{''.join(f', {part}' for part in measured)}"),
        ("rounds", f"{rounds}, {found.seconds:.0f} s"),
        ("clients", f"{len(found.clients)}{f' of {found.num_clients}' if found.num_clients else ''} seen"),
        ("updates", f"{found.num_updates} used; {found.num_late} late"),
        ("failures", failures),
        ("bytes", f"up {decimal(found.bytes_up)} ({per_update} an update), down {decimal(found.bytes_down)}"),
    ]
    return [*rows, ("untrained", ", ".join(found.untrained))] if found.untrained else rows
