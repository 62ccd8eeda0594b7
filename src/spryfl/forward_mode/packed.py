"""Products with packed weights (4-bit, 8-bit): no dense weight ever stands whole.

Some rows of the weight are unpacked at a time, into the same memory, for primal and tangents together. The price is
to unpack anew for every block of tokens, and in a backward pass again; so such blocks are not too small.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from spryfl.forward_mode.budget import DEFAULT_CHUNK_BYTES, NO_LIMIT, chunk_bytes, chunks_of, each, is_dry
from spryfl.forward_mode.dual import Dual, carrying_tangents, num_tangents, split

UnpackRows = Callable[[nn.Module, slice, Tensor], None]
"""(module, rows, out): writes these rows of its frozen weight (out_features, in_features) into `out`, in its dtype."""

PRODUCT_SHARE = 2  # of the budget: unpacked rows; as much again for the tokens that they meet
GRAIN = 64  # of unpacked rows: blocks are multiples of it, as smaller and odd ones cost more than they spare
ENOUGH_VECTORS = 1024  # tokens, times 1 + K, that a weight is unpacked for: it then takes a tenth of the product's time


def packed_linear(module: Any, unpack: UnpackRows) -> Callable[[Tensor], Tensor]:
    """The forward of a linear map with a packed frozen weight: duals, plain tensors and backward passes alike."""
    vars(module)["_packed"] = True

    @wraps(module.forward)
    def forward(input: Tensor) -> Tensor:
        if isinstance(input, Dual):
            output: Tensor = Dual(product(input.stacked, module, unpack))
        else:
            output = _Product.apply(input, module, unpack)  # type: ignore[no-untyped-call]
        return output if module.bias is None else _add_bias(output, module.bias)

    return forward


def enough_tokens(block: nn.Module, k: int) -> int:
    """The fewest tokens that a chunk through a block should hold, K tangents each; 1 where no weight is packed."""
    packed = any("_packed" in vars(module) for module in block.modules())
    return -(-ENOUGH_VECTORS // (1 + k)) if packed else 1


def product(x: Tensor, module: Any, unpack: UnpackRows) -> Tensor:
    """W x, a block of tokens and of W's rows at a time.

    Args:
        x: (.., in).
    """
    tokens = x.reshape(-1, x.shape[-1])
    output = x.new_empty((*x.shape[:-1], module.out_features))
    flat = output.view(len(tokens), -1)
    for some in each(_token_blocks(x, module)):
        block = tokens[some].to(product_dtype(x))
        for rows, weight in _unpacked(block, module, unpack):
            flat[some, rows] = block @ weight.t()
    return output


def transposed_product(y: Tensor, module: Any, unpack: UnpackRows) -> Tensor:
    """W^T y, in the same blocks; summed in the dtype of the products.

    Args:
        y: (.., out).
    """
    tokens = y.reshape(-1, y.shape[-1])
    output = y.new_empty((*y.shape[:-1], module.in_features))
    flat = output.view(len(tokens), -1)
    for some in each(_token_blocks(y, module)):
        block = tokens[some]
        total = block.new_zeros((len(block), module.in_features), dtype=product_dtype(y))
        for rows, weight in _unpacked(total, module, unpack):
            torch.addmm(total, block[:, rows].to(total.dtype), weight, out=total)
        flat[some] = total
    return output


def product_dtype(x: Tensor) -> torch.dtype:
    """What packed weights are unpacked to and multiplied in: x's own dtype, or float32 for 16 bits on most CPUs.

    A processor without a matrix unit for 16 bits gains nothing from rounding to them: bfloat16 was half as fast as
    float32 where this was measured, though the processor has instructions for it.
    """
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not has_matrix_unit():
        return torch.float32
    return x.dtype


def has_matrix_unit() -> bool:
    """Whether the processor multiplies matrices of bfloat16 faster than of float32."""
    return torch.cpu._is_amx_tile_supported()


class _Product(torch.autograd.Function):
    """W x whose backward pass unpacks W again; PyTorch's own forward mode passes it too."""

    @staticmethod
    def forward(x: Tensor, module: nn.Module, unpack: UnpackRows) -> Tensor:
        return product(x, module, unpack)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, nn.Module, UnpackRows], output: Tensor) -> None:
        _, ctx.module, ctx.unpack = inputs
        ctx.chunk_bytes = chunk_bytes()  # on an accelerator autograd goes back in a thread of its own
        ctx.save_for_backward(ctx.module.weight)  # so that hooks on saved tensors know that it will be needed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _ = ctx.saved_tensors  # a streamed layer's weight is the module's again from here on
        with chunks_of(ctx.chunk_bytes):
            return transposed_product(gradient, ctx.module, ctx.unpack), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *constants: None) -> Tensor:
        return product(tangent, ctx.module, ctx.unpack)


def _token_blocks(x: Tensor, module: Any) -> Iterator[slice]:
    """Blocks of tokens that take their share of the budget, if that holds enough of them."""
    num_tokens = x.shape[:-1].numel()
    step = max(ENOUGH_VECTORS, _fitting(module.in_features, x))
    return (slice(start, start + step) for start in range(0, num_tokens, step))


def _unpacked(like: Tensor, module: Any, unpack: UnpackRows) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows and their weights (rows, in), of the type of `like`; each overwrites the one before."""
    num_rows = module.out_features
    step = min(num_rows, max(GRAIN, _fitting(module.in_features, like) // GRAIN * GRAIN))
    buffer = like.new_empty((step, module.in_features))
    for rows in each(slice(start, start + step) for start in range(0, num_rows, step)):
        weight = buffer[: num_rows - rows.start]
        unpack(module, rows, weight)
        yield rows, weight


def _fitting(width: int, x: Tensor) -> int:
    """How many vectors of a width, as products take them, fit the share of the budget."""
    budget = chunk_bytes()
    if budget == NO_LIMIT and not is_dry():  # unpacked whole, weights would take more than stock inference does
        budget = DEFAULT_CHUNK_BYTES
    return budget // PRODUCT_SHARE // (width * product_dtype(x).itemsize)


def _add_bias(output: Tensor, bias: Tensor) -> Tensor:
    """Y + b, overwriting y; either may be a dual."""
    output = carrying_tangents(output, num_tangents(output, bias))
    plain, tangents = split(bias)
    if not isinstance(output, Dual):
        return output.add_(plain.to(output.dtype))
    output.stacked[0] += plain
    if tangents is not None:
        output.stacked[1:] += tangents.view(len(tangents), *(1,) * (output.dim() - 1), -1)
    return output
