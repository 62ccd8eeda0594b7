"""What lies in a run's directory: never overwritten, never half written, named where it is damaged."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from spryfl.config import RunConfig
from spryfl.errors import DataError, RunDirectoryError, is_full_disk
from spryfl.files import write_atomically
from spryfl.suite import resume_suite, run_suite
from spryfl.tracking.run_directory import RunDirectory


def test_a_run_directory_is_never_overwritten(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_suite(tiny_config(), tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="--resume"):
        run_suite(tiny_config(), tmp_path / "run")
    (tmp_path / "run/config.toml").unlink()  # its results are a run still
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        run_suite(tiny_config(), tmp_path / "run")


def test_a_run_that_never_began_leaves_its_name_free(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(method__name="fedavg", server__num_rounds=1)
    wrong = config.model_copy(update={"data": config.data.model_copy(update={"label_column": "no_such"})})
    with pytest.raises(DataError, match="no_such"):
        run_suite(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("kept")
    with pytest.raises(DataError, match="no_such"):
        run_suite(wrong, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    run_suite(config, tmp_path / "run")


def test_a_damaged_checkpoint_is_named(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_suite(tiny_config(), tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/checkpoint.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(RunDirectoryError, match="damaged"):
        resume_suite(RunDirectory(tmp_path / "run"))


def test_an_adapter_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """Tokenizers raise a plain exception where the disk is full."""
    directory = RunDirectory(tmp_path)

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter.safetensors").write_bytes(b"old")

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise Exception("File too large (os error 27)")

    directory.write_adapter(save)
    with pytest.raises(RunDirectoryError, match=r"adapter cannot be written: File too large") as told:
        directory.write_adapter(fail)
    assert is_full_disk(told.value)  # a suite ends with it
    assert not is_full_disk(RunDirectoryError("it cannot be written: Permission denied (os error 13)"))
    assert (directory.adapter / "adapter.safetensors").read_bytes() == b"old"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_loses_nothing(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_runs_go_on_from_another_folder(
    tiny_config: Callable[..., RunConfig], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of them: also what a compared run sets is kept by absolute path."""
    monkeypatch.chdir(tiny_data.parent)
    compare = [{"name": "other", "set": {"method.name": "fedavg", "data.name": tiny_data.name}}]
    run_suite(tiny_config(data__name=tiny_data.name, compare=compare, server__num_rounds=1), tmp_path / "run")
    for file in (tmp_path / "run").rglob("summary.json"):
        file.unlink()
    monkeypatch.chdir(tmp_path)
    assert len(resume_suite(RunDirectory(tmp_path / "run"))) == 2
