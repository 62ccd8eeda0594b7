"""The learning rates of the demo: an equal search for each of its methods.

    python benchmarks/tune_demo.py METHOD     # fedyogi_guided, fedadam, spry or fedmezo; resumable

Twelve trials a method, on a validation part cut from train (the test split is never looked at), with the
demo's other settings and 15 rounds (the demo stops at 10 to keep to its five minutes). Each trial is one line
of docs/results/demo-tuning.jsonl; the best final validation accuracy wins, the lower loss on a tie.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from spryfl.config import compared_configs, load_config, parse_config, with_overrides
from spryfl.data.builtin import find_dataset
from spryfl.presets import find_preset
from spryfl.run import run
from spryfl.tracking.run_directory import create_run_directory

RESULTS = Path(__file__).parents[1] / "docs/results/demo-tuning.jsonl"
ROUNDS = 15
YOGI_GRID = [
    {"local.learning_rate": local, "server.learning_rate": server}
    for server, local in itertools.product((1e-2, 3e-3, 3e-2), (1e-3, 3e-3, 3e-4, 1e-2))
]
MEAN_GRID = [
    {"local.optimizer": optimizer, "local.learning_rate": rate}
    for optimizer, rates in {
        "sgd": (1e-2, 3e-2, 1e-1, 3e-1, 1e-3, 1.0),
        "adamw": (1e-3, 3e-3, 3e-4, 1e-2, 1e-4, 3e-2),
    }.items()
    for rate in rates
]
ADAM_GRID = [
    {"local.learning_rate": local, "server.learning_rate": server}
    for server, local in itertools.product((1e-2, 3e-3, 3e-2), (0.1, 0.03, 0.3, 1.0))
]
GRIDS: dict[str, list[dict[str, Any]]] = {
    "fedyogi_guided": ADAM_GRID,
    "fedadam": ADAM_GRID,
    "spry": YOGI_GRID,
    "fedmezo": MEAN_GRID,
}


def training_rows(folder: Path) -> Path:
    """The demo's train split as a file of its own, so that its validation part is cut from train."""
    table = pq.read_table(find_dataset("movie_reviews").files["train"])
    path = folder / "train.parquet"
    pq.write_table(table.filter(pc.field("domain") == "movie_reviews"), path)
    return path


def main(method: str) -> None:
    demo = find_preset("demo")
    assert demo is not None
    main_run = load_config(demo)
    own = {config.method.name: config for config in (main_run, *compared_configs(main_run).values())}[method]
    base = own.model_dump(exclude_none=True, exclude={"compare": True, "label": True, "server": {"learning_rate"}})
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        fixed = {
            "method.name": method,
            "server.num_rounds": ROUNDS,
            "evaluation.every": ROUNDS,
            "data.name": str(training_rows(Path(scratch))),
        }
        for number, trial in enumerate(GRIDS[method]):
            if any(row["method"] == method and row["trial"] == trial for row in done):
                continue
            config = parse_config(with_overrides(base, {**fixed, **trial}))
            summary = run(config, create_run_directory(Path(scratch) / str(number)), (), method)
            row = {
                "method": method,
                "trial": trial,
                "rounds": ROUNDS,
                "seed": config.seed,
                "validation_accuracy": summary.accuracy,
                "validation_loss": summary.test_loss,
            }
            with RESULTS.open("a") as handle:
                handle.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
