"""Logit adjustment: a client with few classes trains as if it had as many rows of each.

    L_i = -log softmax(f(x_i) + tau log p)_{y_i},    p_c = (n_c + 1) / (n + C)

(Menon et al. 2021, equation 10; on clients of a federation Zhang et al. 2022), n_c the client's own rows of class c,
one more of each so that a class it has none of is improbable, not impossible. The logits themselves then need not say
how frequent a class is with this client, so that the gradients of clients with different labels agree more; which
matters most where few clients train a unit. Evaluation, and training that is to serve the client alone, use the logits
as they are. What is learned leans to no class, also where all clients together have more of one than of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spryfl.data.examples import Batch, Examples
from spryfl.data.task import Classifier, Evaluation


@dataclass(frozen=True)
class AdjustedClassification:
    """A task of classification whose losses are adjusted to one client's labels.

    Attributes:
        task: what is adjusted.
        offset: (classes,) added to the logits, `label_offset`.
    """

    task: Classifier
    offset: Tensor

    def batch(self, examples: Examples, rows: Sequence[int]) -> Batch:
        """See `Task.batch`."""
        return self.task.batch(examples, rows)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows,) the adjusted cross-entropy of each row."""
        logits = self.task.logits(model, batch)
        offset = self.offset.to(device=logits.device, dtype=logits.dtype)
        return nn.functional.cross_entropy(logits + offset, batch["labels"], reduction="none")

    def evaluate(self, model: nn.Module, examples: Examples, rows: Sequence[int], batch_size: int) -> Evaluation:
        """See `Task.evaluate`; nothing is adjusted."""
        return self.task.evaluate(model, examples, rows, batch_size)


def label_offset(labels: np.ndarray, num_classes: int, strength: float) -> Tensor:
    """(classes,) `strength` times the log of the labels' shares, of one more row of each class, in float64."""
    counts = np.bincount(labels, minlength=num_classes) + 1.0
    return strength * torch.from_numpy(np.log(counts / counts.sum()))
