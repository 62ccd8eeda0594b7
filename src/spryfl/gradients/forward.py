"""The forward gradient: slope along a tangent, times the tangent.

    g = (1/K) sum_k (grad L . v_k) v_k,    v_k ~ N(0, I)

(Baydin et al. 2022, "Gradients without Backpropagation"; Spry, Panchal et al. 2024, equation 1.) One
forward-mode pass gives all K slopes exactly; nothing is stored for a backward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spryfl.forward_mode.dual import split
from spryfl.forward_mode.inject import injected
from spryfl.gradients.estimator import GradientEstimate, Loss, SeparableLoss, estimate_from_slopes, sum_of_rows
from spryfl.gradients.tangents import Draw


@dataclass(frozen=True)
class ForwardGradient:
    """Forward mode along `num_tangents` (K) directions of each group of parameters, all in one pass."""

    num_tangents: int = 1

    def estimate(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw, num_examples: int
    ) -> GradientEstimate:
        """See `GradientEstimator.estimate`."""
        shapes = {name: model.get_parameter(name).shape for name in parameters}
        value, slopes = loss_and_slopes(model, loss, draw.stacked(shapes, self.num_tangents))
        return estimate_from_slopes(model, slopes.tolist(), value, parameters, draw)

    def example_slopes(
        self, model: nn.Module, loss: SeparableLoss, parameters: Sequence[str], draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """See `ExampleSlopes.example_slopes`; one pass, as for the batch."""
        tangents = draw.stacked({name: model.get_parameter(name).shape for name in parameters}, self.num_tangents)
        with torch.no_grad(), injected(model, tangents):
            parts, slopes = split(loss.parts(model))
        if slopes is None:
            slopes = parts.new_zeros((draw.num_slopes(parameters, self.num_tangents), *parts.shape))
        return sum_of_rows(parts), sum_of_rows(slopes, 1)


def loss_and_slopes(model: nn.Module, loss: Loss, tangents: Mapping[str, Tensor]) -> tuple[float, Tensor]:
    """One forward-mode pass: the loss and its slopes grad L . v_k along K tangents.

    Args:
        model: any device and floating dtype.
        loss: one batch's loss as a function of the model.
        tangents: v, by parameter name, each (K, *its parameter's shape).

    Returns:
        The loss, and (K,) slopes in the loss's dtype; zeros where it depends on none of the parameters.
    """
    with torch.no_grad(), injected(model, tangents):
        primal, slopes = split(loss(model))
    num_tangents = max((tangent.shape[0] for tangent in tangents.values()), default=0)
    return float(primal), primal.new_zeros(num_tangents) if slopes is None else slopes
