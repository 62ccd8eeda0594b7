"""Windows, their labels and losses, and answers over windows, by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoTokenizer

from families import autograd_gradient, build, padded_batch, trainable
from prompted import byte_tokenizer
from spryfl.config import DataConfig, TaskConfig
from spryfl.data.checks import check_columns
from spryfl.data.question_answering import QuestionAnswering, best_span
from spryfl.data.windows import tokenize_questions
from spryfl.errors import DataError
from spryfl.gradients.forward import loss_and_slopes

CONTEXT = "the film is good the plot was bad a cast is great"  # words 0 to 11
TASK = TaskConfig(kind="qa", stride=2)
DATA = DataConfig(text_columns=("question", "context"), label_column="answers", max_tokens=11)


def rows(*answers: str) -> Dataset:
    """The same question and context once for each answer; the empty one stands for none."""
    found = [
        {"text": [answer] if answer else [], "answer_start": [CONTEXT.index(answer)] if answer else []}
        for answer in answers
    ]
    return Dataset.from_dict(
        {"question": ["the film"] * len(answers), "context": [CONTEXT] * len(answers), "answers": found}
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def task_of(tokenizer: Any, threshold: float = 0.0, most: int = 30) -> QuestionAnswering:
    return QuestionAnswering(tokenizer, torch.device("cpu"), most, threshold)


def test_windows_and_their_labels(tokenizer: Any) -> None:
    """[CLS] q q [SEP] leave six tokens of eleven to the context, and [SEP] one: words 0-5, 4-9 and 8-11."""
    windows = tokenize_questions(rows("plot was bad", "", "film", "great"), DATA, TASK, tokenizer)
    assert windows.sources is not None
    assert windows.sources.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    words = CONTEXT.split()
    shown = [tokenizer.decode(windows.encodings[i]["input_ids"]) for i in range(3)]
    assert shown == [f"[CLS] the film [SEP] {' '.join(words[a:b])} [SEP]" for a, b in ((0, 6), (4, 10), (8, 12))]
    none = (0, 0)
    expected = [none, (5, 7), none, none, none, none, (5, 5), none, none, none, none, (7, 7)]
    assert [tuple(label) for label in windows.labels] == expected
    assert windows.made_from(np.array([0, 2])).tolist() == [0, 1, 2, 6, 7, 8]
    assert windows.nulls.tolist() == [0] * 12
    assert not windows.spans[0][:4].any()
    assert [CONTEXT[a:b] for a, b in windows.spans[1][4:10]] == words[4:10]


def test_a_decoder_s_windows_end_with_the_null_token() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match=r"no \[CLS\]"):
        tokenize_questions(rows(""), DATA, TASK, tokenizer)
    tokenizer.eos_token = "<pad>"
    data = DATA.model_copy(update={"max_tokens": 30})
    windows = tokenize_questions(rows("film", ""), data, TASK, tokenizer)
    for row, encoding in enumerate(windows.encodings):
        assert len(encoding["input_ids"]) == len(encoding["attention_mask"]) <= 30
        assert windows.nulls[row] == len(encoding["input_ids"]) - 1
        assert encoding["input_ids"][-1] == tokenizer.eos_token_id
    first, last = windows.labels[0]
    assert tokenizer.decode(windows.encodings[0]["input_ids"][first : last + 1]).strip() == "film"
    assert tokenizer.decode(windows.encodings[0]["input_ids"]).startswith("the film\nthe film is good")
    assert tuple(windows.labels[-1]) == (windows.nulls[-1],) * 2


@pytest.mark.parametrize("answer", ["good", " good", "good  ", "  good  the "])
def test_spaces_around_an_answer_are_no_part_of_it(answer: str) -> None:
    """Neither of the golden one's label nor of the one given, though byte-level tokens take the space before them."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<pad>"
    context = "  the film is  good  the plot was bad"
    place = context.index(answer, 10)
    asked = {
        "question": ["film"],
        "context": [context],
        "answers": [{"text": [answer], "answer_start": [place]}],
    }
    windows = tokenize_questions(Dataset.from_dict(asked), DATA.model_copy(update={"max_tokens": 64}), TASK, tokenizer)
    first, last = windows.labels[0]
    (begin, _), (_, end) = windows.spans[0][[first, last]]
    assert context[begin:end].strip() == answer.strip()
    assert begin <= place + len(answer) - len(answer.lstrip()) < windows.spans[0][first][1]

    logits = torch.zeros(2, 1, len(windows.spans[0]))
    logits[0, 0, first] = logits[1, 0, last] = 9.0
    model = nn.Module()
    model.forward = lambda **_: SimpleNamespace(start_logits=logits[0], end_logits=logits[1])
    (sample,) = task_of(tokenizer).samples(model, windows, [0])
    assert sample["written"] == answer.strip()


def test_an_answer_at_the_edge_may_begin_with_what_no_token_holds(tokenizer: Any) -> None:
    """A space of no width, of which BERT's tokenizer leaves nothing."""
    context = f"\u200b{CONTEXT}"
    asked = {
        "question": ["the film"],
        "context": [context],
        "answers": [{"text": ["\u200bthe film"], "answer_start": [0]}],
    }
    windows = tokenize_questions(Dataset.from_dict(asked), DATA, TASK, tokenizer)
    assert [tuple(label) for label in windows.labels] == [(4, 5), (0, 0), (0, 0)]


def test_an_empty_answer() -> None:
    answers = [{"text": [" "], "answer_start": [3]}]
    given = Dataset.from_dict({"question": ["film"], "context": [CONTEXT], "answers": answers})
    with pytest.raises(DataError, match="train row 0: an answer is empty"):
        check_columns(given, "train", DATA, TASK)


