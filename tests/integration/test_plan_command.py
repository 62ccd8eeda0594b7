"""`spry plan` as a user meets it: from a folder with nothing but config.json."""

import json
import shutil
from pathlib import Path

import pytest
from test_cli import spry
from transformers import T5Config

CAPTURED = pytest.CaptureFixture[str]


@pytest.fixture
def bare(tiny_model: Path, tmp_path: Path) -> Path:
    """No weights, no tokenizer."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(tiny_model / "config.json", folder)
    return folder


def test_a_table_and_a_recommendation(monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED, bare: Path) -> None:
    assert spry(monkeypatch, "plan", bare, "--batch", 4, "--tokens", 16, "--budget", "1GB", "--bandwidth", "1MB/s") == 0
    out, err = capsys.readouterr()
    assert "→ backprop, float32: it has the fastest exact gradient that fits." in out
    assert "570 MB of the process" in out
    assert "sent in" in out
    assert err == ""


@pytest.mark.parametrize("columns", ["80", "200"])
def test_no_figure_is_cut_short_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED, bare: Path, columns: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", columns)
    assert spry(monkeypatch, "plan", bare, "--tokens", 16, "--bandwidth", "1kB/s") == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert ("activations" in out.split("→")[0]) == (int(columns) > 150)


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED, bare: Path) -> None:
    assert spry(monkeypatch, "plan", bare, "--batch", 4, "--tokens", 16, "--k", 2, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["recommended"] for row in rows].count(True) == 1
    for row in rows:
        parts = ("weights_bytes", "activation_peak_bytes", "adapter_bytes", "process_bytes")
        assert row["peak_bytes"] == sum(row[part] for part in parts)
        assert (row["batch"], row["tokens"], row["layers"], row["k"], row["fits"]) == (4, 16, 2, 2, True)
        assert row["transfer_seconds"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "1MB"], "no way to train fits 1,000,000 bytes. The least is "),
        (["--budget", "plenty"], "not a size: 'plenty'"),
        (["--bandwidth", "20Mbit/s"], "not a rate: '20Mbit/s'"),
        (["--tokens", "64"], "this model reads at most 32 tokens"),
        (["--dtype", "float8"], "model.dtype"),
    ],
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED, bare: Path, arguments: list[str], message: str
) -> None:
    assert spry(monkeypatch, "plan", bare, "--tokens", 16, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_models_that_are_not_there(monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED) -> None:
    assert spry(monkeypatch, "plan", "shape:llama-7b") == 2
    assert "Did you mean 'llama2-7b'" in capsys.readouterr().err
    assert spry(monkeypatch, "plan", "./nowhere") == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("plan",), ("check",), ("check", "--task", "prompted")])
def test_an_encoder_with_a_decoder_is_refused(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED, tmp_path: Path
) -> None:
    T5Config(d_model=32, num_layers=2, num_heads=2, d_ff=64, d_kv=16, vocab_size=50).save_pretrained(tmp_path)
    assert spry(monkeypatch, *command, tmp_path) == 2
    told = capsys.readouterr().err
    assert "t5 has an encoder and a decoder" in told
    assert told.count("\n") == 1
