"""The forward gradient: slope along a tangent, times the tangent.

    g = (1/K) sum_k (grad L . v_k) v_k,    v_k ~ N(0, I)

(Baydin et al. 2022, "Gradients without Backpropagation"; Spry, Panchal et al. 2024, equation 1.) One
forward-mode pass gives a slope exactly; nothing is stored for a backward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from spryfl.forward_mode.inject import injected
from spryfl.gradients.estimator import Draw, GradientEstimate, Loss, estimate_from_slopes


@dataclass(frozen=True)
class ForwardGradient:
    """Forward mode along `num_tangents` (K) directions, one pass each."""

    num_tangents: int = 1

    def estimate(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw, num_examples: int
    ) -> GradientEstimate:
        """See `GradientEstimator.estimate`."""
        shapes = {name: model.get_parameter(name).shape for name in parameters}
        losses, slopes = [], []
        for k in range(self.num_tangents):
            tangents = {name: draw(k, name, shape) for name, shape in shapes.items()}
            value, slope = loss_and_slope(model, loss, tangents)
            losses.append(value)
            slopes.append(slope)
        mean_loss = sum(losses) / len(losses)
        return estimate_from_slopes(model, slopes, mean_loss, parameters, draw, num_examples)


def loss_and_slope(model: nn.Module, loss: Loss, tangents: Mapping[str, Tensor]) -> tuple[float, float]:
    """One forward-mode pass: the loss and its slope grad L . v along the tangents.

    Args:
        model: any device and floating dtype.
        loss: one batch's loss as a function of the model.
        tangents: v, by parameter name, each of its parameter's shape.
    """
    with torch.no_grad(), forward_ad.dual_level(), injected(model, tangents):
        primal, tangent = forward_ad.unpack_dual(loss(model))
    return float(primal), 0.0 if tangent is None else float(tangent)
