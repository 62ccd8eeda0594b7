"""A layer runs on some rows of the batch at a time: what it makes in between never stands for all rows.

A transformer layer treats the rows of a batch apart from each other. So only the hidden state that goes in
and the one that comes out need memory for the whole batch, and where tangents flow they are the same memory.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from spryfl.forward_mode.budget import chunk_bytes, tangents_in_flight
from spryfl.forward_mode.dual import Dual, num_tangents, write_rows
from spryfl.forward_mode.feed_forward import token_wise_blocks
from spryfl.forward_mode.packed import dense_bytes, staged

HIDDEN_STATES = 4  # beside the outputs of its linear maps: context, norm and rotary temporaries, residual


def take_rows(tree: Any, rows: slice, num_rows: int) -> Any:
    """Some rows of every tensor in a tree whose first dimension is the batch; the others as they are.

    Args:
        tree: arguments of a layer: hidden states, masks, positions.
        rows: which.
        num_rows: the batch's; a first dimension of 1 broadcasts and is kept.
    """

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != num_rows or num_rows == 1:
            return leaf
        return Dual(leaf.stacked[:, rows]) if isinstance(leaf, Dual) else leaf[rows]

    return tree_map(take, tree)


def rows_at_a_time(layer: nn.Module, hidden: Tensor, k: int) -> int:
    """How many rows of the batch a layer takes at a time within the byte budget.

    Chunks smaller than the layer's packed weights take when unpacked would save nothing, as those must then
    stay unpacked from chunk to chunk.

    Args:
        hidden: (batch, tokens, hidden).
        k: tangents that flow.
    """
    tokens = hidden.shape[1] if hidden.dim() > 2 else 1
    row_bytes = (1 + k) * tokens * hidden.element_size() * (HIDDEN_STATES * hidden.shape[-1] + _widths(layer))
    return max(1, max(chunk_bytes(), dense_bytes(layer, hidden.element_size())) // row_bytes)


def chunk_layers(layers: Sequence[nn.Module]) -> None:
    """Run layers some rows at a time wherever no backward pass will need them whole; in place, once and for all."""
    for layer in layers:
        if "_in_rows" not in vars(layer):
            layer.forward = _in_rows(layer)
            vars(layer)["_in_rows"] = True


def _widths(layer: nn.Module) -> int:
    """Outputs of the layer's frozen linear maps outside its token-wise blocks, which are chunked further."""
    inside = {module for block in token_wise_blocks(layer) for module in block.modules()}
    outside: list[Any] = [m for m in layer.modules() if hasattr(m, "out_features") and m not in inside]
    return sum(m.out_features for m in outside if isinstance(m.weight, Tensor) and not m.weight.requires_grad)


def _in_rows(layer: nn.Module) -> Callable[..., Any]:
    plain = layer.forward

    @wraps(plain)
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        num_rows = hidden.shape[0]
        k = num_tangents(hidden) or tangents_in_flight()
        if torch.is_grad_enabled() or (step := rows_at_a_time(layer, hidden, k)) >= num_rows:
            return plain(hidden, *args, **kwargs)
        target: Tensor | None = hidden if isinstance(hidden, Dual) else None
        rest: tuple[Any, ...] | None = None
        with staged():
            for start in range(0, num_rows, step):
                rows = slice(start, start + step)
                part_hidden, part_args, part_kwargs = take_rows((hidden, args, kwargs), rows, num_rows)
                part = plain(part_hidden, *part_args, **part_kwargs)
                if isinstance(part, tuple):
                    part, *others = part
                    rest = tuple(others)
                target = write_rows(target, part, rows, num_rows)
        return target if rest is None else (target, *rest)

    return forward
