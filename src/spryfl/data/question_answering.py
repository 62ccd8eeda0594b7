"""Extractive question answering, with questions that the context does not answer (SQuAD v2).

Of a window (`windows.py`) with start logits s, end logits e and null token n,

    L = [CE(s, start) + CE(e, end)] / 2,    start = end = n where the window does not hold all of the answer,
    best = max s_i + e_j  over context tokens i <= j < i + max_answer_tokens,    null = s_n + e_n

as transformers' own, but padding takes no part in the softmax, so that a row's loss depends on that row alone. Of a
row's windows the best span is the best of all and the null score the least; no answer is given where
null - best > `task.null_threshold`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from spryfl.data.examples import Batch, Examples, inputs_of
from spryfl.data.metrics import best_over_thresholds, exact_match, token_f1
from spryfl.data.task import Evaluation, Sample, longest_first_batches
from spryfl.data.windows import Windows


@dataclass(frozen=True)
class Prediction:
    """The best answer that some windows have, and how its score compares with the null score."""

    text: str
    score: float
    null_score: float

    def answer(self, threshold: float) -> str:
        """The text, empty for no answer."""
        return "" if self.null_score - self.score > threshold else self.text


@dataclass(frozen=True)
class QuestionAnswering:
    """The task of finding a question's answer in its context.

    Attributes:
        tokenizer: of the model; it has a padding token.
        device: where batches go.
        max_answer_tokens, null_threshold: see the configuration's task.
    """

    tokenizer: Any
    device: torch.device
    max_answer_tokens: int
    null_threshold: float

    def batch(self, examples: Examples, rows: Sequence[int]) -> Batch:
        """Pad some windows to the longest among them."""
        windows = [examples.encodings[row] for row in rows]
        # On the right always, whatever the tokenizer's side, as labels are places.
        padded = pad_without_fast_tokenizer_warning(self.tokenizer, windows, padding_side="right", return_tensors="pt")
        batch = {name: tensor.to(self.device) for name, tensor in padded.items()}
        batch["labels"] = torch.as_tensor(examples.labels[list(rows)], device=self.device)
        return batch

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows,) the loss of each window, in float32 at least."""
        return _losses(*self.logits(model, batch), batch["labels"])

    def logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of starts and ends: (rows, tokens) each, in float32 at least; next to nothing at padding."""
        output = model(**inputs_of(batch))
        wide = torch.promote_types(output.start_logits.dtype, torch.float32)
        padding = (1 - batch["attention_mask"].to(wide)) * -1e9
        return output.start_logits.to(wide) + padding, output.end_logits.to(wide) + padding

    def evaluate(self, model: nn.Module, examples: Examples, rows: Sequence[int], batch_size: int) -> Evaluation:
        """See `Task.evaluate`. The loss is a mean over windows; all else, and the count, is of the dataset's rows."""
        assert isinstance(examples, Windows)
        found, loss = self._predictions(model, examples, rows, batch_size)
        golden, predictions = [examples.questions[source].answers for source in found], list(found.values())
        answers = [prediction.answer(self.null_threshold) for prediction in predictions]
        f1, exact = (_each(score, answers, golden) for score in (token_f1, exact_match))
        answerable = np.array([bool(own) for own in golden])
        metrics = {"f1": float(f1.mean()), "exact_match": float(exact.mean())}
        for name, some in (("f1_answerable", answerable), ("f1_unanswerable", ~answerable)):
            if some.any():
                metrics[name] = float(f1[some].mean())
        return Evaluation(loss, metrics | _best(predictions, golden, answerable), len(found))

    def samples(self, model: nn.Module, examples: Examples, rows: Sequence[int]) -> list[Sample]:
        """The model's answers to the questions of some windows."""
        assert isinstance(examples, Windows)
        found = []
        for source, prediction in self._predictions(model, examples, rows, len(rows))[0].items():
            question = examples.questions[source]
            expected = question.answers[0] if question.answers else ""
            answer = prediction.answer(self.null_threshold)
            found.append({"prompt": question.question, "written": answer, "expected": expected})
        return found

    def _predictions(
        self, model: nn.Module, examples: Windows, rows: Sequence[int], batch_size: int
    ) -> tuple[dict[int, Prediction], float]:
        """By row of the dataset, in order; and the mean loss of the windows."""
        found: dict[int, Prediction] = {}
        loss = 0.0
        with torch.inference_mode():
            for part in longest_first_batches(examples, rows, batch_size):
                batch = self.batch(examples, part)
                logits = self.logits(model, batch)
                loss += float(_losses(*logits, batch["labels"]).sum())
                starts, ends = (tensor.cpu().double().numpy() for tensor in logits)  # not all devices have float64
                for row, start, end in zip(part, starts, ends, strict=True):
                    source, window = self._source(examples, row), self._window(examples, row, start, end)
                    found[source] = _better(found[source], window) if source in found else window
        return dict(sorted(found.items())), loss / len(rows)

    def _source(self, examples: Windows, row: int) -> int:
        assert examples.sources is not None
        return int(examples.sources[row])

    def _window(self, examples: Windows, row: int, starts: np.ndarray, ends: np.ndarray) -> Prediction:
        """The best answer of one window, every span of its context looked at."""
        firsts, lasts = examples.spans[row].T
        null_score = float(starts[examples.nulls[row]] + ends[examples.nulls[row]])
        inside = np.flatnonzero(lasts > firsts)
        if len(inside) == 0:  # the tokenizer knows nothing of what stands there
            return Prediction("", -np.inf, null_score)
        first, last, score = best_span(starts[inside], ends[inside], self.max_answer_tokens)
        context = examples.questions[self._source(examples, row)].context
        # Byte-level tokens take the space before a word.
        return Prediction(context[firsts[inside[first]] : lasts[inside[last]]].strip(), score, null_score)


