"""`spry init`: a run's file to start from."""

from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Annotated

import typer

from spryfl.errors import SpryError
from spryfl.presets import FLOWER_APP, find_preset


def init(
    path: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The file to write; must not exist.")] = Path(
        "run.toml"
    ),
    flower: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a Flower app instead: a folder for flwr run.")
    ] = None,
) -> None:
    """Write a commented copy of the demo's configuration, or a Flower app around one."""
    if flower is not None:
        _write_app(flower)
        return
    demo = find_preset("demo")
    assert demo is not None
    if path.exists():
        raise SpryError(f"{path} exists already: choose another name, or remove it")
    if not path.parent.is_dir():
        raise SpryError(f"{path.parent}: no such folder")
    path.write_text(demo.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"Wrote {path}. Edit it, then: spry run {path}")


def _write_app(folder: Path) -> None:
    if folder.exists():
        raise SpryError(f"{folder} exists already: choose another name, or remove it")
    if not folder.absolute().parent.is_dir():
        raise SpryError(f"{folder.absolute().parent}: no such folder")
    copytree(FLOWER_APP, folder, ignore=ignore_patterns("__pycache__"))
    print(f"Wrote {folder}. Edit {folder / 'run.toml'}; what to start where is in {folder / 'README.md'}")
