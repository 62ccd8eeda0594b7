"""Token-wise blocks run in chunks of tokens, so that their wide middle never stands whole.

A feed-forward block maps each token on its own, through a layer three to four times as wide as the
hidden state. Primal and tangents of that layer are the largest tensors of a forward-mode pass; a chunk
at a time, they shrink to a byte budget.
"""

from collections.abc import Callable, Iterator
from functools import wraps

import torch
from torch import Tensor, nn

from spryfl.forward_mode.budget import FEED_FORWARD_SHARE, chunk_bytes, each, tangents_in_flight
from spryfl.forward_mode.dual import num_tangents, write_rows
from spryfl.forward_mode.packed import enough_tokens

# Where transformers keeps a model's token-wise blocks: (module class suffix, method taking (.., tokens,
# hidden) to the same shape). A block that is not listed runs whole: correct, but not as lean.
TOKEN_WISE: tuple[tuple[str, str], ...] = (
    ("BertLayer", "feed_forward_chunk"),
    ("RobertaLayer", "feed_forward_chunk"),
    ("AlbertLayer", "ff_chunk"),
    ("FFN", "ff_chunk"),  # DistilBERT
    ("MLP", "forward"),  # Llama, Mistral, Qwen, Gemma
)
# Parts of such a block, where the block is a method of the whole layer.
_PARTS = {"feed_forward_chunk": ("intermediate", "output"), "ff_chunk": ("ffn", "ffn_output", "lin1", "lin2")}
WIDE_TENSORS = 2  # of the middle's width alive at a time: before and after the activation (or its gate)


def token_wise_blocks(layer: nn.Module) -> Iterator[nn.Module]:
    """The modules that a layer's token-wise blocks are made of."""
    for module in layer.modules():
        for suffix, method in TOKEN_WISE:
            if type(module).__name__.endswith(suffix):
                if method == "forward":
                    yield module
                else:
                    yield from (getattr(module, part) for part in _PARTS[method] if hasattr(module, part))


def chunk_feed_forward(model: nn.Module) -> None:
    """Run the model's token-wise blocks in chunks wherever no backward pass will need them whole.

    Args:
        model: changed in place, once and for all; its values and results are not.
    """
    for module in model.modules():
        for suffix, method in TOKEN_WISE:
            if type(module).__name__.endswith(suffix) and method not in vars(module):
                setattr(module, method, _in_chunks(module, getattr(module, method)))


def _widest(module: nn.Module) -> int:
    """The largest dimension of its linear maps, whatever kind of module holds them (GPT-2's are no nn.Linear)."""
    features = [int(m.out_features) for m in module.modules() if hasattr(m, "out_features")]  # type: ignore[arg-type]
    return max(features or [max(parameter.shape, default=1) for parameter in module.parameters()], default=1)


def _in_chunks(module: nn.Module, block: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function like `block`, (.., tokens, hidden size) to the same shape, some tokens at a time."""
    width = _widest(module)

    @wraps(block)  # transformers counts the arguments of its chunk functions
    def chunked(hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return block(hidden)
        k = num_tangents(hidden) or tangents_in_flight()
        token_bytes = WIDE_TENSORS * (1 + k) * width * hidden.element_size()
        step = max(enough_tokens(module, k), chunk_bytes(FEED_FORWARD_SHARE) // token_bytes)
        num_tokens = hidden.shape[:-1].numel()
        if num_tokens <= step:
            return block(hidden)
        tokens, output = hidden.reshape(num_tokens, -1), None
        for start in each(range(0, num_tokens, step)):
            chunk = slice(start, start + step)
            # A tangent may start inside the block, at a perturbed module of its own.
            output = write_rows(output, block(tokens[chunk]), chunk, num_tokens)
        assert output is not None
        return output.view(hidden.shape)

    return chunked
