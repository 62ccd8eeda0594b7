"""Token-wise blocks run in chunks of tokens, so that their wide middle never stands whole.

A feed-forward block maps each token on its own, through a layer three to four times as wide as the
hidden state. Primal and tangent of that layer are the largest tensors of a forward-mode pass; a chunk
at a time, they shrink to a byte budget.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn

from spryfl.forward_mode.dual import pack, unpack

CHUNK_BYTES = 16 * 2**20  # of one wide layer's primal and tangent; measured as fast as no chunks

# Where transformers keeps a model's token-wise blocks: (module class suffix, method taking (.., tokens,
# hidden) to the same shape). A block that is not listed runs whole: correct, but not as lean.
TOKEN_WISE: tuple[tuple[str, str], ...] = (
    ("BertLayer", "feed_forward_chunk"),
    ("RobertaLayer", "feed_forward_chunk"),
    ("AlbertLayer", "ff_chunk"),
    ("FFN", "ff_chunk"),  # DistilBERT
    ("MLP", "forward"),  # Llama, Mistral, Qwen, Gemma
)


def chunk_feed_forward(model: nn.Module, chunk_bytes: int = CHUNK_BYTES) -> None:
    """Run the model's token-wise blocks in chunks wherever no backward pass will need them whole.

    Args:
        model: changed in place, once and for all; its values and results are not.
        chunk_bytes: bound on a wide layer's primal and tangent.
    """
    for module in model.modules():
        for suffix, method in TOKEN_WISE:
            if type(module).__name__.endswith(suffix) and method not in vars(module):
                setattr(module, method, _in_chunks(getattr(module, method), _widest(module), chunk_bytes))


def _widest(module: nn.Module) -> int:
    """The largest dimension of its weights, whatever kind of module holds them (GPT-2's are no nn.Linear)."""
    return max((max(parameter.shape, default=1) for parameter in module.parameters()), default=1)


def _in_chunks(block: Callable[[Tensor], Tensor], width: int, chunk_bytes: int) -> Callable[[Tensor], Tensor]:
    """A function like `block`, (.., tokens, hidden size) to the same shape, some tokens at a time."""

    @wraps(block)  # transformers counts the arguments of its chunk functions
    def chunked(hidden: Tensor) -> Tensor:
        step = max(1, chunk_bytes // (2 * width * hidden.element_size()))
        num_tokens = hidden.shape[:-1].numel()
        if torch.is_grad_enabled() or num_tokens <= step:
            return block(hidden)
        primal, tangent = unpack(hidden)
        tokens = primal.reshape(num_tokens, -1)
        token_tangents = None if tangent is None else tangent.reshape(num_tokens, -1)
        output, output_tangent = torch.empty_like(tokens), None
        for start in range(0, num_tokens, step):
            chunk = slice(start, start + step)
            part = block(pack(tokens[chunk], None if token_tangents is None else token_tangents[chunk]))
            output[chunk], part_tangent = unpack(part)
            if part_tangent is not None:
                # A tangent may start inside the block, at a perturbed module of its own.
                output_tangent = torch.empty_like(output) if output_tangent is None else output_tangent
                output_tangent[chunk] = part_tangent
        return pack(output.view_as(hidden), None if output_tangent is None else output_tangent.view_as(hidden))

    return chunked
