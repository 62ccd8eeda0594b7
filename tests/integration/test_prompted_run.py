"""Whole runs of a decoder with a prompt: training, the saved adapter, streamed and packed layers, bad input."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prompted import TEMPLATE, WORDS, save_decoder
from spryfl.cli.main import main
from spryfl.config import TASK_KINDS, RunConfig, parse_config, with_overrides
from spryfl.federated.method import METHODS
from spryfl.federated.rounds import run_round
from spryfl.models.classes import MODEL_CLASSES
from spryfl.models.quantizing import quantize_checkpoint
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.suite import run_suite
from spryfl.tasks import TASKS
from spryfl.workbench import Workbench


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder("llama", tmp_path_factory.mktemp("decoder"), tied=True)


@pytest.fixture
def table(tiny_table: dict[str, dict[str, object]], decoder: Path) -> dict[str, Any]:
    task = {"kind": "prompted", "template": TEMPLATE, "label_words": WORDS}
    return with_overrides(tiny_table, {"model.name": str(decoder), "data.max_tokens": 48, "task": task})


@pytest.fixture
def make(table: dict[str, Any]) -> Callable[..., RunConfig]:
    return lambda **overrides: parse_config(
        with_overrides(table, {k.replace("__", "."): v for k, v in overrides.items()})
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method: str, make: Callable[..., RunConfig], tmp_path: Path) -> None:
    options: dict[str, object] = {"method__upload": "slopes"} if method == "spry" else {}
    if METHODS[method].num_tangents > 1:
        options["method__num_tangents"] = 2
    config = make(method__name=method, server__num_rounds=2, **options)
    (summary,) = run_suite(config, tmp_path / "run")
    assert summary.num_failures == summary.num_refused == 0
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert summary.accuracy_before == events[0]["accuracy"]
    # LoRA of rank 1 on queries, 32 + 32, and values, 32 + 16, of two layers: no head is trained.
    assert summary.trainable_parameters == 2 * (64 + 48)


def test_it_learns_and_the_adapter_gives_the_reported_accuracy(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make(method__name="fedavg", local__learning_rate=0.05, adapter__rank=4, server__num_rounds=6)
    (summary,) = run_suite(config, tmp_path / "run")
    assert summary.accuracy > summary.accuracy_before + 0.1
    adapter = str(tmp_path / "run/adapter")
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    model, tokenizer = PeftModel.from_pretrained(base, adapter).eval(), AutoTokenizer.from_pretrained(adapter)
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    words = [tokenizer(word)["input_ids"][0] for word in WORDS]
    bench = Workbench.from_config(config)
    right = 0
    with torch.no_grad():
        for encoding, label in zip(bench.test.encodings, bench.test.labels, strict=True):
            logits = model(input_ids=torch.tensor([encoding["input_ids"]])).logits[0, -1, words]
            right += int(logits.argmax() == label)
    assert right / len(bench.test) == pytest.approx(summary.accuracy)


@pytest.mark.parametrize(("method", "checkpointing"), [("spry", "none"), ("fedyogi", "none"), ("fedyogi", "per_layer")])
@pytest.mark.parametrize("quantized", [False, True])
def test_streamed_layers_give_the_same_round(
    quantized: bool, method: str, checkpointing: str, make: Callable[..., RunConfig], decoder: Path, tmp_path: Path
) -> None:
    name = str(decoder)
    if quantized:
        quantize_checkpoint(make().model, tmp_path / "nf4", "nf4")
        name = str(tmp_path / "nf4")
    found = []
    for streamed in (False, True):
        settings = {"model__name": name, "model__streamed": streamed, "method__name": method}
        bench = Workbench.from_config(make(**settings, method__checkpointing=checkpointing))
        runtime = InProcessRuntime(bench.client, bench.batch_tokens)
        state, report = run_round(bench.initial_state(), bench.federation, runtime)
        assert not report.failures
        found.append((report.loss, bench.evaluate(state.values)))
    assert found[0] == found[1]


def test_a_model_quantized_on_the_way_is_the_quantized_copy(
    make: Callable[..., RunConfig], decoder: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(make().model, tmp_path / "nf4", "nf4")
    benches = [
        Workbench.from_config(make(**{"model__name": name, "model__quantization": kind}))
        for name, kind in ((str(decoder), "nf4"), (str(tmp_path / "nf4"), "none"))
    ]
    ours, copies = (bench.evaluate(bench.initial_state().values) for bench in benches)
    assert ours == copies


def test_clients_of_unequal_memory(make: Callable[..., RunConfig]) -> None:
    """Predicted with the prompt's loss, and without a head."""
    bench = Workbench.from_config(make(clients__memory=["2GB"]))
    memory = bench.client_memory
    assert memory is not None
    assert memory.dry.work.task == "prompted"
    assert bench.unheld_units == ()
    _, report = run_round(bench.initial_state(), bench.federation, InProcessRuntime(bench.client, bench.batch_tokens))
    assert not report.failures
    assert sum(memory.values.values()) == bench.adapted.num_trainable


def test_every_kind_of_task_is_in_the_tables() -> None:
    assert set(TASKS) == set(TASK_KINDS) == set(MODEL_CLASSES)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.label_words=[' yes']", "1 words for 2 classes"),
        ("task.label_words=[' yes', ' yes!']", "both begin with the token"),
        ("task.template='{txt}:'", "not among data.text_columns"),
        ("task.kind='classification'", "belongs to kind = 'prompted'"),
        ("data.max_tokens=4", "the template alone takes"),
        ("model.name={tiny_model}", "no decoder that goes on with a prompt"),
    ],
)
def test_mistakes_are_one_line(
    setting: str,
    message: str,
    table: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(table))
    setting = setting.replace("{tiny_model}", str(tiny_model))
    monkeypatch.setattr(sys, "argv", ["spry", "run", str(file), "--out", str(tmp_path / "run"), "--set", setting])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_check_and_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], decoder: Path) -> None:
    for arguments, answer in (
        (["check", str(decoder), "--task", "prompted"], "are supported in forward mode"),
        (["list", "tasks", "--json"], '"prompted"'),
    ):
        monkeypatch.setattr(sys, "argv", ["spry", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code
        assert answer in capsys.readouterr().out
