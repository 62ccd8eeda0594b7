"""Attention of duals in blocks, as a transformers attention implementation.

PyTorch's fused attention has no forward derivative, and the eager one keeps every (queries x keys)
matrix several times over. Here a block of queries is carried to its output before the next begins:

    S = c q k^T,  P = softmax(S),  o = P v
    S' = c (q' k^T + q k'^T),  D = P * S',  o' = P v' + D v - rowsum(D) o

P is computed once for all K tangents. Without tangents the call goes to PyTorch's fused kernels, so inference
and backprop run on those.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from spryfl.errors import UnsupportedModuleError
from spryfl.forward_mode.budget import ATTENTION_SHARE, chunk_bytes, each, is_dry
from spryfl.forward_mode.dual import Dual, num_tangents, split

ATTENTION_NAME = "spry"


def register_attention() -> None:
    """Make `attn_implementation="spry"` known to transformers; may be called again.

    The mask function is registered too: without it transformers passes no mask at all and padding is
    silently attended to.
    """
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)


def padding_mask(batch_size: int, q_length: int, kv_length: int, **settings: Any) -> Tensor | None:
    """The mask transformers hands to our attention: padding alone where that and causality are all there is.

    Causality is cut block by block, so no (batch, 1, queries, keys) mask stands whole. Other patterns (a
    sliding window shorter than the text, packed sequences, a cache) get transformers' own full mask.

    Returns:
        (batch, 1, 1, keys) or (batch, 1, queries, keys), True where attended; None where all are.
    """
    function, given = settings.get("mask_function", causal_mask_function), settings.get("attention_mask")
    plain = function in (causal_mask_function, bidirectional_mask_function)
    square = q_length == kv_length and not settings.get("q_offset") and not settings.get("kv_offset")
    if not (plain and square) or given is None or given.shape[-1] != kv_length:
        full: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, **settings)
        return full
    return None if is_dry() or given.all() else given[:, None, None, :].bool()


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
        attention_mask: broadcasts to (batch, 1, queries, keys); True or 0 where attended. One without a
            query dimension is padding alone, and causality is the module's.
        dropout: must be 0 where a tangent flows: base models run in evaluation mode.
        scaling: c; 1 / sqrt(head size) by default.
        is_causal: overrides the module's own.

    Returns:
        (batch, queries, heads, head size), and no attention weights.

    Raises:
        UnsupportedModuleError: the module asks for more, which transformers' own such kernel would pass over.
    """
    unsupported = [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]
    if unsupported:
        raise UnsupportedModuleError(
            f"{type(module).__name__}: no method here trains attention with {' and '.join(unsupported)}: take another"
        )
    # A module that does not say so is causal without a mask, as in transformers, but not beside one of padding.
    given = is_causal if is_causal is not None else getattr(module, "is_causal", attention_mask is None)
    causal = bool(given) and query.shape[2] > 1 and (attention_mask is None or attention_mask.shape[2] == 1)
    if num_tangents(query, key, value) == 0:
        if causal and attention_mask is not None:
            whole, rows = slice(None), slice(0, query.shape[2])
            attention_mask = _block_mask(attention_mask, causal, whole, rows, key.shape[2], query.device)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if dropout:
        raise NotImplementedError("attention dropout under forward mode: put the base model in evaluation mode")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, mask=attention_mask, causal=causal, scaling=scaling), None


def attention(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, causal: bool, scaling: float) -> Dual:
    """Attention of duals, block by block within the byte budget.

    Args:
        query: (batch, heads, queries, head size).
        key, value: (batch, key heads, keys, head size): query heads come in `heads / key heads` groups over
            each key head. At least one of the three is a dual.
        mask: broadcasts to (batch, 1, queries, keys): bool (True: attended) or added to the scores.
        causal: query i attends to keys up to i.
        scaling: c.

    Returns:
        (batch, queries, heads, head size), contiguous.
    """
    k = num_tangents(query, key, value)
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    groups = heads // key_heads
    (q, q_tangents), (key_primal, key_tangents), (v, v_tangents) = split(query), split(key), split(value)
    stack = q.new_empty(1 + k, batch, queries, heads, value.shape[-1])
    # Three float32 score-sized tensors at the widest: P, S' of one tangent, and one term of it.
    row_bytes = 3 * 4 * groups * keys
    for b, h, rows in each(_blocks(batch, key_heads, queries, row_bytes, chunk_bytes(ATTENTION_SHARE))):
        q_heads = slice(h.start * groups, h.stop * groups)
        primals = (_grouped(q[b, q_heads, rows], groups), key_primal[b, h], v[b, h])
        probabilities, output = _block(primals, _block_mask(mask, causal, b, rows, keys, q.device), scaling, groups)
        _place(stack[0, b, rows, q_heads], output, groups)
        for i in range(k):
            tangents = (
                None if q_tangents is None else _grouped(q_tangents[i, b, q_heads, rows], groups),
                None if key_tangents is None else key_tangents[i, b, h],
                None if v_tangents is None else v_tangents[i, b, h],
            )
            tangent = _block_tangent(primals, tangents, probabilities, output, scaling)
            _place(stack[1 + i, b, rows, q_heads], tangent, groups)
    return Dual(stack)


def _place(target: Tensor, block: Tensor, groups: int) -> None:
    """Write (b, key heads, groups * rows, d) into (b, rows, heads, d)."""
    b, h, _, d = block.shape
    target.copy_(block.view(b, h * groups, -1, d).transpose(1, 2))


def _grouped(query: Tensor, groups: int) -> Tensor:
    """(b, heads, rows, d) -> (b, key heads, groups * rows, d): one product serves a key head's whole group."""
    return query.reshape(query.shape[0], -1, groups * query.shape[2], query.shape[3])


def _block(
    primals: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, scaling: float, groups: int
) -> tuple[Tensor, Tensor]:
    """P and o of a block: query (b, h, groups * rows, d), key and value (b, h, keys, d), mask (b, 1, rows, keys)."""
    query, key, value = primals
    probabilities = _softmax(torch.matmul(query * scaling, key.transpose(-1, -2)), mask, groups)
    return probabilities, torch.matmul(probabilities.to(value.dtype), value)


def _block_tangent(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    probabilities: Tensor,
    output: Tensor,
    scaling: float,
) -> Tensor:
    """O' of one tangent of a block."""
    query, key, value = primals
    query_tangent, key_tangent, value_tangent = tangents
    tangent = None if value_tangent is None else torch.matmul(probabilities.to(value.dtype), value_tangent)
    if query_tangent is not None or key_tangent is not None:
        weighted = _score_tangent(query, key, query_tangent, key_tangent, scaling)
        weighted = weighted.to(probabilities.dtype).mul_(probabilities)  # D = P * S'
        moved = torch.matmul(weighted.to(value.dtype), value)
        moved.addcmul_(weighted.sum(-1, keepdim=True).to(output.dtype), output, value=-1)
        tangent = moved if tangent is None else tangent.add_(moved)
    return torch.zeros_like(output) if tangent is None else tangent


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
    if mask is not None:
        mask = mask[..., :keys]
        mask = mask if mask.shape[0] == 1 else mask[b]
        mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    if not causal:
        return mask
    lower = _causal_mask(rows, keys, device)
    if mask is None:
        return lower
    return lower & mask if mask.dtype == torch.bool else torch.where(lower, mask, torch.finfo(mask.dtype).min)


def _causal_mask(rows: slice, keys: int, device: torch.device) -> Tensor:
    """(1, 1, rows, keys): query i attends to keys up to i."""
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    return (torch.arange(keys, device=device)[None, :] <= row)[None, None]


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
