"""The ServerApp: the same rounds as in one process, with clients on Flower's grid."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from spryfl.errors import SpryError
from spryfl.federated.messages import Runtime
from spryfl.models.fingerprint import base_fingerprint
from spryfl.run import hold_to, run, with_absolute_paths
from spryfl.runtime.flower.presence import Presence
from spryfl.runtime.flower.runtime import FlowerRuntime
from spryfl.runtime.flower.settings import Order, read_order
from spryfl.tracking.events import Note, Observer, RoundEvent, Summary
from spryfl.tracking.lock import held
from spryfl.tracking.run_directory import RunDirectory
from spryfl.workbench import Workbench

LOCK_SECONDS = 60.0


def server_app(config_file: Path) -> ServerApp:
    """A ServerApp that performs the run of a TOML file, or goes on with it in its run directory."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, read_order(config_file, context.run_config))

    return app


def serve(grid: Grid, order: Order) -> Summary:
    """Perform a run on a grid; if its directory holds a part of it already, go on from there."""
    config = with_absolute_paths(order.config)

    @contextmanager
    def connect(bench: Workbench, before_client: Callable[[], None]) -> Iterator[Runtime]:
        about = {"labels": bench.label_names}
        num_clients = bench.federation.num_clients
        presence = Presence(grid, base_fingerprint(config.model), num_clients)
        runtime = FlowerRuntime(grid, presence, about, before_client)
        present = runtime.gather(num_clients, order.wait_seconds)
        if not present:
            data = " data='PATH'" if config.partition.kind == "own" else ""
            raise SpryError(
                f"no client came within {order.wait_seconds:g} s: start SuperNodes, each with --node-config "
                f'"partition-id=..{data}" from 0 to {num_clients - 1}; or raise wait-seconds'
            )
        print(f"{len(present)} of {num_clients} clients are here", flush=True)
        yield runtime

    directory = RunDirectory(order.run_dir)
    directory.path.mkdir(parents=True, exist_ok=True)
    # One whose SuperLink was killed may still be about to end.
    with held(directory.path, "server.lock", LOCK_SECONDS):
        hold_to(directory, config)
        return run(config, directory, [_Log()], config.label or config.method.name, connect)


class _Log(Observer):
    """A line a round, to Flower's log."""

    def started(self, label: str, first_round: int, num_rounds: int) -> None:
        self._num_rounds = num_rounds
        print(f"{label}: {f'going on after round {first_round}' if first_round else 'a new run'}", flush=True)

    def noted(self, note: Note) -> None:
        print(f"{note.about}: {note.text}", flush=True)

    def round_finished(self, event: RoundEvent) -> None:
        parts = [f"round {event.round} of {self._num_rounds}", f"{event.num_updates} updates"]
        parts += [f"loss {event.loss:.3f}"] if event.loss is not None else []
        parts += [f"{name} {value:.3f}" for name, value in list(event.metrics.items())[:1]]
        parts += [f"client {reason}" for reason in (*event.failures, *event.refused, *event.late)]
        for name, own in event.held_out.items():
            score = getattr(event, name)
            parts += [f"{name} {'unknown' if score is None else f'{score:.3f}'} of {own['num_clients']} clients"]
            parts += [f"not of client {reason}" for reason in own["failures"]]
        print("; ".join(parts), flush=True)

    def finished(self, summary: Summary) -> None:
        print(f"done: {summary.metric} {summary.score:.3f} in {summary.run_directory}", flush=True)
