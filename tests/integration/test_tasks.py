"""Whole runs of questions with answers in their context, language models, and answers to judge; their bad input."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from prompted import save_decoder
from spryfl.config import RunConfig, parse_config, with_overrides
from spryfl.data.loading import load_rows
from spryfl.data.question_answering import QuestionAnswering
from spryfl.errors import ConfigError, DataError
from spryfl.evaluation import _averaged
from spryfl.federated.client import BatchLoss
from spryfl.federated.evaluation import ClientsEvaluation
from spryfl.federated.rounds import run_round
from spryfl.gradients.estimator import TokenLoss
from spryfl.map_keeper import MapKeeper
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.suite import run_suite
from spryfl.workbench import Workbench

NOUNS, TONES = ("film", "plot", "cast"), ("good", "fine", "great", "bad", "poor", "awful")


def questions() -> list[dict[str, Any]]:
    """Contexts of eighteen words; every third question, about an "a", has no answer in them."""
    found = []
    for i in range(48):
        tones = [TONES[(i + j) % 6] for j in range(3)]
        verb = ("is", "was")[i % 2]
        context = " ".join(f"the {noun} {verb} {tone} a a" for noun, tone in zip(NOUNS, tones, strict=True))
        noun = i % 4
        answer = {"text": [tones[noun]], "answer_start": [context.index(tones[noun])]} if noun < 3 else None
        asked = f"the {NOUNS[noun]}" if noun < 3 else "a"
        found.append({"question": asked, "context": context, "answers": answer or {"text": [], "answer_start": []}})
    return found


def instructions() -> list[dict[str, Any]]:
    return [
        {"text": f"the {NOUNS[i % 3]} is {TONES[i % 6]}", "answer": ("positive", "negative")[i % 6 // 3]}
        for i in range(48)
    ]


def judged() -> list[dict[str, Any]]:
    """A paragraph, a question, an answer, and whether the paragraph gives it."""
    return [
        {
            "paragraph": f"the film is {TONES[i % 6]} " + "the plot was a a " * (i % 3),
            "question": "the film is",
            "answer": TONES[i % 6] if i % 2 else TONES[(i + 1) % 6],
            "label": i % 2,
        }
        for i in range(48)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder("llama", tmp_path_factory.mktemp("decoder"), tied=True)


@pytest.fixture
def tables(tiny_table: dict[str, dict[str, object]], decoder: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Each task's configuration."""
    small = {"server.num_rounds": 2, "partition": {"kind": "iid", "num_clients": 6}, "evaluation.num_samples": 2}
    qa = {
        "data.name": str(write(tmp_path / "qa.jsonl", questions())),
        "data.text_columns": ["question", "context"],
        "data.label_column": "answers",
        "task": {"kind": "qa", "stride": 4, "max_answer_tokens": 3},
    }
    language = {
        "model.name": str(decoder),
        "data.name": str(write(tmp_path / "lm.jsonl", instructions())),
        "data.text_columns": ["text", "answer"],
        "data.max_tokens": 48,
        "task": {"kind": "language_model", "template": "Review: {text}\nSentiment: {answer}"},
    }
    three = {
        "data.name": str(write(tmp_path / "three.jsonl", judged())),
        "data.text_columns": ["paragraph", "question", "answer"],
    }
    every = {"qa": qa, "language_model": language, "three": three}
    return {name: with_overrides(tiny_table, small | settings) for name, settings in every.items()}


@pytest.fixture
def make(tables: dict[str, dict[str, Any]]) -> Callable[..., RunConfig]:
    return lambda name, **overrides: parse_config(
        with_overrides(tables[name], {k.replace("__", "."): v for k, v in overrides.items()})
    )


@pytest.fixture
def run(make: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., tuple[Any, RunConfig, Path]]:
    def perform(name: str, **overrides: object) -> tuple[Any, RunConfig, Path]:
        config, out = make(name, **overrides), tmp_path / "run"
        (summary,) = run_suite(config, out)
        assert summary.num_failures == summary.num_refused == 0
        return summary, config, out

    return perform


