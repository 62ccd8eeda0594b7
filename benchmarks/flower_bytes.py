"""Bytes a client and round over Flower: what we send, and all that passes a node's connection.

    python benchmarks/flower_bytes.py

Three SuperNodes on loopback, without encryption so that bytes can be counted; one of them connects through a proxy that
counts them, first while there is nothing to do, then during a run, without the round in which it is sent the app.
"""

import contextlib
import json
import platform
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from flower_world import FlowerWorld, wait_for
from spryfl.config import parse_config
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate
from spryfl.federated.rounds import run_round
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.runtime.messages import encode_answer, encode_task
from spryfl.workbench import Workbench

METHODS = ("spry", "spry_per_iteration", "fedavg")
NUM_ROUNDS = 4
IDLE_SECONDS = 30.0
RESULTS = Path(__file__).parents[1] / "docs/results"


def table(method: str) -> dict[str, Any]:
    return {
        "model": {"name": "builtin:minilm", "dtype": "float32"},
        "data": {"max_tokens": 16, "max_train_examples": 60, "max_test_examples": 40},
        "partition": {"kind": "iid", "num_clients": 3},
        "method": {"name": method},
        "server": {"num_rounds": NUM_ROUNDS, "cohort_size": 3},
        "evaluation": {"every": NUM_ROUNDS},
        "runtime": {"num_threads": 1},
    }


class Proxy:
    """Passes connections on and counts their bytes."""

    def __init__(self, target: int) -> None:
        self.up = self.down = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, sink, way in ((client, server, "up"), (server, client, "down")):
                threading.Thread(target=self._pass, args=(source, sink, way), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                setattr(self, way, getattr(self, way) + len(piece))
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def parcels(method: str) -> dict[str, float]:
    """Mean bytes of a client's task and answer as we encode them, over a round of the same run in one process."""
    bench = Workbench.from_config(parse_config(table(method)))
    inner, sizes = InProcessRuntime(bench.client, bench.batch_tokens), {"down": 0, "up": 0}

    class Counting:
        evaluate = inner.evaluate

        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
            for task in tasks:
                sizes["down"] += sum(map(len, (encode_task(task).header, encode_task(task).tensors)))
            for answer in inner.run(tasks):
                sizes["up"] += sum(map(len, (encode_answer(answer).header, encode_answer(answer).tensors)))
                yield answer

    run_round(bench.initial_state(), bench.federation, Counting())
    return {f"parcel_bytes_{way}": size / 3 for way, size in sizes.items()}


def measure(method: str) -> dict[str, Any]:
    """A run over Flower, its first node's connection counted from the first round's end to the last one's."""
    with tempfile.TemporaryDirectory() as folder, FlowerWorld(Path(folder) / "w", table(method)) as world:
        proxy = Proxy(world.port)
        world.start_node(0, superlink=proxy.port)
        for partition in (1, 2):
            world.start_node(partition)
        wait_for(lambda: proxy.up > 0, 120, "the node is connected")
        time.sleep(5)  # it introduces itself
        start = (proxy.up, proxy.down)
        time.sleep(IDLE_SECONDS)
        idle = ((proxy.up - start[0]) / IDLE_SECONDS, (proxy.down - start[1]) / IDLE_SECONDS)
        run = world.submit()
        world.wait_for_round(1, 600)
        before, first = (proxy.up, proxy.down), world.events()[-1].round
        world.wait_for_round(NUM_ROUNDS, 600)
        after, events = (proxy.up, proxy.down), world.events()
        status = world.finish(run, 200)
        assert status == "finished:completed", world.log()
    rounds = NUM_ROUNDS - first
    return {
        "method": method,
        **parcels(method),
        "values_or_slopes_bytes_up": events[-1].bytes_up / 3,
        "connection_bytes_up_a_round": (after[0] - before[0]) / rounds,
        "connection_bytes_down_a_round": (after[1] - before[1]) / rounds,
        "idle_bytes_up_a_second": idle[0],
        "idle_bytes_down_a_second": idle[1],
        "seconds_a_round": sum(event.seconds for event in events[-rounds:]) / rounds,
    }


def report(rows: list[dict[str, Any]]) -> str:
    """The table as a page."""
    lines = [
        "# Bytes a client and round over Flower",
        "",
        "MiniLM, LoRA r 1, 3 SuperNodes on loopback. Of each method: a client's task and answer as we encode them",
        "(JSON and safetensors), what of the answer is trained values or slopes, and all that passed a node's",
        "connection. That is ours, Flower's envelope, and its questions for messages, which it asks while idle too.",
        "Made by `benchmarks/flower_bytes.py`.",
        "",
        "| method | values or slopes up (B) | answer (B) | task (B) | connection up (B) | connection down (B) "
        "| round (s) | idle up (B/s) | idle down (B/s) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['values_or_slopes_bytes_up']:,.0f} | {row['parcel_bytes_up']:,.0f} "
            f"| {row['parcel_bytes_down']:,.0f} | {row['connection_bytes_up_a_round']:,.0f} "
            f"| {row['connection_bytes_down_a_round']:,.0f} | {row['seconds_a_round']:.1f} "
            f"| {row['idle_bytes_up_a_second']:,.0f} | {row['idle_bytes_down_a_second']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = []
    for method in METHODS:
        rows.append(measure(method))
        print(rows[-1], flush=True)
    about = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    (RESULTS / "flower-bytes.json").write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    (RESULTS / "flower-bytes.md").write_text(report(rows))


if __name__ == "__main__":
    main()
