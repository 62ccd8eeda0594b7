"""Client-level differential privacy: what any one client sends is drowned in noise before it reaches the model.

    c_m   = what client m proposes, scaled to norm C over all its units together       (0 if it sent nothing)
    d_u   = (1/n_u) (sum_m c_mu + N(0, (z C)^2 I))     for each unit u, of the n_u clients that were asked to train it

All sums of a round together are one vector. A client moves it by at most C, however many units it trains, and by 2 C
if its data is exchanged for another's. Were n_u the clients that answered, or their examples, then one client's data
would change the weight of the others: so those count that were asked, all alike.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spryfl.federated.aggregation import Contribution, clipped
from spryfl.gradients.noise import Words, gaussian_noise, secret_words


@dataclass(frozen=True)
class ClientPrivacy:
    """How the server keeps each client private (DP-FedAvg with a fixed denominator, McMahan et al. 2018).

    Attributes:
        clip: C, of a client's change over all its units (L2).
        noise_multiplier: z.
        words: where noise and cohorts come from; secret but in tests.
    """

    clip: float
    noise_multiplier: float
    words: Words = secret_words

    def sample_cohort(self, num_clients: int, cohort_size: int) -> list[int]:
        """Draw a round's clients without replacement, in an order that is random too.

        Nobody outside may know who took part, or sampling amplifies no privacy: the run's seed is known to all. And
        units are dealt by place: in ascending order, another client in the cohort would shift everyone's units.
        """
        order = np.argsort(self.words(num_clients), kind="stable")
        return [int(client) for client in order[:cohort_size]]

    def noisy_mean(
        self, contributions: Sequence[Contribution], asked: Iterable[Sequence[str]], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Each parameter's change, float32; of all that anyone was asked for, trained or not.

        Args:
            contributions: of the clients that sent something usable.
            asked: the parameters that each client was asked to train.
            values: the present ones.
        """
        counts = Counter(name for parameters in asked for name in parameters)
        sums = {name: torch.zeros(values[name].shape, dtype=torch.float64) for name in values if name in counts}
        for contribution in sorted(contributions, key=lambda c: c.client):
            for name, change in clipped(contribution, self.clip).change.items():
                sums[name] += change
        scale = self.noise_multiplier * self.clip
        return {
            name: ((total + scale * gaussian_noise(self.words, total.shape)) / counts[name]).float()
            for name, total in sums.items()
        }