STRONG = {"method__name": "fedavg", "local__learning_rate": 0.03, "adapter__rank": 4}


def test_questions_learnt_and_the_adapter_gives_the_reported_f1(run: Callable[..., Any]) -> None:
    summary, config, out = run("qa", **STRONG, server__num_rounds=4)
    assert summary.metric == "f1"
    assert summary.accuracy is None
    assert summary.score > summary.score_before + 0.1
    best = {"best_f1", "best_exact_match", "best_null_threshold"}
    assert set(summary.metrics) == {"f1", "exact_match", "f1_answerable", "f1_unanswerable"} | best
    assert summary.metrics["best_f1"] >= summary.metrics["f1"]
    base = AutoModelForQuestionAnswering.from_pretrained(config.model.name)
    model = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    bench = Workbench.from_config(config)
    task = QuestionAnswering(tokenizer, torch.device("cpu"), 3, 0.0)
    again = task.evaluate(model, bench.test, range(len(bench.test)), batch_size=8)
    assert again.metrics == pytest.approx(summary.metrics)
    at_best = QuestionAnswering(tokenizer, torch.device("cpu"), 3, again.metrics["best_null_threshold"])
    told = at_best.evaluate(model, bench.test, range(len(bench.test)), batch_size=8)
    assert told.metrics["f1"] == pytest.approx(again.metrics["best_f1"])
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [set(sample) for sample in samples] == [{"prompt", "written", "expected"}] * 2


def test_windows_of_a_question_lie_with_one_client(make: Callable[..., RunConfig]) -> None:
    bench = Workbench.from_config(make("qa"))
    assert bench.train.sources is not None
    assert len(bench.train) > len(np.unique(bench.train.sources))  # some have several
    owners = [set(bench.train.sources[rows]) for rows in bench.partition]
    assert sum(map(len, owners)) == len(set().union(*owners)) == len(np.unique(bench.train.sources))
    assert sorted(np.concatenate(bench.partition)) == list(range(len(bench.train)))


def test_samples_of_a_model_that_computes_in_bfloat16(run: Callable[..., Any]) -> None:
    """The adapter is saved in float32, which the model itself must not be left in."""
    _, _, out = run("language_model", **STRONG, model__dtype="bfloat16", server__num_rounds=1)
    assert (out / "samples.jsonl").is_file()
    assert {tensor.dtype for tensor in load_file(out / "adapter/adapter_model.safetensors").values()} == {torch.float32}


def test_answers_written_and_the_adapter_gives_the_reported_perplexity(run: Callable[..., Any]) -> None:
    summary, config, out = run("language_model", **STRONG, method__checkpointing="per_layer")
    assert summary.metric == "perplexity"
    assert summary.score < summary.score_before
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    model = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    test = Workbench.from_config(config).test
    total, count = 0.0, 0
    with torch.no_grad():
        for encoding, begin in zip(test.encodings, test.labels, strict=True):
            ids = torch.tensor([encoding["input_ids"]])
            logits = model(input_ids=ids).logits[0, begin - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, begin:], reduction="sum"))
            count += ids.shape[1] - begin
    assert math.exp(total / count) == pytest.approx(summary.score, rel=1e-4)
    first = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert first["prompt"] + first["expected"] == tokenizer.decode(test.encodings[0]["input_ids"])
    assert first["written"]


