"""Whole runs: every method, resuming, killing, the saved adapter."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from spryfl.config import RunConfig
from spryfl.errors import ConfigError
from spryfl.federated.method import METHODS
from spryfl.suite import resume_suite, run_suite
from spryfl.tracking.events import Observer, RoundEvent
from spryfl.tracking.run_directory import RunDirectory
from spryfl.workbench import Workbench

SUMMARY_KEYS = {
    "method",
    "model",
    "dataset",
    "rounds",
    "seed",
    "accuracy_before",
    "accuracy",
    "loss",
    "trainable_parameters",
    "bytes_up_per_client_round",
    "bytes_down_per_client_round",
    "peak_activation_bytes",
    "seconds",
}
EVENT_KEYS = {"round", "method", "loss", "accuracy", "bytes_up", "bytes_down", "seconds", "peak_activation_bytes"}

# Fewer directions than by default; and a threshold that the tiny model's gradients meet.
QUICK: dict[str, dict[str, float]] = {
    "baffle": {"method__num_tangents": 3},
    "baffle_plus": {"method__num_tangents": 2},
    "fwdllm": {"method__variance_threshold": 1e6},
    "fwdllm_plus": {"method__num_tangents": 2},
}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "checkpoint.safetensors")


def assert_same_training(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for mine, yours in zip(RunDirectory(one).read_events(), RunDirectory(other).read_events(), strict=True):
        assert (mine.round, mine.loss, mine.accuracy, mine.test_loss, mine.bytes_up) == (
            yours.round,
            yours.loss,
            yours.accuracy,
            yours.test_loss,
            yours.bytes_up,
        )


def test_checkpointing_within_a_budget(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The same training as plain backprop up to rounding; a budget that some client exceeds is refused at once."""
    options = {"method__name": "fedavg", "server__num_rounds": 1, "adapter__dropout": 0.3}
    budgeted = {"method__checkpointing": "budgeted"}
    run_suite(tiny_config(**options), tmp_path / "plain")
    (summary,) = run_suite(tiny_config(**options, **budgeted, method__budget="16KiB"), tmp_path / "budgeted")
    assert (summary.checkpointing, summary.checkpoint_budget_bytes) == ("budgeted", 2**14)
    plain, ours = tensors(tmp_path / "plain"), tensors(tmp_path / "budgeted")
    assert all(torch.allclose(plain[name], ours[name], atol=1e-5) for name in plain)
    with pytest.raises(
        ConfigError, match=r"method.budget = 99 bytes: one layer's input takes [\d,]+ bytes for a batch of client"
    ):
        run_suite(tiny_config(**options, **budgeted, method__budget=99), tmp_path / "impossible")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method: str, tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (summary,) = run_suite(tiny_config(method__name=method, **QUICK.get(method, {})), tmp_path / "run")
    row = json.loads((tmp_path / "run/summary.json").read_text())
    assert SUMMARY_KEYS <= set(row)
    assert row["method"] == method
    assert row["rounds"] == 3
    assert row["peak_activation_bytes"] > 0
    assert row["num_failures"] == row["num_refused"] == 0
    lines = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert all(set(line) >= EVENT_KEYS for line in lines)
    assert (tmp_path / "run/progress.png").read_bytes().startswith(b"\x89PNG")

    # What travels: every trainable value and a seed down; up, what the method's row says.
    everything = 4 * summary.trainable_parameters
    down, up = row["bytes_down_per_client_round"], row["bytes_up_per_client_round"]
    if METHODS[method].num_candidates > 1:  # the last update too, from the second round on
        assert everything + 8 < down <= 2 * everything + 8
    else:
        assert down == everything + 8
    if METHODS[method].upload == "slopes":
        assert up == 4 * QUICK.get(method, {}).get("method__num_tangents", 1)
    elif METHODS[method].pacing == "leave_out":  # and their gradients' variance
        assert everything < up <= everything + 8
    elif METHODS[method].assignment == "all":
        assert up == everything
    else:
        assert 0 < up < everything


