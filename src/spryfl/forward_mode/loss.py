"""Cross-entropy of a language model's head without a (tokens x vocabulary) matrix.

    L = mean_t [log sum_j exp(w_j h_t) - w_{y_t} h_t]
    L' = mean_t [sum_j p_tj w_j h'_t - w_{y_t} h'_t],    p_t = softmax(W h_t)

Logits exist for some tokens at a time; only the tokens that carry a label are looked at.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spryfl.forward_mode.budget import FEED_FORWARD_SHARE, chunk_bytes
from spryfl.forward_mode.dual import Dual, num_tangents
from spryfl.forward_mode.operators import linear

IGNORED = -100  # the label of a token without a loss, as in transformers
WIDE_TENSORS = 2  # of vocabulary width alive at a time: the logits, and their exponentials


def head_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the labelled tokens, in chunks of tokens that fit the byte budget.

    Args:
        hidden: (.., hidden size): the head's input, maybe a dual; already shifted, so that token t's hidden
            state predicts label t.
        weight: (vocabulary, hidden size), maybe a dual.
        labels: (..); `IGNORED` where there is no loss.
        bias: (vocabulary,).

    Returns:
        A scalar in float32 at least; a dual if anything carries tangents. Differentiable by autograd too,
        with one chunk's logits at a time.
    """
    flat = labels.reshape(-1)
    kept = (flat != IGNORED).nonzero().squeeze(-1)
    tokens, targets = hidden.reshape(-1, hidden.shape[-1])[kept], flat[kept]
    k = num_tangents(hidden, weight, bias)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    step = max(1, chunk_bytes(FEED_FORWARD_SHARE) // (WIDE_TENSORS * (1 + k) * weight.shape[0] * wide.itemsize))
    total: Tensor | None = None
    for start in range(0, len(targets), step):
        part, label = tokens[start : start + step], targets[start : start + step]
        if torch.is_grad_enabled():
            loss = checkpoint(_chunk_loss, part, weight, bias, label, use_reentrant=False)
        else:
            loss = _chunk_loss(part, weight, bias, label)
        total = loss if total is None else total + loss
    if total is None:
        raise ValueError("no token carries a label, so there is no loss: every text was truncated before its answer")
    return total / len(targets)


def _chunk_loss(tokens: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Summed cross-entropy of a chunk of tokens (chunk, hidden size)."""
    logits = linear(tokens, weight, bias)
    wide = torch.promote_types(logits.dtype, torch.float32)
    if not isinstance(logits, Dual):
        return nn.functional.cross_entropy(logits.to(wide), labels, reduction="sum")
    primal = logits.stacked[0].to(wide)
    stack = primal.new_empty(logits.stacked.shape[0])
    stack[0] = nn.functional.cross_entropy(primal, labels, reduction="sum")
    error = torch.softmax(primal, -1)
    error[torch.arange(len(labels), device=labels.device), labels] -= 1  # dL/dlogits
    for k in range(1, len(stack)):
        stack[k] = (error * logits.stacked[k]).sum()
    return Dual(stack)