def _each(
    score: Callable[[str, Sequence[str]], float], answers: Sequence[str], golden: Sequence[Sequence[str]]
) -> np.ndarray:
    return np.array([score(answer, own) for answer, own in zip(answers, golden, strict=True)])


def _best(
    predictions: Sequence[Prediction], golden: Sequence[Sequence[str]], answerable: np.ndarray
) -> dict[str, float]:
    """SQuAD v2's best scores, each at the threshold that is best for it on these rows, and F1's."""
    texts = [prediction.text for prediction in predictions]
    answered = np.array([text != "" for text in texts])
    gaps = np.array([prediction.null_score - prediction.score for prediction in predictions])
    (best_f1, threshold), (best_exact, _) = (
        best_over_thresholds(_each(score, texts, golden), answerable, answered, gaps)
        for score in (token_f1, exact_match)
    )
    return {"best_f1": best_f1, "best_exact_match": best_exact, "best_null_threshold": threshold}


def _losses(starts: Tensor, ends: Tensor, labels: Tensor) -> Tensor:
    start, end = (
        nn.functional.cross_entropy(logits, label, reduction="none")
        for logits, label in zip((starts, ends), labels.unbind(-1), strict=True)
    )
    return (start + end) / 2


def _better(one: Prediction, other: Prediction) -> Prediction:
    """Of two windows of one context: the better answer, and the lower null score."""
    best = one if one.score >= other.score else other
    return Prediction(best.text, best.score, min(one.null_score, other.null_score))


def best_span(starts: np.ndarray, ends: np.ndarray, most: int) -> tuple[int, int, float]:
    """The first and last token of the span of at most `most` tokens with the largest sum of logits, and that sum.

    Args:
        starts, ends: (tokens,), of the context alone.
    """
    scores = starts[:, None] + ends[None, :]
    places = np.arange(len(starts))
    length = places[None, :] - places[:, None] + 1
    scores[(length < 1) | (length > most)] = -np.inf
    first, last = np.unravel_index(np.argmax(scores), scores.shape)
    return int(first), int(last), float(scores[first, last])
