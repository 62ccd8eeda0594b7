"""Reverse mode: the exact gradient, at the price of stored activations.

Plain backprop stores every activation. Checkpointing per layer keeps only each layer's input and runs the
layer again on the way back (Chen et al. 2016). Within a byte budget, a few inputs are kept and the rest are
computed again by the binomial schedule (Griewank & Walther 2000). Only the wanted parameters require
gradients, so nothing is stored below the lowest.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from spryfl.errors import ConfigError
from spryfl.gradients.estimator import GradientEstimate, Loss, on_cpu
from spryfl.gradients.sweep import Sweep
from spryfl.gradients.tangents import Draw

Checkpointing = Literal["none", "per_layer", "budgeted"]


@dataclass(frozen=True)
class Backprop:
    """Backpropagation, storing every activation, each layer's input, or as many inputs as a budget holds.

    Attributes:
        layers: finds the model's layers in the order it calls them; needed for checkpointing. A layer called
            several times stands there as often; if it does not, "budgeted" is as correct and runs more layers.
        budget_bytes: for "budgeted": bound on the layer inputs kept at a time. What the layer being run
            takes comes on top, as with every kind of checkpointing.

    Raises:
        ConfigError: a budget without "budgeted", or the other way round.
    """

    checkpointing: Checkpointing = "none"
    layers: Callable[[nn.Module], Sequence[nn.Module]] = lambda model: ()
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.checkpointing == "budgeted") != (self.budget_bytes is not None):
            raise ConfigError(
                f"checkpointing = '{self.checkpointing}' with a budget of {self.budget_bytes}: "
                "'budgeted' and a budget go together, give both or neither"
            )

    def estimate(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw, num_examples: int
    ) -> GradientEstimate:
        """See `GradientEstimator.estimate`; `draw` is not called."""
        value, found = self.loss_and_gradient(model, loss, parameters)
        shapes = {name: model.get_parameter(name).shape for name in parameters}
        return GradientEstimate(on_cpu(shapes, found), float(value), None)

    def loss_and_gradient(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and its gradient by each parameter, on the model's device and as precise as it computes.

        None stands for a parameter that the loss does not depend on.
        """
        with torch.enable_grad(), only_requiring_grad(model, parameters) as wanted:
            if self.checkpointing != "none":
                layers = self.layers(model)
                return Sweep(layers, wanted, self.budget_bytes).run(model, loss)
            value = loss(model)
            return value.detach(), list(torch.autograd.grad(value, wanted, allow_unused=True))


@contextmanager
def only_requiring_grad(model: nn.Module, names: Sequence[str]) -> Iterator[list[nn.Parameter]]:
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
