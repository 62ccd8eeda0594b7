"""Runs that evaluate clients on what they hold out: figures, resuming, runtimes, estimators."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spryfl.config import RunConfig
from spryfl.errors import DataError
from spryfl.federated.client import loaded
from spryfl.federated.fitting import Deal, PassSettings
from spryfl.federated.rounds import client_task
from spryfl.suite import resume_suite, run_suite
from spryfl.tracking.console import print_results
from spryfl.tracking.events import Observer, RoundEvent
from spryfl.tracking.run_directory import RunDirectory
from spryfl.workbench import Workbench

Make = Callable[..., RunConfig]


def without_times(event: RoundEvent) -> RoundEvent:
    return replace(event, seconds=0.0, client_seconds=0.0, client_cpu_seconds=0.0, peak_activation_bytes=0)


def assert_same_run(one: Path, other: Path) -> None:
    """Events and state, to the last bit."""
    ours, theirs = RunDirectory(one), RunDirectory(other)
    assert list(map(without_times, ours.read_events())) == list(map(without_times, theirs.read_events()))
    states = [directory.read_checkpoint().values for directory in (ours, theirs)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_figures_of_a_run(tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are what the task makes of the final values on each client's own rows."""
    config = tiny_config(
        evaluation__held_out=0.3, method__name="fedavg", local__learning_rate=0.03, partition__alpha=0.5
    )
    (summary,) = run_suite(config, tmp_path / "run")
    row = json.loads((tmp_path / "run/summary.json").read_text())
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert row["central_test"] == row["score"] == events[-1]["central_test"]
    assert [event["generalized"] is None for event in events] == [True, True, True, False]  # at the end, by default
    assert [event["personalized"] is None for event in events] == [True, True, True, False]
    assert events[-1]["held_out"] == row["held_out"]

    bench, state = Workbench.from_config(config), RunDirectory(tmp_path / "run").read_checkpoint()
    with loaded(bench.adapted.model, state.values):
        own = [bench.task.evaluate(bench.adapted.model, bench.train, rows, 64) for rows in bench.held_out if len(rows)]
    sizes, scores = [e.num_examples for e in own], [e.metrics["accuracy"] for e in own]
    assert row["generalized"] == pytest.approx(np.average(scores, weights=sizes))
    assert "f1" in row["metrics"]
    spread = row["held_out"]["generalized"]
    assert list(spread["metrics"]) == ["accuracy"]  # clients' F1s have no mean
    assert spread["std"] == pytest.approx(np.std(scores))
    assert (spread["lowest"], spread["highest"]) == (min(scores), max(scores))
    assert (spread["num_clients"], spread["num_examples"]) == (len(own), sum(sizes))

    # Personalized: the values that each client would send up in the next round.
    units, losses = tuple(bench.federation.units), []
    for client, rows in enumerate(bench.held_out):
        assert len(rows)
        deal = Deal({client: units}, {client: PassSettings()})
        update = bench.client(client).update(client_task(state, bench.federation, client, deal))
        with loaded(bench.adapted.model, update.tensors):
            losses.append(bench.task.evaluate(bench.adapted.model, bench.train, rows, 64).loss)
    assert row["held_out"]["personalized"]["loss"] == pytest.approx(np.average(losses, weights=sizes))
    assert row["held_out"]["personalized"]["loss"] < row["held_out"]["generalized"]["loss"]

    print_results([summary], tmp_path)
    out = capsys.readouterr().out
    assert f"generalized accuracy {summary.generalized:.3f} on {sum(sizes)} held-out rows of {len(own)} clients" in out


@pytest.fixture
def evaluated(tiny_config: Make) -> Make:
    """Every evaluation of every kind, on five of the eight clients."""

    def make(**overrides: object) -> RunConfig:
        kinds = {"generalized": "every", "personalized": "every", "held_out": 0.25, "max_clients": 5}
        return tiny_config(**{f"evaluation__{key}": value for key, value in kinds.items()}, **overrides)

    return make


