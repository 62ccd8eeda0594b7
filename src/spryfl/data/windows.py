"""Questions and their contexts as windows of tokens.

A row of the dataset makes one window of its context after another, each after the whole question, `task.stride` tokens
of overlap between neighbours. Each window has a null token, which stands for "no answer here": [CLS] where the
tokenizer puts one. Decoders have none, and their first token has seen nothing of the context: their windows end with
an end-of-text token, which is it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from spryfl.config import DataConfig, TaskConfig
from spryfl.data.classification import token_limit
from spryfl.data.examples import Examples
from spryfl.errors import DataError


@dataclass(frozen=True)
class Question:
    """One row of the dataset.

    Attributes:
        answers: any of them is right; none where the context has no answer.
    """

    question: str
    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Windows(Examples):
    """Tokenized windows; `labels` is (windows, 2), the answer's first and last token.

    Attributes:
        questions: of the dataset's rows, as numbered by `sources`.
        spans: of each window (tokens, 2), where each token begins and ends in the context; 0, 0 outside it.
        nulls: (windows,) the place of the null token.
    """

    questions: Sequence[Question]
    spans: Sequence[np.ndarray]
    nulls: np.ndarray


def tokenize_questions(rows: Dataset, config: DataConfig, task: TaskConfig, tokenizer: Any) -> Windows:
    """Windows of every row's context.

    Raises:
        DataError: `max_tokens` exceeds what the model can read, or a question leaves a window no room to move on.
    """
    questions = [
        Question(question.lstrip(), context, tuple(dict.fromkeys(answers["text"])))
        for question, context, answers in zip(
            *(rows[column][:] for column in (*config.text_columns, config.label_column)), strict=True
        )
    ]
    begins = [answers["answer_start"][0] if answers["text"] else -1 for answers in rows[config.label_column]]
    encodings, labels, sources, spans, nulls = [], [], [], [], []
    for source, window in _windows(questions, config, task, tokenizer):
        first = questions[source].answers[0] if questions[source].answers else ""
        labels.append(_label(window, begins[source], first))
        encodings.append(window.encoding)
        sources.append(source)
        spans.append(window.spans)
        nulls.append(window.null)
    arrays = np.array(labels), np.array(sources)
    return Windows(encodings, *arrays, questions=questions, spans=spans, nulls=np.array(nulls))


@dataclass(frozen=True)
class _Window:
    encoding: dict[str, list[int]]
    spans: np.ndarray
    null: int
    first: bool
    last: bool


def _windows(
    questions: Sequence[Question], config: DataConfig, task: TaskConfig, tokenizer: Any
) -> Iterator[tuple[int, _Window]]:
    """Each window and the row it was made from."""
    limit = token_limit(config, tokenizer)
    stride = limit // 4 if task.stride is None else task.stride
    ends = tokenizer.cls_token_id not in tokenizer("")["input_ids"]  # a decoder: windows end with the null token
    if ends and tokenizer.eos_token_id is None:
        raise DataError("task.kind = 'qa': the tokenizer has no [CLS] and no end-of-text token: take another model")
    joined = [q.question if tokenizer.sep_token_id is not None else f"{q.question}\n" for q in questions]
    for source, (text, question) in enumerate(zip(joined, questions, strict=True)):
        taken = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + tokenizer.num_special_tokens_to_add(True)
        room = limit - ends - taken
        if room <= stride:
            raise DataError(
                f"data.max_tokens = {limit}: the question {question.question[:40]!r} leaves its context {max(room, 0)} "
                f"tokens, where windows share {stride}: raise it, lower task.stride, or drop the row"
            )
        encoded = tokenizer(
            text,
            question.context,
            truncation="only_second",
            max_length=limit - ends,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        names = [name for name in tokenizer.model_input_names if name in encoded]
        for number, offsets in enumerate(encoded["offset_mapping"]):
            parts = encoded.sequence_ids(number)
            spans = [span if part == 1 else (0, 0) for span, part in zip(offsets, parts, strict=True)]
            encoding = {name: list(encoded[name][number]) for name in names}
            if ends:
                added = {"input_ids": tokenizer.eos_token_id, "attention_mask": 1}
                encoding = {name: [*ids, added.get(name, 0)] for name, ids in encoding.items()}
                spans = [*spans, (0, 0)]
            null = len(spans) - 1 if ends else encoding["input_ids"].index(tokenizer.cls_token_id)
            first, last = number == 0, number == len(encoded["offset_mapping"]) - 1
            yield source, _Window(encoding, np.array(spans, dtype=np.int32), null, first, last)


def _label(window: _Window, begin: int, answer: str) -> tuple[int, int]:
    """The first and last token of an answer that begins at a character; the null token where not all of it is here.

    Characters at the context's very edges that no token holds are missing in no window.
    """
    none = window.null, window.null
    if begin < 0:
        return none
    start = begin + len(answer) - len(answer.lstrip())  # no token need hold what is white
    stop = begin + len(answer.rstrip())
    firsts, lasts = window.spans.T
    inside = np.flatnonzero(lasts > firsts)
    touched = np.flatnonzero((lasts > start) & (firsts < stop))
    cut_before = not window.first and firsts[inside[0]] > start
    cut_after = not window.last and lasts[inside[-1]] < stop
    if len(touched) == 0 or cut_before or cut_after:
        return none
    return int(touched[0]), int(touched[-1])
