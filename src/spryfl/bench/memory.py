"""`spry bench memory`: what a step takes in memory and time, for every estimator on every work.

Each case runs in a process of its own (`bench.measure`). What was measured is kept line by line, so a stopped
run goes on where it was.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from spryfl.bench.works import WORKS, Case
from spryfl.errors import SpryError, require_known

Row = dict[str, Any]
Progress = Callable[[str], None]
GROWTH = "growth"
TRUTH = "truth"
NAMES = (*WORKS, GROWTH, TRUTH)
TIMEOUT_SECONDS = 4 * 3600


def run_works(
    names: Sequence[str], estimators: Sequence[str], partial: Path, cache: Path, say: Progress = lambda text: None
) -> list[Row]:
    """Measure works, or go on with what a stopped run left in `partial`.

    Args:
        names: of `NAMES`.
        estimators: only these; none given means all.
        partial: a file of JSON lines, one for each measurement.
        cache: where checkpoints of random weights are kept: 4 GB for 7B, 7 GB for 13B.
        say: told what is measured next.

    Returns:
        One row a case, its seconds the median over the work's repeats; a case that failed has `error`.

    Raises:
        SpryError: an unknown work or estimator.
    """
    require_known("work", names, NAMES)
    require_known("estimator", estimators, {case.estimator for work in WORKS.values() for case in work.cases})
    found = _read(partial)
    for key, arguments in _todo(names, estimators):
        if key in found:
            continue
        say(key)
        found[key] = _in_own_process(arguments, cache)
        with partial.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"key": key, "rows": found[key]}) + "\n")
    wanted = {key for key, _ in _todo(names, estimators)}
    return _merged([rows for key, rows in found.items() if key in wanted])


def _todo(names: Sequence[str], estimators: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Every measurement in its order: (key, arguments of its process)."""
    for name in names:
        if name in (GROWTH, TRUTH):
            yield name, [name, "0"]
            continue
        work = WORKS[name]
        for repeat in range(work.repeats):
            for number, case in enumerate(work.cases):
                if not estimators or case.estimator in estimators:
                    yield f"{name} {repeat + 1} {_case_name(case)}", [name, str(number)]


def _case_name(case: Case) -> str:
    return f"{case.estimator} k={case.k} units={case.units}"


def _in_own_process(arguments: Sequence[str], cache: Path) -> list[Row]:
    command = [sys.executable, "-m", "spryfl.bench.measure", *arguments, str(cache)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [_failed(arguments, f"took longer than {TIMEOUT_SECONDS} s")]
    if done.returncode != 0:
        killed = "killed, most likely for want of memory" if done.returncode < 0 else ""
        last = (done.stderr.strip().splitlines() or [""])[-1]
        ours = last.startswith(SpryError.__module__)  # the message says it all
        return [_failed(arguments, killed or (last.partition(": ")[2] if ours else last))]
    rows: list[Row] = json.loads(done.stdout.strip().splitlines()[-1])
    return rows


def _failed(arguments: Sequence[str], why: str) -> Row:
    """A row that says that it was tried, and what came of it."""
    name, number = arguments
    if name in (GROWTH, TRUTH):
        return {"work": name, "error": why}
    return WORKS[name].row(WORKS[name].cases[int(number)]) | {"error": why}


def _read(partial: Path) -> dict[str, list[Row]]:
    """What was measured already; what failed is tried again.

    Raises:
        SpryError: the file is damaged.
    """
    if not partial.is_file():
        return {}
    lines = partial.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        whole = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave a torn last line
    except ValueError as error:
        raise SpryError(f"{partial}: not JSON lines ({error}): mend or remove it") from None
    return {entry["key"]: entry["rows"] for entry in whole if not any("error" in row for row in entry["rows"])}


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier bench; none where there is no file.

    Raises:
        SpryError: the file is damaged.
    """
    try:
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError as error:
        raise SpryError(f"{path}: not JSON ({error}): mend or remove it") from None
    return rows


def _merged(measured: Sequence[Sequence[Row]]) -> list[Row]:
    """Repeats of a case as one row: the median of its seconds, the most of its bytes; of failed ones, if all did."""
    by_case: dict[tuple[Any, ...], list[Row]] = {}
    for row in (row for rows in measured for row in rows):
        by_case.setdefault(_case_of(row), []).append(row)
    merged = []
    for tried in by_case.values():
        rows = [row for row in tried if "error" not in row] or tried[:1]
        row = dict(rows[0])
        for key in row:
            if key.endswith("_peak_bytes"):
                row[key] = max(r[key] for r in rows)
        for key in ("seconds_per_step", "cpu_seconds_per_step"):
            if key in row:
                row[key] = median(r[key] for r in rows)
                row["repeats"] = len(rows)
        merged.append(row)
    return merged


def with_kept(rows: Sequence[Row], kept: Sequence[Row]) -> list[Row]:
    """New rows, and those of earlier runs whose case was not measured anew, in the order of the works."""
    measured = {_case_of(row) for row in rows}
    both = [*rows, *(row for row in kept if _case_of(row) not in measured)]
    return sorted(both, key=_place)


def _case_of(row: Row) -> tuple[Any, ...]:
    what = ("work", "estimator", "precision", "tokens", "k", "units", "against")
    layers = row.get("layers") if row["work"] == GROWTH else None  # a failed row has none, and a work has one depth
    return (layers, *(row.get(key) for key in what))


def _place(row: Row) -> tuple[int, int]:
    """Of a row's case among all: its work, then its place in it."""
    cases = [(case.estimator, case.k, case.units) for case in WORKS[row["work"]].cases] if row["work"] in WORKS else []
    own = (row.get("estimator"), row.get("k"), row.get("units"))
    return NAMES.index(row["work"]), cases.index(own) if own in cases else len(cases)


def default_cache() -> Path:
    """Where random checkpoints lie, as other programs' caches do."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "spryfl" / "bench"
