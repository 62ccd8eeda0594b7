"""Prompted classification: a text inside a template, told apart by the word a decoder would go on with.

Each class has a label word. Of a prompt that is

    x = template(text),    z_c = the model's logit, after x, of the first token of class c's word,

the loss is cross-entropy of z over the classes, so a softmax restricted to the label words: the rest of the
vocabulary is neither computed nor trained away. The prediction is the largest z_c, and before any training it is
the model's zero-shot answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from spryfl.config import DataConfig, TaskConfig
from spryfl.data.classification import token_limit
from spryfl.data.examples import Batch, Examples, inputs_of
from spryfl.data.task import Evaluation, evaluate_classes
from spryfl.errors import DataError
from spryfl.forward_mode.next_token import next_token_logits

SAMPLE = "x"  # stands for a text where only the template matters


@dataclass(frozen=True)
class Prompts:
    """A template and the tokenizer it is read with."""

    task: TaskConfig
    columns: tuple[str, ...]
    tokenizer: Any

    def render(self, texts: Sequence[str]) -> str:
        """The prompt of one row's texts, one a column."""
        by_column = dict(zip(self.columns, texts, strict=True))
        pieces = self.task.pieces or (("", self.columns[0]),)
        return "".join(literal + ("" if column is None else by_column[column]) for literal, column in pieces)

    def require_room(self, limit: int) -> None:
        """Raise DataError if the template alone takes all of `limit` tokens."""
        (alone,) = self.encode([self.render([""] * len(self.columns))])
        if len(alone) >= limit:
            raise DataError(
                f"data.max_tokens = {limit}: the template alone takes {len(alone)} tokens, which leaves none to the "
                "text; raise it, or shorten task.template"
            )

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole prompts. What a tokenizer appends (BERT's [SEP]) would come between prompt and word."""
        encoded = self.tokenizer(list(prompts), return_special_tokens_mask=True)
        found = []
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            end = len(ids)
            while end and special[end - 1]:
                end -= 1
            found.append(ids[:end])
        return found

    def within(self, texts: Sequence[str], ids: list[int], limit: int) -> tuple[list[str], list[int]]:
        """A prompt in at most `limit` tokens, cut in its texts, longest first: the template survives whole.

        Args:
            texts: one a column.
            ids: of their prompt.

        Returns:
            The texts as cut, and the token ids of their prompt.
        """
        texts = list(texts)
        while len(ids) > limit:
            spans = [self._spans(text) for text in texts]
            kept = longest_first([len(s) for s in spans], len(ids) - limit)
            texts = [t[: s[n][0]] if n < len(s) else t for t, s, n in zip(texts, spans, kept, strict=True)]
            (ids,) = self.encode([self.render(texts)])  # tokens merge across a cut, so count again
        return texts, ids

    def words(self) -> list[int]:
        """The first token of each label word, as the tokenizer reads it after the template.

        Raises:
            DataError: two words begin with the same token, or one has none of its own.
        """
        words = self.task.label_words or ()
        stem = self.render([SAMPLE] * len(self.columns))
        first, *whole = self.encode([stem, *(stem + word for word in words)])
        found: dict[int, str] = {}
        for word, ids in zip(words, whole, strict=True):
            if ids[: len(first)] != first or len(ids) == len(first):
                raise DataError(
                    f"task.label_words: {word!r} gets no token of its own after the template's end {stem[-12:]!r}: put "
                    "the space between them at the word's beginning, not at the template's end"
                )
            token = ids[len(first)]
            if token == self.tokenizer.unk_token_id:
                raise DataError(
                    f"task.label_words: the model's vocabulary has no token for {word!r}: take another word"
                )
            if token in found:
                raise DataError(
                    f"task.label_words: {found[token]!r} and {word!r} both begin with the token "
                    f"{self.tokenizer.decode([token])!r}, so they cannot be told apart: take words that begin otherwise"
                )
            found[token] = word
        return list(found)

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where each token of a text begins and ends."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["offset_mapping"])


@dataclass(frozen=True)
class PromptedClassification:
    """The task of predicting a class by the label word that follows a prompt.

    Attributes:
        words: (classes,) token ids.
        pad: the padding token's id.
        positions: whether the model is told positions.
        device: where batches go.
    """

    words: Tensor
    pad: int
    positions: bool
    device: torch.device

    def batch(self, examples: Examples, rows: Sequence[int]) -> Batch:
        """Pad some rows on the left to the longest among them, so that every prompt ends at the last position."""
        prompts = [examples.encodings[i]["input_ids"] for i in rows]
        ids = torch.full((len(prompts), max(map(len, prompts))), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt) :] = torch.as_tensor(prompt)
            mask[row, -len(prompt) :] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.positions:
            batch["position_ids"] = positions_of(mask)
        batch["labels"] = torch.as_tensor(examples.labels[list(rows)])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows,) the cross-entropy of each row, in float32 at least."""
        return nn.functional.cross_entropy(self.logits(model, batch), batch["labels"], reduction="none")

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, classes): the label words' logits at each prompt's end, in float32 at least."""
        logits = next_token_logits(model, inputs_of(batch), self.words)
        return logits if logits.dtype == torch.float64 else logits.float()

    def evaluate(self, model: nn.Module, examples: Examples, rows: Sequence[int], batch_size: int) -> Evaluation:
        """See `Task.evaluate`."""
        return evaluate_classes(self, model, examples, rows, batch_size)


def positions_of(mask: Tensor) -> Tensor:
    """The position of each token in its own text; 0 for padding on the left."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def longest_first(lengths: Sequence[int], excess: int) -> list[int]:
    """How much of each length is kept once `excess` in all is taken from whichever is longest at the time."""
    kept = list(lengths)
    for _ in range(min(excess, sum(kept))):
        kept[int(np.argmax(kept))] -= 1
    return kept


def label_tokens(config: DataConfig, task: TaskConfig, tokenizer: Any, label_names: Sequence[str]) -> list[int]:
    """The token that stands for each class.

    Raises:
        DataError: not one word a class, or words that cannot be told apart.
    """
    words = task.label_words or ()
    if len(words) != len(label_names):
        raise DataError(
            f"task.label_words: {len(words)} words for {len(label_names)} classes; give one for each of "
            f"{list(label_names)}, in this order"
        )
    return Prompts(task, config.text_columns, tokenizer).words()


def tokenize_prompts(rows: Dataset, config: DataConfig, task: TaskConfig, tokenizer: Any) -> Examples:
    """Token ids of every row's prompt, its texts truncated so that the prompt has at most `max_tokens`.

    Raises:
        DataError: `max_tokens` exceeds what the model can read, or leaves no room beside the template.
    """
    limit = token_limit(config, tokenizer)
    prompts = Prompts(task, config.text_columns, tokenizer)
    prompts.require_room(limit)
    texts = list(zip(*(rows[column][:] for column in config.text_columns), strict=True))
    encoded = prompts.encode([prompts.render(row) for row in texts])
    fitted = [prompts.within(row, ids, limit)[1] for row, ids in zip(texts, encoded, strict=True)]
    labels = np.asarray(rows[config.label_column][:], dtype=np.int64)
    num_truncated = sum(len(ids) > limit for ids in encoded)
    return Examples([{"input_ids": ids} for ids in fitted], labels, num_truncated=num_truncated)
