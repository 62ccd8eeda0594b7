"""Which training examples each client holds: lists of row numbers, one a client."""

from collections.abc import Callable, Sequence

import numpy as np

from spryfl.config import PartitionConfig, RunConfig
from spryfl.data.loading import Rows
from spryfl.errors import DataError, nearest

Partition = list[np.ndarray]
"""Sorted row numbers of each client; every row belongs to one client."""

_HELD_OUT_STREAM = 2  # keeps held-out rows independent of the cohorts, drawn from the same seed
_LARGEST_ALPHA = 1e12  # proportions are equal to six digits there, and sums of more overflow


def share_out(config: RunConfig, rows: Rows) -> tuple[Partition, Partition]:
    """The rows that each client trains on, and those that it is evaluated on.

    Raises:
        DataError: the column is missing, rows are too few, or no client is left with any to be evaluated on.
    """
    column = config.partition.column
    if column is not None and column not in rows.train.column_names:
        known = rows.train.column_names
        raise DataError(f"partition.column: no column '{column}'.{nearest(column, known)} There is {known}")
    whole = partition_rows(
        config.partition,
        rows.classes(config.data.label_column),
        None if column is None else rows.train[column][:],
        config.seed,
    )
    partition, held_out = hold_out(whole, config.evaluation.held_out, config.seed)
    if config.evaluation.held_out > 0 and not any(map(len, held_out)):
        raise DataError(
            f"evaluation.held_out = {config.evaluation.held_out:g} is less than a row of every client: raise it, or "
            "lower partition.num_clients, so that clients hold more rows"
        )
    return partition, held_out


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
    if config.kind not in ("column", "own") and needed > len(labels):
        raise DataError(
            f"partition: {config.num_clients} clients of at least {config.min_examples} examples need {needed} rows, "
            f"there are {len(labels)}: lower partition.num_clients or partition.min_examples"
        )
    generator = np.random.Generator(np.random.Philox(key=seed))
    return [np.sort(rows) for rows in PARTITIONS[config.kind](config, labels, column, generator)]


def hold_out(partition: Partition, fraction: float, seed: int) -> tuple[Partition, Partition]:
    """Cut each client's rows into those it trains on and those it is evaluated on.

    Rounded to whole rows, halves up, but a client keeps at least one row to train on: of 0.2, clients of one or two
    rows hold nothing out. A client's cut depends on the seed, its number and its rows alone.

    Args:
        fraction: of each client's rows held out; 0 for none.

    Returns:
        The rows trained on and those held out, sorted, by client.
    """
    training, held_out = [], []
    for client, rows in enumerate(partition):
        count = max(0, min(int(fraction * len(rows) + 0.5), len(rows) - 1))
        address = np.array([0, client, _HELD_OUT_STREAM, 0], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=seed, counter=address)).permutation(rows)
        held_out.append(np.sort(order[:count]))
        training.append(np.sort(order[count:]))
    return training, held_out


def label_counts(partition: Partition, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """(clients, labels) rows of each label that each client holds."""
    return np.stack([np.bincount(labels[rows], minlength=num_labels) for rows in partition])


def _iid(config: PartitionConfig, labels: np.ndarray, column: object, generator: np.random.Generator) -> Partition:
    """Equal shares of shuffled rows."""
    return np.array_split(generator.permutation(len(labels)), config.num_clients)


def _dirichlet(
    config: PartitionConfig, labels: np.ndarray, column: object, generator: np.random.Generator
) -> Partition:
    """Each label's rows in proportions drawn from a Dirichlet distribution (Yurochkin et al. 2019)."""
    shares: list[list[np.ndarray]] = [[] for _ in range(config.num_clients)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        for share, part in zip(shares, _in_proportions(rows, config, generator), strict=True):
            share.append(part)
    return _with_minimum([np.concatenate(share) for share in shares], config.min_examples, generator)


def _quantity(config: PartitionConfig, labels: np.ndarray, column: object, generator: np.random.Generator) -> Partition:
    """Shuffled rows in sizes drawn from a Dirichlet distribution ("quantity skew" of NIID-Bench, Li et al. 2022)."""
    parts = _in_proportions(generator.permutation(len(labels)), config, generator)
    return _with_minimum(parts, config.min_examples, generator)


def _in_proportions(rows: np.ndarray, config: PartitionConfig, generator: np.random.Generator) -> Partition:
    """Consecutive parts of rows, their sizes in proportions drawn from a symmetric Dirichlet distribution."""
    proportions = generator.dirichlet(np.full(config.num_clients, min(config.alpha, _LARGEST_ALPHA)))
    cuts = (np.cumsum(proportions)[:-1] * len(rows)).astype(int)
    return np.split(rows, cuts)


def _with_minimum(partition: Partition, minimum: int, generator: np.random.Generator) -> Partition:
    """Move rows drawn from the largest clients to those that hold fewer than `minimum`."""
    sizes = np.array([len(rows) for rows in partition])
    for client in np.flatnonzero(sizes < minimum):
        while sizes[client] < minimum:
            giver = int(np.argmax(sizes))
            place, rows = generator.integers(sizes[giver]), partition[giver]
            partition[client] = np.append(partition[client], rows[place])
            rows[place] = rows[-1]
            partition[giver] = rows[:-1]
            sizes[client] += 1
            sizes[giver] -= 1
    return partition


def _by_column(
    config: PartitionConfig, labels: np.ndarray, column: Sequence[object] | None, generator: np.random.Generator
) -> Partition:
    """One client for each value of a column, in sorted order: a natural partition."""
    assert column is not None
    empty = next((row for row, value in enumerate(column) if value is None), None)
    if empty is not None:
        raise DataError(
            f"partition.column = '{config.column}': row {empty} of those trained on has no value, so no client: drop "
            "it, or give it one"
        )
    values = np.array([str(value) for value in column])
    names, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    small = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < config.min_examples]
    if small:
        raise DataError(
            f"partition.column = '{config.column}': {len(small)} clients hold fewer than partition.min_examples = "
            f"{config.min_examples} rows, first {small[0]}: lower min_examples or drop those rows"
        )
    return np.split(np.argsort(places, kind="stable"), np.cumsum(counts)[:-1])


def _own(config: PartitionConfig, labels: np.ndarray, column: object, generator: np.random.Generator) -> Partition:
    """All rows of this machine: on a client's its own; on the server's its own, in place of any client's."""
    return [np.arange(len(labels))] * config.num_clients


PARTITIONS: dict[str, Callable[..., Partition]] = {
    "dirichlet": _dirichlet,
    "quantity": _quantity,
    "iid": _iid,
    "column": _by_column,
    "own": _own,
}
