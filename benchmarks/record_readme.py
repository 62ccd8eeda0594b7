"""Put the measured tables into the README, between their markers.

    python benchmarks/record_readme.py

Reads docs/results/{memory,frontier}.json; tests/integration/test_readme.py holds the README to them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spryfl.bench import frontier_report, memory_report

ROOT = Path(__file__).parents[1]
HEADLINES: dict[str, Callable[[Any], str]] = {
    "memory": memory_report.headline,
    "frontier": frontier_report.headline,
}


def with_table(readme: str, name: str, table: str) -> str:
    """The README with one block filled."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return block.sub(lambda match: match[1] + table + match[2], readme)


def main() -> None:
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    for name, headline in HEADLINES.items():
        rows = json.loads((ROOT / f"docs/results/{name}.json").read_text(encoding="utf-8"))
        readme = with_table(readme, name, headline(rows))
    path.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
