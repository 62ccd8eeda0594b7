"""`spry init`: a run's file to start from."""

from pathlib import Path
from typing import Annotated

import typer

from spryfl.errors import SpryError
from spryfl.presets import find_preset


def init(
    path: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The file to write; must not exist.")] = Path(
        "run.toml"
    ),
) -> None:
    """Write a commented copy of the demo's configuration."""
    demo = find_preset("demo")
    assert demo is not None
    if path.exists():
        raise SpryError(f"{path} exists already: choose another name, or remove it")
    if not path.parent.is_dir():
        raise SpryError(f"{path.parent}: no such folder")
    path.write_text(demo.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"Wrote {path}. Edit it, then: spry run {path}")
