"""The cohort of a round."""

import numpy as np

_STREAM = 1  # keeps cohorts independent of the other things drawn from the run's seed


def sample_cohort(num_clients: int, cohort_size: int, seed: int, round: int) -> list[int]:
    """Draw a round's clients, uniformly and without replacement, in ascending order."""
    bits = np.random.Philox(key=seed, counter=np.array([0, 0, _STREAM, round], dtype=np.uint64))
    chosen = np.random.Generator(bits).choice(num_clients, size=min(cohort_size, num_clients), replace=False)
    return sorted(int(client) for client in chosen)
