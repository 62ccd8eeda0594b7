"""What a language model says of a few tokens after a prompt, without logits of any other.

The head's forward is replaced by those of its rows; what the model does to logits afterwards (Gemma 2's soft
capping, Cohere's and Granite's scales) is element-wise, so it stays the model's own. Of a head as large as
Llama's, or one that lies on disk, the rows are all that is read.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn

from spryfl.forward_mode.operators import linear
from spryfl.forward_mode.patching import Forward, patched_forwards


def next_token_logits(model: nn.Module, inputs: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of some tokens after the last position of each row, so padding must be on the left.

    Args:
        model: of transformers, with a language-model head; its adapters may carry tangents.
        inputs: input_ids, attention_mask, ..: (rows, positions).
        tokens: (number of tokens,) ids.

    Returns:
        (rows, number of tokens), a dual if anything carries tangents.
    """
    with head_rows(model, tokens) as narrowed:
        logits: Tensor = model(**inputs, logits_to_keep=1).logits[:, -1]
    return logits if narrowed else logits[:, tokens]


def takes_positions(model: nn.Module) -> bool:
    """Whether a model is to be told positions; others find them from the mask, or need none."""
    return "position_ids" in signature(model.forward).parameters


@contextmanager
def head_rows(model: nn.Module, tokens: Tensor) -> Iterator[bool]:
    """Let a model's head compute some rows only; whether it does: not if it is adapted, or there is none."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if type(head) is not nn.Linear:
        yield False
        return
    with patched_forwards([head], lambda module, forward: _rows_of(module, tokens)):
        yield True


def _rows_of(head: Any, tokens: Tensor) -> Forward:
    def forward(hidden: Tensor) -> Tensor:
        # A head tied to an embedding table on disk has the table's type.
        weight = head.weight[tokens].to(hidden.dtype)
        return linear(hidden, weight, None if head.bias is None else head.bias[tokens].to(hidden.dtype))

    return forward
