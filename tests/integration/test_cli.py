"""The command line as a user meets it: output, exit codes, and one clear line for bad input."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from spryfl.bench.steps import STEPS
from spryfl.cli.main import main


def spry(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["spry", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.fixture
def tiny_file(tiny_table: dict[str, dict[str, object]], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tiny_table))
    return path


def test_run_prints_a_table_and_its_directory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_file: Path, tmp_path: Path
) -> None:
    assert spry(monkeypatch, "run", tiny_file, "--out", tmp_path / "run", "--set", "server.num_rounds=2") == 0
    out, err = capsys.readouterr()
    assert "Accuracy before and after" in out
    assert "peak" in out
    assert f"Run directory: {tmp_path / 'run'}" in out
    assert "round 2" in err
    assert json.loads((tmp_path / "run/summary.json").read_text())["rounds"] == 2


def test_json_and_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_file: Path, tmp_path: Path
) -> None:
    assert spry(monkeypatch, "run", tiny_file, "--out", tmp_path / "one", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "one/summary.json").read_text())
    assert err == ""
    assert spry(monkeypatch, "run", tiny_file, "--out", tmp_path / "two", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_the_default_directory_is_numbered(
    monkeypatch: pytest.MonkeyPatch, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert spry(monkeypatch, "run", tiny_file, "-q", "--set", "server.num_rounds=1") == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-001", "tiny-002"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.name=./none.csv"], "no such file or folder"),
        (["data.text_columns=['words']"], "no column 'words'"),
        (["data.label_column=topik"], "Did you mean 'topic'"),
        (["partition.num_clients=60", "partition.min_examples=9"], "lower partition.num_clients"),
        (["server.num_roundz=3"], "Did you mean 'num_rounds'"),
        (["model.name=./none"], "no such folder"),
        (["model.device=cuda:9"], "cannot be used here"),
        (["data.max_tokens=1000"], "the model reads at most 32 tokens"),
        (["data.max_tokens=2"], "puts 2 tokens around a text: set 3 at least"),
        (["adapter.target_modules=['nope']"], "no module named ['nope']"),
        (["method.name=spry_guided", "adapter.target_modules=['query', 'word_embeddings']"], "word_embeddings' is an "),
        (["partition.kind=column", "partition.column=nope"], "no column 'nope'"),
        (["method.name=nope"], "spry list methods"),
        (["nonsense"], "write it as part.key=value"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_file: Path,
    tmp_path: Path,
    settings: list[str],
    message: str,
) -> None:
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert spry(monkeypatch, "run", tiny_file, "--out", tmp_path / "run", "--quiet", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "spry init"),
        (["run", "none.toml"], "no such file"),
        (["run", "--resume", "nowhere"], "no run there"),
        (["run", "demo", "--resume", "nowhere"], "leave out CONFIG"),
        (["check", "builtin:nope"], "unknown built-in model"),
        (["init", "/no/such/folder/a.toml"], "no such folder"),
    ],
)
def test_bad_arguments(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert spry(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_file: Path, tmp_path: Path
) -> None:
    """The disk fills after the second checkpoint; what is there stays whole and can be resumed."""
    from spryfl.tracking import run_directory

    write, count = run_directory.write_atomically, [0]

    def filling(path: Path, content: bytes) -> None:
        count[0] += path.name == "checkpoint.safetensors"
        if count[0] > 2:
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    with monkeypatch.context() as full:
        full.setattr(run_directory, "write_atomically", filling)
        assert spry(full, "run", tiny_file, "--out", tmp_path / "run", "--quiet") == 2
    assert "no space left on disk" in capsys.readouterr().err
    assert spry(monkeypatch, "run", "--resume", tmp_path / "run", "--quiet") == 0


def test_init_gives_a_file_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert spry(monkeypatch, "init", "my.toml") == 0
    from spryfl.config import load_config

    assert load_config(tmp_path / "my.toml").method.name == "fedyogi_guided"
    assert spry(monkeypatch, "init", "my.toml") == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["methods", "models", "datasets", "adapters", "tasks", "settings"])
def test_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    assert spry(monkeypatch, "list", kind, "--json") == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    expected = {
        "methods": "spry",
        "models": "builtin:minilm",
        "datasets": "builtin:movie_reviews",
        "adapters": "lora",
        "tasks": "prompted",
        "settings": "server.learning_rate",
    }
    assert expected[kind] in names
    assert spry(monkeypatch, "list", kind) == 0
    assert expected[kind] in capsys.readouterr().out


def test_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    assert spry(monkeypatch, "check", tiny_model) == 0
    assert "modules are supported in forward mode" in capsys.readouterr().out


def test_bench_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["bench", "step", "--layers", 1, "--tokens", 16, "--batch", 2, "--repeats", 1, "--out", tmp_path]
    assert spry(monkeypatch, *arguments, "--json") == 0
    rows = {row["estimator"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(STEPS)
    slopes = {name: row["slope"] for name, row in rows.items() if name != "inference"}
    assert slopes.pop("zeroth_order") == pytest.approx(slopes["forward"], rel=0.05)  # a difference in float32
    assert list(slopes.values()) == pytest.approx([slopes["forward"]] * 5, rel=1e-3)  # all measure the same thing
    assert json.loads((tmp_path / "step.json").read_text()) == list(rows.values())
    assert "| forward |" in (tmp_path / "step.md").read_text()


def test_version_and_help_are_fast() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "spryfl", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor: a neighbour does not lengthen it
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert "bench" in done.stdout
    code = "import sys, spryfl.cli.main; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft')))"
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run([sys.executable, "-m", "spryfl", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"spry \d+\.\d+\.\d+\n", done.stdout)
