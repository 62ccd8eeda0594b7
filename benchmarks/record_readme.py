"""Put the measured tables into the README and that of docs/results, between their markers.

    python benchmarks/record_readme.py

Reads docs/results/{memory,frontier}.json; tests/integration/test_readme.py holds the texts to them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spryfl.bench import frontier_report, frontier_targets, memory_report, memory_targets

ROOT = Path(__file__).parents[1]


def frontier_table(rows: list[Any]) -> str:
    """The frontier's targets, with the peaks of stock inference beside them."""
    peaks = json.loads((ROOT / "docs/results/frontier-inference.json").read_text(encoding="utf-8"))
    return frontier_targets.targets_table(rows, peaks)


TABLES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("README.md", "memory", memory_report.headline),
    ("README.md", "frontier", frontier_report.headline),
    ("docs/results/README.md", "memory", memory_targets.targets_table),
    ("docs/results/README.md", "frontier", frontier_table),
)
"""(text, results, table of their rows)."""


def with_table(text: str, name: str, table: str) -> str:
    """The text with one block filled."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return block.sub(lambda match: match[1] + table + match[2], text)


def main() -> None:
    for file, name, table in TABLES:
        path = ROOT / file
        rows = json.loads((ROOT / f"docs/results/{name}.json").read_text(encoding="utf-8"))
        path.write_text(with_table(path.read_text(encoding="utf-8"), name, table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
