"""Cross-entropy of a language model's head without a (tokens x vocabulary) matrix.

    L_i = sum_t a_it [log sum_j exp(w_j h_t) - w_{y_t} h_t]
    L_i' = sum_t a_it [sum_j p_tj w_j h'_t - w_{y_t} h'_t],    p_t = softmax(W h_t)

a_it is the share of token t in the loss of row i. Logits exist for some tokens at a time, and only for the tokens
that carry a label. So the model is run with a head that passes its input on, and the head is asked afterwards.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spryfl.errors import ModelError
from spryfl.forward_mode.budget import FEED_FORWARD_SHARE, chunk_bytes, each, is_dry, tangents_in_flight
from spryfl.forward_mode.dual import Dual, num_tangents, split
from spryfl.forward_mode.operators import linear
from spryfl.forward_mode.patching import patched_forwards

IGNORED = -100  # the label of a token without a loss, as in transformers
NO_LABELS = "no token carries a label, so there is no loss: every text was truncated before its answer"
WIDE_TENSORS = 2  # of vocabulary width alive at a time: the logits, and their exponentials

Head = Callable[[Tensor], Tensor]
"""(tokens, hidden size) -> (tokens, vocabulary)."""


def row_losses(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Each row's mean cross-entropy over its labelled tokens, each predicted from the tokens before it.

    Args:
        model: of transformers, with a language-model head that is the last thing it does (`require_bare_logits`).
        inputs: input_ids, attention_mask, ..: (rows, tokens).
        labels: (rows, tokens): the token's id, or `IGNORED`; the first is never predicted.

    Returns:
        (rows,) in float32 at least, a dual if anything carries tangents. Differentiable by autograd too, with one
        chunk's logits at a time.

    Raises:
        ValueError: no token carries a label.
    """
    rows, _, hidden, targets = _labelled(model, inputs, labels)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shares = (rows == torch.arange(labels.shape[0], device=rows.device).unsqueeze(-1)).to(wide)
    shares /= shares.sum(-1, keepdim=True).clamp(min=1)
    return head_cross_entropy(*_head(model, hidden.dtype), hidden, targets, shares)


