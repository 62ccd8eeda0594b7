"""Language modelling and instruction tuning: a decoder learns to write a text, or an answer after a prompt.

Of a row's tokens x_1 .. x_n, of which the text to be written begins at x_b,

    L = -1 / (n - b + 1) sum_{t = b..n} log p(x_t | x_1 .. x_{t-1})

What stands before it in the template is read, not learnt. Perplexity is exp of the mean of -log p over all written
tokens of all rows, so long rows count for more there than in the loss. Where the tokenizer has an end-of-text token,
a text that was not cut ends with it and it counts as one more token. A text without a prompt, of a tokenizer without
a beginning-of-text token, counts from its second token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import GenerationConfig

from spryfl.config import DataConfig, TaskConfig
from spryfl.data.classification import token_limit
from spryfl.data.examples import Batch, Examples, inputs_of
from spryfl.data.prompted import Prompts
from spryfl.data.task import Evaluation, Sample, longest_first_batches
from spryfl.errors import DataError
from spryfl.forward_mode.loss import IGNORED, row_losses, token_losses, token_scores

SAMPLE_TOKENS = 32  # written for a sample
OPENING_TOKENS = 8  # of a text without a prompt, from which a sample goes on


@dataclass(frozen=True)
class LanguageModel:
    """The task of writing a text, or an answer after a prompt.

    Attributes:
        tokenizer: of the model; it has a padding token.
        device: where batches go.
    """

    tokenizer: Any
    device: torch.device

    def batch(self, examples: Examples, rows: Sequence[int]) -> Batch:
        """Pad some rows on the right; "labels" are the ids of tokens to be written, `IGNORED` elsewhere."""
        texts = [examples.encodings[row]["input_ids"] for row in rows]
        ids = torch.full((len(texts), max(map(len, texts))), self.tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
            ids[place, : len(text)] = torch.as_tensor(text)
            mask[place, : len(text)] = 1
            begin = int(examples.labels[row])
            labels[place, begin : len(text)] = ids[place, begin : len(text)]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows,) the mean cross-entropy of each row's written tokens, in float32 at least."""
        return row_losses(model, inputs_of(batch), batch["labels"])

    def token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, tokens) what each row's loss is the sum of, at the token that predicts."""
        return token_losses(model, inputs_of(batch), batch["labels"])

    def evaluate(self, model: nn.Module, examples: Examples, rows: Sequence[int], batch_size: int) -> Evaluation:
        """See `Task.evaluate`."""
        loss = total = right = num_tokens = 0.0
        with torch.inference_mode():
            for part in longest_first_batches(examples, rows, batch_size):
                batch = self.batch(examples, part)
                scores = token_scores(model, inputs_of(batch), batch["labels"])
                row_of, losses, likeliest = (tensor.cpu() for tensor in scores)  # not all devices have float64
                counts = torch.bincount(row_of, minlength=len(part))
                loss += float((losses.double() / counts[row_of]).sum())
                total += float(losses.double().sum())
                right += int(likeliest.sum())
                num_tokens += len(losses)
        perplexity = float(torch.tensor(total / num_tokens, dtype=torch.float64).exp())  # infinite, not an error
        metrics = {"perplexity": perplexity, "token_accuracy": right / num_tokens}
        return Evaluation(loss / len(rows), metrics, len(rows))

    def samples(self, model: nn.Module, examples: Examples, rows: Sequence[int]) -> list[Sample]:
        """What the model writes after some rows' prompts, the likeliest token each time."""
        return [self._sample(model, examples.encodings[row]["input_ids"], int(examples.labels[row])) for row in rows]

    def _sample(self, model: Any, ids: list[int], begin: int) -> Sample:
        begin = begin if begin > 1 else min(OPENING_TOKENS, len(ids) - 1)
        given = torch.tensor([ids[:begin]], device=self.device)
        settings = GenerationConfig(
            max_new_tokens=min(SAMPLE_TOKENS, self.tokenizer.model_max_length - begin),  # what the model can read
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        with torch.inference_mode():
            output = model.generate(input_ids=given, attention_mask=torch.ones_like(given), generation_config=settings)
        parts = {"prompt": ids[:begin], "written": output[0, begin:].tolist(), "expected": ids[begin:]}
        return {name: self.tokenizer.decode(part, skip_special_tokens=True) for name, part in parts.items()}


def tokenize_texts(rows: Dataset, config: DataConfig, task: TaskConfig, tokenizer: Any) -> Examples:
    """Token ids of every row's template, cut to `max_tokens` in its texts, longest first; labels: where to begin.

    Raises:
        DataError: `max_tokens` exceeds what the model can read, or leaves a row no token to be written.
    """
    limit, prompts = token_limit(config, tokenizer), Prompts(task, config.text_columns, tokenizer)
    prompts.require_room(limit)
    written = config.text_columns.index(task.written_column or config.text_columns[0])
    given = list(zip(*(rows[column][:] for column in config.text_columns), strict=True))
    whole = prompts.encode([prompts.render(texts) for texts in given])
    encodings, begins = [], []
    for texts, ids in zip(given, whole, strict=True):
        cut, kept = prompts.within(texts, ids, limit)
        begin = _begin(prompts, cut, written)
        if len(kept) < limit and cut == list(texts) and tokenizer.eos_token_id is not None:
            kept.append(tokenizer.eos_token_id)
        if begin >= len(kept):
            raise DataError(
                f"data.max_tokens = {limit}: the row whose column '{config.text_columns[written]}' is "
                f"{texts[written][:40]!r} has no token left of it, which is to be written: raise it, shorten "
                "task.template, or drop the row"
            )
        encodings.append({"input_ids": kept})
        begins.append(begin)
    num_truncated = sum(len(ids) > limit for ids in whole)
    return Examples(encodings, np.asarray(begins, dtype=np.int64), num_truncated=num_truncated)


def _begin(prompts: Prompts, texts: Sequence[str], written: int) -> int:
    """The first token that holds something of the text to be written; 1 at least, as a token before it is needed."""
    before = prompts.render([text if place != written else "" for place, text in enumerate(texts)])
    encoded = prompts.tokenizer(
        prompts.render(texts), return_offsets_mapping=True, return_special_tokens_mask=True, truncation=False
    )
    spans = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    own = [place for place, ((_, end), special) in enumerate(spans) if not special and end > len(before)]
    return max(1, own[0]) if own else len(encoded["input_ids"])
