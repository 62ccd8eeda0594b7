"""Run the demo and keep what it gives: summaries, plot, and a picture of the table it prints.

python benchmarks/record_demo.py     # writes docs/results/demo.{json,png,svg}
"""

import json
import platform
import shutil
import tempfile
import time
from datetime import date
from pathlib import Path

from rich.console import Console

from spryfl.config import load_config
from spryfl.presets import find_preset
from spryfl.suite import run_suite, suite_labels
from spryfl.tracking.console import ConsoleObserver, print_results

RESULTS = Path(__file__).parents[1] / "docs/results"


def main() -> None:
    demo = find_preset("demo")
    assert demo is not None
    config = load_config(demo)
    rounds = [config.server.num_rounds] * (1 + len(config.compare))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "demo-001"
        with ConsoleObserver(suite_labels(config), rounds, hidden=False) as console:
            summaries = run_suite(config, folder, lambda directory: [console])
        shutil.copy(folder / "comparison.png", RESULTS / "demo.png")
    record = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "seconds": time.perf_counter() - started,
        "summaries": [summary.as_row() | {"run_directory": "runs/demo-001"} for summary in summaries],
    }
    (RESULTS / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    picture = Console(record=True, width=100)
    print_results(summaries, Path("runs/demo-001"), picture)
    picture.save_svg(str(RESULTS / "demo.svg"), title="spry run demo")


if __name__ == "__main__":
    main()
