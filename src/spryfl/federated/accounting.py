"""How much privacy a run has spent: epsilon at a given delta, after so many rounds.

Neighbouring data sets differ in one client (or one example) exchanged for another, so that their number is public,
as it must be with cohorts of a fixed size. Exchanging one moves a sum of clipped vectors by 2 C, so noise of standard
deviation z C has a multiplier of z / 2 to the accountant.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from spryfl.errors import ConfigError
from spryfl.federated.sampling import Sampling

EXCHANGE = 2.0
"""By how many clips a sum moves when one of its terms is exchanged."""
ORDERS = (*range(2, 65), 128, 256, 512, 1024)
"""Of the Renyi divergences; the bound is the best of them."""


@dataclass(frozen=True)
class ClientAccountant:
    """Epsilon for a client, of rounds whose cohorts are drawn in secret.

    Two bounds hold, and the smaller one is told: Gaussian noise in every round as if all clients took part in each,
    exactly (Balle & Wang 2018), and that of sampling without replacement (Wang et al. 2019, theorem 27).
    """

    noise_multiplier: float
    delta: float
    num_clients: int
    cohort_size: int

    def epsilon(self, round: int) -> float:
        """After that many rounds."""
        every = gaussian_epsilon(self.noise_multiplier, round, self.delta)
        if self.cohort_size == self.num_clients:
            return every
        sampled = sampled_epsilon(self.noise_multiplier, round, self.delta, self.num_clients, self.cohort_size)
        return min(every, sampled)


@dataclass
class ExampleAccountant:
    """Epsilon for an example of the client that was asked most often; cohorts and batches are known to the server.

    Attributes:
        passes: how often a client goes through its examples in a round; each is in one batch of a pass.
    """

    noise_multiplier: float
    delta: float
    num_clients: int
    cohort_size: int
    seed: int
    passes: int
    _asked: Counter[int] = field(default_factory=Counter)
    _round: int = 0

    def epsilon(self, round: int) -> float:
        """After that many rounds; they count up."""
        while self._round < round:
            self._round += 1
            self._asked.update(Sampling(self.num_clients, self.cohort_size).cohort(self.seed, self._round))
        return gaussian_epsilon(self.noise_multiplier, max(self._asked.values()) * self.passes, self.delta)


Accountant = ClientAccountant | ExampleAccountant


def gaussian_epsilon(noise_multiplier: float, num_releases: int, delta: float) -> float:
    """Of that many releases, each with Gaussian noise: exact, as together they are one of less noise."""
    sigma = noise_multiplier / EXCHANGE / num_releases**0.5
    return float(dp_accounting().get_epsilon_gaussian(sigma, delta))


def sampled_epsilon(
    noise_multiplier: float, num_rounds: int, delta: float, num_clients: int, cohort_size: int
) -> float:
    """Of that many rounds, each of a cohort drawn without replacement: a bound by Renyi divergences."""
    spent = num_rounds * _divergences(noise_multiplier, num_clients, cohort_size)
    epsilon, _ = dp_accounting().rdp.rdp_privacy_accountant.compute_epsilon(ORDERS, spent, delta)
    return float(epsilon)


@lru_cache(maxsize=8)  # a second's work, and the same for all rounds
def _divergences(noise_multiplier: float, num_clients: int, cohort_size: int) -> np.ndarray:
    """(orders,) the Renyi divergences of one round."""
    library = dp_accounting()
    accountant = library.rdp.RdpAccountant(ORDERS, library.NeighboringRelation.REPLACE_ONE)
    noise = library.GaussianDpEvent(noise_multiplier / EXCHANGE)
    accountant.compose(library.SampledWithoutReplacementDpEvent(num_clients, cohort_size, noise))
    return np.asarray(accountant.rdp)


def dp_accounting() -> Any:
    """Google's accountants.

    Raises:
        ConfigError: they are not installed.
    """
    try:
        import dp_accounting as library
    except ImportError as error:
        raise ConfigError(f"privacy.level needs dp-accounting: pip install 'spryfl[privacy]' ({error})") from error
    return library
