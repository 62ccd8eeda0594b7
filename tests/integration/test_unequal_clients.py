"""Clients of unequal memory: what is metered stays within what each states, and a run says who ran how."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from spryfl.client_choice import GuidedMemory
from spryfl.client_memory import SMALLER_CHUNKS, ClientMemory
from spryfl.config import RunConfig
from spryfl.errors import ConfigError
from spryfl.federated.fitting import PassSettings
from spryfl.federated.messages import ClientTask, ClientUpdate
from spryfl.federated.rounds import run_round
from spryfl.memory.meter import weight_bytes
from spryfl.memory.plan import PROCESS_BYTES
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.suite import run_suite
from spryfl.workbench import Workbench

Make = Callable[..., RunConfig]
LARGE = 10**12


class Metered:
    """Meters every task, and keeps tasks and updates."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.done: list[tuple[ClientTask, ClientUpdate]] = []

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
        for task in tasks:
            (update,) = InProcessRuntime(self.bench.client, self.bench.batch_tokens).run([task])
            assert isinstance(update, ClientUpdate), update
            self.done.append((task, update))
            yield update


def bench_with(make: Make, *memory: int, **overrides: object) -> Workbench:
    return Workbench.from_config(make(clients__memory=list(memory), server__cohort_size=8, **overrides))


def memory_of(bench: Workbench) -> ClientMemory:
    assert bench.client_memory is not None
    return bench.client_memory


def by_layer(memory: ClientMemory) -> tuple[list[str], list[str]]:
    """The units of the lower layer and those of the upper one."""
    return tuple([unit for unit, place in memory.layer.items() if place == layer] for layer in (0, 1))


@pytest.mark.parametrize(
    "overrides",
    [
        {"method__name": "spry", "method__num_tangents": 4},
        {"method__name": "spry_per_iteration", "method__num_tangents": 4},
        {"method__name": "fedmezo", "method__num_tangents": 2},
        {"method__name": "fedyogi_split"},
        {"method__name": "fedyogi_split", "method__checkpointing": "per_layer", "adapter__dropout": 0.2},
    ],
    ids=lambda overrides: "-".join(str(value) for value in overrides.values()),
)
def test_the_metered_peak_stays_within_the_budget(overrides: dict[str, object], tiny_config: Make) -> None:
    """Half of the clients are as small as can hold every unit; all units are trained."""
    memory = memory_of(bench_with(tiny_config, LARGE, **overrides))
    small = memory.peak_bytes(list(memory.values), 1, SMALLER_CHUNKS[-1])
    bench = bench_with(tiny_config, small, LARGE, **overrides)
    runtime = Metered(bench)
    _, report = run_round(bench.initial_state(), bench.federation, runtime)
    assert report.untrained == report.unheld == report.refused == report.failures == ()
    assert len(runtime.done) == len(report.settings) == 8
    for task, update in runtime.done:
        assert task.settings == report.settings[task.client]
        budget = small if task.client % 2 == 0 else LARGE
        assert 0 < update.peak_activation_bytes <= budget - PROCESS_BYTES - weight_bytes(bench.adapted.model)
        if update.slopes is not None:
            assert update.slopes.shape[1] == task.settings.num_tangents
    if "spry" in str(overrides["method__name"]):
        assert max(task.settings.num_tangents for task, _ in runtime.done) == 4
        assert min(task.settings.num_tangents for task, _ in runtime.done) < 4


@pytest.mark.parametrize(
    "overrides",
    [
        {"method__name": "spry_guided", "guide__slopes": "none"},
        {"method__name": "spry_guided"},
        {"method__name": "spry_guided", "guide__horizon": 1},
        {"method__name": "fedyogi_guided"},
    ],
    ids=lambda overrides: "-".join(str(value) for value in overrides.values()),
)
def test_guesses_take_what_guesses_take(overrides: dict[str, object], tiny_config: Make) -> None:
    """A budget that holds a guess of every unit holds it in truth, and less than backprop of them would take."""
    fitting = bench_with(tiny_config, LARGE, **overrides).fitting
    assert isinstance(fitting, GuidedMemory)
    memory, every = fitting.choice.memory, list(fitting.choice.memory.values)
    small = fitting.least_bytes(every)
    bench = bench_with(tiny_config, small, LARGE, **overrides)
    assert bench.unheld_units == ()
    _, report = run_round(bench.initial_state(), bench.federation, runtime := Metered(bench))
    assert report.untrained == report.unheld == report.refused == report.failures == ()
    for task, update in runtime.done:
        budget = small if task.client % 2 == 0 else LARGE
        assert task.settings.chunk_bytes is not None
        assert 0 < update.peak_activation_bytes <= budget - PROCESS_BYTES - weight_bytes(bench.adapted.model)
    assert fitting.within(fitting.least_bytes(["head"]) - 1, ["head"]) is None
    if overrides.get("guide__slopes") == "none":
        assert small < memory.peak_bytes(every, 1, SMALLER_CHUNKS[-1])


