"""`spry bench frontier`: accuracy, memory and compute of every estimator in real federated runs.

Each run has a directory of its own below `--out`, so a stopped bench goes on where it was, inside a run too.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spryfl.bench.frontier_works import SEEDS, TASKS, TUNING_ROUNDS, VARIANTS, Variant, settings_of
from spryfl.config import RunConfig, parse_config, with_overrides
from spryfl.errors import SpryError, require_known
from spryfl.run import run_in
from spryfl.tracking.run_directory import RunDirectory

Row = dict[str, Any]
Progress = Callable[[str], None]
ROWS_FILE = "frontier.json"
TUNING_FILE = "frontier-tuning.json"
TUNING_SEED = 100


def run_frontier(
    tasks: Sequence[str], variants: Sequence[str], seeds: Sequence[int], data: Path, out: Path, say: Progress
) -> list[Row]:
    """Run what is asked for, or go on with it; rows of all runs that are finished below `out`.

    A row of an earlier bench that stands in `out`'s frontier.json counts as done, whatever became of its run, if it was
    made with the same settings.

    Raises:
        SpryError: an unknown name, or data that is not there.
    """
    check(tasks, variants, data)
    tuned, kept = read_tuning(out), {_key(row): row for row in read_rows(out)}
    for seed in seeds:
        for task in tasks:
            for name in variants:
                if not VARIANTS[name].suits(TASKS[task]):
                    continue
                config = variant_config(task, VARIANTS[name], data, tuned, seed)
                row = kept.get((task, name, seed))
                if row is not None and _is_of(row, config):
                    continue
                say(f"{task}, {name}, seed {seed}")
                run_in(config, run_folder(out, task, name, seed))
    return collect(out)


def collect(out: Path) -> list[Row]:
    """One row for each finished run, in the order of the tables; an earlier bench's where its run is not there."""
    rows = [row for task in TASKS for name in VARIANTS for row in _finished(out, task, name)]
    measured = {_key(row) for row in rows}
    rows += [row for row in read_rows(out) if _key(row) not in measured]
    tasks, names = list(TASKS), list(VARIANTS)
    rows.sort(key=lambda row: (tasks.index(row["task"]), names.index(_key(row)[1]), row["seed"]))
    return [row | {"share_recovered": _share(row, rows)} for row in rows]


def tune(tasks: Sequence[str], variants: Sequence[str], data: Path, out: Path, say: Progress) -> dict[str, Any]:
    """Try learning rates of the server for some rounds on a part of the training data; keep that of the least loss.

    Every variant that has no rate of its own and borrows none gets as many trials; so does every task, or
    the one that is searched for it. Losses, because accuracies of short runs are near chance.
    """
    check(tasks, variants, data)
    tuned = read_tuning(out)
    for task in dict.fromkeys(TASKS[task].tuned_on or task for task in tasks):
        for name in variants:
            variant = VARIANTS[name]
            if variant.rates_of is not None or variant.rate is not None or not variant.suits(TASKS[task]):
                continue
            trials = tuned.setdefault(task, {}).setdefault(name, {}).setdefault("loss", {})
            for factor in variant.factors:
                rate = float(f"{factor * TASKS[task].rate:.1e}")
                if str(rate) in trials:
                    continue
                say(f"tuning {task}, {name}, server.learning_rate {rate}")
                config = _tuning_config(task, variant, data, rate)
                folder = out / "tuning" / task / f"{_slug(name)}-{rate}"
                trials[str(rate)] = run_in(config, folder).test_loss
                shutil.rmtree(folder)
                tuned[task][name]["rate"] = float(min(trials, key=lambda r: (trials[r], float(r))))
                (out / TUNING_FILE).write_text(json.dumps(tuned, indent=2) + "\n", encoding="utf-8")
    return tuned


def read_rows(out: Path) -> list[Row]:
    """The rows that a bench left in `out`, of tasks and variants that there still are."""
    path = out / ROWS_FILE
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [row for row in rows if row["task"] in TASKS and _key(row)[1] in VARIANTS]


def _key(row: Row) -> tuple[str, str, int]:
    """(task, variant, seed)."""
    return row["task"], f"{row['estimator']} {row['dial']}".strip(), row["seed"]


def _is_of(row: Row, config: RunConfig) -> bool:
    return bool(row["settings"] == settings_digest(config))


