"""Keep what a demo run gave: summaries, plot, and a picture of the table it printed.

    make demo && .venv/bin/python benchmarks/record_demo.py runs/demo-001

Writes docs/results/demo.{json,png,svg}.
"""

import json
import platform
import shutil
import sys
from datetime import date
from pathlib import Path

from rich.console import Console

from spryfl.suite import resume_suite
from spryfl.tracking.console import print_results
from spryfl.tracking.run_directory import RunDirectory

RESULTS = Path(__file__).parents[1] / "docs/results"


def main(path: Path) -> None:
    summaries = resume_suite(RunDirectory(path))  # a finished run is only read
    shown = Path("runs") / path.name
    record = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "summaries": [summary.as_row() | {"run_directory": str(shown)} for summary in summaries],
    }
    (RESULTS / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.copy(path / "comparison.png", RESULTS / "demo.png")
    picture = Console(record=True, width=110)
    print_results(summaries, shown, picture)
    picture.save_svg(str(RESULTS / "demo.svg"), title="spry run demo")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