def test_units_that_only_some_can_hold(tiny_config: Make) -> None:
    """Under backprop lower units take more: small clients get upper ones, and alone they leave the lower ones."""
    memory = memory_of(bench_with(tiny_config, LARGE, method__name="fedyogi_split"))
    lower, upper = by_layer(memory)
    small = memory.peak_bytes([*upper, "head"], 1, SMALLER_CHUNKS[0])
    bench = bench_with(tiny_config, small, LARGE, method__name="fedyogi_split")
    _, report = run_round(bench.initial_state(), bench.federation, runtime := Metered(bench))
    assert report.untrained == ()
    assert all(not set(task.units) & set(lower) for task, _ in runtime.done if task.client % 2 == 0)
    bench = bench_with(tiny_config, small, method__name="fedyogi_split")
    _, report = run_round(bench.initial_state(), bench.federation, Metered(bench))
    assert report.unheld == report.untrained == bench.unheld_units == tuple(lower)


def test_a_run_reports_settings_and_units_nobody_holds(
    tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from spryfl.tracking.console import ConsoleObserver, print_results

    memory = memory_of(bench_with(tiny_config, LARGE, method__name="fedyogi_split"))
    lower, upper = by_layer(memory)
    small = memory.peak_bytes([*upper, "head"], 1, SMALLER_CHUNKS[0])
    config = tiny_config(method__name="fedyogi_split", clients__memory=[small], server__num_rounds=2)
    console = ConsoleObserver(["fedyogi_split"], [2], hidden=False)
    (summary,) = run_suite(config, tmp_path / "run", lambda directory: [console])
    row = json.loads((tmp_path / "run/summary.json").read_text())
    assert (row["client_memory"], row["unheld_units"]) == ([small], lower)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    for event in events[1:]:
        assert event["unheld"] == event["untrained"] == lower
        assert [own["client"] for own in event["settings"]] == sorted(own["client"] for own in event["settings"])
        assert all(own["chunk_bytes"] == SMALLER_CHUNKS[0] for own in event["settings"])
    assert run_again(tmp_path / "run") == summary
    print_results([summary], tmp_path)
    out, err = capsys.readouterr()
    assert f"Untrained, as no client has the memory: {lower[0]}" in out
    assert err.count("no client of the cohort has the memory for") == 1


def run_again(path: Path) -> object:
    """What a finished run's directory says of itself."""
    from spryfl.tracking.run_directory import RunDirectory

    return RunDirectory(path).read_summary()


def test_tasks_of_other_settings_are_metered_anew(tiny_config: Make) -> None:
    bench = bench_with(tiny_config, LARGE, method__num_tangents=4)
    runtime = Metered(bench)
    run_round(bench.initial_state(), bench.federation, runtime)
    task = runtime.done[0][0]
    shared = InProcessRuntime(bench.client, bench.batch_tokens)
    fewer = replace(task, settings=PassSettings(1, SMALLER_CHUNKS[0]))
    peaks = [update.peak_activation_bytes for update in shared.run([fewer, task, fewer])]
    assert 0 < peaks[0] < peaks[1]
    assert peaks[2] == 0  # known


def test_without_stated_memory_nothing_is_reported(tiny_config: Make) -> None:
    bench = Workbench.from_config(tiny_config())
    assert bench.federation.fit is None
    _, report = run_round(bench.initial_state(), bench.federation, Metered(bench))
    assert report.settings == {}


def test_a_budget_nothing_fits_leaves_nothing_behind(tiny_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="300,000,000 bytes hold no unit of this model"):
        run_suite(tiny_config(clients__memory=["2GB", "300MB"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