def settings_digest(config: RunConfig) -> str:
    """Of all that a run's end follows from and is no default: the same wherever its data lie.

    What nothing is guided by is left out, as defaults that change would make another run of it.
    """
    left_out: dict[str, bool | set[str]] = {"label": True, "runtime": True, "compare": True, "evaluation": {"every"}}
    if config.method.own_estimator not in ("guided", "auto"):
        left_out["guide"] = True
    table = config.model_dump(mode="json", exclude_defaults=True, exclude=left_out)
    for part, key in (("data", "name"), ("guide", "text")):
        if key in table.get(part, {}):
            table[part][key] = Path(table[part][key]).name
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:12]


def read_tuning(out: Path) -> dict[str, Any]:
    """By task and variant: its trials and the best rate."""
    path = out / TUNING_FILE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def variant_config(task: str, variant: Variant, data: Path, tuned: dict[str, Any], seed: int) -> RunConfig:
    """Of one run.

    Args:
        tuned: of `read_tuning`; the task's own rate where it has none.
    """
    found = tuned.get(TASKS[task].tuned_on or task, {}).get(variant.rates_of or variant.name, {})
    rate = variant.rate or found.get("rate", TASKS[task].rate)
    settings = settings_of(TASKS[task], variant, str(data.resolve()), rate, seed)
    return parse_config(with_overrides({}, settings | {"runtime.num_threads": 1, "label": variant.name}))


def _tuning_config(task: str, variant: Variant, data: Path, rate: float) -> RunConfig:
    """A short run that never sees the test split: a part of train takes its place."""
    settings = settings_of(TASKS[task], variant, str(data.resolve()), rate, TUNING_SEED)
    changed = {
        "data.name": f"{data.resolve()}/{TASKS[task].data}/train.parquet",
        "server.num_rounds": TUNING_ROUNDS,
        "evaluation.every": TUNING_ROUNDS,
        "runtime.num_threads": 1,
    }
    return parse_config(with_overrides({}, settings | changed))


def _finished(out: Path, task: str, name: str) -> Iterator[Row]:
    variant = VARIANTS[name]
    for seed in SEEDS:
        directory = RunDirectory(run_folder(out, task, name, seed))
        summary = directory.read_summary()
        if summary is None:
            continue
        events = directory.read_events()
        steps = [event for event in events if event.round > 0]
        config = directory.read_config()
        yield {
            "task": task,
            "model": summary.model,
            "estimator": variant.estimator,
            "dial": variant.dial,
            "seed": seed,
            "rounds": summary.rounds,
            "accuracy": summary.accuracy,
            "accuracy_before": summary.accuracy_before,
            "client_seconds": summary.client_seconds,
            "client_cpu_seconds": summary.client_cpu_seconds,
            "activation_peak_bytes": summary.peak_activation_bytes,
            "bytes_up": summary.bytes_up,
            "bytes_down": summary.bytes_down,
            "map_fits": summary.num_map_fits,
            "learning_rate": config.server.learning_rate,
            "settings": settings_digest(config),
            "curve": [
                [event.round, event.accuracy, sum(e.client_cpu_seconds for e in steps if e.round <= event.round)]
                for event in events
                if event.accuracy is not None
            ],
        }


def _share(row: Row, rows: Sequence[Row]) -> float | None:
    """The part of backprop's gain (all units to all clients) that a run makes, of the same task, seed and rounds.

    A gain counts from training the head alone, or from the zero-shot prompt where there is no head.
    """
    same = [r for r in rows if all(r[key] == row[key] for key in ("task", "seed", "rounds"))]
    best = next((r["accuracy"] for r in same if r["estimator"] == "backprop"), None)
    start = row["accuracy_before"]
    if TASKS[row["task"]].has_head:
        start = next((r["accuracy"] for r in same if r["estimator"] == "head alone"), None)
    if best is None or start is None or best <= start:
        return None
    return float((row["accuracy"] - start) / (best - start))


def check(tasks: Sequence[str], variants: Sequence[str], data: Path) -> None:
    """Refuse an unknown name and data that is not there."""
    require_known("task", tasks, TASKS)
    require_known("estimator", variants, VARIANTS)
    missing = [task for task in tasks if not (data / TASKS[task].data / "train.parquet").is_file()]
    if missing:
        raise SpryError(f"--data {data}: no folder {TASKS[missing[0]].data} with train.parquet and test.parquet in it")


def run_folder(out: Path, task: str, name: str, seed: int) -> Path:
    """Where a variant's run lies."""
    return out / "runs" / task / f"{_slug(name)}-{seed}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")
