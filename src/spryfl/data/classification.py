"""Sequence and pair classification: texts to token ids, batches to losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import BatchEncoding, DataCollatorWithPadding

from spryfl.config import DataConfig
from spryfl.data.examples import Batch, Examples, inputs_of, numbered
from spryfl.data.task import Evaluation, evaluate_classes
from spryfl.errors import DataError


@dataclass(frozen=True)
class Classification:
    """The task of predicting one label for a text or a pair of texts.

    Attributes:
        collator: pads the rows of a batch to its longest.
        device: where batches go.
    """

    collator: DataCollatorWithPadding
    device: torch.device

    def batch(self, examples: Examples, rows: Sequence[int]) -> Batch:
        """Pad some rows to the longest among them."""
        padded = self.collator([examples.encodings[i] for i in rows])
        batch = {name: tensor.to(self.device) for name, tensor in padded.items()}
        batch["labels"] = torch.as_tensor(examples.labels[list(rows)], device=self.device)
        return batch

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows,) the cross-entropy of each row, in float32 at least."""
        return nn.functional.cross_entropy(self.logits(model, batch), batch["labels"], reduction="none")

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, labels), in float32 at least."""
        logits = model(**inputs_of(batch)).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def evaluate(self, model: nn.Module, examples: Examples, rows: Sequence[int], batch_size: int) -> Evaluation:
        """See `Task.evaluate`."""
        return evaluate_classes(self, model, examples, rows, batch_size)


def tokenize(rows: Dataset, config: DataConfig, tokenizer: Any) -> Examples:
    """Token ids of every row, truncated to `max_tokens`: the longer text of a pair first.

    Of three texts (a paragraph, a question, an answer to judge) the second and third make one, the tokenizer's
    separator between them, and the first alone is cut, as what it is asked for must be read whole. Where those two
    leave no room for any of the first, the longer side is cut as in pairs. Rows that differ in the third alone are one
    group.

    Raises:
        DataError: `max_tokens` exceeds what the model can read or leaves no room for text, or a row has no token.
    """
    limit = token_limit(config, tokenizer)
    special = tokenizer.num_special_tokens_to_add(pair=len(config.text_columns) > 1)
    if limit <= special:  # tokenizers do not truncate then
        raise DataError(
            f"data.max_tokens = {limit}: the tokenizer puts {special} tokens around a text: set {special + 1} at least"
        )
    texts = [list(rows[column]) for column in config.text_columns]
    groups = numbered(zip(texts[0], texts[1], strict=True)) if len(texts) == 3 else None
    if len(texts) == 3:
        encoded = _cut_first(texts[0], _joined(texts[1], texts[2], tokenizer), limit, tokenizer)
        encodings = [dict(row) for row in encoded]
    else:
        encoded = [tokenizer(*texts, truncation=True, max_length=limit)]
        names, columns = encoded[0].keys(), encoded[0].values()
        encodings = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    empty = sum(not encoding["input_ids"] for encoding in encodings)
    if empty:  # by a decoder's tokenizer, which puts nothing around a text
        raise DataError(
            f"data.text_columns: {empty} of {len(rows)} rows are empty, and this model's tokenizer makes no token of "
            "them: drop them"
        )
    labels = np.asarray(rows[config.label_column][:], dtype=np.int64)
    return Examples(encodings, labels, groups=groups, num_truncated=sum(map(_num_truncated, encoded)))


def _joined(seconds: Sequence[str], thirds: Sequence[str], tokenizer: Any) -> list[str]:
    separator = "\n" if tokenizer.sep_token is None else f" {tokenizer.sep_token} "
    return [f"{second}{separator}{third}" for second, third in zip(seconds, thirds, strict=True)]


def _cut_first(firsts: list[str], seconds: list[str], limit: int, tokenizer: Any) -> list[BatchEncoding]:
    """Encoded pairs of at most `limit` tokens, the first text cut where the second leaves it any room."""
    taken = tokenizer.num_special_tokens_to_add(pair=True)
    lengths = [len(ids) + taken for ids in tokenizer(seconds, add_special_tokens=False)["input_ids"]]
    return [
        tokenizer(first, second, truncation="only_first" if length < limit else "longest_first", max_length=limit)
        for first, second, length in zip(firsts, seconds, lengths, strict=True)
    ]


def _num_truncated(encoded: BatchEncoding) -> int:
    """Of how many rows some was left out; slow tokenizers, which transformers has hardly any of left, tell none."""
    return sum(bool(row.overflowing) for row in encoded.encodings or ())


def token_limit(config: DataConfig, tokenizer: Any) -> int:
    """`max_tokens`, which the model can read.

    Raises:
        DataError: it cannot.
    """
    limit = tokenizer.model_max_length
    if config.max_tokens > limit:
        raise DataError(f"data.max_tokens = {config.max_tokens}: the model reads at most {limit} tokens: lower it")
    return config.max_tokens
