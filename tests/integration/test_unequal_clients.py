"""Clients of unequal memory: settings and units that fit each, checked against what is metered."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from spryfl.config import RunConfig, parse_config
from spryfl.errors import ConfigError
from spryfl.federated.messages import ClientTask, ClientUpdate
from spryfl.federated.rounds import run_round
from spryfl.memory.meter import weight_bytes
from spryfl.memory.plan import PROCESS_BYTES
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.suite import run_suite
from spryfl.workbench import Workbench

Make = Callable[..., RunConfig]
LARGE = 10**12


class Recording:
    """Meters every task, and keeps tasks and updates."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.done: list[tuple[ClientTask, ClientUpdate]] = []

    def run(self, tasks: Sequence[ClientTask]) -> object:
        for task in tasks:
            (update,) = InProcessRuntime(self.bench.client, self.bench.batch_tokens).run([task])
            assert isinstance(update, ClientUpdate), update
            self.done.append((task, update))
            yield update


def bench_with(make: Make, memory: Sequence[int], **overrides: object) -> Workbench:
    return Workbench.from_config(make(clients__memory=list(memory), server__cohort_size=8, **overrides))


def fixed(bench: Workbench) -> int:
    return PROCESS_BYTES + weight_bytes(bench.adapted.model)


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
    """Half of the clients are as small as the plan allows; all that the round needs is trained all the same."""
    least = bench_with(tiny_config, [LARGE], **overrides).capacity
    assert least is not None
    tightest = bench_with(tiny_config, [least.least() + 10_000], **overrides).capacity
    assert tightest is not None
    # What the lowest unit takes under the least settings.
    small = min(tightest.peak_bytes[next(iter(tightest.peak_bytes))])
    bench = bench_with(tiny_config, [small, LARGE], **overrides)
    runtime = Recording(bench)
    _, report = run_round(bench.initial_state(), bench.federation, runtime)
    assert report.untrained == report.unheld == report.refused == report.failures == ()
    assert len(runtime.done) == 8
    for task, update in runtime.done:
        assert task.settings == report.settings[task.client]
        budget = small if task.client % 2 == 0 else LARGE
        assert 0 < update.peak_activation_bytes <= budget - fixed(bench)
        if update.slopes is not None:
            assert update.slopes.shape[1] == task.settings.num_tangents
    if "num_tangents" in str(overrides) and overrides["method__name"] != "fedmezo":
        assert {task.settings.num_tangents for task, _ in runtime.done} == {1, 4}


def test_units_that_only_some_can_hold(tiny_config: Make) -> None:
    """Under backprop lower units take more: the small clients get the upper ones, or, alone, leave the lower ones."""
    peaks = bench_with(tiny_config, [LARGE], method__name="fedyogi_split").capacity.peak_bytes
    lower = [unit for unit in peaks if ".0." in unit]
    upper = max(peaks[unit][0] for unit in peaks if unit not in lower)
    assert upper < min(peaks[unit][0] for unit in lower)
    bench = bench_with(tiny_config, [upper, LARGE], method__name="fedyogi_split")
    _, report = run_round(bench.initial_state(), bench.federation, runtime := Recording(bench))
    assert report.untrained == ()
    assert all(not set(task.units) & set(lower) for task, _ in runtime.done if task.client % 2 == 0)
    bench = bench_with(tiny_config, [upper], method__name="fedyogi_split")
    _, report = run_round(bench.initial_state(), bench.federation, Recording(bench))
    assert report.unheld == report.untrained == tuple(lower)
    assert bench.capacity.unheld(range(8)) == tuple(lower)


def test_a_run_reports_settings_and_units_nobody_holds(tiny_config: Make, tmp_path: Path) -> None:
    peaks = bench_with(tiny_config, [LARGE], method__name="fedyogi_split").capacity.peak_bytes
    upper = max(peak[0] for unit, peak in peaks.items() if ".0." not in unit)
    config = tiny_config(method__name="fedyogi_split", clients__memory=[upper], server__num_rounds=1)
    (summary,) = run_suite(config, tmp_path / "run")
    lower = [unit for unit in peaks if ".0." in unit]
    assert summary.unheld == tuple(lower)
    row = json.loads((tmp_path / "run/summary.json").read_text())
    assert (row["client_memory"], row["unheld"]) == ([upper], lower)
    event = json.loads((tmp_path / "run/events.jsonl").read_text().splitlines()[1])
    assert event["unheld"] == event["untrained"] == lower
    assert {*event["settings"][0]} == {"client", "num_tangents", "chunk_bytes", "streamed"}
    assert len(event["settings"]) == 3
    (again,) = run_suite(replace_out(config), tmp_path / "again")
    assert replace(again, seconds=0, client_seconds=0, run_directory="") == replace(
        summary, seconds=0, client_seconds=0, run_directory=""
    )


def replace_out(config: RunConfig) -> RunConfig:
    """The same configuration, through its own file format."""
    return parse_config(config.model_dump(exclude_none=True, mode="json"))


def test_without_stated_memory_nothing_changes(tiny_config: Make) -> None:
    bench = Workbench.from_config(tiny_config())
    assert bench.federation.capacity is None
    _, report = run_round(bench.initial_state(), bench.federation, runtime := Recording(bench))
    assert report.settings == {}
    assert all(task.settings is None for task, _ in runtime.done)


def test_a_budget_nothing_fits_is_refused_before_the_run(tiny_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a client with 300,000,000 bytes can train no unit\. The least takes"):
        run_suite(tiny_config(clients__memory=["2GB", "300MB"]), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]
    with pytest.raises(ConfigError, match=r"clients\.memory\.0: a number of bytes, or text such as '64MiB'"):
        tiny_config(clients__memory=["plenty"])
