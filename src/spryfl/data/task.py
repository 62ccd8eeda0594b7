"""What every task has: batches, losses, and how well values do on some examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from spryfl.data.examples import Batch, Examples
from spryfl.data.metrics import binary_f1, question_scores

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
"""Metrics of which less is better."""
NOT_AVERAGED = frozenset(
    {
        "f1",
        "f1_by_question",
        "exact_match_by_question",
        "f1_answerable",
        "f1_unanswerable",
        "best_f1",
        "best_exact_match",
        "best_null_threshold",
    }
)
"""Metrics of which a mean over clients says nothing, unless they are the task's main one, a mean over rows: of all rows
together, of some only, or at a threshold of each client's own."""


Sample = dict[str, str]
"""What a model answered to one row, beside what it was given and what was expected."""


@dataclass(frozen=True)
class Evaluation:
    """How a model does on some examples.

    Attributes:
        loss: mean over the examples.
        metrics: by name, the task's main one first.
    """

    loss: float
    metrics: Mapping[str, float]
    num_examples: int


class Task(Protocol):
    """What a model is finetuned for."""

    def batch(self, examples: Examples, rows: Sequence[int]) -> Batch:
        """Some rows, padded to the longest among them."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows,) the loss of each row, in float32 at least."""
        ...

    def evaluate(self, model: nn.Module, examples: Examples, rows: Sequence[int], batch_size: int) -> Evaluation:
        """Loss and metrics of some rows."""
        ...


@runtime_checkable
class TokenTask(Protocol):
    """A task whose loss sits on many tokens of a causal model."""

    def token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, tokens) what each row's loss is the sum of; a token's part depends on the tokens up to it alone."""
        ...


@runtime_checkable
class Answers(Protocol):
    """A task whose answers are worth reading."""

    def samples(self, model: nn.Module, examples: Examples, rows: Sequence[int]) -> list[Sample]:
        """The model's answers to some rows."""
        ...


class Classifier(Protocol):
    """A task whose model gives one score a class."""

    def batch(self, examples: Examples, rows: Sequence[int]) -> Batch: ...

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, classes), in float32 at least."""
        ...

    def evaluate(self, model: nn.Module, examples: Examples, rows: Sequence[int], batch_size: int) -> Evaluation: ...


def evaluate_classes(
    task: Classifier, model: nn.Module, examples: Examples, rows: Sequence[int], batch_size: int
) -> Evaluation:
    """Mean cross-entropy and accuracy; of two classes the F1 of class 1 too, and where rows are grouped by question,
    what is right of whole ones among these rows.
    """
    losses, predicted = [], []  # on the device: a question a batch would have it wait
    parts = longest_first_batches(examples, rows, batch_size)
    with torch.inference_mode():
        for part in parts:
            batch = task.batch(examples, part)
            logits = task.logits(model, batch)
            losses.append(nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
            predicted.append(logits.argmax(-1))
    total_loss = sum(torch.stack(losses).tolist())
    order = np.concatenate(parts)
    answers, right = torch.cat(predicted).cpu().numpy(), examples.labels[order]
    metrics = {"accuracy": float((answers == right).mean())}
    if logits.shape[-1] == 2:
        metrics["f1"] = binary_f1(answers, right)
        if examples.groups is not None:
            metrics |= question_scores(answers, right, examples.groups[order])
    return Evaluation(total_loss / len(rows), metrics, len(rows))


def longest_first_batches(examples: Examples, rows: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows in batches of like length, so that little is padded; the longest first."""
    lengths = [-len(examples.encodings[row]["input_ids"]) for row in rows]
    order = np.asarray(rows)[np.argsort(lengths, kind="stable")]
    return [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]