def test_the_same_seed_gives_the_same_run(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    for name in ("one", "other"):
        run_suite(tiny_config(adapter__dropout=0.1), tmp_path / name)
    run_suite(tiny_config(seed=1), tmp_path / "seed")
    assert_same_training(tmp_path / "one", tmp_path / "other")
    assert any(not torch.equal(t, tensors(tmp_path / "seed")[n]) for n, t in tensors(tmp_path / "one").items())


@pytest.mark.parametrize("method", ["spry", "fedavg", "fedmezo"])
def test_adapter_dropout_is_on_while_training_only(
    method: str, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """It changes what forward mode and backprop train; zeroth order runs without; evaluation always does."""
    for name, rate in (("without", 0.0), ("with", 0.5)):
        config = tiny_config(method__name=method, adapter__dropout=rate, server__num_rounds=1)
        run_suite(config, tmp_path / name)
    before = [RunDirectory(tmp_path / name).read_events()[0].test_loss for name in ("without", "with")]
    assert before[0] == before[1]
    ours, theirs = tensors(tmp_path / "without"), tensors(tmp_path / "with")
    changed = [name for name in ours if "lora_B" in name and not torch.equal(ours[name], theirs[name])]
    assert bool(changed) == (method != "fedmezo")


@pytest.mark.parametrize("options", [{"method__name": "fwdllm"}, {"server__sampling": "size"}], ids=["pool", "size"])
def test_a_run_goes_on_from_its_state(
    options: dict[str, object], tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """What is pooled, and the last update, are in the checkpoint; cohorts by size come from the seed."""
    run_suite(tiny_config(**options), tmp_path / "whole")
    run_suite(tiny_config(**options, server__num_rounds=2), tmp_path / "part")
    (tmp_path / "part/summary.json").unlink()
    RunDirectory(tmp_path / "part").write_config(tiny_config(**options))
    resume_suite(RunDirectory(tmp_path / "part"))
    assert_same_training(tmp_path / "whole", tmp_path / "part")
    assert any(name.startswith("pool/") for name in tensors(tmp_path / "whole")) == ("method__name" in options)


def test_workers_give_the_same_run(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_suite(tiny_config(runtime__num_threads=1), tmp_path / "one")
    run_suite(tiny_config(runtime__num_workers=2, runtime__num_threads=1), tmp_path / "two")
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_spry_learns(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(
        server__num_rounds=40,
        evaluation__every=40,
        method__num_tangents=4,
        local__learning_rate=3e-2,
        partition__alpha=100.0,
    )
    (summary,) = run_suite(config, tmp_path / "run")
    assert summary.accuracy > summary.accuracy_before + 0.2


def test_slopes_travel_instead_of_values(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A seed and scalars up give the same run as values up, but for float rounding of differences."""
    for name, upload in (("values", None), ("slopes", "slopes")):
        extra = {"method__upload": upload} if upload else {}
        run_suite(tiny_config(method__name="fedmezo", local__optimizer="sgd", **extra), tmp_path / name)
    ours, theirs = tensors(tmp_path / "values"), tensors(tmp_path / "slopes")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_adapter_gives_the_reported_accuracy(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(method__name="fedavg", local__learning_rate=0.02)
    (summary,) = run_suite(config, tmp_path / "run")
    assert summary.accuracy != summary.accuracy_before
    adapter = tmp_path / "run/adapter"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in adapter.iterdir()}
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    bench = Workbench.from_config(config)
    texts = [tokenizer.decode(e["input_ids"], skip_special_tokens=True) for e in bench.test.encodings]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    accuracy = (logits.argmax(-1).numpy() == bench.test.labels).mean()
    assert accuracy == pytest.approx(summary.accuracy)


@pytest.mark.parametrize("guided", [False, True])
def test_resume_is_bitwise(
    guided: bool, tiny_config: Callable[..., RunConfig], tiny_data: Path, tmp_path: Path
) -> None:
    """Guided, maps and momentum are read from the checkpoint too."""
    config = tiny_config(server__num_rounds=5, adapter__dropout=0.1)
    if guided:
        guide = {"guess": "maps", "text": str(tiny_data), "momentum": True}
        config = tiny_config(server__num_rounds=5, method__name="spry_guided", guide=guide)
    run_suite(config, tmp_path / "whole")

    class Stop(Observer):
        def round_finished(self, event: RoundEvent) -> None:
            if event.round == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(config, tmp_path / "stopped", lambda directory: [Stop()])
    assert RunDirectory(tmp_path / "stopped").read_checkpoint().round == 2
    assert len(RunDirectory(tmp_path / "stopped").read_events()) == 4  # round 3's line is there, its state is not
    resume_suite(RunDirectory(tmp_path / "stopped"))
    assert_same_training(tmp_path / "whole", tmp_path / "stopped")


def test_kill_in_the_middle_of_a_round(
    tiny_table: dict[str, dict[str, object]], tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """kill -9 while clients train; what is resumed ends bitwise where an uninterrupted run does."""
    rounds = 40
    config = tiny_config(server__num_rounds=rounds, evaluation__every=rounds)
    run_suite(config, tmp_path / "whole")
    file = tmp_path / "run.toml"
    table = {**tiny_table, "server": {"num_rounds": rounds, "cohort_size": 3}, "evaluation": {"every": rounds}}
    file.write_text(tomli_w.dumps(table))
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "spryfl", "run", str(file), "--out", str(killed), "--quiet"]
    process = subprocess.Popen(command)
    events = killed / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not events.exists() or len(events.read_text().splitlines()) < 6):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < RunDirectory(killed).read_checkpoint().round < rounds
    assert not (killed / "summary.json").exists()
    with events.open("a") as handle:
        handle.write('{"round": 39, "meth')  # a torn line, as a crash can leave
    subprocess.run([sys.executable, "-m", "spryfl", "run", "--resume", str(killed), "--quiet"], check=True)
    assert_same_training(tmp_path / "whole", killed)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_saves_and_says_how_to_resume(
    tiny_table: dict[str, dict[str, object]], tmp_path: Path, signum: signal.Signals
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps({**tiny_table, "server": {"num_rounds": 5000, "cohort_size": 3}}))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "spryfl", "run", str(file), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "checkpoint.safetensors").exists():
        time.sleep(0.05)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"spry run --resume {out}" in errors
    assert "Traceback" not in errors
    assert not list(out.glob("*.tmp"))


def test_compared_runs_and_resuming_them(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    compare = [
        {"name": "backprop", "label": "Backprop", "set": {"method.name": "fedyogi"}},
        {"name": "zeroth", "set": {"method.name": "fedmezo"}},
    ]
    config = tiny_config(compare=compare, label="Ours")
    summaries = run_suite(config, tmp_path / "run")
    assert [s.label for s in summaries] == ["Ours", "Backprop", "zeroth"]
    assert len({s.accuracy_before for s in summaries}) == 1  # the same start
    assert (tmp_path / "run/comparison.png").exists()
    (tmp_path / "run/compare/zeroth/summary.json").unlink()
    stamp = (tmp_path / "run/compare/backprop/events.jsonl").stat().st_mtime_ns
    again = resume_suite(RunDirectory(tmp_path / "run"))
    assert [s.accuracy for s in again] == [s.accuracy for s in summaries]
    assert (tmp_path / "run/compare/backprop/events.jsonl").stat().st_mtime_ns == stamp  # nothing is repeated


def test_nothing_leaves_the_machine(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built-in model, built-in data and local files: not even a name is looked up."""
    looked_up = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: looked_up.append(args))
    monkeypatch.setattr("socket.socket.connect", lambda self, address: looked_up.append(address))
    small = {"data__max_train_examples": 80, "data__max_test_examples": 20, "server__num_rounds": 1}
    run_suite(tiny_config(model__name="builtin:minilm", data__name="builtin:movie_reviews", **small), tmp_path / "a")
    run_suite(tiny_config(server__num_rounds=1), tmp_path / "b")
    assert looked_up == []


def test_tensorboard(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from spryfl.tracking.tensorboard import TensorBoardObserver

    run_suite(tiny_config(), tmp_path / "run", lambda d: [TensorBoardObserver(d.path / "tensorboard")])
    record = EventAccumulator(str(tmp_path / "run/tensorboard"))
    record.Reload()
    assert [s.step for s in record.Scalars("accuracy")] == [0, 1, 2, 3]
    assert [s.step for s in record.Scalars("loss")] == [1, 2, 3]
