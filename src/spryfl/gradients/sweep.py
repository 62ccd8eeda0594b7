"""Reverse mode one layer at a time, from a few kept hidden states.

The model's own forward pass runs its layers without recording for autograd and keeps some of their inputs.
The last layer's output is a leaf: autograd differentiates what lies above it. From there the sweep goes back
call by call: the layer is run again on its input, recorded this time, and differentiated at once. What the
schedule (`revolve`) did not keep is computed again from the nearest kept input below.

A layer is always called as a module, and its backward pass is done before that call returns. So hooks that
fetch a layer's weights when it is called and drop them afterwards serve both ways, once a visit.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from spryfl.errors import ConfigError, ModelError
from spryfl.forward_mode.patching import Forward, patched_forwards
from spryfl.gradients.calls import REMEDY, Call, hidden_of, record
from spryfl.gradients.reverse import GradientSums, reverse_call
from spryfl.gradients.revolve import Advance, Free, Keep, reversal, steps_to_keep


@dataclass
class Sweep:
    """One loss and its gradient.

    Attributes:
        layers: the model's layers in the order it calls them, a shared one as often as it is called.
        wanted: what is differentiated; requires gradients, as nothing else does.
        budget_bytes: bound on the layer inputs kept at a time; None keeps all of them.
        calls: from the lowest that needs a gradient on.
        kept: inputs of calls, by their place in `calls`.
        num_below: calls below those.
        num_kept, keeps: with a budget, how many inputs may be kept, and which are on the way up.
        latest: the last call's output.
        outputs: what calls returned that takes part in autograd, by place; alive if someone holds it.
    """

    layers: Sequence[nn.Module]
    wanted: Sequence[nn.Parameter]
    budget_bytes: int | None
    calls: list[Call] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    outputs: list[tuple[int, bool, "weakref.ref[Tensor]"]] = field(default_factory=list)
    num_below: int = 0
    num_kept: int = 1
    keeps: set[int] | None = None
    latest: Tensor | None = None
    sums: GradientSums = field(default_factory=GradientSums)

    def __post_init__(self) -> None:
        wanted = set(self.wanted)
        self._unique = list(dict.fromkeys(self.layers))
        self._own = {layer: [p for p in layer.parameters() if p in wanted] for layer in self._unique}

    def run(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and the gradient of each wanted parameter, None where the loss does not depend on it.

        Gradients are enabled by the caller.

        Raises:
            ConfigError: the budget does not hold one hidden state.
            ModelError: the model does more between its layers than pass a hidden state on.
        """
        with patched_forwards(self._unique, self._recording):
            value = loss(model)
        if not self.calls and not self.num_below:
            raise ModelError(f"checkpointing: the loss calls none of the model's {len(self.layers)} layers: {REMEDY}")
        arriving = self._through_the_top(value)
        self.latest = None
        if self.calls:
            self._through_the_layers(arriving)
        return value.detach(), [self.sums.sums.get(parameter) for parameter in self.wanted]

    # The way up.

    def _recording(self, layer: nn.Module, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, call = record(layer, args, kwargs)
            below = not self.calls and not hidden.requires_grad and not self._own[layer]
            if below:
                self.num_below += 1
            else:
                self._meet(hidden, call)
                del args
            # Without recording, token-wise blocks run in chunks, which would draw other masks than the way back.
            with torch.set_grad_enabled(call.stochastic):
                output = forward(hidden.detach(), *call.args, **call.kwargs)
            if (found := hidden_of(output, layer)).shape != hidden.shape:
                shapes = f"{tuple(hidden.shape)} to {tuple(found.shape)}"
                raise ModelError(f"checkpointing: {type(layer).__name__} changes its input's shape, {shapes}: {REMEDY}")
            return output if below else self._as_leaves(output, layer)

        return run

    def _meet(self, hidden: Tensor, call: Call) -> None:
        """Take note of a call and keep its input if the schedule says so."""
        place = len(self.calls)
        if place == 0:
            self._plan(hidden)
        elif hidden is not self.latest:
            kind = type(call.layer).__name__
            raise ModelError(f"checkpointing: {kind} is not given just what the layer before it returned: {REMEDY}")
        if self.keeps is None or place in self.keeps:
            self.kept[place] = hidden
        self.calls.append(call)

    def _plan(self, hidden: Tensor) -> None:
        """Decide which inputs to keep, now that the size of one is known."""
        if self.budget_bytes is None:
            return
        state_bytes = hidden.numel() * hidden.element_size()
        self.num_kept = self.budget_bytes // state_bytes
        if self.num_kept < 1:
            raise ConfigError(
                f"method.budget = {self.budget_bytes:,} bytes: one layer's input takes {state_bytes:,} bytes for "
                f"{tuple(hidden.shape)} {hidden.dtype}; raise the budget to that at least, or make batches smaller"
            )
        self.keeps = set(steps_to_keep(max(1, len(self.layers) - self.num_below), self.num_kept))

    def _as_leaves(self, output: Any, layer: nn.Module) -> Any:
        """The output cut off from autograd below, so that a gradient that arrives here can be seen."""
        first, place = hidden_of(output, layer), len(self.calls) - 1

        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            cut = tensor.detach().requires_grad_()
            self.outputs.append((place, tensor is first, weakref.ref(cut)))
            if tensor is first:
                self.latest = cut
            return cut

        return tree_map_only(Tensor, leaf, output)

    # The way back.

    def _through_the_top(self, value: Tensor) -> dict[int, Tensor]:
        """Differentiate what lies above the layers; what arrives at each call's output, by its place."""
        alive = [(place, is_hidden, t) for place, is_hidden, ref in self.outputs if (t := ref()) is not None]
        inputs = [*(t for *_, t in alive), *self.wanted]
        found: Sequence[Tensor | None] = torch.autograd.grad(value, inputs, allow_unused=True)
        self.sums.add(self.wanted, found[len(alive) :])
        arriving = {}
        for (place, is_hidden, _), gradient in zip(alive, found[: len(alive)], strict=True):
            if gradient is None:
                continue
            if not is_hidden:
                kind = type(self.calls[place].layer).__name__
                raise ModelError(f"checkpointing: the loss depends on more than {kind}'s hidden state: {REMEDY}")
            # Ours to overwrite: autograd may hand out one tensor twice, or an expanded one.
            arriving[place] = gradient.clone(memory_format=torch.contiguous_format)
        return arriving

    def _through_the_layers(self, arriving: dict[int, Tensor]) -> None:
        """Reverse the calls from the last to the first, then what lies below them."""
        entry = self.kept[0]
        num_kept = len(self.kept) if self.budget_bytes is None else self.num_kept
        last = len(self.calls) - 1
        gradient = arriving.pop(last) if last in arriving else torch.zeros_like(entry, requires_grad=False)
        at_hand: Tensor | None = None
        for action in reversal(len(self.calls), sorted(self.kept), num_kept):
            if isinstance(action, Advance):
                at_hand = self._advance(action)
            elif isinstance(action, Keep):
                assert at_hand is not None
                self.kept[action.step], at_hand = at_hand, None
            elif isinstance(action, Free):
                del self.kept[action.step]
            else:
                if action.step in arriving:  # the model uses this output elsewhere too
                    gradient.add_(arriving.pop(action.step))
                state = (self.kept[action.step] if at_hand is None else at_hand).detach()
                at_hand = None
                call, needs_input = self.calls[action.step], action.step > 0 or entry.requires_grad
                reverse_call(call, state, gradient, self._own[call.layer], self.sums, needs_input=needs_input)
                del state
        if entry.requires_grad:
            below = torch.autograd.grad(entry, self.wanted, gradient, allow_unused=True)
            self.sums.add(self.wanted, below)

    def _advance(self, action: Advance) -> Tensor:
        hidden = self.kept[action.start].detach()
        for call in self.calls[action.start : action.stop]:
            hidden = call.output_of(hidden)
        return hidden
