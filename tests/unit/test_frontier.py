"""The frontier bench's tables: every run's settings are valid, shares by hand, bad names."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spryfl.bench import gradient_quality
from spryfl.bench.frontier import _share, read_tuning, run_frontier, settings_digest, tune, variant_config
from spryfl.bench.frontier_report import (
    as_markdown,
    equal_accuracy,
    headline,
    not_run,
    on_shared_rounds,
    plot_frontier,
)
from spryfl.bench.frontier_targets import targets_table
from spryfl.bench.frontier_works import TASKS, VARIANTS, settings_of
from spryfl.config import RunConfig, parse_config, with_overrides
from spryfl.errors import SpryError


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_run_is_valid_and_shares_clients_and_rounds(task: str, name: str) -> None:
    variant = VARIANTS[name]
    if not variant.suits(TASKS[task]):
        pytest.skip("not tried there")
    config = parse_config(with_overrides({}, settings_of(TASKS[task], variant, "data", 1e-2, 1)))
    first = parse_config(with_overrides({}, settings_of(TASKS[task], VARIANTS["backprop"], "data", 1e-2, 1)))
    rounds, schedule = config.server.num_rounds, config.server.schedule
    # More of them, or another rate, only if it says so.
    assert rounds == first.server.num_rounds or f"{rounds} rounds" in variant.dial
    assert schedule == first.server.schedule or "falling rate" in variant.dial
    own = {"num_rounds": first.server.num_rounds, "schedule": first.server.schedule}
    server = config.server.model_copy(update=own)
    assert (config.data, config.partition, server, config.local, config.seed) == (
        first.data,
        first.partition,
        first.server,
        first.local,
        first.seed,
    )
    assert variant.rates_of is None or VARIANTS[variant.rates_of].rates_of is None


def row(task: str, estimator: str, accuracy: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "task": task,
        "model": "m",
        "estimator": estimator,
        "dial": "",
        "seed": seed,
        "rounds": 3,
        "accuracy": accuracy,
        "accuracy_before": 0.3,
        "client_cpu_seconds": 10.0,
        "activation_peak_bytes": 10**6,
        "bytes_up": 10**6,
        "bytes_down": 10**6,
        "share_recovered": None,
        "curve": [[0, 0.3, 0.0], [3, accuracy, 10.0]],
    } | more


def test_shares_count_from_the_head_or_from_the_zero_shot_prompt() -> None:
    rows = [
        row("snli", "head alone", 0.5),
        row("snli", "backprop", 0.7),
        row("snli", "guided maps", 0.6),
        row("snli", "guided maps", 0.6, seed=1),
        row("prompted_sst2", "backprop", 0.9),
        row("prompted_sst2", "guided maps", 0.6),
    ]
    shares = [_share(r, rows) for r in rows]
    assert shares[:3] == pytest.approx([0.0, 1.0, 0.5])
    assert shares[3] is None  # no backprop with that seed
    assert shares[5] == pytest.approx(0.5)


def test_reports(tmp_path: Path) -> None:
    rows = [row("snli", "backprop", 0.7), row("snli", "backprop", 0.8, seed=1), row("snli", "head alone", 0.5)]
    assert "| backprop |  | 2 | 0.750 ± 0.071 |" in as_markdown(rows)
    assert "| 1.0 | 2.00 | 1.0 | 1.0 |" in as_markdown(rows, {"snli": 500_000})  # peak, x inference, up, down
    assert "| backprop, all units, checkpointed | 0.750 (2); 10; 1.0 |" in headline(rows)
    plot_frontier(rows, tmp_path / "plot.png", {"snli": 500_000})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_shows_the_best_of_an_estimators_settings() -> None:
    settings = [
        row("snli", "zeroth order", accuracy, dial=f"150 rounds{more}")
        for accuracy, more in ((0.5, ""), (0.6, ", falling rate"), (0.4, ", rate 0.002"))
    ]
    assert "(FedMeZO) | 0.600; 10; 1.0 |" in headline([row("snli", "backprop", 0.8), *settings])


def test_costs_at_equal_accuracy() -> None:
    rows = [
        row("snli", "backprop", 0.8, curve=[[0, 0.3, 0.0], [1, 0.5, 4.0], [2, 0.8, 8.0]]),
        row("snli", "backprop", 0.7, seed=1, curve=[[0, 0.3, 0.0], [1, 0.5, 4.0], [2, 0.7, 8.0]]),
        row("snli", "zeroth order", 0.4, curve=[[0, 0.3, 0.0], [2, 0.4, 20.0]]),
        row("snli", "head alone", 0.3, curve=[[0, 0.3, 0.0], [2, 0.3, 1.0]]),  # never better than at its start
        row("snli", "forward", 0.9, dial="K=1", seed=1, curve=[[0, 0.3, 0.0], [2, 0.9, 20.0]]),
    ]
    text = "\n".join(equal_accuracy(rows))
    assert "| backprop | 0.750 | 8 |  |" in text
    assert "| zeroth order | 0.400 | 20 | 0.20 |" in text
    assert "| forward K=1 | 0.900 | 20 | never |" in text
    assert "head alone" not in text
    assert equal_accuracy(rows[2:3]) == []


def test_targets_name_what_fits_and_ran_on_all_seeds() -> None:
    seeds = range(3)
    rows = [row("snli", "backprop", 0.8, seed=seed) for seed in seeds]
    rows += [row("snli", "guess", 0.55, dial="h=3", seed=seed, share_recovered=0.4 + 0.1 * seed) for seed in seeds]
    rows += [row("snli", "guess", 0.7, dial="h=9", seed=seed, activation_peak_bytes=10**7) for seed in seeds]
    rows += [row("snli", "guess", 0.7, dial="h=1")]
    slow = {"share_recovered": 0.9, "curve": [[0, 0.3, 0.0], [3, 0.8, 30.0]]}
    rows += [row("snli", "slow", 0.8, seed=seed, **slow) for seed in seeds]
    still = {"share_recovered": 0.0, "curve": [[0, 0.3, 0.0], [3, 0.3, 30.0]]}
    rows += [row("snli", "forward", 0.3, seed=seed, **still) for seed in seeds]
    peaks = dict.fromkeys(TASKS, 800_000)
    shown = [
        "| snli: slow | 0.6, 0.95 | 0.90 (0.90, 0.90, 0.90) | 1.25 | **missed**: 3.00 |",
        "| snli: guess h=3 | 0.6, 0.95 | **missed**: 0.50 (0.40, 0.50, 0.60) | 1.25 | 1.00 |",
        "| snli: forward | 0.6, 0.95 | **missed**: 0.00 (0.00, 0.00, 0.00) | 1.25 | never better than at its start |",
    ]
    assert targets_table(rows, peaks).splitlines()[2:] == [f"{line}  |" for line in shown]
    rows += [row("snli", "zeroth order", 0.3, **still)]
    never = " FedMeZO never better than at its start |"
    assert targets_table(rows, peaks).splitlines()[2:] == [line + never for line in shown]
    rows += [row("snli", "zeroth order", 0.5, dial="150 rounds", curve=[[0, 0.3, 0.0], [9, 0.5, 100.0]])]
    assert targets_table(rows, peaks).splitlines()[2] == f"{shown[0]} **missed**: 0.30 |"  # the best of FedMeZO's runs
    rows[-1]["curve"] = [[0, 0.3, 0.0], [9, 0.31, 100.0]]
    ends = [" **missed**: 0.30 |", " 0.10 |", " **missed**: never as good |"]
    assert targets_table(rows, peaks).splitlines()[2:] == [a + b for a, b in zip(shown, ends, strict=True)]


def test_seconds_against_backprop_are_of_rounds_where_both_were_evaluated() -> None:
    guess = [[0, 0.3, 0.0], [5, 0.6, 50.0], [10, 0.7, 100.0], [15, 0.8, 150.0]]
    backprop = [[0, 0.3, 0.0], [10, 0.9, 200.0]]
    rows = [
        row("snli", name, 0.8, seed, curve=curve, share_recovered=0.9)
        for name, curve in (("guess maps", guess), ("backprop", backprop))
        for seed in (0, 1, 2)
    ]
    assert on_shared_rounds({0: guess}, {0: backprop, 1: backprop}) == {0: [guess[0], guess[2]]}
    assert targets_table(rows, {"snli": 10**6}).splitlines()[2].split("|")[5].strip() == "0.50"  # 100 s of 200


def test_what_has_no_run_is_named() -> None:
    found = not_run("prompted_sst2", [row("prompted_sst2", name, 0.8) for name in VARIANTS if name != "backprop"])
    assert found == ["Not run on prompted_sst2: backprop."]
    assert not_run("prompted_sst2", [row("prompted_sst2", name, 0.8) for name in VARIANTS]) == []


def test_settings_of_guides_are_no_matter_to_what_is_not_guided() -> None:
    """A default of theirs that changes makes no other run of it."""

    def digest(method: str, slopes: str) -> str:
        config = parse_config({"method": {"name": method}})
        return settings_digest(config.model_copy(update={"guide": config.guide.model_copy(update={"slopes": slopes})}))

    assert digest("fedyogi", "unit") == digest("fedyogi", "step")
    assert digest("spry_guided", "unit") != digest("spry_guided", "step")


@pytest.fixture
def parquet_data(tmp_path: Path) -> Path:
    """The names of data that nothing here reads."""
    for name in ("snli", "mnli", "ag_news", "sst2"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "train.parquet").touch()
    return tmp_path / "data"


def test_a_search_keeps_the_rate_of_the_least_loss_and_serves_other_tasks(
    tmp_path: Path, parquet_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, float]] = []

    def run_in(config: RunConfig, folder: Path) -> SimpleNamespace:
        folder.mkdir(parents=True)
        assert config.data.name.endswith("/snli/train.parquet")
        tried.append((config.method.name, config.server.learning_rate or 0))
        return SimpleNamespace(test_loss=abs((config.server.learning_rate or 0) - 0.003))

    monkeypatch.setattr("spryfl.bench.frontier.run_in", run_in)
    names = ["backprop", "backprop split", "forward K=1"]
    tuned = tune(["mnli", "snli"], names, parquet_data, tmp_path, lambda text: None)
    assert tried == [
        ("fedyogi", 0.003),
        ("fedyogi", 0.01),
        ("fedyogi", 0.03),
        ("spry", 0.003),
        ("spry", 0.01),
        ("spry", 0.03),
        ("spry", 0.1),
    ]
    assert read_tuning(tmp_path) == tuned
    for task in ("snli", "mnli"):
        assert variant_config(task, VARIANTS["backprop split"], parquet_data, tuned, 0).server.learning_rate == 0.003
    assert variant_config("prompted_sst2", VARIANTS["backprop"], parquet_data, tuned, 0).server.learning_rate == 0.002
    tuned["prompted_sst2"] = {"zeroth order": {"rate": 0.006}}
    for dial, rate in (("", 0.006), (" 150 rounds, falling rate", 0.006), (" 150 rounds, rate 0.002", 0.002)):
        variant = VARIANTS[f"zeroth order{dial}"]
        assert variant_config("prompted_sst2", variant, parquet_data, tuned, 0).server.learning_rate == rate
    tune(["ag_news"], names, parquet_data, tmp_path, lambda text: None)
    assert len(tried) == 7  # nothing twice


def test_rows_of_an_earlier_bench_are_not_run_again(
    tmp_path: Path, parquet_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("spryfl.bench.frontier.run_in", lambda config, folder: None)

    def made_with(name: str, seed: int, data: str = "elsewhere", rate: float = 0.01) -> dict[str, str]:
        settings = settings_of(TASKS["snli"], VARIANTS[name], data, rate, seed)
        return {"settings": settings_digest(parse_config(with_overrides({}, settings | {"label": "another"})))}

    kept = [
        row("snli", "backprop", 0.7) | made_with("backprop", 0),
        row("snli", "backprop", 0.7, seed=1) | made_with("backprop", 1, rate=0.02),  # not what is asked for now
        row("snli", "head alone", 0.5) | made_with("head alone", 0),
    ]
    (tmp_path / "frontier.json").write_text(json.dumps(kept))
    rows = run_frontier(["snli"], ["head alone", "backprop"], [0, 1], parquet_data, tmp_path, told.append)
    assert told == ["snli, head alone, seed 1", "snli, backprop, seed 1"]
    assert [(r["estimator"], r["seed"], r["share_recovered"]) for r in rows] == [
        ("head alone", 0, 0.0),
        ("backprop", 0, 1.0),
        ("backprop", 1, None),
    ]


def test_gradient_quality_performs_the_run_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the frontier has that run's row already."""
    (tmp_path / "snli").mkdir()
    (tmp_path / "snli/train.parquet").touch()
    performed = []

    def run_in(config: RunConfig, folder: Path) -> None:
        performed.append((config.method.name, folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(gradient_quality, "run_in", run_in)
    with pytest.raises(KeyboardInterrupt):
        gradient_quality.measure_quality("snli", tmp_path, tmp_path / "out", lambda text: None)
    assert performed == [("fedyogi_split", tmp_path / "out/runs/snli/backprop-split-0")]
    with pytest.raises(SpryError, match="no folder ag_news"):
        gradient_quality.measure_quality("ag_news", tmp_path, tmp_path / "out", lambda text: None)


def test_unknown_names_and_missing_data(tmp_path: Path) -> None:
    for tasks, variants, message in (
        (["snlli"], ["backprop"], "unknown task 'snlli'. Did you mean 'snli'"),
        (["snli"], ["backdrop"], "unknown estimator 'backdrop'. Did you mean 'backprop'"),
        (["snli"], ["backprop"], "no folder snli"),
    ):
        with pytest.raises(SpryError, match=message):
            run_frontier(tasks, variants, [0], tmp_path, tmp_path / "out", lambda text: None)
