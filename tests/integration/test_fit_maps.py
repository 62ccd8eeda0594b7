"""`spry fit-maps`: maps for a prompt, fitted once, and runs that use them; bad input."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from prompted import TEMPLATE, WORDS, save_decoder
from spryfl.cli.main import main
from spryfl.config import RunConfig, load_config, with_overrides
from spryfl.errors import ModelError
from spryfl.map_keeper import MapKeeper
from spryfl.suite import run_suite
from spryfl.workbench import Workbench


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder("llama", tmp_path_factory.mktemp("decoder"), tied=True)


def spry(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["spry", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def fit(monkeypatch: pytest.MonkeyPatch, model: Path, public: Path, out: Path, *more: object) -> int:
    words = [option for word in WORDS for option in ("--word", word)]
    return spry(
        monkeypatch,
        "fit-maps",
        model,
        "--text",
        public,
        "--prompt",
        TEMPLATE,
        *words,
        "--tokens",
        48,
        "--out",
        out,
        *more,
    )


def test_fit_maps_then_train_with_them(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    decoder: Path,
    public: Path,
    tiny_table: dict[str, Any],
    tmp_path: Path,
) -> None:
    maps = tmp_path / "maps.safetensors"
    assert fit(monkeypatch, decoder, public, maps) == 0
    out_of_fit, _ = capsys.readouterr()
    assert "kB a layer" in out_of_fit
    task = {"kind": "prompted", "template": TEMPLATE, "label_words": WORDS}
    changed = {
        "model.name": str(decoder),
        "data.max_tokens": 48,
        "task": task,
        "method.name": "spry_guided",
        "guide": {"guess": "maps", "maps": str(maps)},
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(with_overrides(tiny_table, changed)))
    assert spry(monkeypatch, "run", path, "--out", tmp_path / "run", "--json") == 0
    out, _ = capsys.readouterr()
    summary = json.loads(out)
    assert summary["num_failures"] == 0
    assert summary["bytes_down_per_client_round"] > 4 * summary["trainable_parameters"] + 8

    # Another base model of the same shape, another horizon, kind of map, or prompt.
    other = save_decoder("llama", tmp_path / "other", tied=True, dtype=torch.bfloat16)
    capsys.readouterr()
    for number, (override, told) in enumerate(
        (
            (f"model.name={other}", "another base model"),
            ("guide.horizon=1", "guide.horizon = 0, not 1"),
            ("guide.across=false", "guide.across = true, not false"),
            ("task.template={text} So", "another task or prompt (public.txt, prompt"),
        )
    ):
        assert spry(monkeypatch, "run", path, "--out", tmp_path / f"bad-{number}", "--set", override) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert told in err

    # What the fit was worth came with the file, so that no text is needed to know.
    bench = Workbench.from_config(load_config(path))
    keeper = MapKeeper.of(bench)
    noted = keeper.cosines(keeper.start(bench.initial_state()))
    shown = {int(line.split()[0]): float(line.split()[1]) for line in out_of_fit.splitlines()[1:-1]}
    assert noted == pytest.approx(shown, abs=1e-3)


def test_a_texts_columns_stand_for_the_prompts_fields(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], decoder: Path, public: Path, tmp_path: Path
) -> None:
    """Public text seldom calls its columns what the task does."""
    table = tmp_path / "public.jsonl"
    lines = [line.strip() for line in public.read_text().splitlines() if line.strip()]
    table.write_text("\n".join(json.dumps({"words": line}) for line in lines))
    same, named = tmp_path / "same.safetensors", tmp_path / "named.safetensors"
    assert fit(monkeypatch, decoder, public, same) == 0
    assert fit(monkeypatch, decoder, table, named, "--column", "words") == 0
    one, other = load_file(same), load_file(named)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    capsys.readouterr()
    assert fit(monkeypatch, decoder, table, named, "--column", "words", "--column", "words") == 2
    assert "--column: 2 given, but the prompt's fields are ['text']" in (err := capsys.readouterr().err)
    assert err.count("\n") == 1


def test_maps_of_a_model_that_is_packed_while_loading(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], decoder: Path, public: Path, tmp_path: Path
) -> None:
    """Fitted through the packed weights that runs will have, and for the same base model."""
    dense, packed = tmp_path / "dense.safetensors", tmp_path / "packed.safetensors"
    assert fit(monkeypatch, decoder, public, dense) == 0
    assert fit(monkeypatch, decoder, public, packed, "--quantization", "nf4") == 0
    one, other = load_file(dense), load_file(packed)
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in other.items()}
    assert not torch.equal(one["0/own"], other["0/own"])
    with safe_open(dense, "pt") as first, safe_open(packed, "pt") as second:
        assert first.metadata()["base_sha256"] == second.metadata()["base_sha256"]
    capsys.readouterr()
    assert fit(monkeypatch, decoder, public, tmp_path / "no", "--quantization", "nf3") == 2
    assert "model.quantization" in (err := capsys.readouterr().err)
    assert err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_fit_maps_that_cannot_be_written_or_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], decoder: Path, public: Path, tmp_path: Path
) -> None:
    """Told before the fit, and of the prompt's own field where the text has no such column."""
    assert fit(monkeypatch, decoder, public, tmp_path) == 2
    assert "is a folder: name a file" in capsys.readouterr().err
    table, binary = tmp_path / "public.csv", tmp_path / "public.txt"
    table.write_text("sentence\n" + "\n".join(public.read_text().splitlines()))
    binary.write_bytes(b"caf\xe9\n")
    out = tmp_path / "maps.safetensors"
    assert fit(monkeypatch, decoder, table, out, "--prompt", "Review: {sentence}\nSentiment:") == 0
    capsys.readouterr()
    for text, told in ((table, "no column 'text'"), (binary, "byte 3 is not UTF-8")):
        assert fit(monkeypatch, decoder, text, out) == 2
        assert told in (err := capsys.readouterr().err)
        assert err.count("\n") == 1


def test_a_map_file_that_is_none(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = tmp_path / "maps.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="spry fit-maps"):
        run_suite(tiny_config(method__name="spry_guided", guide__guess="maps", guide__maps=str(path)), tmp_path / "run")
