"""Put the measured tables into the README and that of docs/results, between their markers.

    python benchmarks/record_readme.py

Reads docs/results/{memory,frontier}.json and {matrix,directions}/results.parquet; tests/integration/test_readme.py
holds the texts to them.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pyarrow import parquet

from spryfl.bench import frontier_report, frontier_targets, memory_report, memory_targets
from spryfl.compare.results import ResultRow
from spryfl.compare.tables import Table, overview_tables, results_table, target_table

ROOT = Path(__file__).parents[1]
RESULTS = {
    "memory": ROOT / "docs/results/memory.json",
    "frontier": ROOT / "docs/results/frontier.json",
    "matrix": ROOT / "docs/results/matrix/results.parquet",
    "directions": ROOT / "docs/results/directions/results.parquet",
}
ZEROTH_ORDER = ("fedmezo", "baffle", "baffle_plus", "fwdllm", "fwdllm_plus")
HEADLINE = (
    "spry",
    "spry_guided",
    "spry_guided_adjusted",
    "fedyogi_guided",
    "fedyogi_guided_adjusted",
    "fedmezo",
    "fwdllm_plus",
    "fedyogi_split",
    "fedyogi_split_adjusted",
    "fedyogi",
    "fedyogi_adjusted",
    "head_alone",
)
POINTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Spry above the best of finite differences", "spry", ZEROTH_ORDER),
    ("Spry, guided, above it", "spry_guided", ZEROTH_ORDER),
    ("Spry above FedYogi", "spry", ("fedyogi",)),
    ("Spry, guided, above FedYogi, split", "spry_guided", ("fedyogi_split",)),
    ("Spry, guided, above FedYogi", "spry_guided", ("fedyogi",)),
    ("FedYogi, guided, above FedYogi", "fedyogi_guided", ("fedyogi",)),
    ("Spry, guided, adjusted, above FedYogi, split, adjusted", "spry_guided_adjusted", ("fedyogi_split_adjusted",)),
    ("Spry, guided, adjusted, above FedYogi, adjusted", "spry_guided_adjusted", ("fedyogi_adjusted",)),
    ("FedYogi, guided, adjusted, above it", "fedyogi_guided_adjusted", ("fedyogi_adjusted",)),
)
"""(told, variant, variants whose best it is held against)."""


def matrix_table(rows: Sequence[ResultRow]) -> str:
    """Some methods on the datasets that ran from several seeds."""
    several = {row.dataset for row in rows if row.seed != rows[0].seed}
    shown = [row for row in rows if row.variant in HEADLINE and row.dataset in several]
    return overview_tables(shown)[0][1].as_markdown()


def costs_tables(rows: Sequence[ResultRow]) -> str:
    """Some methods of a suite of one dataset: where they ended, for what, and what its target took them."""
    shown = [row for row in rows if row.variant in HEADLINE]
    to_target = target_table(shown, "FedYogi")
    assert to_target is not None
    told = f"{shown[0].dataset}, to reach {shown[0].metric} {shown[0].target:g}:"
    return f"{results_table(shown).as_markdown()}\n{told}\n\n{to_target.as_markdown()}"


def points_table(rows: Sequence[ResultRow]) -> str:
    """By how many points of the central test one method ends above others, on each dataset: means over shared seeds."""
    scores = {(row.dataset, row.variant, row.seed): row.central_test for row in rows if row.central_test is not None}
    lines = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        cells = []
        for _, variant, others in POINTS:
            points = [
                100 * (score - max(scores[dataset, other, seed] for other in others))
                for (of, name, seed), score in scores.items()
                if (of, name) == (dataset, variant) and all((dataset, other, seed) in scores for other in others)
            ]
            cells.append(f"{fmean(points):+.1f}" if points else "")
        lines.append([dataset, *cells])
    headings = ["points of the central test", *(told for told, _, _ in POINTS)]
    known = [column for column in range(len(headings)) if any(line[column] for line in lines)]
    return Table(
        [headings[column] for column in known], [[line[column] for column in known] for line in lines]
    ).as_markdown()


def frontier_table(rows: list[Any]) -> str:
    """The frontier's targets, with the peaks of stock inference beside them."""
    peaks = json.loads((ROOT / "docs/results/frontier-inference.json").read_text(encoding="utf-8"))
    return frontier_targets.targets_table(rows, peaks)


TABLES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("README.md", "memory", memory_report.headline),
    ("README.md", "frontier", frontier_report.headline),
    ("docs/results/README.md", "memory", memory_targets.targets_table),
    ("docs/results/README.md", "frontier", frontier_table),
    ("README.md", "matrix", matrix_table),
    ("docs/results/README.md", "matrix", points_table),
    ("docs/results/README.md", "directions", costs_tables),
)
"""(text, results, table of their rows)."""


def read_rows(name: str) -> list[Any]:
    """The results of that name."""
    path = RESULTS[name]
    if path.suffix == ".parquet":
        return [ResultRow(**row) for row in parquet.read_table(path).to_pylist()]
    rows: list[Any] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def with_table(text: str, name: str, table: str) -> str:
    """The text with one block filled."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return block.sub(lambda match: match[1] + table + match[2], text)


def main() -> None:
    for file, name, table in TABLES:
        path = ROOT / file
        path.write_text(with_table(path.read_text(encoding="utf-8"), name, table(read_rows(name))), encoding="utf-8")


if __name__ == "__main__":
    main()
