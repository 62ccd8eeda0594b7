"""`method.estimator = "auto"`: clients of two sizes use different estimators, and a resumed run chooses as before."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spryfl.client_memory import SMALLER_CHUNKS
from spryfl.config import RunConfig
from spryfl.errors import ConfigError
from spryfl.federated.choosing import KINDS, Calibration
from spryfl.federated.fitting import Deal, PassSettings
from spryfl.federated.rounds import client_task
from spryfl.map_keeper import MapKeeper
from spryfl.run import run
from spryfl.speeds import measure_speeds
from spryfl.tracking.console import ConsoleObserver
from spryfl.tracking.events import Observer, RoundEvent
from spryfl.tracking.run_directory import RunDirectory, create_run_directory
from spryfl.workbench import Workbench

Make = Callable[..., RunConfig]
LARGE = 10**12
SLOW_CHECKPOINTS = Calibration({"backprop": 1.0, "per_layer": 50.0, "guided": 1.0, "forward": 10.0})


class StopAfter(Observer):
    """Stops a run once a round is done."""

    def __init__(self, round: int) -> None:
        self._round, self._done = round, 0

    def before_client(self) -> None:
        if self._done == self._round:
            raise KeyboardInterrupt

    def round_finished(self, event: RoundEvent) -> None:
        self._done = event.round


def auto(make: Make, *memory: int, **overrides: object) -> RunConfig:
    own = {"method__name": "fedyogi_split", "method__estimator": "auto", "clients__memory": list(memory)}
    return make(**(own | {"server__cohort_size": 8, "evaluation__every": 3} | overrides))


def two_sizes(make: Make) -> RunConfig:
    """Rich clients hold plain backprop of the lowest unit; poor ones hold a guess of it and no more of its inputs."""
    bench = Workbench.from_config(auto(make, LARGE))
    memory, choice, lowest = bench.client_memory, bench.client_choice, [next(iter(bench.federation.units)), "head"]
    assert memory is not None
    assert choice is not None
    rich = memory.peak_bytes(list(memory.values), 1, SMALLER_CHUNKS[0])
    guess = next(c for c in choice.candidates(0, lowest) if c.name == "guided h=0 without slopes")
    assert guess.peak_bytes < memory.peak_bytes(lowest, 1, SMALLER_CHUNKS[-1]) < rich
    return auto(make, guess.peak_bytes, rich)


def test_rich_clients_use_backprop_and_poor_ones_a_guess(
    tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_sizes(tiny_config)
    whole = create_run_directory(tmp_path / "whole")
    whole.write_calibration(SLOW_CHECKPOINTS)
    with ConsoleObserver(["auto"], [3], hidden=False) as console:
        summary = run(config, whole, [console], "auto")
    assert summary.estimator == "auto"
    assert summary.num_failures == summary.num_refused == 0
    rows = [row for event in whole.read_events() for row in event.settings]
    assert len(rows) == 24
    rich, poor = ([row for row in rows if row["client"] % 2 == size] for size in (1, 0))
    assert {(row["estimator"], row["checkpointing"]) for row in rich} == {("backprop", "none")}
    assert "guided" in {row["estimator"] for row in poor}
    assert all(row["reason"].startswith(row["estimator"]) and "to spare" in row["reason"] for row in rows)
    shown = capsys.readouterr().err
    assert "uses guided h=0 without slopes: fits 570 MB with" in shown
    assert shown.count("uses") < len(rows)

    # Stopped after the first round and resumed, with nothing measured again: bitwise the same.
    monkeypatch.setattr("spryfl.run.measure_speeds", lambda bench, state: SLOW_CHECKPOINTS.speeds)
    parts = create_run_directory(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        run(config, parts, [StopAfter(1)], "auto")
    assert json.loads(parts.choice_file.read_text())["speeds"] == SLOW_CHECKPOINTS.speeds
    monkeypatch.setattr("spryfl.run.measure_speeds", lambda bench, state: pytest.fail("measured anew"))
    run(config, RunDirectory(parts.path), (), "auto")
    assert parts.checkpoint_file.read_bytes() == whole.checkpoint_file.read_bytes()
    assert [e.settings for e in parts.read_events()] == [e.settings for e in whole.read_events()]


def test_without_stated_memory_every_candidate_fits(tiny_config: Make, tmp_path: Path) -> None:
    config = auto(tiny_config, server__num_rounds=1, server__cohort_size=3)
    bench = Workbench.from_config(config)
    assert bench.client_choice is not None
    assert bench.unheld_units == ()
    speeds = measure_speeds(bench, bench.initial_state())
    assert set(speeds) == set(KINDS)
    assert all(speed > 0 for speed in speeds.values())
    directory = create_run_directory(tmp_path / "run")
    run(config, directory, (), "auto")
    (event,) = directory.read_events()[1:]
    assert {row["estimator"] for row in event.settings} <= {"backprop", "guided", "forward"}
    assert all("to spare" not in row["reason"] for row in event.settings)


def test_only_clients_that_are_guided_are_sent_maps(tiny_config: Make, tmp_path: Path) -> None:
    text = tmp_path / "public.txt"
    text.write_text("\n".join(f"a {noun} is {tone}" for noun in ("film", "plot") for tone in ("good", "bad") * 8))
    bench = Workbench.from_config(auto(tiny_config, LARGE, guide__guess="maps", guide__text=str(text)))
    state = MapKeeper.of(bench).start(bench.initial_state())
    units = list(bench.federation.units)
    settings = {0: PassSettings(estimator="backprop"), 1: PassSettings(estimator="guided"), 2: PassSettings()}
    deal = Deal(dict.fromkeys(settings, tuple(units)), settings)
    sent = {client: set(client_task(state, bench.federation, client, deal).maps) for client in settings}
    assert sent == {0: set(), 1: {"basis", "0/own", "0/across"}, 2: {"basis", "0/own", "0/across"}}


def test_what_auto_refuses(tiny_config: Make) -> None:
    with pytest.raises(ConfigError, match="estimator 'auto'"):
        tiny_config(method__name="spry_per_iteration", method__estimator="auto")
    with pytest.raises(ConfigError, match="estimator = 'auto' chooses it"):
        tiny_config(method__estimator="auto", method__checkpointing="per_layer")
    with pytest.raises(ConfigError, match="300,000,000 bytes hold no unit of this model; the least is 570"):
        Workbench.from_config(auto(tiny_config, LARGE, 3 * 10**8))
