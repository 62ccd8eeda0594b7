"""The exact gradient of the head beside any estimate of the layers' parameters.

What lies above the layers is small: from the last hidden state, which the estimate's pass computes anyway, it is
run once more and differentiated, without a pass through the layers. And the estimate is freed of the head's
share of its variance.

A zeroth-order estimate leaves the hidden state of its last pass, whose parameters were h along a direction: the
head's gradient is then exact to the order of h.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from spryfl.forward_mode.dual import split
from spryfl.forward_mode.patching import Forward, patched_forwards
from spryfl.gradients.backprop import Backprop, only_requiring_grad
from spryfl.gradients.calls import HIDDEN, hidden_of
from spryfl.gradients.estimator import GradientEstimate, GradientEstimator, Loss, on_cpu
from spryfl.gradients.tangents import Draw


@dataclass(frozen=True)
class ExactHead:
    """An estimator whose head is exact.

    Attributes:
        inner: estimates all other parameters' gradient.
        layers: finds the model's layers in the order it calls them.
        head: names of the parameters above the layers.
    """

    inner: GradientEstimator
    layers: Callable[[nn.Module], Sequence[nn.Module]]
    head: frozenset[str]

    def estimate(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw, num_examples: int
    ) -> GradientEstimate:
        """See `GradientEstimator.estimate`. Slopes are not returned: the head's gradient cannot be made of them."""
        head = [name for name in parameters if name in self.head]
        others = [name for name in parameters if name not in self.head]
        if not head or not others:
            alone = Backprop() if head else self.inner  # stores what lies above the layers, nothing else
            return alone.estimate(model, loss, parameters, draw, num_examples)
        layers = list(self.layers(model))
        last: list[Any] = []
        with _recorded(layers, last):
            estimate = self.inner.estimate(model, loss, others, draw, num_examples)
        with torch.enable_grad(), only_requiring_grad(model, head) as wanted, _skipped(layers, last[0]):
            found: Sequence[Tensor | None] = torch.autograd.grad(loss(model), wanted, allow_unused=True)
        exact = on_cpu({name: p.shape for name, p in zip(head, wanted, strict=True)}, found)
        return replace(estimate, gradients=estimate.gradients | exact, slopes=None)


@contextmanager
def _recorded(layers: Sequence[nn.Module], last: list[Any]) -> Iterator[None]:
    """Put the last call's output, without its tangents, into `last`: that of the latest pass inside."""
    places = count()

    def recording(layer: nn.Module, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if next(places) % len(layers) == len(layers) - 1:
                hidden = split(hidden_of(output, layer))[0].detach()
                last[:] = [hidden if isinstance(output, Tensor) else (hidden, *output[1:])]
            return output

        return run

    with patched_forwards(list(dict.fromkeys(layers)), recording):
        yield


@contextmanager
def _skipped(layers: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Leave the layers out of the pass inside: the last one returns this."""
    places = count()

    def skipping(layer: nn.Module, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs[HIDDEN]
            if next(places) == len(layers) - 1:
                return output
            return given if isinstance(output, Tensor) else (given, *output[1:])

        return run

    with patched_forwards(list(dict.fromkeys(layers)), skipping):
        yield
