"""Memory and time of a round in one process, by the number of clients and by the cohort.

    taskset -c 0,1 python benchmarks/population.py docs/results/population.json [--quick]

Every case runs in a process of its own: Spry per iteration (one local step of two rows a client and round) on
builtin:minilm, the same 20,000 rows shared among all clients. Only the cohort's clients exist, one at a time, so memory
should not depend on the number of clients, and time on nothing but the cohort.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_ROWS = 20_000
NUM_ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="two small cases")
    given = parser.parse_args()
    cases = [(n, 10) for n in (100, 1_000, 10_000)] + [(10_000, cohort) for cohort in (20, 40, 80)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        tones = ("good", "bad")
        data.write_text(
            "\n".join(json.dumps({"text": f"film {i} is {tones[i % 2]}", "label": i % 2}) for i in range(NUM_ROWS))
        )
        for num_clients, cohort in [(100, 10), (10_000, 10)] if given.quick else cases:
            command = [
                sys.executable,
                "-c",
                f"import population as m; m.measure({str(data)!r}, {num_clients}, {cohort})",
            ]
            printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
            rows.append(json.loads(printed.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    given.out.write_text(json.dumps(rows, indent=2) + "\n")


def measure(data: str, num_clients: int, cohort: int) -> None:
    """Print one case as JSON."""
    from spryfl.config import parse_config
    from spryfl.federated.rounds import run_round
    from spryfl.runtime.in_process import InProcessRuntime
    from spryfl.workbench import Workbench

    config = parse_config(
        {
            "model": {"name": "builtin:minilm", "dtype": "float32"},
            "data": {"name": data, "max_tokens": 16},
            "partition": {"kind": "iid", "num_clients": num_clients},
            "method": {"name": "spry_per_iteration"},
            "local": {"batch_size": 2},
            "server": {"cohort_size": cohort},
        }
    )
    bench = Workbench.from_config(config)
    runtime = InProcessRuntime(bench.client, bench.batch_tokens)
    state, seconds = bench.initial_state(), []
    state, _ = run_round(state, bench.federation, runtime)  # warms up
    before = peak_bytes()
    for _ in range(NUM_ROUNDS):
        started = time.perf_counter()
        state, report = run_round(state, bench.federation, runtime)
        seconds.append(time.perf_counter() - started)
    assert report.num_updates == cohort
    row = {
        "num_clients": num_clients,
        "cohort": cohort,
        "seconds_a_round": statistics.median(seconds),
        "peak_bytes": peak_bytes(),
        "grown_over_rounds_bytes": peak_bytes() - before,
        "bytes_up_a_client": report.bytes_up / cohort,
    }
    print(json.dumps(row))


def peak_bytes() -> int:
    """The process's resident peak (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
