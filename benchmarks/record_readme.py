"""Put the measured tables into the README, between its markers.

    python benchmarks/record_readme.py

Reads docs/results/memory.json; tests/integration/test_readme.py holds the README to it.
"""

import json
import re
from pathlib import Path

from spryfl.bench.memory_report import headline

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- memory -->\n).*?(<!-- /memory -->)", re.DOTALL)


def with_tables(readme: str, rows: list[dict[str, object]]) -> str:
    """The README with its block filled from the results' rows."""
    return BLOCK.sub(lambda match: match[1] + headline(rows) + match[2], readme)


def main() -> None:
    path = ROOT / "README.md"
    rows = json.loads((ROOT / "docs/results/memory.json").read_text(encoding="utf-8"))
    path.write_text(with_tables(path.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