def test_resumed_and_interrupted_evaluations(evaluated: Make, tmp_path: Path) -> None:
    """Stopped between two clients of a round's evaluation, then of the last one's: the same to the last bit."""
    config = evaluated(server__num_rounds=2, adapter__dropout=0.1)
    run_suite(config, tmp_path / "whole")

    class Stop(Observer):
        """Of 5 + 5 evaluations before training, then 3 clients and 10 evaluations a round."""

        def __init__(self, before: int) -> None:
            self.left = before

        def before_client(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    stopped = RunDirectory(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        run_suite(config, stopped.path, lambda directory: [Stop(10 + 3 + 7)])
    assert [event.round for event in stopped.read_events()] == [0]
    with pytest.raises(KeyboardInterrupt):
        resume_suite(stopped, lambda directory: [Stop(13 + 3 + 2)])
    assert stopped.read_checkpoint().round == 1
    resume_suite(stopped)
    assert_same_run(tmp_path / "whole", stopped.path)
    events = stopped.read_events()
    assert all(event.held_out["personalized"]["num_clients"] == 5 for event in events)
    assert len({event.held_out["generalized"]["num_examples"] for event in events}) == 1


def test_evaluations_in_workers(evaluated: Make, tmp_path: Path) -> None:
    options = {"server__num_rounds": 1, "runtime__num_threads": 1}
    run_suite(evaluated(**options), tmp_path / "one")
    run_suite(evaluated(**options, runtime__num_workers=2), tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert RunDirectory(tmp_path / "two").read_events()[-1].held_out["personalized"]["failures"] == []


@pytest.mark.parametrize(
    "overrides",
    [
        {"method__name": "spry_per_iteration"},
        {"method__name": "fedsgd"},
        {"method__name": "fedmezo", "method__upload": "slopes"},
        {"method__estimator": "guided"},
        {"method__estimator": "bottleneck", "method__exact_head": True},
        {"method__estimator": "auto", "clients__memory": ["2GB", "700MB"]},
    ],
    ids=lambda overrides: "-".join(str(value) for value in overrides.values()),
)
def test_every_kind_of_estimator_personalizes(overrides: dict[str, object], tiny_config: Make, tmp_path: Path) -> None:
    options = {"evaluation__held_out": 0.3, "server__num_rounds": 1, "evaluation__max_clients": 3}
    (summary,) = run_suite(tiny_config(**options, local__learning_rate=0.05, **overrides), tmp_path / "run")
    own = summary.held_out
    assert own["personalized"]["failures"] == own["generalized"]["failures"] == []
    assert own["personalized"]["num_clients"] == 3
    assert own["personalized"]["num_examples"] == own["generalized"]["num_examples"]
    assert own["personalized"]["loss"] != own["generalized"]["loss"]


def test_held_out_rows_are_not_trained_on(tiny_config: Make, tmp_path: Path) -> None:
    """By default there are none, and the partition is what it was; it is drawn in the run directory."""
    whole = Workbench.from_config(tiny_config())
    assert not any(map(len, whole.held_out))
    bench = Workbench.from_config(tiny_config(evaluation__held_out=0.3))
    for rows, kept, out in zip(whole.partition, bench.partition, bench.held_out, strict=True):
        assert sorted([*kept, *out]) == rows.tolist()
    assert bench.label_counts.tolist() == whole.label_counts.tolist()
    assert bench.label_counts.sum() == len(whole.train)
    (summary,) = run_suite(tiny_config(server__num_rounds=1), tmp_path / "run")
    assert (summary.generalized, summary.personalized, summary.held_out) == (None, None, {})
    assert summary.central_test == summary.score
    assert (tmp_path / "run/partition.png").read_bytes().startswith(b"\x89PNG")


def test_clients_too_small_to_hold_anything_out(tiny_config: Make) -> None:
    small = {"data__max_train_examples": 16, "partition__min_examples": 1, "partition__kind": "iid"}
    with pytest.raises(DataError, match=r"held_out = 0.2 is less than a row of every client: raise it, or lower"):
        Workbench.from_config(tiny_config(evaluation__held_out=0.2, **small))
