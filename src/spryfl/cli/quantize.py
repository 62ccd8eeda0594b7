"""`spry quantize`: a 4-bit or int8 copy of a model on disk."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Precision(str, Enum):
    """What linear maps can be packed to."""

    nf4 = "nf4"
    int8 = "int8"


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="builtin:NAME, a hub id, or a local folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A new folder.")],
    precision: Annotated[
        Precision, typer.Option(help="nf4 takes about half a byte a weight, int8 one.")
    ] = Precision.nf4,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code from the hub repository.")] = False,
) -> None:
    """Write a quantized copy that runs, and transformers, open as it is; the model never lies in memory whole."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from spryfl.config import ModelConfig
    from spryfl.models.quantizing import quantize_checkpoint

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"quantizing to {precision.value}", total=None)
        quantize_checkpoint(
            ModelConfig(name=model, trust_remote_code=trust_remote_code),
            out,
            precision.value,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    written = sum(path.stat().st_size for path in out.expanduser().iterdir())
    print(f"{out}: {precision.value}, {written / 1e6:,.1f} MB. Use it with model.name = '{out}'")