def token_losses(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """What each row's loss (`row_losses`) is the sum of: a part for each token, of what it says of the next one.

    Args:
        model, inputs, labels: as in `row_losses`.

    Returns:
        (rows, tokens), zero where the next token carries no label; a dual if anything carries tangents.

    Raises:
        ValueError: no token carries a label.
    """
    rows, places, hidden, targets = _labelled(model, inputs, labels)
    head, num_words = _head(model, hidden.dtype)
    found = [_token_losses(head, hidden[chunk], targets[chunk]) for chunk in _chunks(hidden, num_words)]
    if not found:
        raise ValueError(NO_LABELS)
    stack = torch.cat([part.stacked if isinstance(part, Dual) else part.unsqueeze(0) for part in found], -1)
    spread = stack.new_zeros((len(stack), *labels.shape))
    spread[:, rows, places] = stack / torch.bincount(rows)[rows]
    return Dual(spread) if isinstance(found[0], Dual) else spread[0]


def token_scores(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without derivatives, of every labelled token: its row, its cross-entropy, and whether it is the likeliest.

    Args:
        model, inputs, labels: as in `row_losses`.

    Returns:
        (labelled tokens,) each.
    """
    rows, _, hidden, targets = _labelled(model, inputs, labels)
    head, num_words = _head(model, hidden.dtype)
    losses, right = [], []
    for chunk in _chunks(hidden, num_words):
        logits = head(hidden[chunk])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(nn.functional.cross_entropy(wide, targets[chunk], reduction="none"))
        right.append(wide.argmax(-1) == targets[chunk])
    return rows, torch.cat(losses), torch.cat(right)


def head_cross_entropy(head: Head, num_words: int, hidden: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """Weighted sums of tokens' cross-entropies, in chunks of tokens that fit the byte budget.

    Args:
        num_words: the head's outputs, the vocabulary's size.
        hidden: (tokens, hidden size): the head's input, maybe a dual; token t's hidden state predicts label t.
        labels: (tokens,).
        shares: (rows, tokens): a token's weight in each row's sum.

    Returns:
        (rows,), as `row_losses`.
    """
    total: Tensor | None = None
    for chunk in each(_chunks(hidden, num_words)):
        part, label, share = hidden[chunk], labels[chunk], shares[:, chunk]
        if torch.is_grad_enabled():
            loss = checkpoint(_chunk_loss, head, part, label, share, use_reentrant=False)
        else:
            loss = _chunk_loss(head, part, label, share)
        total = loss if total is None else total + loss
    if total is None:
        raise ValueError(NO_LABELS)
    return total


def require_bare_logits(model: nn.Module, name: str) -> None:
    """Raise ModelError if a model does more than apply its head: then its logits cannot be made in chunks.

    Gemma 2 caps them, Cohere and Granite scale them. A pass over two tokens tells, one of which may be
    padding, whose embedding is zero.
    """
    made: list[Tensor] = []
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_hook(lambda module, args, output: made.append(output.detach().float().clone()))
    try:
        ids = torch.arange(2, device=next(model.parameters()).device).unsqueeze(0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    finally:
        handle.remove()
    if not made or not torch.equal(made[-1], logits.float()):
        raise ModelError(
            f"task.kind = 'language_model': {name} changes its logits after its head, which is not supported: take a "
            "model such as builtin:smollm2, or task.kind = 'prompted'"
        )


def _labelled(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each token that carries a label: its row, the place before it, the hidden state there, its label."""
    targets = labels[:, 1:]
    if is_dry():  # without data to ask, all of them
        rows, places = (grid.flatten() for grid in torch.meshgrid(*map(torch.arange, targets.shape), indexing="ij"))
    else:
        rows, places = (targets != IGNORED).nonzero(as_tuple=True)
    head = model.get_output_embeddings()  # type: ignore[operator]
    with patched_forwards([head], lambda module, forward: lambda hidden: hidden):
        hidden = model(**inputs).logits
    return rows, places, hidden[rows, places], targets[rows, places]


def _head(model: nn.Module, dtype: torch.dtype) -> tuple[Head, int]:
    """The model's head and the size of its vocabulary."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear:
        return head, head.out_features
    # A head tied to an embedding table on disk has the table's type.
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    return lambda hidden: linear(hidden, weight, bias), head.out_features


def _chunks(hidden: Tensor, num_words: int) -> Iterator[slice]:
    """Slices of the tokens, each with no more logits than the budget has room for."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    k = max(num_tangents(hidden), tangents_in_flight())  # an adapted head carries them even where its input has none
    token_bytes = WIDE_TENSORS * (1 + k) * num_words * wide.itemsize
    step = max(1, chunk_bytes(FEED_FORWARD_SHARE) // token_bytes)
    for start in range(0, hidden.shape[0], step):
        yield slice(start, start + step)


def _chunk_loss(head: Head, tokens: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """(rows,) weighted sums of the cross-entropies of a chunk of tokens (chunk, hidden size)."""
    losses = _token_losses(head, tokens, labels)
    return Dual(losses.stacked @ shares.T) if isinstance(losses, Dual) else shares @ losses


def _token_losses(head: Head, tokens: Tensor, labels: Tensor) -> Tensor:
    """(chunk,) the cross-entropies of a chunk of tokens (chunk, hidden size), a dual if there are tangents."""
    primal, tangents = split(head(tokens))
    primal = primal.to(torch.promote_types(primal.dtype, torch.float32))
    losses = nn.functional.cross_entropy(primal, labels, reduction="none")
    if tangents is None:
        return losses
    stack = losses.new_empty((1 + tangents.shape[0], len(labels)))
    stack[0] = losses
    error = torch.softmax(primal, -1)
    error[torch.arange(len(labels), device=labels.device), labels] -= 1  # dL/dlogits
    for k, tangent in enumerate(tangents, 1):
        stack[k] = (error * tangent).sum(-1)
    return Dual(stack)
