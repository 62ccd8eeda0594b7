"""Many clients in one process: what a round costs by the number of clients, and by the size of the cohort.

    python benchmarks/many_clients.py

MiniLM, LoRA r 1, one local step of two rows a client (`spry_per_iteration`), the same 16 thousand sentences shared
among all clients. Every case is a process of its own; seconds are the processor's, of one thread, as neighbours on the
machine do not lengthen them. Writes docs/results/many-clients.{json,md}.
"""

import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs/results"
CASES = [(100, 10), (1_000, 10), (10_000, 10), (10_000, 30), (10_000, 100)]
ROUNDS = 4  # the first is metered and not counted


def measure(num_clients: int, cohort_size: int) -> dict[str, Any]:
    """One case: loading, and the rounds after the first."""
    import torch

    from spryfl.config import parse_config
    from spryfl.data.partition import partition_rows
    from spryfl.federated.rounds import run_round
    from spryfl.runtime.in_process import InProcessRuntime
    from spryfl.workbench import Workbench

    torch.set_num_threads(1)
    config = parse_config(
        {
            "model": {"name": "builtin:minilm"},
            "data": {"name": "builtin:sentiment_by_domain", "max_tokens": 16},
            "partition": {"kind": "iid", "num_clients": num_clients, "min_examples": 1},
            "method": {"name": "spry_per_iteration"},
            "local": {"batch_size": 2},
            "server": {"cohort_size": cohort_size},
        }
    )
    bench = Workbench.from_config(config)
    started = time.process_time()
    partition_rows(config.partition, bench.train.labels, None, 0)
    partitioning = time.process_time() - started
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state, seconds, clients = bench.initial_state(), [], []
    runtime = InProcessRuntime(bench.client, bench.batch_tokens)
    for _ in range(ROUNDS):
        started = time.process_time()
        state, report = run_round(state, bench.federation, runtime)
        seconds.append(time.process_time() - started)
        clients.append(report.client_cpu_seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "num_clients": num_clients,
        "cohort_size": cohort_size,
        "partition_seconds": partitioning,
        "round_seconds": median(seconds[1:]),
        "server_seconds": median(a - b for a, b in zip(seconds[1:], clients[1:], strict=True)),
        "loaded_bytes": loaded * 1024,
        "peak_bytes": peak * 1024,
    }


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, *map(str, case)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(rows[-1], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    (RESULTS / "many-clients.json").write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    (RESULTS / "many-clients.md").write_text(report(rows))


def report(rows: list[dict[str, Any]]) -> str:
    """The table as a page."""
    lines = [
        "# Many clients in one process",
        "",
        "MiniLM, LoRA r 1, `spry_per_iteration`: a step of two rows (16 tokens at most) a client and round. The same",
        f"sentences are shared among all clients. Processor seconds of one thread, median of {ROUNDS - 1} rounds;",
        "outside clients: the part of a round that is none of theirs. Resident peaks of the process, after loading and",
        "in all. Made by `benchmarks/many_clients.py`.",
        "",
        "| clients | cohort | partition (s) | round (s) | outside clients | by client (ms) | loaded (MB) | peak (MB) |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['num_clients']:,} | {row['cohort_size']} | {row['partition_seconds']:.3f} "
            f"| {row['round_seconds']:.2f} | {row['server_seconds']:.3f} "
            f"| {1e3 * row['round_seconds'] / row['cohort_size']:.0f} "
            f"| {row['loaded_bytes'] / 1e6:,.0f} | {row['peak_bytes'] / 1e6:,.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
