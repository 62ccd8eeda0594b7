"""Reverse mode: the exact gradient, at the price of stored activations.

Checkpointing per layer keeps only each layer's input and runs the layer again on the way back (Chen
et al. 2016). Only the wanted parameters require gradients, so nothing is stored below the lowest.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spryfl.forward_mode.patching import patched_forwards
from spryfl.gradients.estimator import Draw, GradientEstimate, Loss

Checkpointing = Literal["none", "per_layer"]


@dataclass(frozen=True)
class Backprop:
    """Backpropagation, storing every activation or only each layer's input.

    Attributes:
        layers: finds the model's repeated layers; needed for checkpointing "per_layer".
    """

    checkpointing: Checkpointing = "none"
    layers: Callable[[nn.Module], Sequence[nn.Module]] = lambda model: ()

    def estimate(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw, num_examples: int
    ) -> GradientEstimate:
        """See `GradientEstimator.estimate`; `draw` is not called."""
        layers = self.layers(model) if self.checkpointing == "per_layer" else ()
        with torch.enable_grad(), _only_requiring_grad(model, parameters) as wanted, checkpointed(layers):
            value = loss(model)
            found = torch.autograd.grad(value, wanted, allow_unused=True)
        gradients = {
            name: torch.zeros(p.shape) if g is None else g.float().cpu()
            for name, p, g in zip(parameters, wanted, found, strict=True)
        }
        return GradientEstimate(gradients, float(value.detach()), None, num_examples)


def checkpointed(layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Let each layer keep only its input and recompute the rest during the backward pass."""
    return patched_forwards(layers, lambda layer, forward: partial(checkpoint, forward, use_reentrant=False))


@contextmanager
def _only_requiring_grad(model: nn.Module, names: Sequence[str]) -> Iterator[list[nn.Parameter]]:
    """Let only the named parameters require gradients; yields them in order."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = [model.get_parameter(name) for name in names]
    try:
        model.requires_grad_(False)
        for parameter in wanted:
            parameter.requires_grad_(True)
        yield wanted
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
