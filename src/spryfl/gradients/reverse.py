"""The backward pass of one layer, run again on its kept input, some rows of the batch at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spryfl.forward_mode.budget import chunk_bytes, each
from spryfl.forward_mode.packed import enough_tokens
from spryfl.forward_mode.patching import Forward, patched_forwards
from spryfl.forward_mode.rows import take_rows
from spryfl.gradients.calls import Call, hidden_of

HIDDEN_SIZED = 8  # a layer's norms, residual sums and the like, in hidden states: they are no linear maps


@dataclass
class GradientSums:
    """Gradients by parameter, summed over the places and row chunks that add to them; float32 at least."""

    sums: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            known = self.sums.get(parameter)
            precise = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            self.sums[parameter] = precise if known is None else known + precise


def reverse_call(
    call: Call,
    hidden: Tensor,
    gradient: Tensor,
    own: Sequence[nn.Parameter],
    sums: GradientSums,
    *,
    needs_input: bool,
    onward: Tensor | None = None,
) -> None:
    """Run a call again and back: its output's gradient becomes its input's; its parameters' are added up.

    Args:
        hidden: what the call was given, (batch, tokens, hidden).
        gradient: at its output, of the same shape; overwritten by the one at its input if that is needed.
        own: the call's parameters that require gradients.
        sums: where their gradients go.
        onward: where the call's own output goes, of the same shape; may be `hidden`, whose rows have served by then.
    """

    def there_and_back(forward: Forward) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            num_rows = gradient.shape[0]
            step = rows_at_once(call, hidden)
            for start in each(range(0, num_rows, step)):
                rows = slice(start, start + step)
                (state, *others), kept = take_rows((args, kwargs), rows, num_rows)
                state = state.detach().requires_grad_(needs_input)
                output = hidden_of(forward(state, *others, **kept), call.layer)
                inputs = [*own, state] if needs_input else list(own)
                found: Sequence[Tensor | None] = [None] * len(inputs)
                if output.requires_grad:  # it may not: an adapter that is switched off
                    found = torch.autograd.grad(output, inputs, gradient[rows], allow_unused=True)
                sums.add(own, found[: len(own)])
                if onward is not None:
                    onward[rows] = output.detach()
                if needs_input:
                    # The rows of the output's gradient have served: the input's take their place.
                    gradient[rows] = 0 if (moved := found[-1]) is None else moved
                del output, found, state
            return hidden  # for the layer's hooks to see

        return run

    with patched_forwards([call.layer], lambda _, forward: there_and_back(forward)):
        call.again(hidden)


def rows_at_once(call: Call, hidden: Tensor) -> int:
    """Rows of the batch whose backward pass through a layer stores a chunk's bytes at most; at least one.

    A layer that draws random numbers takes the batch whole: in chunks it would draw others.
    """
    num_rows = hidden.shape[0]
    if call.stochastic or hidden.dim() != 3:
        return num_rows
    enough = -(-enough_tokens(call.layer, 0) // hidden.shape[1])
    num_chunks = -(-num_rows // max(enough, chunk_bytes() // row_bytes(call.layer, hidden)))
    return -(-num_rows // num_chunks)  # chunks of one size


def row_bytes(layer: nn.Module, hidden: Tensor) -> int:
    """An estimate of what one row's backward pass through a layer stores.

    Args:
        hidden: the layer's input, (batch, tokens, hidden).
    """
    widths = sum(width for m in layer.modules() if isinstance(width := getattr(m, "out_features", None), int))
    _, tokens, size = hidden.shape
    return int(tokens * hidden.element_size() * (widths + HIDDEN_SIZED * size))
