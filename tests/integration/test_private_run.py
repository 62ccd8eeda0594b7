"""Whole runs with privacy or against hostile clients: what is told of them, and what is refused."""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from spryfl.config import RunConfig
from spryfl.errors import ConfigError
from spryfl.federated.accounting import gaussian_epsilon
from spryfl.federated.answers import proposed_change
from spryfl.federated.rounds import run_round
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.suite import resume_suite, run_suite
from spryfl.tracking.console import print_results
from spryfl.tracking.run_directory import RunDirectory
from spryfl.workbench import Workbench

PRIVATE = {"privacy__clip": 0.5, "privacy__noise_multiplier": 2.0, "privacy__delta": 1e-3}


def test_private_clients(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(privacy__level="client", **PRIVATE)
    (summary,) = run_suite(config, tmp_path)
    events = RunDirectory(tmp_path).read_events()
    spent = [event.epsilon for event in events]
    assert spent[0] is None
    assert 0 < spent[1] < spent[2] < spent[3] == summary.epsilon < gaussian_epsilon(2.0, 3, 1e-3)
    assert (summary.privacy, summary.delta, events[-1].delta) == ("client", 1e-3, 1e-3)
    console = Console(record=True, width=200, file=io.StringIO())
    print_results([summary], tmp_path, console)
    assert f"differential privacy of each client, epsilon {summary.epsilon:.3g} at delta 0.001" in console.export_text()


def test_delta_is_held_to_the_clients_that_a_column_makes(tiny_config: Callable[..., RunConfig]) -> None:
    partition = {"kind": "column", "column": "label"}
    config = tiny_config(partition=partition, privacy__level="client", **PRIVATE | {"privacy__delta": 0.6})
    with pytest.raises(ConfigError, match=r"delta = 0\.6 would allow publishing one of 2 clients outright"):
        Workbench.from_config(config)


@pytest.mark.parametrize("method", ["spry", "spry_per_iteration", "fedmezo"])
def test_private_examples(method: str, tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(privacy__level="example", method__name=method, server__num_rounds=2, **PRIVATE)
    (summary,) = run_suite(config, tmp_path)
    asked = Counter(client for event in RunDirectory(tmp_path).read_events() for client in event.clients)
    assert summary.epsilon == gaussian_epsilon(2.0, max(asked.values()), 1e-3)
    assert summary.loss is None  # clients do not tell it
    assert summary.num_refused == summary.num_failures == 0
    (resumed,) = resume_suite(RunDirectory(tmp_path))
    assert resumed == summary


@pytest.mark.parametrize(("method", "passes"), [("spry", 3), ("spry_per_iteration", 1)])
def test_an_example_pays_for_every_epoch(method: str, passes: int, tiny_config: Callable[..., RunConfig]) -> None:
    bench = Workbench.from_config(
        tiny_config(privacy__level="example", method__name=method, local__epochs=3, **PRIVATE)
    )
    assert bench.accountant is not None
    assert bench.accountant.epsilon(1) == gaussian_epsilon(2.0, passes, 1e-3)


def test_private_slopes_are_rebuilt_as_any_other(tiny_config: Callable[..., RunConfig]) -> None:
    """The server's replay of noised slopes is bitwise what the client, with the same noise, trained."""
    bench = Workbench.from_config(tiny_config(privacy__level="example", method__upload="slopes", **PRIVATE))
    federation = bench.federation
    tasks = []

    class Recorded(InProcessRuntime):
        def run(self, given):  # type: ignore[no-untyped-def]
            tasks.extend(given)
            return super().run(given)

    run_round(bench.initial_state(), federation, Recorded(bench.client, bench.batch_tokens))
    task, client = tasks[0], bench.client(tasks[0].client)

    def update(upload: str):  # type: ignore[no-untyped-def]
        words = np.random.Philox(key=7).random_raw
        return replace(client, estimator=replace(client.estimator, words=words)).update(replace(task, upload=upload))

    slopes, values = update("slopes"), update("values")
    assert slopes.loss is None
    rebuilt = proposed_change(slopes, task, federation)
    assert all(torch.equal(rebuilt[name], values.tensors[name] - task.values[name]) for name in task.parameters)


def test_median_and_trimmed_mean_need_three_clients_of_a_unit(tiny_config: Callable[..., RunConfig]) -> None:
    """Four units of LoRA: split among three clients, each has one."""
    with pytest.raises(ConfigError, match=r"some unit has 1 of a round's clients.* raise server.cohort_size to 12"):
        Workbench.from_config(tiny_config(server__aggregation="median"))
    with pytest.raises(ConfigError, match=r"has 2 of a round's clients.* raise server.cohort_size to 3$"):
        Workbench.from_config(tiny_config(server__aggregation="median", server__cohort_size=2, method__name="fedavg"))
    Workbench.from_config(tiny_config(server__aggregation="median", method__name="fedavg"))


def test_a_run_with_trimmed_mean_and_clipping(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    options = {"method__name": "fedavg", "server__aggregation": "trimmed_mean", "server__clip_norm": 1e-3}
    (summary,) = run_suite(tiny_config(server__num_rounds=1, **options), tmp_path)
    state = RunDirectory(tmp_path).read_checkpoint()
    start = Workbench.from_config(tiny_config()).initial_state()
    moved = torch.cat([(state.values[n] - v).flatten() for n, v in start.values.items()]).norm()
    assert 0 < float(moved) <= 2e-3
    assert (summary.privacy, summary.epsilon) == ("none", None)