def test_three_texts_and_f1(run: Callable[..., Any]) -> None:
    """A long paragraph is cut; question and answer are read whole."""
    summary, config, out = run("three", **STRONG, data__max_tokens=12, data__test_fraction=0.5)
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2)
    model = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    bench = Workbench.from_config(config)
    predicted = []
    for encoding in bench.test.encodings:
        text = tokenizer.decode(encoding["input_ids"])
        assert "[SEP] the film is [SEP]" in text
        assert len(encoding["input_ids"]) <= 12
        with torch.no_grad():
            inputs = {name: torch.tensor([values]) for name, values in encoding.items()}
            predicted.append(int(model(**inputs).logits.argmax()))
    assert summary.metrics["f1"] == pytest.approx(f1_score(bench.test.labels, predicted, zero_division=0))
    assert summary.metrics["accuracy"] == summary.accuracy == summary.score
    rows = load_rows(config.data, config.seed).test
    right: dict[tuple[str, str], bool] = {}
    for row, answer in zip(rows, predicted, strict=True):
        question = row["paragraph"], row["question"]
        right[question] = right.get(question, True) and answer == row["label"]
    assert 1 < len(right) < len(rows)
    assert summary.metrics["exact_match_by_question"] == pytest.approx(sum(right.values()) / len(right))
    assert "f1_by_question" in summary.metrics
    assert not (out / "samples.jsonl").exists()


@pytest.mark.parametrize("task", ["qa", "language_model"])
@pytest.mark.parametrize("estimator", ["forward", "zeroth_order", "bottleneck", "guided"])
def test_every_estimator(task: str, estimator: str, make: Callable[..., RunConfig]) -> None:
    settings: dict[str, Any] = {"adapter__rank": 2, "method__estimator": estimator}
    if estimator in ("forward", "bottleneck"):
        settings |= {"method__num_tangents": 2, "method__exact_head": task == "qa"}
    bench = Workbench.from_config(make(task, **settings))
    runtime = InProcessRuntime(bench.client, bench.batch_tokens)
    state, report = run_round(bench.initial_state(), bench.federation, runtime)
    assert not report.failures
    assert report.num_updates == 3
    assert any(not torch.equal(state.values[name], value) for name, value in bench.initial_state().values.items())


@pytest.mark.parametrize(("task", "dimensions"), [("qa", 1), ("language_model", 2)])
def test_clients_losses_are_told_as_finely_as_can_be(
    task: str, dimensions: int, make: Callable[..., RunConfig]
) -> None:
    """By token where a causal model is to write, as bottleneck tangents take them; else by row."""
    bench = Workbench.from_config(make(task))
    data, model = bench.client(0).data, bench.adapted.model
    loss = BatchLoss(data, data.batch([0, 1]), 0)
    assert isinstance(loss, TokenLoss)
    with torch.no_grad():
        parts = loss.token_parts(model)
        assert parts.dim() == dimensions
        assert float(parts.sum()) == pytest.approx(float(loss(model)), rel=1e-5)


def test_maps_fitted_on_public_text_alone(make: Callable[..., RunConfig], tables: dict[str, Any]) -> None:
    """Public text is a text like any other: nothing of it is drawn at random."""
    guide = {"guess": "maps", "text": tables["language_model"]["data"]["name"], "across": False, "num_texts": 16}
    bench = Workbench.from_config(make("language_model", method__name="spry_guided", guide=guide))
    state = MapKeeper.of(bench).start(bench.initial_state())
    assert state.maps
    _, report = run_round(state, bench.federation, InProcessRuntime(bench.client, bench.batch_tokens))
    assert not report.failures


