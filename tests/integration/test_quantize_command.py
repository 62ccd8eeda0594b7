"""`spry quantize` from the shell, and a run on what it writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")


def spry(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "spryfl", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_copy_and_its_messages(tiny_model: Path, tmp_path: Path) -> None:
    done = spry("quantize", tiny_model, tmp_path / "copy", "--precision", "int8")
    assert done.returncode == 0, done.stderr
    assert "int8" in done.stdout
    assert done.stderr.strip() == ""  # no noise of libraries, no bar where there is no terminal
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    again = spry("quantize", tiny_model, tmp_path / "copy")
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "exists already" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["no/such/folder/here", "out"], ["builtin:nothing", "out"]])
def test_bad_input(arguments: list[str], tmp_path: Path) -> None:
    done = spry("quantize", arguments[0], tmp_path / arguments[1])
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_model.iterdir():
        (source / path.name).write_bytes(path.read_bytes()[:-1] if path.suffix == ".safetensors" else path.read_bytes())
    done = spry("quantize", source, tmp_path / "copy")
    assert done.returncode == 2
    assert "model.safetensors: corrupt or truncated" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
