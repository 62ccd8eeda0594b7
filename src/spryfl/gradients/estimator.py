"""What an estimator is and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from spryfl.gradients.tangents import Draw

Loss = Callable[[nn.Module], Tensor]
"""Maps the model, its present values loaded, to the mean loss of one batch: a scalar tensor."""


@runtime_checkable
class SeparableLoss(Protocol):
    """A `Loss` that can also be told example by example."""

    def __call__(self, model: nn.Module) -> Tensor: ...

    def parts(self, model: nn.Module) -> Tensor:
        """(rows,) what the mean loss is the sum of; a row's part depends on that row alone."""
        ...


@runtime_checkable
class TokenLoss(Protocol):
    """A `SeparableLoss` that can also be told token by token where the model is causal."""

    def token_parts(self, model: nn.Module) -> Tensor:
        """(rows, tokens) of a causal model, where a part depends on its row's tokens up to it; else `parts`."""
        ...


@dataclass(frozen=True)
class GradientEstimate:
    """An estimated gradient of one batch's loss.

    Attributes:
        gradients: by parameter name, float32 on the CPU, where adapter-sized arithmetic is the same on
            every machine.
        loss: the batch's mean loss.
        slopes: (K,) float32 on the CPU, K for each group of `Draw`: slope along each direction; None where the
            gradient is made of more than slopes along drawn directions.
    """

    gradients: dict[str, Tensor]
    loss: float
    slopes: Tensor | None


class GradientEstimator(Protocol):
    """Estimates the gradient of a loss with respect to some of a model's parameters.

    The model is left as it was found.
    """

    def estimate(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw, num_examples: int
    ) -> GradientEstimate:
        """Estimate the gradient of `loss` at the model's present values.

        Args:
            model: holds the parameters; any device and floating dtype.
            loss: one batch's loss as a function of the model.
            parameters: names, as in `model.named_parameters()`, of what is differentiated.
            draw: seeded directions; backprop does not call it.
            num_examples: rows of the batch.
        """
        ...


def sum_of_rows(parts: Tensor, leading: int = 0) -> Tensor:
    """(.., rows): what a loss's parts, (.., rows) or (.., rows, tokens), come to for each row.

    Args:
        leading: dimensions before the rows.
    """
    return parts if parts.dim() == leading + 1 else parts.flatten(leading + 1).sum(-1)


def on_cpu(shapes: Mapping[str, torch.Size], found: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """What autograd found for each parameter, as a `GradientEstimate` has it; None, not reached, is zero."""
    return {
        name: torch.zeros(shape) if gradient is None else gradient.float().cpu()
        for (name, shape), gradient in zip(shapes.items(), found, strict=True)
    }


def estimate_from_slopes(
    model: nn.Module, slopes: list[float], loss: float, parameters: Sequence[str], draw: Draw
) -> GradientEstimate:
    """The GradientEstimate of an estimator that measures slopes along drawn directions."""
    # Rounded to float32 first: that is what travels, so both sides see the same numbers.
    rounded = torch.tensor(slopes, dtype=torch.float32)
    shapes = {name: model.get_parameter(name).shape for name in parameters}
    return GradientEstimate(draw.gradient(rounded, shapes), loss, rounded)
