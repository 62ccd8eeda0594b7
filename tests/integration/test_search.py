"""The searches of suites: equal trials, resuming, failing."""

import json
import math
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

from spryfl.compare.cells import Suite, chosen_cells
from spryfl.compare.checking import check_cells
from spryfl.compare.running import compare
from spryfl.compare.search import Outcome, read_outcome, spread_point
from spryfl.compare.search import search as perform_search
from spryfl.config import RunConfig, SuiteConfig
from spryfl.errors import RunDirectoryError, SpryError
from spryfl.run import hold_to
from spryfl.tracking.run_directory import RunDirectory
from suites import Watcher, summary_of


def test_every_method_has_the_same_trials_and_a_stopped_search_goes_on(
    suite_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spryfl.compare.search.FEWEST_TO_LEARN_FROM", 1)  # so that the second trial is an estimator's
    search = {"trials": 2, "rounds": 1, "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    config = SuiteConfig.model_validate(suite_table | {"seeds": [0], "search": search})
    whole, stopped = Suite(config, tmp_path / "whole"), Suite(config, tmp_path / "stopped")
    everything, before, after = Watcher(), Watcher(stop_before=3), Watcher()
    compare(whole, whole.cells(), [everything])
    spry, yogi = (read_outcome(whole, cell) for cell in whole.cells())
    assert spry is not None
    assert yogi is not None
    assert len(spry.trials) == len(yogi.trials) == 2
    assert spry.trials[0].settings == yogi.trials[0].settings != spry.trials[1].settings
    scores = [trial.score for trial in spry.trials]
    assert spry.score == max(score for score in scores if score is not None)
    assert spry.settings == spry.trials[scores.index(spry.score)].settings
    assert (
        whole.run_config(whole.cells()[0], spry.settings).server.learning_rate == spry.settings["server.learning_rate"]
    )
    assert summary_of(whole, 0)["rounds"] == 2
    assert "| reviews, Spry | 2 |" in (whole.out / "report.md").read_text()

    with pytest.raises(KeyboardInterrupt):  # two clients are a trial: in the second one
        compare(stopped, stopped.cells(), [before])
    compare(stopped, stopped.cells(), [after])
    assert before.rounds + after.rounds == everything.rounds
    assert [read_outcome(stopped, cell) for cell in stopped.cells()] == [spry, yogi]
    assert not list(stopped.out.glob("search/*/*/trial-*"))

    plain = Suite(SuiteConfig.model_validate(suite_table | {"seeds": [0]}), tmp_path / "plain")
    (cell,) = chosen_cells(plain.cells(), ["spry"])
    plain.folder(cell).mkdir(parents=True)
    hold_to(RunDirectory(plain.folder(cell)), plain.run_config(cell))
    searched = Suite(SuiteConfig.model_validate(suite_table | {"seeds": [0], "search": search}), plain.out)
    with pytest.raises(SpryError, match="a run, but its search is not there"):
        check_cells(searched, searched.cells())

    # A search of before there was some key goes on as one with that key's default.
    told = whole.search_folder(whole.cells()[0]) / "search.json"
    row = json.loads(told.read_text())
    del row["data"]["drop_unlabelled"]
    told.write_text(json.dumps(row))
    check_cells(whole, whole.cells())

    changed = Suite(
        SuiteConfig.model_validate(suite_table | {"seeds": [0], "search": search | {"trials": 3}}), whole.out
    )
    with pytest.raises(SpryError, match=r"search of other settings \(trials differ\)"):
        compare(changed, changed.cells())


def test_an_estimator_draws_where_scores_are_better(
    suite_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After points that are spread, of which the smallest rates did best: no training, its score is its rate's."""

    def score(config: RunConfig, *_: object) -> SimpleNamespace:
        return SimpleNamespace(metric="accuracy", score=-abs(math.log(config.server.learning_rate / 1e-3)))

    monkeypatch.setattr("spryfl.compare.search.run_in", score)
    search = {"trials": 30, "rounds": 1, "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    suite = Suite(SuiteConfig.model_validate(suite_table | {"seeds": [0], "search": search}), tmp_path / "out")
    rates = [t.settings["server.learning_rate"] for t in perform_search(suite, suite.cells()[0], []).trials]
    spread, drawn = rates[:15], rates[15:]
    assert median(drawn) < median(spread) / 4


def test_trials_that_diverge_count_and_are_never_chosen(
    suite_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rates from 1e-3 to 1, those above 0.18 end without an update and those above 0.03 without a score."""

    def train(config: RunConfig, *_: object) -> SimpleNamespace:
        rate = config.server.learning_rate or 0.0
        if rate > 10**-0.75:
            raise SpryError("round 1: no client returned a usable update")
        return SimpleNamespace(metric="accuracy", score=math.nan if rate > 10**-1.5 else rate, test_loss=1.0)

    def searched(low: float, name: str) -> Outcome:
        search = {"trials": 5, "space": {"server.learning_rate": {"low": low, "high": 1.0}}}
        suite = Suite(SuiteConfig.model_validate(suite_table | {"seeds": [0], "search": search}), tmp_path / name)
        return perform_search(suite, suite.cells()[0], [])

    monkeypatch.setattr("spryfl.compare.search.run_in", train)
    monkeypatch.setattr(RunDirectory, "read_events", lambda _: [None])  # each had begun
    found = searched(1e-3, "some")
    rates = [trial.settings["server.learning_rate"] for trial in found.trials]
    assert [trial.score is None for trial in found.trials] == [rate > 10**-1.5 for rate in rates]
    assert found.score == max(rate for rate in rates if rate <= 10**-1.5)
    assert {trial.failure for trial in found.trials} >= {
        "accuracy is nan",
        "round 1: no client returned a usable update",
    }
    with pytest.raises(SpryError, match="every trial of the search failed: round 1"):
        searched(0.5, "all")


def test_a_full_disk_is_no_trials_fault(
    suite_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object) -> SimpleNamespace:
        raise RunDirectoryError("the disk is full")

    search = {"trials": 2, "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    suite = Suite(SuiteConfig.model_validate(suite_table | {"seeds": [0], "search": search}), tmp_path / "out")
    monkeypatch.setattr(RunDirectory, "read_events", lambda _: [None])
    with monkeypatch.context() as full:
        full.setattr("spryfl.compare.search.run_in", train)
        with pytest.raises(RunDirectoryError, match="the disk is full"):
            perform_search(suite, suite.cells()[0], [])
    fine = SimpleNamespace(metric="accuracy", score=0.5, test_loss=1.0)
    monkeypatch.setattr("spryfl.compare.search.run_in", lambda *_: fine)
    assert [trial.score for trial in perform_search(suite, suite.cells()[0], []).trials] == [0.5, 0.5]


def test_trials_that_never_trained_do_not_count(
    suite_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search goes on once what kept it from training is mended."""

    def fail(*_: object) -> None:
        raise SpryError("the hub cannot be reached")

    search = {"trials": 2, "rounds": 1, "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    suite = Suite(SuiteConfig.model_validate(suite_table | {"seeds": [0], "search": search}), tmp_path / "out")
    cells = chosen_cells(suite.cells(), ["spry"])
    with monkeypatch.context() as broken:
        broken.setattr("spryfl.compare.search.run_in", fail)
        with pytest.raises(SpryError, match=r"spry/0 failed: the hub cannot be reached"):
            compare(suite, cells)
    assert compare(suite, cells)[0].search_trials == 2
    outcome = read_outcome(suite, cells[0])
    assert outcome is not None
    assert [trial.failure for trial in outcome.trials] == [None, None]


def test_one_search_serves_the_datasets_tuned_on_its_own(suite_table: dict[str, Any], tmp_path: Path) -> None:
    search = {"trials": 2, "rounds": 1, "by": "loss", "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    skewed = {"name": "skewed", "tuned_on": "reviews", "set": {"partition.alpha": 0.1}}
    changed = {"seeds": [0], "search": search, "dataset": [skewed, *suite_table["dataset"]]}
    suite, watcher = Suite(SuiteConfig.model_validate(suite_table | changed), tmp_path / "suite"), Watcher()
    rows = compare(suite, chosen_cells(suite.cells(), ["spry"]), [watcher])
    trials = [f"reviews, Spry, trial {number} of 2" for number in (1, 2)]
    assert watcher.started_labels == [*trials, "skewed, Spry, seed 0", "reviews, Spry, seed 0"]
    assert rows[0].settings == rows[1].settings
    assert [row.alpha for row in rows] == [0.1, 1.0]
    assert [path.name for path in (suite.out / "search").iterdir()] == ["reviews"]
    outcome = read_outcome(suite, suite.cells()[0])
    assert outcome is not None
    assert outcome.metric == "loss"
    assert suite.config.search is not None
    space, seed = suite.config.space_of(suite.config.method[0]), suite.config.search.seed
    assert [trial.settings for trial in outcome.trials] == [spread_point(space, seed, number) for number in range(2)]
    assert outcome.score == min(trial.score for trial in outcome.trials if trial.score is not None)
    told = (suite.out / "report.md").read_text()
    assert "judged by their loss on 20%" in told
    assert "Datasets without trials of their own: skewed with reviews's." in told


def test_a_search_that_was_killed_while_writing_goes_on(
    suite_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a lock that nobody holds and half a line in its journal, below a relative folder."""
    monkeypatch.chdir(tmp_path)
    search = {"trials": 2, "rounds": 1, "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    suite = Suite(SuiteConfig.model_validate(suite_table | {"seeds": [0], "search": search}), Path("out"))
    chosen = chosen_cells(suite.cells(), ["spry"])
    with pytest.raises(KeyboardInterrupt):
        compare(suite, chosen, [Watcher(stop_before=3)])
    journal = suite.search_folder(chosen[0]) / "journal.log"
    with journal.open("a") as handle:
        handle.write('{"op_code": 4, "worker')
    Path(f"{journal}.lock").symlink_to(journal)
    assert compare(suite, chosen)[0].search_trials == 2
