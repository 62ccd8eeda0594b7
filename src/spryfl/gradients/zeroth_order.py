"""The slope by central difference, times the direction.

    g = (1/K) sum_k (L(w + h v_k) - L(w - h v_k)) / (2h) v_k

(SPSA, Spall 1992; MeZO, Malladi et al. 2023, algorithm 1; Baffle, Feng et al. 2023, with all K terms
weighted 1/(2 h K).) Both evaluations run without dropout, as MeZO does: with two different masks the
difference would measure the masks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from spryfl.gradients.estimator import GradientEstimate, Loss, SeparableLoss, estimate_from_slopes, sum_of_rows
from spryfl.gradients.tangents import Draw

Measured = TypeVar("Measured", float, Tensor)


@dataclass(frozen=True)
class ZerothOrder:
    """Central differences of step `step_size` (h) along `num_tangents` (K) directions of each group of parameters."""

    num_tangents: int = 1
    step_size: float = 1e-3

    def estimate(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw, num_examples: int
    ) -> GradientEstimate:
        """See `GradientEstimator.estimate`."""
        # Python's floats: a difference of float32 losses keeps few digits as it is.
        losses, slopes = self._differences(model, lambda model: float(loss(model)), parameters, draw)
        return estimate_from_slopes(model, slopes, sum(losses) / len(losses), parameters, draw, num_examples)

    def example_slopes(
        self, model: nn.Module, loss: SeparableLoss, parameters: Sequence[str], draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """See `ExampleSlopes.example_slopes`; as many passes as for the batch."""
        parts, slopes = self._differences(
            model, lambda model: sum_of_rows(loss.parts(model)).double(), parameters, draw
        )
        return torch.stack(parts).mean(0), torch.stack(slopes)

    def _differences(
        self, model: nn.Module, loss: Callable[[nn.Module], Measured], parameters: Sequence[str], draw: Draw
    ) -> tuple[list[Measured], list[Measured]]:
        """Along each direction: the mean of the loss at both ends, and its central difference."""
        named = {name: model.get_parameter(name) for name in parameters}
        losses, slopes = [], []
        with torch.no_grad(), _dropout_off(model):
            for direction in draw.directions({name: p.shape for name, p in named.items()}, self.num_tangents):
                above = _loss_at(model, loss, named, direction, self.step_size)
                below = _loss_at(model, loss, named, direction, -self.step_size)
                losses.append((above + below) / 2)
                slopes.append((above - below) / (2 * self.step_size))
        return losses, slopes


def _loss_at(
    model: nn.Module,
    loss: Callable[[nn.Module], Measured],
    named: Mapping[str, nn.Parameter],
    direction: Mapping[str, Tensor],
    step: float,
) -> Measured:
    """L(w + step v), the parameters restored bitwise afterwards."""
    moved = {name: named[name] for name in direction}
    saved = {name: p.detach().clone() for name, p in moved.items()}
    try:
        for name, parameter in moved.items():
            parameter.add_(direction[name].to(parameter.device, parameter.dtype), alpha=step)
        return loss(model)
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
