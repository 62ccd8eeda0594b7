"""A pass that stops to be differentiated at the last hidden state, and a second one that begins where it kept one.

The layers run without recording for autograd. What lies above them (norm, pooler, head, loss) is
differentiated, so the loss's gradient at the last hidden state and the head's exact gradient come with the
pass that computes the loss, at no further one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from spryfl.errors import ModelError
from spryfl.forward_mode.budget import NO_LIMIT, chunks_of
from spryfl.forward_mode.patching import Forward, patched_forwards
from spryfl.gradients.calls import HIDDEN, Call, hidden_of, record, seeing_mask
from spryfl.gradients.reverse import GradientSums

REMEDY = "train this model with estimator = 'forward' or 'backprop'"


@dataclass
class Trace:
    """What one pass left for estimates that go down from its top.

    Attributes:
        calls: of the layers, from the lowest up.
        kept: inputs of some calls, by place: (batch, tokens, hidden).
        loss: of the batch.
        gradient: of the loss at the last call's output, (batch, tokens, hidden); the caller's to overwrite.
        mask: (batch, tokens), true at tokens that are no padding; None where the model was given none.
        sums: exact gradients of wanted parameters above the layers.
    """

    calls: list[Call] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    gradient: Tensor = field(default_factory=lambda: torch.zeros(()))
    mask: Tensor | None = None
    sums: GradientSums = field(default_factory=GradientSums)
    _others: list[tuple[Any, ...] | None] = field(default_factory=list)

    @contextmanager
    def resumed(self, start: int) -> Iterator[None]:
        """Let one pass inside begin at a call whose input was kept: those below it are left out.

        What the model computes before its layers is computed again, and comes to nothing. A layer that draws random
        numbers draws those of the first pass: whole, as it did then, since chunks would draw others.
        """
        places = count()

        def starting(layer: nn.Module, forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                place = next(places)
                if place < start:
                    given, others = (args[0] if args else kwargs[HIDDEN]), self._others[place]
                    return given if others is None else (given, *others)
                if place == start:
                    args, kwargs = (self.kept[start], *args[1:]), _without_hidden(args, kwargs)
                random = self.calls[place].random
                if random is None:
                    return forward(*args, **kwargs)
                with random.again(), chunks_of(NO_LIMIT):
                    return forward(*args, **kwargs)

            return run

        with patched_forwards(list(dict.fromkeys(call.layer for call in self.calls)), starting):
            yield


def trace(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    layers: Sequence[nn.Module],
    wanted: Sequence[nn.Parameter],
    keep: Callable[[int], bool],
) -> Trace:
    """Run a loss and differentiate what lies above the layers; gradients are enabled by the caller.

    Args:
        layers: of the model, in the order it calls them.
        wanted: what is differentiated; requires gradients, as nothing else does.
        keep: whether to keep the input of the call at a place, counted from 0.

    Raises:
        ModelError: the loss does not depend on the last layer's output.
    """
    found = Trace()
    latest: list[Tensor] = []

    def recording(layer: nn.Module, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, call = record(layer, args, kwargs)
            if latest and hidden is not latest[0]:
                kind = type(layer).__name__
                raise ModelError(f"guided tangents: {kind} is given more than the layer before it returned: {REMEDY}")
            if keep(len(found.calls)):
                found.kept[len(found.calls)] = hidden.detach()
            found.calls.append(call)
            hidden = hidden.detach()
            del args
            with torch.set_grad_enabled(call.stochastic):  # as `Call.output_of`
                output = forward(hidden, *call.args, **call.kwargs)
            leaf = hidden_of(output, layer).detach().requires_grad_()
            latest[:] = [leaf]
            found._others.append(tuple(output[1:]) if isinstance(output, tuple | list) else None)
            return leaf if not isinstance(output, tuple | list) else type(output)((leaf, *output[1:]))

        return run

    def see(mask: Tensor | None) -> None:
        found.mask = mask

    with patched_forwards(list(dict.fromkeys(layers)), recording), seeing_mask(model, see):
        value = loss(model)
    if not latest:
        raise ModelError(f"guided tangents: the loss calls none of the model's {len(layers)} layers: {REMEDY}")
    gradient, *above = torch.autograd.grad(value, [latest[0], *wanted], allow_unused=True)
    if gradient is None:
        raise ModelError(f"guided tangents: the loss does not depend on the last layer's output: {REMEDY}")
    found.sums.add(wanted, above)
    found.loss = value.detach()
    found.gradient = gradient.clone(memory_format=torch.contiguous_format)
    return found


def _without_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs if args else {name: value for name, value in kwargs.items() if name != HIDDEN}
