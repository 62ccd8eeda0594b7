"""The slope by central difference, times the direction.

    g = (1/K) sum_k (L(w + h v_k) - L(w - h v_k)) / (2h) v_k

(SPSA, Spall 1992; MeZO, Malladi et al. 2023, algorithm 1; Baffle, Feng et al. 2023, with all K terms
weighted 1/(2 h K).) Both evaluations run without dropout, as MeZO does: with two different masks the
difference would measure the masks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spryfl.gradients.estimator import GradientEstimate, Loss, estimate_from_slopes
from spryfl.gradients.tangents import Draw


@dataclass(frozen=True)
class ZerothOrder:
    """Central differences of step `step_size` (h) along `num_tangents` (K) directions of each group of parameters."""

    num_tangents: int = 1
    step_size: float = 1e-3

    def estimate(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw, num_examples: int
    ) -> GradientEstimate:
        """See `GradientEstimator.estimate`."""
        named = {name: model.get_parameter(name) for name in parameters}
        losses, slopes = [], []
        with torch.no_grad(), _dropout_off(model):
            for direction in draw.directions({name: p.shape for name, p in named.items()}, self.num_tangents):
                above = _loss_at(model, loss, named, direction, self.step_size)
                below = _loss_at(model, loss, named, direction, -self.step_size)
                losses.append((above + below) / 2)
                slopes.append((above - below) / (2 * self.step_size))
        mean_loss = sum(losses) / len(losses)
        return estimate_from_slopes(model, slopes, mean_loss, parameters, draw, num_examples)


def _loss_at(
    model: nn.Module, loss: Loss, named: Mapping[str, nn.Parameter], direction: Mapping[str, Tensor], step: float
) -> float:
    """L(w + step v), the parameters restored bitwise afterwards."""
    moved = {name: named[name] for name in direction}
    saved = {name: p.detach().clone() for name, p in moved.items()}
    try:
        for name, parameter in moved.items():
            parameter.add_(direction[name].to(parameter.device, parameter.dtype), alpha=step)
        return float(loss(model))
    finally:
        for name, parameter in moved.items():
            parameter.copy_(saved[name])


@contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, each back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
