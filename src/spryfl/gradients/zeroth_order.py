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

from spryfl.gradients.estimator import GradientEstimate, Loss, SeparableLoss, estimate_from_slopes, sum_of_rows
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
        losses, slopes = self._differences(model, loss, parameters, draw)
        return estimate_from_slopes(model, slopes.tolist(), float(losses.mean()), parameters, draw)

    def example_slopes(
        self, model: nn.Module, loss: SeparableLoss, parameters: Sequence[str], draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """See `ExampleSlopes.example_slopes`; as many passes as for the batch."""
        losses, slopes = self._differences(model, lambda model: sum_of_rows(loss.parts(model)), parameters, draw)
        return losses.mean(0), slopes

    def _differences(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """Along each direction: the mean of the loss at both ends, and its central difference.

        Args:
            loss: a number, or one a row.

        Returns:
            (K,) or (K, rows) each, in float64 on the CPU: a difference of float32 losses keeps few digits as it is.
        """
        named = {name: model.get_parameter(name) for name in parameters}
        saved = {name: parameter.detach().clone() for name, parameter in named.items()}
        losses = []
        with torch.no_grad(), _dropout_off(model):
            for drawn in draw.directions({name: p.shape for name, p in named.items()}, self.num_tangents):
                direction = {name: v.to(named[name]) for name, v in drawn.items()}
                for step in (self.step_size, -self.step_size):
                    with _moved(named, saved, direction, step):
                        losses.append(loss(model))
        above, below = torch.stack(losses).cpu().double().unflatten(0, (-1, 2)).unbind(1)
        return (above + below) / 2, (above - below) / (2 * self.step_size)


@contextmanager
def _moved(
    named: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor], direction: Mapping[str, Tensor], step: float
) -> Iterator[None]:
    """The parameters at w + step v, and afterwards bitwise at w, which `saved` holds."""
    try:
        for name, v in direction.items():
            named[name].add_(v, alpha=step)
        yield
    finally:
        for name in direction:
            named[name].copy_(saved[name])


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
