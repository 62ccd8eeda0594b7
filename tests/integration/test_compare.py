"""Whole suites with a tiny model: resuming, failing, reporting."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pyarrow import parquet

from spryfl.cli.main import main
from spryfl.compare.cells import Suite, chosen_cells
from spryfl.compare.checking import check_cells
from spryfl.compare.results import ResultRow
from spryfl.compare.running import compare
from spryfl.config import MethodEntry, SuiteConfig
from spryfl.errors import SpryError
from spryfl.tracking.lock import held
from spryfl.tracking.run_directory import RunDirectory
from suites import Watcher, summary_of


def without_times(rows: Sequence[ResultRow]) -> list[ResultRow]:
    times = ("client_seconds", "client_cpu_seconds", "seconds")
    return [replace(row, **dict.fromkeys(times, 0.0), **{f"{name}_to_target": 0.0 for name in times}) for row in rows]


def test_a_killed_suite_repeats_nothing(suite_table: dict[str, Any], tmp_path: Path) -> None:
    config = SuiteConfig.model_validate(suite_table)
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
    assert found[0]["bytes_up"] == summary_of(whole, 0)["bytes_up"]
    assert found[0]["central_test"] == summary_of(whole, 0)["score"]
    page = (whole.out / "report.html").read_text()
    assert "Tiny &lt;suite&gt;" in page
    assert page.count('src="data:image/png;base64,') == 2
    assert "http" not in page
    text = (whole.out / "report.md").read_text()
    assert "![overview](overview.png)" in text
    assert "![curves-reviews](curves-reviews.png)" in text
    assert "x fedyogi's CPU" in text

    changed = Suite(
        SuiteConfig.model_validate(suite_table | {"base": suite_table["base"] | {"local": {"batch_size": 2}}}),
        whole.out,
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


def test_a_run_that_fails_does_not_stop_the_others(suite_table: dict[str, Any], tmp_path: Path) -> None:
    impossible = {
        "name": "tight",
        "set": {"method.name": "fedavg", "method.checkpointing": "budgeted", "method.budget": 9},
    }
    config = SuiteConfig.model_validate(
        suite_table | {"seeds": [0], "method": [impossible, {"name": "spry"}], "reference": None}
    )
    suite = Suite(config, tmp_path / "out")
    with pytest.raises(SpryError, match=r"^reviews/tight/0 failed: method.budget = 9 bytes"):
        compare(suite, suite.cells())
    assert [row["variant"] for row in parquet.read_table(suite.out / "results.parquet").to_pylist()] == ["spry"]
    assert "\nFailed: reviews/tight/0: method.budget = 9 bytes" in (suite.out / "report.md").read_text()
    mended = replace(suite, config=SuiteConfig.model_validate(suite_table | {"seeds": [0]}))
    mended.folder(mended.cells()[1]).mkdir(parents=True)
    RunDirectory(mended.folder(mended.cells()[1])).write_failure("of another time")
    compare(mended, mended.cells())
    assert "Failed" not in (suite.out / "report.md").read_text()


def test_a_run_of_another_version_is_told_by_its_file(suite_table: dict[str, Any], tmp_path: Path) -> None:
    suite = Suite(SuiteConfig.model_validate(suite_table | {"seeds": [0]}), tmp_path / "out")
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
    suite_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("index out of range in self")

    config = SuiteConfig.model_validate(suite_table | {"seeds": [0]})
    suite, first = Suite(config, tmp_path / "out"), Watcher()
    first.started = fail  # type: ignore[method-assign]
    with pytest.raises(SpryError, match=r"spry/0 failed: KeyError: .*; reviews/fedyogi/0 failed: KeyError"):
        compare(suite, suite.cells(), [first])
    told = (suite.folder(suite.cells()[0]) / "failure.txt").read_text()
    assert told.startswith("KeyError: 'index out of range in self'\nTraceback")  # where it was is not lost
    assert "Traceback" not in (suite.out / "report.md").read_text()
    assert len(compare(suite, suite.cells())) == 2


def test_two_processes_do_not_write_over_each_other(
    suite_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one is at work on is left to it; the rest is done; the report is one's at a time."""
    suite = Suite(SuiteConfig.model_validate(suite_table | {"seeds": [0]}), tmp_path / "out")
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


def test_data_are_read_as_their_task_reads_them(suite_table: dict[str, Any], tmp_path: Path) -> None:
    """Before any run: questions pass, and an answer that is not where it is said to be is named."""
    row = {"question": "the film", "context": "the film is good", "answers": {"text": ["good"], "answer_start": [12]}}
    wrong = row | {"answers": {"text": ["good"], "answer_start": [4]}}
    reading = {"task.kind": "qa", "data.text_columns": ["question", "context"], "data.label_column": "answers"}
    datasets = []
    for name, last in (("mended", row), ("broken", wrong)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [row] * 39 + [last])))
        own = {"data.name": str(tmp_path / f"{name}.jsonl"), "data.test_split": "train", "partition.kind": "iid"}
        datasets.append({"name": name, "set": reading | own})
    suite = Suite(SuiteConfig.model_validate(suite_table | {"dataset": datasets}), tmp_path / "out")
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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], suite_table: dict[str, Any], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(tomli_w.dumps(suite_table))
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
