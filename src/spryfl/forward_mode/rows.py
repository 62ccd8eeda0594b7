"""A batch's rows, some at a time."""

from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map_only

Tree = TypeVar("Tree")


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
