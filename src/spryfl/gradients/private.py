"""Slopes that keep each example private: clipped, summed and noised before anything is made of them.

    s_i   = (grad L_i . v_1, .., grad L_i . v_K)                    of each example i of a batch of b
    s     = (1/b) (sum_i s_i min(1, C / |s_i|) + N(0, (z C)^2 I))
    g     = (1/K) sum_k s_k v_k

(DP-SGD, Abadi et al. 2016, with slopes in place of gradients; compare DP-ZO, Tang et al. 2024.) Forward mode gives
the K slopes of every example in the pass that gives the batch's, so nothing is stored for each example but K
numbers. The directions come from a seed and know nothing of the data: the gradient, and all that is made of it, is a
post-processing of K noised numbers, however many parameters there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from spryfl.errors import ModelError
from spryfl.gradients.estimator import GradientEstimate, Loss, SeparableLoss, estimate_from_slopes
from spryfl.gradients.noise import Words, gaussian_noise, secret_words
from spryfl.gradients.tangents import Draw


class ExampleSlopes(Protocol):
    """An estimator that can tell each example's slopes."""

    def example_slopes(
        self, model: nn.Module, loss: SeparableLoss, parameters: Sequence[str], draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """(rows,) what the mean loss is the sum of, and (slopes, rows) the slopes of each of these parts."""
        ...


@dataclass(frozen=True)
class PrivateSlopes:
    """An estimator whose gradient is made of clipped and noised slopes.

    Attributes:
        inner: tells each example's slopes.
        clip: C, of an example's slopes together (L2), of its own loss.
        noise_multiplier: z.
        words: where the noise comes from; secret but in tests.
    """

    inner: ExampleSlopes
    clip: float
    noise_multiplier: float
    words: Words = secret_words

    def estimate(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw, num_examples: int
    ) -> GradientEstimate:
        """See `GradientEstimator.estimate`. Its loss is the true one, which is not private.

        Raises:
            ModelError: the examples cannot be told apart.
        """
        if not isinstance(loss, SeparableLoss):
            raise ModelError("privacy.level = 'example': the loss has no `parts`, one an example")
        parts, slopes = self.inner.example_slopes(model, loss, parameters, draw)
        if parts.shape != (num_examples,):
            raise ModelError(
                f"privacy.level = 'example': {tuple(parts.shape)} parts of a loss, {num_examples} examples"
            )
        # An example's own slopes; one that overflowed must not tell so.
        own = torch.nan_to_num(slopes.cpu().double() * num_examples, nan=0.0, posinf=0.0, neginf=0.0)
        factors = (self.clip / own.norm(dim=0)).clamp(max=1.0)
        noise = gaussian_noise(self.words, own.shape[:1]) * (self.noise_multiplier * self.clip)
        private = (torch.nan_to_num(own * factors).sum(1) + noise) / num_examples
        return estimate_from_slopes(model, private.tolist(), float(parts.sum()), parameters, draw)
