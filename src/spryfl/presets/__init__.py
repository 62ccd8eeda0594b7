"""Configurations that come with the project, by name."""

from pathlib import Path

FOLDER = Path(__file__).parent
FLOWER_APP = FOLDER / "flower"
"""What `spry init --flower` copies."""


def find_preset(name: str) -> Path | None:
    """The file of a preset's name, or None if it is not one's."""
    path = FOLDER / f"{name}.toml"
    return path if "/" not in name and path.is_file() else None
