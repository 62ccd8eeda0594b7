"""A call of a layer, recorded so that it can be made again with another hidden state and the same randomness."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states

from spryfl.errors import ModelError
from spryfl.forward_mode.patching import Forward, patched_forwards

HIDDEN = "hidden_states"  # what transformers calls a layer's input where it is not the first argument
PLAIN = (Tensor, str, int, float, torch.dtype, torch.device, type(None))
REMEDY = "train this model with method.checkpointing = 'none'"


@dataclass(frozen=True)
class RandomState:
    """Where the generators of the CPU and of a tensor's device stand, as in `torch.utils.checkpoint`."""

    cpu: Tensor
    device_type: str
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, tensor: Tensor) -> "RandomState":
        """Before a call with this tensor.

        Raises:
            ModelError: its device's generator cannot be set back, so that another run would draw other masks.
        """
        kind = tensor.device.type
        if kind not in ("cpu", "meta") and not hasattr(getattr(torch, kind), "device"):
            raise ModelError(f"dropout: a layer run again on {kind} would draw another mask: set adapter.dropout = 0")
        return cls(torch.get_rng_state(), tensor.device.type, *get_device_states(tensor))

    @contextmanager
    def again(self) -> Iterator[None]:
        """The generators as they stood then; as they stand now, afterwards."""
        with torch.random.fork_rng(self.devices, device_type=self.device_type if self.devices else "cuda"):
            torch.set_rng_state(self.cpu)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=self.device_type)
            yield


@dataclass(frozen=True)
class Call:
    """One call of a layer; all its arguments but the hidden state, by reference.

    Attributes:
        random: the generators before the call, where the layer draws from them.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: RandomState | None

    @property
    def stochastic(self) -> bool:
        return self.random is not None

    def again(self, hidden: Tensor) -> Any:
        """Call the layer, hooks and all, with this hidden state: (batch, tokens, hidden)."""
        args = (hidden, *self.args)
        if self.random is None:
            return self.layer(*args, **self.kwargs)
        with self.random.again():
            return self.layer(*args, **self.kwargs)

    def output_of(self, hidden: Tensor) -> Tensor:
        """The call's output, cut off from autograd: (batch, tokens, hidden) -> the same."""
        # Without recording, token-wise blocks run in chunks, which would draw other masks than a recorded call.
        with torch.set_grad_enabled(self.stochastic):
            return hidden_of(self.again(hidden), self.layer).detach()


def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden state a layer is called with, and the call without it.

    Raises:
        ModelError: the call cannot be made again, or a gradient would be lost if it were.
    """
    hidden, others = (args[0], args[1:]) if args else (kwargs.get(HIDDEN), ())
    rest = {name: value for name, value in kwargs.items() if args or name != HIDDEN}
    kind = type(layer).__name__
    if not isinstance(hidden, Tensor):
        raise ModelError(f"checkpointing: {kind} is not called with a hidden state first: {REMEDY}")
    for leaf in tree_leaves((others, rest)):
        if not isinstance(leaf, PLAIN):
            found = type(leaf).__name__
            raise ModelError(f"checkpointing: {kind} is given a {found}, which a second run would change: {REMEDY}")
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise ModelError(f"checkpointing: {kind} needs a gradient of more than its hidden state: {REMEDY}")
    return hidden, Call(layer, others, rest, RandomState.now(hidden) if draws(layer) else None)


@contextmanager
def seeing_mask(model: nn.Module, see: Callable[[Tensor | None], None]) -> Iterator[None]:
    """Tell the padding mask of each pass inside: (rows, tokens) of bool, None where the model is given no such."""

    def telling(module: nn.Module, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask")
            see(mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None)
            return forward(*args, **kwargs)

        return run

    with patched_forwards([model], telling):
        yield


def draws(layer: nn.Module) -> bool:
    """Whether a module in it is in training mode, and so may draw a dropout mask."""
    return any(m.training and not isinstance(m, nn.Identity) for m in layer.modules())


def hidden_of(output: Any, layer: nn.Module) -> Tensor:
    """The hidden state in a layer's output: the output, or the first of a tuple."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        kind = type(layer).__name__
        raise ModelError(f"checkpointing: {kind} returns a {type(hidden).__name__}, not a hidden state: {REMEDY}")
    return hidden
