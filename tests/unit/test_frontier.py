"""The frontier bench's tables: every run's settings are valid, shares by hand, bad names."""

import json
from pathlib import Path
from typing import Any

import pytest

from spryfl.bench.frontier import _share, run_frontier, settings_digest
from spryfl.bench.frontier_report import as_markdown, headline, plot_frontier
from spryfl.bench.frontier_works import TASKS, VARIANTS, settings_of
from spryfl.config import parse_config, with_overrides
from spryfl.errors import SpryError


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_run_is_valid_and_shares_clients_and_rounds(task: str, name: str) -> None:
    variant = VARIANTS[name]
    if variant.encoder_only and not TASKS[task].has_head:
        pytest.skip("needs a trained head")
    config = parse_config(with_overrides({}, settings_of(TASKS[task], variant, "data", 1e-2, 1)))
    first = parse_config(with_overrides({}, settings_of(TASKS[task], VARIANTS["backprop"], "data", 1e-2, 1)))
    assert (config.data, config.partition, config.server, config.local, config.seed) == (
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
    assert "| backprop | 0.750 (2 seeds), 10, 1.0 |" in headline(rows)
    plot_frontier(rows, tmp_path / "plot.png", {"snli": 500_000})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_an_earlier_bench_are_not_run_again(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
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
    rows = run_frontier(["snli"], ["head alone", "backprop"], [0, 1], shared_data, tmp_path, told.append)
    assert told == ["snli, head alone, seed 1", "snli, backprop, seed 1"]
    assert [(r["estimator"], r["seed"], r["share_recovered"]) for r in rows] == [
        ("head alone", 0, 0.0),
        ("backprop", 0, 1.0),
        ("backprop", 1, None),
    ]


def test_unknown_names_and_missing_data(tmp_path: Path) -> None:
    for tasks, variants, message in (
        (["snlli"], ["backprop"], "unknown task 'snlli'. Did you mean 'snli'"),
        (["snli"], ["backdrop"], "unknown estimator 'backdrop'. Did you mean 'backprop'"),
        (["snli"], ["backprop"], "no folder snli"),
    ):
        with pytest.raises(SpryError, match=message):
            run_frontier(tasks, variants, [0], tmp_path, tmp_path / "out", lambda text: None)
