"""Which training examples each client holds: lists of row numbers, one a client."""

from collections.abc import Callable, Sequence

import numpy as np

from spryfl.config import PartitionConfig
from spryfl.errors import DataError

Partition = list[np.ndarray]
"""Sorted row numbers of each client; every row belongs to one client."""


def partition_rows(
    config: PartitionConfig, labels: np.ndarray, column: Sequence[object] | None, seed: int
) -> Partition:
    """Share rows among clients.

    Args:
        labels: (rows,) class numbers.
        column: (rows,) the values of `config.column`, for kind "column".
        seed: the same seed gives the same partition.

    Raises:
        DataError: there are too few rows for every client to hold `min_examples`.
    """
    needed = config.num_clients * config.min_examples
    if config.kind != "column" and needed > len(labels):
        raise DataError(
            f"partition: {config.num_clients} clients of at least {config.min_examples} examples need {needed} rows, "
            f"there are {len(labels)}: lower partition.num_clients or partition.min_examples"
        )
    generator = np.random.Generator(np.random.Philox(key=seed))
    return [np.sort(rows) for rows in PARTITIONS[config.kind](config, labels, column, generator)]


def _iid(config: PartitionConfig, labels: np.ndarray, column: object, generator: np.random.Generator) -> Partition:
    """Equal shares of shuffled rows."""
    return np.array_split(generator.permutation(len(labels)), config.num_clients)


def _dirichlet(
    config: PartitionConfig, labels: np.ndarray, column: object, generator: np.random.Generator
) -> Partition:
    """Each label's rows in proportions drawn from a Dirichlet distribution (Hsu et al. 2019)."""
    shares: list[list[np.ndarray]] = [[] for _ in range(config.num_clients)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        proportions = generator.dirichlet(np.full(config.num_clients, config.alpha))
        cuts = (np.cumsum(proportions)[:-1] * len(rows)).astype(int)
        for share, part in zip(shares, np.split(rows, cuts), strict=True):
            share.append(part)
    return _with_minimum([np.concatenate(share) for share in shares], config.min_examples)


def _with_minimum(partition: Partition, minimum: int) -> Partition:
    """Move rows from the largest clients to those that hold fewer than `minimum`."""
    sizes = np.array([len(rows) for rows in partition])
    for client in np.flatnonzero(sizes < minimum):
        while sizes[client] < minimum:
            giver = int(np.argmax(sizes))
            partition[client] = np.append(partition[client], partition[giver][-1])
            partition[giver] = partition[giver][:-1]
            sizes[client] += 1
            sizes[giver] -= 1
    return partition


def _by_column(
    config: PartitionConfig, labels: np.ndarray, column: Sequence[object] | None, generator: np.random.Generator
) -> Partition:
    """One client for each value of a column, in sorted order: a natural partition."""
    assert column is not None
    values = np.array([str(value) for value in column])
    names, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    small = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < config.min_examples]
    if small:
        raise DataError(
            f"partition.column = '{config.column}': {len(small)} clients hold fewer than partition.min_examples = "
            f"{config.min_examples} rows, first {small[0]}: lower min_examples or drop those rows"
        )
    return np.split(np.argsort(places, kind="stable"), np.cumsum(counts)[:-1])


PARTITIONS: dict[str, Callable[..., Partition]] = {"dirichlet": _dirichlet, "iid": _iid, "column": _by_column}
