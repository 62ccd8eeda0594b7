"""A client's optimizer, on float32 master copies of what it trains."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

LocalOptimizerName = Literal["sgd", "adam", "adamw"]

OPTIMIZERS: dict[LocalOptimizerName, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class LocalOptimizer:
    """Steps float32 values along gradients.

    The client and the server that replays it from slopes both use this, on the CPU, so both come to
    the same values bitwise.
    """

    def __init__(
        self, values: Mapping[str, Tensor], name: LocalOptimizerName, learning_rate: float, weight_decay: float
    ) -> None:
        self.values = {key: value.clone() for key, value in values.items()}
        self._optimizer = OPTIMIZERS[name](
            list(self.values.values()), lr=learning_rate, weight_decay=weight_decay, foreach=False
        )

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """One step in place; gradients by the names given at the start."""
        for name, value in self.values.items():
            value.grad = gradients[name]
        self._optimizer.step()
        self._optimizer.zero_grad()  # an update is to hold values alone