@pytest.mark.parametrize("task", ["qa", "language_model"])
def test_clients_of_unequal_memory(task: str, make: Callable[..., RunConfig]) -> None:
    """Predicted with the task's own loss."""
    bench = Workbench.from_config(make(task, clients__memory=["2GB"]))
    memory = bench.client_memory
    assert memory is not None
    assert memory.dry.work.task == task
    assert bench.unheld_units == ()
    assert sum(memory.values.values()) == bench.adapted.num_trainable
    assert bench.federation.fit is not None
    assert bench.federation.fit(0, list(bench.federation.units)) is not None


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("qa", {"partition__kind": "dirichlet"}, "set partition.kind = 'iid', 'quantity' or 'column'"),
        ("qa", {"data__text_columns": ["question"]}, "set data.text_columns = ['question', 'context'] and data.label"),
        ("qa", {"task__template": "{question}"}, "template belongs to kind = 'prompted' or 'language_model', not 'qa'"),
        ("qa", {"guide__guess": "maps", "guide__text": "t"}, "public text has no answers"),
        ("language_model", {"task__template": "{text}: {answer}!"}, "the template must end with it"),
        ("language_model", {"task__template": "{answer}: {text} {answer}"}, "it must stand there alone"),
        ("language_model", {"task": {"kind": "language_model"}}, "a text alone is one column"),
        ("language_model", {"guide__guess": "maps", "guide__text": "t"}, "set guide.across = false"),
        ("language_model", {"task__stride": 3}, "stride belongs to kind = 'qa'"),
        ("three", {"data__text_columns": ["a", "b", "c", "d"]}, "three columns at most"),
    ],
)
def test_impossible_configurations(
    name: str, overrides: dict[str, Any], message: str, make: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(name, **overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "qa",
            {"answers": {"text": ["plot"], "answer_start": [0]}},
            "answer 'plot' is not at character 0 of",
        ),
        ("qa", {"answers": {"text": ["the"], "answer_start": []}}, "as many texts as whole numbers"),
        ("qa", {"answers": {"text": ["the"], "answer_start": [-1]}}, "mend answer_start, or drop the row"),
        ("qa", {"context": " ", "answers": {"text": [], "answer_start": []}}, "column 'context' is empty"),
        ("language_model", {"answer": " "}, "column 'answer' is empty"),
        ("language_model", {"answer": None}, "holds None, not text"),
        ("three", {"label": 5}, "row 47 with 5; labels are 0, 1"),
    ],
)
def test_rows_that_cannot_be_read(
    name: str, row: dict[str, Any], message: str, tmp_path: Path, make: Callable[..., RunConfig]
) -> None:
    """All rows are train rows, and the last of them is wrong."""
    rows = {"qa": questions, "language_model": instructions, "three": judged}[name]()
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "test.jsonl", rows)
    write(folder / "train.jsonl", [*rows[:-1], rows[-1] | row])
    if name == "three":
        write(folder / "test.jsonl", [*rows[:-1], rows[-1] | row])
        write(folder / "train.jsonl", rows)
    with pytest.raises(DataError) as caught:
        Workbench.from_config(make(name, data__name=str(folder)))
    assert message in str(caught.value)
    assert "47" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_answers_in_csv(tmp_path: Path, make: Callable[..., RunConfig]) -> None:
    """They have no tables: what stands there is text, whatever it looks like."""
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "context", "answers"])
        writer.writeheader()
        writer.writerows(questions())
    with pytest.raises(DataError, match=r"train row 0, column 'answers' holds text, .* as JSONL or Parquet"):
        Workbench.from_config(make("qa", data__name=str(tmp_path / "train.csv")))


def test_what_is_no_mean_over_clients_is_not_told_of_them() -> None:
    found = ClientsEvaluation(0.5, {"f1": 0.3, "exact_match": 0.2, "f1_answerable": 0.4, "best_null_threshold": 1.0})
    assert dict(_averaged(found, "f1").metrics) == {"f1": 0.3, "exact_match": 0.2}
    found = ClientsEvaluation(0.5, {"accuracy": 0.3, "f1": 0.2, "exact_match_by_question": 0.1})
    assert dict(_averaged(found, "accuracy").metrics) == {"accuracy": 0.3}


def test_an_empty_split(tmp_path: Path, make: Callable[..., RunConfig]) -> None:
    write(tmp_path / "train.jsonl", instructions())
    (tmp_path / "test.csv").write_text("text,answer\n")
    with pytest.raises(DataError, match="no rows in it"):
        Workbench.from_config(make("language_model", data__name=str(tmp_path)))
