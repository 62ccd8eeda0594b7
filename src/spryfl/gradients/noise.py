"""Gaussian noise for privacy, from the operating system's secret entropy.

The one exception to the rule that every random draw comes from an explicit seed: a seed that is known, or that a run
directory keeps, would let anyone subtract the noise again. Tests hand in words of their own.
"""

import secrets
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Words = Callable[[int], np.ndarray]
"""Gives that many random 64-bit words, fresh ones at each call."""


def secret_words(count: int) -> np.ndarray:
    """Words of the operating system's cryptographic generator, never the same again."""
    return np.frombuffer(secrets.token_bytes(8 * count), dtype="<u8")


def gaussian_noise(words: Words, shape: torch.Size) -> Tensor:
    """Independent numbers of N(0, 1), float64, by the inverse of its distribution at 52-bit uniform numbers."""
    uniform = ((words(shape.numel()) >> np.uint64(12)) + 0.5) * 2.0**-52  # never 0 or 1
    normal: Tensor = torch.special.ndtri(torch.from_numpy(uniform))
    return normal.reshape(shape)