def test_a_question_that_leaves_no_room(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"the question .* leaves its context 2 tokens, where windows share 2"):
        tokenize_questions(rows(""), DATA.model_copy(update={"max_tokens": 7}), TASK, tokenizer)
    with pytest.raises(DataError, match="reads at most 32 tokens"):
        tokenize_questions(rows(""), DATA.model_copy(update={"max_tokens": 33}), TASK, tokenizer)


class Scores(nn.Module):
    """Logits by token, whatever stands around it."""

    def __init__(self, tokenizer: Any, starts: dict[str, float], ends: dict[str, float]) -> None:
        super().__init__()
        self.tables = [torch.zeros(len(tokenizer)) for _ in range(2)]
        for table, scores in zip(self.tables, (starts, ends), strict=True):
            for word, score in scores.items():
                table[tokenizer.convert_tokens_to_ids(word)] = score

    def forward(self, input_ids: Tensor, **others: Tensor) -> SimpleNamespace:
        start, end = (table[input_ids] for table in self.tables)
        return SimpleNamespace(start_logits=start, end_logits=end)


@pytest.mark.parametrize(
    ("null", "threshold", "most", "f1", "exact"),
    [
        (1.0, 0.0, 30, (1, 0), 0.5),  # null 2, best 10: answers both
        (6.0, 0.0, 30, (0, 1), 0.5),  # null 12, best 10: answers neither
        (6.0, 2.0, 30, (1, 0), 0.5),  # exceeded by no more than the threshold
        (6.0, 1.9, 30, (0, 1), 0.5),
        (1.0, 0.0, 2, (2 / 4, 0), 0.0),  # "plot", one word of three
    ],
)
def test_answers_over_windows(
    tokenizer: Any, null: float, threshold: float, most: int, f1: tuple[float, float], exact: float
) -> None:
    """The best window's answer stands against the least null score."""
    windows = tokenize_questions(rows("plot was bad", ""), DATA, TASK, tokenizer)
    model = Scores(tokenizer, {"plot": 5, "[CLS]": null}, {"bad": 5, "[CLS]": null})
    evaluation = task_of(tokenizer, threshold, most).evaluate(model, windows, range(len(windows)), batch_size=4)
    assert evaluation.num_examples == 2
    assert next(iter(evaluation.metrics)) == "f1"
    found = [evaluation.metrics[f"f1_{kind}"] for kind in ("answerable", "unanswerable")]
    assert found == pytest.approx(f1)
    assert evaluation.metrics["f1"] == pytest.approx(sum(f1) / 2)
    assert evaluation.metrics["exact_match"] == exact
    # Both questions have the same gap: a threshold answers both or neither.
    assert evaluation.metrics["best_f1"] == evaluation.metrics["best_exact_match"] == 0.5


def test_the_least_null_score_of_all_windows_counts(tokenizer: Any) -> None:
    """By the official rules: neither the best window's own, nor the greatest."""
    (plot,) = tokenizer.convert_tokens_to_ids(["plot"])

    class Doubting(Scores):
        def forward(self, input_ids: Tensor, **others: Tensor) -> SimpleNamespace:
            found = super().forward(input_ids)
            found.start_logits[:, 0] += 12 * (input_ids == plot).any(dim=1)  # [CLS], where the answer is
            return found

    windows = tokenize_questions(rows("plot was bad"), DATA, TASK, tokenizer)
    model = Doubting(tokenizer, {"plot": 5}, {"bad": 5})  # best 10; null 12 there, 0 in the other windows
    evaluation = task_of(tokenizer).evaluate(model, windows, range(len(windows)), batch_size=4)
    assert evaluation.metrics["exact_match"] == 1.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=8), st.integers(1, 4))
def test_best_span_is_the_best_of_all(logits: list[tuple[int, int]], most: int) -> None:
    starts, ends = np.array(logits, dtype=float).T
    every = [starts[i] + ends[j] for i in range(len(starts)) for j in range(i, min(i + most, len(starts)))]
    first, last, score = best_span(starts, ends, most)
    assert 0 <= last - first < most
    assert score == max(every) == starts[first] + ends[last]


def test_losses_are_transformers_own_and_padding_changes_none(tokenizer: Any) -> None:
    windows = tokenize_questions(rows("plot was bad", ""), DATA, TASK, tokenizer)
    model, task = build("bert", task="qa"), task_of(tokenizer)
    with torch.no_grad():
        batch = task.batch(windows, [0, 1])
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        start, end = batch["labels"].unbind(-1)
        own = model.get_base_model()(**inputs, start_positions=start, end_positions=end).loss
        assert torch.allclose(task.losses(model, batch).mean(), own, atol=1e-12)
        together = task.losses(model, task.batch(windows, [1, 2]))  # the second is shorter
        apart = [task.losses(model, task.batch(windows, [row])) for row in (1, 2)]
        assert torch.allclose(together, torch.cat(apart), atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "distilbert", "opt"])
def test_slopes_of_spans(family: str) -> None:
    """Against autograd, the head's tangents among them."""
    model, batch, task = build(family, task="qa"), padded_batch(), task_of(byte_tokenizer())
    batch["labels"] = torch.tensor([[1, 2], [0, 0], [3, 8]])
    names = trainable(model)
    assert any("qa_outputs" in name for name in names)

    def loss(model: nn.Module) -> Tensor:
        return task.losses(model, batch).mean()

    generator = torch.Generator().manual_seed(2)
    tangents = {n: torch.randn(1, *model.get_parameter(n).shape, generator=generator).double() for n in names}
    gradient = autograd_gradient(model, loss, names)
    _, slopes = loss_and_slopes(model, loss, tangents)
    assert float(slopes[0]) == pytest.approx(float(sum((gradient[n] * tangents[n][0]).sum() for n in names)), rel=1e-9)
