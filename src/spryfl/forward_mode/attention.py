"""Attention's jvp in blocks, as a transformers attention implementation.

PyTorch's fused attention has no forward derivative, and the eager one keeps every (queries x keys)
matrix several times over. Here a block of queries is carried to its output before the next begins:

    S = c q k^T,  P = softmax(S),  o = P v
    S' = c (q' k^T + q k'^T),  D = P * S',  o' = P v' + D v - rowsum(D) o

Without tangents the call goes to PyTorch's fused kernels, so inference and backprop run on those.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spryfl.forward_mode.dual import pack, unpack

ATTENTION_NAME = "spry"
BLOCK_BYTES = 8 * 2**20  # of scores and their tangents alive at a time; near a core's share of cache


def register_attention() -> None:
    """Make `attn_implementation="spry"` known to transformers; may be called again.

    The mask function is registered too: without it transformers passes no mask at all and padding is
    silently attended to.
    """
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature transformers expects.

    Args:
        module: the attention module; read for `is_causal`.
        query: (batch, heads, queries, head size).
        key, value: (batch, key heads, keys, head size); key heads divide heads.
        attention_mask: broadcasts to (batch, 1, queries, keys); True or 0 where attended.
        dropout: must be 0 where a tangent flows: base models run in evaluation mode.
        scaling: c; 1 / sqrt(head size) by default.
        is_causal: overrides the module's own.

    Returns:
        (batch, queries, heads, head size), and no attention weights.
    """
    (q, q_tangent), (k, k_tangent), (v, v_tangent) = unpack(query), unpack(key), unpack(value)
    if q_tangent is None and k_tangent is None and v_tangent is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if dropout:
        raise NotImplementedError("attention dropout under forward mode: put the base model in evaluation mode")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    primal, tangent = attention_jvp(
        (q, k, v),
        (q_tangent, k_tangent, v_tangent),
        mask=attention_mask,
        causal=bool(causal) and attention_mask is None and query.shape[2] > 1,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return pack(primal, tangent), None


def attention_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Output and output tangent of attention, block by block.

    Args:
        primals: query (batch, heads, queries, head size), key and value (batch, key heads, keys, head
            size): query heads come in `heads / key heads` groups over each key head.
        tangents: of the same shapes, None for zero; at least one is not None.
        mask: broadcasts to (batch, 1, queries, keys): bool (True: attended) or added to the scores.
        causal: query i attends to keys up to i.
        scaling: c.
        block_bytes: bound on the scores and score tangents alive at a time.

    Returns:
        Two contiguous tensors (batch, queries, heads, head size).
    """
    query, key, value = primals
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    groups = heads // key_heads
    output = query.new_empty(batch, queries, heads, value.shape[-1])
    output_tangent = torch.empty_like(output)
    # Three float32 score-sized tensors at the widest: P, S' and one term of it.
    row_bytes = 3 * 4 * groups * keys
    for b, h, rows in _blocks(batch, key_heads, queries, row_bytes, block_bytes):
        q_heads = slice(h.start * groups, h.stop * groups)
        query_tangent, key_tangent, value_tangent = tangents
        block, block_tangent = _block_jvp(
            (_grouped(query[b, q_heads, rows], groups), key[b, h], value[b, h]),
            (
                None if query_tangent is None else _grouped(query_tangent[b, q_heads, rows], groups),
                None if key_tangent is None else key_tangent[b, h],
                None if value_tangent is None else value_tangent[b, h],
            ),
            _block_mask(mask, causal, b, rows, keys, query.device),
            scaling,
            groups,
        )
        for target, source in ((output, block), (output_tangent, block_tangent)):
            shaped = source.view(source.shape[0], -1, rows.stop - rows.start, source.shape[-1])
            target[b, rows, q_heads] = shaped.transpose(1, 2)
    return output, output_tangent


def _grouped(query: Tensor, groups: int) -> Tensor:
    """(b, heads, rows, d) -> (b, key heads, groups * rows, d): one product serves a key head's whole group."""
    return query.reshape(query.shape[0], -1, groups * query.shape[2], query.shape[3])


def _block_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    mask: Tensor | None,
    scaling: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """One block: query (b, h, groups * rows, d), key and value (b, h, keys, d), mask (b, 1, rows, keys)."""
    query, key, value = primals
    query_tangent, key_tangent, value_tangent = tangents
    probabilities = _softmax(torch.matmul(query * scaling, key.transpose(-1, -2)), mask, groups)
    output = torch.matmul(probabilities.to(value.dtype), value)
    tangent = torch.zeros_like(output)
    if value_tangent is not None:
        tangent += torch.matmul(probabilities.to(value.dtype), value_tangent)
    if query_tangent is not None or key_tangent is not None:
        weighted = _score_tangent(query, key, query_tangent, key_tangent, scaling)
        weighted = weighted.to(probabilities.dtype).mul_(probabilities)  # D = P * S'
        del probabilities
        tangent += torch.matmul(weighted.to(value.dtype), value)
        tangent -= weighted.sum(-1, keepdim=True).to(output.dtype) * output
    return output, tangent


def _score_tangent(
    query: Tensor, key: Tensor, query_tangent: Tensor | None, key_tangent: Tensor | None, scaling: float
) -> Tensor:
    """S' = c (q' k^T + q k'^T); where both flow, as one product over the doubled head size."""
    if key_tangent is None:
        assert query_tangent is not None
        return torch.matmul(query_tangent * scaling, key.transpose(-1, -2))
    if query_tangent is None:
        return torch.matmul(query * scaling, key_tangent.transpose(-1, -2))
    left = torch.cat((query_tangent, query), -1).mul_(scaling)
    return torch.matmul(left, torch.cat((key, key_tangent), -1).transpose(-1, -2))


def _softmax(scores: Tensor, mask: Tensor | None, groups: int) -> Tensor:
    """Masked softmax over keys, in float32 at least; overwrites the scores."""
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if mask is not None:
        by_group = scores.view(scores.shape[0], -1, groups, mask.shape[-2], scores.shape[-1])
        if mask.dtype == torch.bool:
            # The lowest finite number, not -inf: a row that attends to nothing must not become NaN.
            by_group.masked_fill_(~mask.unsqueeze(2), torch.finfo(scores.dtype).min)
        else:
            by_group.add_(mask.unsqueeze(2))
    return torch.softmax(scores, -1)


def _block_mask(
    mask: Tensor | None, causal: bool, b: slice, rows: slice, keys: int, device: torch.device
) -> Tensor | None:
    """The mask of one block: (b or 1, 1, rows, keys)."""
    if causal:
        row = torch.arange(rows.start, rows.stop, device=device)[:, None]
        return (torch.arange(keys, device=device)[None, :] <= row)[None, None]
    if mask is None:
        return None
    mask = mask[..., :keys]
    mask = mask if mask.shape[0] == 1 else mask[b]
    return mask if mask.shape[2] == 1 else mask[:, :, rows]


def _blocks(
    batch: int, heads: int, rows: int, row_bytes: int, block_bytes: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Cut (batch, heads, rows) into blocks of at most `block_bytes`: by batch, then heads, then rows."""
    rows_fit = max(1, block_bytes // row_bytes)
    row_step = min(rows, rows_fit)
    head_step = max(1, min(heads, rows_fit // rows))
    batch_step = max(1, min(batch, rows_fit // (rows * heads)))
    for b in range(0, batch, batch_step):
        for h in range(0, heads, head_step):
            for r in range(0, rows, row_step):
                yield (
                    slice(b, min(b + batch_step, batch)),
                    slice(h, min(h + head_step, heads)),
                    slice(r, min(r + row_step, rows)),
                )
