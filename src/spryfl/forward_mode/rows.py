"""A layer runs on some rows of the batch at a time: what it makes in between never stands for all rows.

A transformer layer treats the rows of a batch apart from each other. So only the hidden state that goes in
and the one that comes out need memory for the whole batch, and where tangents flow they are the same memory.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from spryfl.forward_mode.budget import chunk_bytes, each, tangents_in_flight
from spryfl.forward_mode.dual import Dual, num_tangents, write_rows
from spryfl.forward_mode.feed_forward import token_wise_blocks
from spryfl.forward_mode.packed import enough_tokens

Tree = TypeVar("Tree")

HIDDEN_STATES = 4  # beside the outputs of its linear maps: context, norm and rotary temporaries, residual


def take_rows(tree: Tree, rows: slice, num_rows: int) -> Tree:
    """A layer's arguments for some rows of the batch; slices are views.

    Tensors of one dimension stay whole: they hold one number a token (`cache_position`), not a row.

    Args:
        tree: tensors and anything else in tuples, lists and dictionaries. Tensors of at least two dimensions
            whose first is `num_rows` are sliced; what broadcasts over the batch is kept as it is.
        rows: which.
        num_rows: of the whole batch; with one row nothing is sliced.
    """

    def take(tensor: Tensor) -> Tensor:
        return tensor[rows] if tensor.dim() > 1 and tensor.shape[0] == num_rows else tensor

    if num_rows == 1:
        return tree
    return tree_map_only(Tensor, take, tree)  # type: ignore[no-any-return]


def rows_at_a_time(layer: nn.Module, widths: int, hidden: Tensor, k: int) -> int:
    """How many rows of the batch a layer takes at a time within the byte budget, or enough for packed weights.

    Args:
        widths: of the layer's linear maps outside its token-wise blocks.
        hidden: (batch, tokens, hidden).
        k: tangents that flow.
    """
    tokens = hidden.shape[1] if hidden.dim() > 2 else 1
    row_bytes = (1 + k) * tokens * hidden.element_size() * (HIDDEN_STATES * hidden.shape[-1] + widths)
    return max(1, chunk_bytes() // row_bytes, -(-enough_tokens(layer, k) // tokens))


def chunk_layers(layers: Sequence[nn.Module]) -> None:
    """Run layers some rows at a time wherever no backward pass will need them whole; in place, once and for all."""
    for layer in layers:
        if "_in_rows" not in vars(layer):
            layer.forward = _in_rows(layer)
            vars(layer)["_in_rows"] = True


def _widths(layer: nn.Module) -> int:
    """Outputs of the layer's frozen linear maps outside its token-wise blocks, which are chunked further."""
    inside = {module for block in token_wise_blocks(layer) for module in block.modules()}
    # An adapter's module around a linear map repeats that map's width; its own maps are trainable, and narrow.
    linear: list[Any] = [m for m in layer.modules() if hasattr(m, "out_features") and not hasattr(m, "base_layer")]
    frozen = [m for m in linear if isinstance(m.weight, Tensor) and not m.weight.requires_grad]
    return sum(m.out_features for m in frozen if m not in inside)


def _in_rows(layer: nn.Module) -> Callable[..., Any]:
    plain, widths = layer.forward, _widths(layer)

    @wraps(plain)
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        num_rows = hidden.shape[0]
        k = num_tangents(hidden) or tangents_in_flight()
        if torch.is_grad_enabled() or (step := rows_at_a_time(layer, widths, hidden, k)) >= num_rows:
            return plain(hidden, *args, **kwargs)
        target: Tensor | None = hidden if isinstance(hidden, Dual) else None
        rest: tuple[Any, ...] | None = None
        for start in each(range(0, num_rows, step)):
            rows = slice(start, start + step)
            part_hidden, part_args, part_kwargs = take_rows((hidden, args, kwargs), rows, num_rows)
            part = plain(part_hidden, *part_args, **part_kwargs)
            if isinstance(part, tuple):
                part, *others = part
                rest = tuple(others)
            target = write_rows(target, part, rows, num_rows)
        return target if rest is None else (target, *rest)

    return forward
