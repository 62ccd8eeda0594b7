"""Whole suites with a tiny model: resuming, searching, failing, reporting."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from pyarrow import parquet

from spryfl.cli.main import main
from spryfl.compare.cells import Suite, chosen_cells
from spryfl.compare.checking import check_cells
from spryfl.compare.results import ResultRow
from spryfl.compare.running import compare
from spryfl.compare.search import Outcome, read_outcome, spread_point
from spryfl.compare.search import search as perform_search
from spryfl.config import MethodEntry, RunConfig, SuiteConfig
from spryfl.errors import RunDirectoryError, SpryError
from spryfl.run import hold_to
from spryfl.tracking.events import Observer, RoundEvent
from spryfl.tracking.lock import held
from spryfl.tracking.run_directory import RunDirectory


class Watcher(Observer):
    """Notes what is run; stops before the client of a given number."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.started_labels: list[str] = []
        self.rounds: list[tuple[str, int]] = []
        self._left = stop_before

    def started(self, label: str, first_round: int, num_rounds: int) -> None:
        self.started_labels.append(label)

    def before_client(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt

    def round_finished(self, event: RoundEvent) -> None:
        self.rounds.append((self.started_labels[-1], event.round))


@pytest.fixture
def table(tiny_table: dict[str, Any]) -> dict[str, Any]:
    base = tiny_table | {"server": {"num_rounds": 2, "cohort_size": 2, "learning_rate": 0.01}}
    return {
        "title": "Tiny <suite>",
        "seeds": [0, 1],
        "reference": "fedyogi",
        "base": base,
        "dataset": [{"name": "reviews", "target": 0.1}],
        "method": [{"name": "spry", "label": "Spry"}, {"name": "fedyogi"}],
    }


def without_times(rows: Sequence[ResultRow]) -> list[ResultRow]:
    times = ("client_seconds", "client_cpu_seconds", "seconds")
    return [replace(row, **dict.fromkeys(times, 0.0), **{f"{name}_to_target": 0.0 for name in times}) for row in rows]


def test_a_killed_suite_repeats_nothing(table: dict[str, Any], tmp_path: Path) -> None:
    config = SuiteConfig.model_validate(table)
    whole, stopped = Suite(config, tmp_path / "whole"), Suite(config, tmp_path / "stopped")
    everything, before, after = Watcher(), Watcher(stop_before=7), Watcher()
    rows = compare(whole, whole.cells(), [everything])
    assert everything.started_labels == [f"reviews, {m}, seed {s}" for s in (0, 1) for m in ("Spry", "fedyogi")]

    with pytest.raises(KeyboardInterrupt):  # four clients are a run: in the second one's second round
        compare(stopped, stopped.cells(), [before])
    assert "1 of 4 runs are finished" in (stopped.out / "report.html").read_text()
    assert parquet.read_table(stopped.out / "results.parquet").num_rows == 1
    resumed = compare(stopped, stopped.cells(), [after])

    assert before.rounds + after.rounds == everything.rounds
    assert after.started_labels == everything.started_labels[1:]
    assert without_times(resumed) == without_times(rows)
    idle = Watcher()
    assert without_times(compare(stopped, stopped.cells(), [idle])) == without_times(rows)
    assert idle.started_labels == []

    found = parquet.read_table(whole.out / "results.parquet").to_pylist()
    assert [(row["variant"], row["seed"]) for row in found] == [
        ("spry", 0),
        ("fedyogi", 0),
        ("spry", 1),
        ("fedyogi", 1),
    ]
    assert found[0]["bytes_up"] == RunFiles(whole, 0).summary["bytes_up"]
    assert found[0]["central_test"] == RunFiles(whole, 0).summary["score"]
    page = (whole.out / "report.html").read_text()
    assert "Tiny &lt;suite&gt;" in page
    assert page.count('src="data:image/png;base64,') == 2
    assert "http" not in page
    text = (whole.out / "report.md").read_text()
    assert "![overview](overview.png)" in text
    assert "![curves-reviews](curves-reviews.png)" in text
    assert "x fedyogi's CPU" in text

    changed = Suite(
        SuiteConfig.model_validate(table | {"base": table["base"] | {"local": {"batch_size": 2}}}), whole.out
    )
    with pytest.raises(SpryError, match=r"run of other settings \(local.batch_size: 4, now 2\): choose another folder"):
        compare(changed, changed.cells())
    # A piece of it that has not run yet would stand beside them.
    third = {"name": "fedavg", "set": {"method.checkpointing": "per_layer"}}
    more = Suite(
        changed.config.model_copy(update={"method": (*changed.config.method, MethodEntry(**third))}), whole.out
    )
    with pytest.raises(SpryError, match=r"^reviews/spry/0: [^;]*run of other settings [^;]*$"):
        compare(more, chosen_cells(more.cells(), ["fedavg"]))


class RunFiles:
    """What lies in the folder of a suite's cell."""

    def __init__(self, suite: Suite, place: int) -> None:
        self.summary = json.loads((suite.folder(suite.cells()[place]) / "summary.json").read_text())


def test_every_method_has_the_same_trials_and_a_stopped_search_goes_on(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spryfl.compare.search.FEWEST_TO_LEARN_FROM", 1)  # so that the second trial is an estimator's
    search = {"trials": 2, "rounds": 1, "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    config = SuiteConfig.model_validate(table | {"seeds": [0], "search": search})
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
    assert RunFiles(whole, 0).summary["rounds"] == 2
    assert "| reviews, Spry | 2 |" in (whole.out / "report.md").read_text()

    with pytest.raises(KeyboardInterrupt):  # two clients are a trial: in the second one
        compare(stopped, stopped.cells(), [before])
    compare(stopped, stopped.cells(), [after])
    assert before.rounds + after.rounds == everything.rounds
    assert [read_outcome(stopped, cell) for cell in stopped.cells()] == [spry, yogi]
    assert not list(stopped.out.glob("search/*/*/trial-*"))

    plain = Suite(SuiteConfig.model_validate(table | {"seeds": [0]}), tmp_path / "plain")
    (cell,) = chosen_cells(plain.cells(), ["spry"])
    plain.folder(cell).mkdir(parents=True)
    hold_to(RunDirectory(plain.folder(cell)), plain.run_config(cell))
    searched = Suite(SuiteConfig.model_validate(table | {"seeds": [0], "search": search}), plain.out)
    with pytest.raises(SpryError, match="a run, but its search is not there"):
        check_cells(searched, searched.cells())

    # A search of before there was some key goes on as one with that key's default.
    told = whole.search_folder(whole.cells()[0]) / "search.json"
    row = json.loads(told.read_text())
    del row["data"]["drop_unlabelled"]
    told.write_text(json.dumps(row))
    check_cells(whole, whole.cells())

    changed = Suite(SuiteConfig.model_validate(table | {"seeds": [0], "search": search | {"trials": 3}}), whole.out)
    with pytest.raises(SpryError, match=r"search of other settings \(trials differ\)"):
        compare(changed, changed.cells())


def test_an_estimator_draws_where_scores_are_better(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After points that are spread, of which the smallest rates did best: no training, its score is its rate's."""

    def score(config: RunConfig, *_: object) -> SimpleNamespace:
        return SimpleNamespace(metric="accuracy", score=-abs(math.log(config.server.learning_rate / 1e-3)))

    monkeypatch.setattr("spryfl.compare.search.run_in", score)
    search = {"trials": 30, "rounds": 1, "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    suite = Suite(SuiteConfig.model_validate(table | {"seeds": [0], "search": search}), tmp_path / "out")
    rates = [t.settings["server.learning_rate"] for t in perform_search(suite, suite.cells()[0], []).trials]
    spread, drawn = rates[:15], rates[15:]
    assert median(drawn) < median(spread) / 4


def test_trials_that_diverge_count_and_are_never_chosen(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rates from 1e-3 to 1, those above 0.18 end without an update and those above 0.03 without a score."""

    def train(config: RunConfig, *_: object) -> SimpleNamespace:
        rate = config.server.learning_rate or 0.0
        if rate > 10**-0.75:
            raise SpryError("round 1: no client returned a usable update")
        return SimpleNamespace(metric="accuracy", score=math.nan if rate > 10**-1.5 else rate, test_loss=1.0)

    def searched(low: float, name: str) -> Outcome:
        search = {"trials": 5, "space": {"server.learning_rate": {"low": low, "high": 1.0}}}
        suite = Suite(SuiteConfig.model_validate(table | {"seeds": [0], "search": search}), tmp_path / name)
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


def test_a_full_disk_is_no_trials_fault(table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> SimpleNamespace:
        raise RunDirectoryError("the disk is full")

    search = {"trials": 2, "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    suite = Suite(SuiteConfig.model_validate(table | {"seeds": [0], "search": search}), tmp_path / "out")
    monkeypatch.setattr(RunDirectory, "read_events", lambda _: [None])
    with monkeypatch.context() as full:
        full.setattr("spryfl.compare.search.run_in", train)
        with pytest.raises(RunDirectoryError, match="the disk is full"):
            perform_search(suite, suite.cells()[0], [])
    fine = SimpleNamespace(metric="accuracy", score=0.5, test_loss=1.0)
    monkeypatch.setattr("spryfl.compare.search.run_in", lambda *_: fine)
    assert [trial.score for trial in perform_search(suite, suite.cells()[0], []).trials] == [0.5, 0.5]


def test_trials_that_never_trained_do_not_count(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search goes on once what kept it from training is mended."""

    def fail(*_: object) -> None:
        raise SpryError("the hub cannot be reached")

    search = {"trials": 2, "rounds": 1, "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    suite = Suite(SuiteConfig.model_validate(table | {"seeds": [0], "search": search}), tmp_path / "out")
    cells = chosen_cells(suite.cells(), ["spry"])
    with monkeypatch.context() as broken:
        broken.setattr("spryfl.compare.search.run_in", fail)
        with pytest.raises(SpryError, match=r"spry/0 failed: the hub cannot be reached"):
            compare(suite, cells)
    assert compare(suite, cells)[0].search_trials == 2
    outcome = read_outcome(suite, cells[0])
    assert outcome is not None
    assert [trial.failure for trial in outcome.trials] == [None, None]


def test_one_search_serves_the_datasets_tuned_on_its_own(table: dict[str, Any], tmp_path: Path) -> None:
    search = {"trials": 2, "rounds": 1, "by": "loss", "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    skewed = {"name": "skewed", "tuned_on": "reviews", "set": {"partition.alpha": 0.1}}
    changed = {"seeds": [0], "search": search, "dataset": [skewed, *table["dataset"]]}
    suite, watcher = Suite(SuiteConfig.model_validate(table | changed), tmp_path / "suite"), Watcher()
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


def test_a_run_that_fails_does_not_stop_the_others(table: dict[str, Any], tmp_path: Path) -> None:
    impossible = {
        "name": "tight",
        "set": {"method.name": "fedavg", "method.checkpointing": "budgeted", "method.budget": 9},
    }
    config = SuiteConfig.model_validate(
        table | {"seeds": [0], "method": [impossible, {"name": "spry"}], "reference": None}
    )
    suite = Suite(config, tmp_path / "out")
    with pytest.raises(SpryError, match=r"^reviews/tight/0 failed: method.budget = 9 bytes"):
        compare(suite, suite.cells())
    assert [row["variant"] for row in parquet.read_table(suite.out / "results.parquet").to_pylist()] == ["spry"]
    assert "\nFailed: reviews/tight/0: method.budget = 9 bytes" in (suite.out / "report.md").read_text()
    mended = replace(suite, config=SuiteConfig.model_validate(table | {"seeds": [0]}))
    mended.folder(mended.cells()[1]).mkdir(parents=True)
    RunDirectory(mended.folder(mended.cells()[1])).write_failure("of another time")
    compare(mended, mended.cells())
    assert "Failed" not in (suite.out / "report.md").read_text()


def test_a_run_of_another_version_is_told_by_its_file(table: dict[str, Any], tmp_path: Path) -> None:
    suite = Suite(SuiteConfig.model_validate(table | {"seeds": [0]}), tmp_path / "out")
    compare(suite, suite.cells())
    directory = RunDirectory(suite.folder(suite.cells()[0]))
    for file, change, message in (
        (directory.summary_file, lambda text: text.replace('"rounds"', '"rounds_of_old"'), "another version"),
        (directory.summary_file, lambda text: text[:20], "another version"),
        (directory.events_file, lambda text: text.replace('"round"', '"turn"'), "another version"),
        (directory.config_file, lambda text: text.replace("seed", "sead"), "unknown key 'sead'"),
    ):
        written = file.read_text()
        file.write_text(change(written))
        with pytest.raises(SpryError, match=message) as caught:
            compare(suite, suite.cells())
        assert str(file) in str(caught.value)
        file.write_text(written)


def test_what_no_one_foresaw_ends_its_own_run_alone(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("index out of range in self")

    config = SuiteConfig.model_validate(table | {"seeds": [0]})
    suite, first = Suite(config, tmp_path / "out"), Watcher()
    first.started = fail  # type: ignore[method-assign]
    with pytest.raises(SpryError, match=r"spry/0 failed: KeyError: .*; reviews/fedyogi/0 failed: KeyError"):
        compare(suite, suite.cells(), [first])
    told = (suite.folder(suite.cells()[0]) / "failure.txt").read_text()
    assert told.startswith("KeyError: 'index out of range in self'\nTraceback")  # where it was is not lost
    assert "Traceback" not in (suite.out / "report.md").read_text()
    assert len(compare(suite, suite.cells())) == 2


def test_two_processes_do_not_write_over_each_other(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one is at work on is left to it; the rest is done; the report is one's at a time."""
    suite = Suite(SuiteConfig.model_validate(table | {"seeds": [0]}), tmp_path / "out")
    folder = suite.folder(suite.cells()[0])
    folder.mkdir(parents=True)
    with held(folder), pytest.raises(SpryError, match=r"^reviews/spry/0 failed: .*: another process is at work there"):
        compare(suite, suite.cells())
    assert [row["variant"] for row in parquet.read_table(suite.out / "results.parquet").to_pylist()] == ["fedyogi"]
    assert len(compare(suite, suite.cells())) == 2
    monkeypatch.setattr("spryfl.compare.running.REPORT_SECONDS", 0)
    with held(suite.out), pytest.raises(SpryError, match="another process is at work there"):
        compare(suite, suite.cells())
    other = Suite(suite.config, tmp_path / "other")
    other.out.mkdir()
    with held(other.out), pytest.raises(SpryError, match="another process is at work there"):
        compare(other, other.cells())
    assert all(other.is_finished(cell) for cell in other.cells())  # the report alone is left


def test_a_search_that_was_killed_while_writing_goes_on(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a lock that nobody holds and half a line in its journal, below a relative folder."""
    monkeypatch.chdir(tmp_path)
    search = {"trials": 2, "rounds": 1, "space": {"server.learning_rate": {"low": 1e-3, "high": 1.0}}}
    suite = Suite(SuiteConfig.model_validate(table | {"seeds": [0], "search": search}), Path("out"))
    chosen = chosen_cells(suite.cells(), ["spry"])
    with pytest.raises(KeyboardInterrupt):
        compare(suite, chosen, [Watcher(stop_before=3)])
    journal = suite.search_folder(chosen[0]) / "journal.log"
    with journal.open("a") as handle:
        handle.write('{"op_code": 4, "worker')
    Path(f"{journal}.lock").symlink_to(journal)
    assert compare(suite, chosen)[0].search_trials == 2


def test_data_are_read_as_their_task_reads_them(table: dict[str, Any], tmp_path: Path) -> None:
    """Before any run: questions pass, and an answer that is not where it is said to be is named."""
    row = {"question": "the film", "context": "the film is good", "answers": {"text": ["good"], "answer_start": [12]}}
    wrong = row | {"answers": {"text": ["good"], "answer_start": [4]}}
    reading = {"task.kind": "qa", "data.text_columns": ["question", "context"], "data.label_column": "answers"}
    datasets = []
    for name, last in (("mended", row), ("broken", wrong)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [row] * 39 + [last])))
        own = {"data.name": str(tmp_path / f"{name}.jsonl"), "data.test_split": "train", "partition.kind": "iid"}
        datasets.append({"name": name, "set": reading | own})
    suite = Suite(SuiteConfig.model_validate(table | {"dataset": datasets}), tmp_path / "out")
    check_cells(suite, [cell for cell in suite.cells() if cell.dataset.name == "mended"])
    with pytest.raises(SpryError) as caught:
        compare(suite, suite.cells())
    message = str(caught.value)
    assert message.startswith("broken/spry/0, broken/fedyogi/0, broken/spry/1 and 1 more: t")
    assert "the answer 'good' is not at character 4 of its context" in message
    assert "\n" not in message
    assert not suite.out.exists()


def spry(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["spry", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], table: dict[str, Any], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(tomli_w.dumps(table))
    assert spry(monkeypatch, "mine.toml", "--only", "*/spry/0", "--set", "server.num_rounds=1") == 0
    out, err = capsys.readouterr()
    assert "[1/1] reviews, Spry, seed 0: accuracy" in err
    assert "| Spry | 1 |" in out
    assert "runs/mine: report.html" in out
    today = date.today().isoformat()
    assert f"1 of 4 runs are finished (of {today}); seeds 0, 1. Written on {today}." in out
    assert "\nMade by: spry compare mine.toml --set server.num_rounds=1\n" in out
    assert spry(monkeypatch, "mine.toml", "--only", "*/spry/0", "--set", "server.num_rounds=1", "--json") == 0
    out, err = capsys.readouterr()
    assert (err, [row["rounds"] for row in json.loads(out)]) == ("", [1])
    assert spry(monkeypatch, "mine.toml", "--only", "*/spry/0") == 2
    assert "holds a run of other settings (server.num_rounds: 1, now 2)" in capsys.readouterr().err
    assert spry(monkeypatch, "gone.toml") == 2
    assert "gone.toml: no such file" in capsys.readouterr().err
