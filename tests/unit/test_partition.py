"""Partitions of every kind, and what clients hold out."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spryfl.config import PartitionConfig, parse_config
from spryfl.data.loading import load_rows
from spryfl.data.partition import PARTITIONS, hold_out, label_counts, partition_rows, share_out
from spryfl.errors import DataError
from spryfl.report.plots import partition_figure, plot_partition

WRITTEN = {"kind": "language_model", "template": "{instruction}\n{response}"}
ALPHAS = [1e-320, 1e-10, 0.01, 0.1, 1.0, 100.0, 1.7e308]


def config_of(kind: str, num_clients: int, alpha: float, least: int) -> PartitionConfig:
    column = "who" if kind == "column" else None
    return PartitionConfig(kind=kind, num_clients=num_clients, alpha=alpha, min_examples=least, column=column)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(set(PARTITIONS) - {"own"})),  # clients' own files: this machine's rows are not shared out
    st.lists(st.integers(0, 4), min_size=30, max_size=200),
    st.integers(1, 10),
    st.sampled_from(ALPHAS),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.99]),
)
def test_every_row_is_of_one_client_and_trained_on_or_held_out(
    kind: str, labels: list[int], num_clients: int, alpha: float, least: int, fraction: float
) -> None:
    column = [f"client {row % num_clients}" for row in range(len(labels))]

    def share(seed: int) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        whole = partition_rows(config_of(kind, num_clients, alpha, least), np.array(labels), column, seed)
        return whole, *hold_out(whole, fraction, seed)

    whole, training, held_out = share(3)
    assert len(whole) == num_clients
    assert sorted(np.concatenate(whole).tolist()) == list(range(len(labels)))
    assert min(map(len, whole)) >= least
    sizes = [len(rows) for rows in whole]
    assert kind != "iid" or max(sizes) - min(sizes) <= 1
    assert kind != "column" or all(len({column[row] for row in rows}) == 1 for rows in whole)
    for rows, kept, out in zip(whole, training, held_out, strict=True):
        assert sorted([*kept, *out]) == rows.tolist()
        assert len(kept) >= 1
        assert len(out) <= fraction * len(rows) + 0.5
        assert len(out) > fraction * len(rows) - 0.5 or len(kept) == 1
        assert kept.tolist() == sorted(kept)
    again = share(3)
    for one, other in zip((whole, training, held_out), again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_sizes_skewed_and_labels_alike() -> None:
    """Quantity: the smaller alpha, the more unequal the sizes; labels in each client as in all rows."""
    labels = np.arange(20_000) % 2

    def parts(alpha: float) -> list[np.ndarray]:
        return partition_rows(PartitionConfig(kind="quantity", num_clients=20, alpha=alpha), labels, None, 0)

    spread = [np.std([len(rows) for rows in parts(alpha)]) for alpha in (0.1, 1.0, 100.0)]
    assert spread[0] > spread[1] > spread[2] > 0
    large = [rows for rows in parts(1.0) if len(rows) > 400]
    assert len(large) > 5
    assert all(abs(labels[rows].mean() - 0.5) < 0.1 for rows in large)


def test_iid_clients_are_alike() -> None:
    labels = np.sort(np.arange(4000) % 4)
    counts = label_counts(partition_rows(PartitionConfig(kind="iid", num_clients=10), labels, None, 0), labels, 4)
    assert counts.sum(axis=1).tolist() == [400] * 10
    assert abs(counts / 400 - 0.25).max() < 0.1


def test_extreme_concentrations() -> None:
    labels = np.arange(1000) % 2
    one = partition_rows(PartitionConfig(num_clients=10, alpha=1e-320, min_examples=1), labels, None, 0)
    assert sorted(len(rows) for rows in one) == [1] * 8 + [496] * 2  # two clients had all of a label each
    even = partition_rows(PartitionConfig(num_clients=10, alpha=1.7e308), labels, None, 0)
    assert {len(rows) for rows in even} <= {98, 99, 100, 101, 102}


def test_what_is_moved_to_small_clients_is_drawn() -> None:
    """Not all of the last label, as it was in the order of the giver's rows."""
    labels = np.arange(4000) % 4
    found = partition_rows(PartitionConfig(num_clients=40, alpha=1e-10, min_examples=20), labels, None, 0)
    moved = label_counts([rows for rows in found if len(rows) == 20], labels, 4).sum(axis=0)
    assert moved.min() > 0.5 * moved.max()


def test_how_much_is_held_out() -> None:
    partition = [np.arange(count) for count in (1, 2, 3, 4, 7, 8, 100)]
    training, held_out = hold_out(partition, 0.2, seed=0)
    assert [len(rows) for rows in held_out] == [0, 0, 1, 1, 1, 2, 20]  # 0.2, 0.4, 0.6, 0.8, 1.4, 1.6
    assert [len(rows) for rows in training] == [1, 2, 2, 3, 6, 6, 80]
    assert [len(rows) for rows in hold_out(partition, 0.99, 0)[0]] == [1] * 7
    assert not np.array_equal(hold_out(partition, 0.2, 1)[1][-1], held_out[-1])
    assert np.array_equal(hold_out(partition, 0.0, 0)[0][-1], partition[-1])


@pytest.mark.parametrize("kind", ["dirichlet", "quantity", "iid"])
def test_a_minimum_that_cannot_be_met(kind: str) -> None:
    config = PartitionConfig(kind=kind, num_clients=10, min_examples=6)
    with pytest.raises(DataError, match=r"need 60 rows, there are 50: lower partition\.num_clients or"):
        partition_rows(config, np.zeros(50), None, 0)


@pytest.mark.parametrize(("num_clients", "num_labels"), [(1, 1), (3, 30), (10, 3), (200, 2)])
def test_the_plot(num_clients: int, num_labels: int, tmp_path: Path) -> None:
    counts = np.arange(num_clients * num_labels).reshape(num_clients, num_labels)
    plot_partition(counts + (counts.sum() == 0), tmp_path)
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_each_clients_shares() -> None:
    share, size = partition_figure(np.array([[3, 1], [0, 0], [0, 2], [5, 5]])).axes
    (image,) = share.images
    first, second = (np.asarray(image.get_array())[row, 0] for row in (0, -1))  # the colours of label 0 and 1
    shown = (np.asarray(image.get_array()) == first).all(axis=-1).mean(axis=0)
    assert not np.array_equal(first, second)
    assert shown == pytest.approx([0.75, 0.0, 0.5], abs=0.01)  # who holds none is left out
    (sizes,) = (patch for patch in size.patches)
    assert sizes.get_data().values.tolist() == [4, 2, 10]


def test_label_counts() -> None:
    counts = label_counts([np.array([0, 1, 2]), np.array([3])], np.array([1, 0, 1, 2]), 3)
    assert counts.tolist() == [[1, 2, 0], [0, 0, 1]]


def test_smaller_alpha_is_more_unequal() -> None:
    labels = np.arange(4000) % 2

    def skew(alpha: float) -> float:
        config = PartitionConfig(num_clients=20, alpha=alpha)
        return float(np.mean([abs(labels[rows].mean() - 0.5) for rows in partition_rows(config, labels, None, 0)]))

    assert skew(0.1) > skew(1.0) > skew(100.0)


@pytest.mark.parametrize(
    ("data", "task", "column", "num_clients"),
    [
        ({"name": "dolly_15k", "text_columns": ["instruction", "response"]}, WRITTEN, "category", 8),
        ({"name": "shakespeare_by_speaker"}, {"kind": "language_model"}, "client_id", 183),
        ({"name": "mnli", "text_columns": ["premise", "hypothesis"]}, {}, "genre", 5),
    ],
)
def test_natural_partitions_of_real_data(
    data: dict[str, object], task: dict[str, object], column: str, num_clients: int, shared_data: Path
) -> None:
    """Categories of instructions, speakers, genres: 80 / 20 within each."""
    table = {
        "data": data | {"name": str(shared_data / str(data["name"]))},
        "task": task,
        "partition": {"kind": "column", "column": column, "min_examples": 2},
        "evaluation": {"held_out": 0.2},
    }
    config = parse_config(table)
    rows = load_rows(config.data, 0, config.task)
    training, held_out = share_out(config, rows)
    values = rows.train[column][:]
    assert len(training) == num_clients == len(set(values))
    for kept, out in zip(training, held_out, strict=True):
        assert len({values[row] for row in (*kept, *out)}) == 1
        assert abs(len(out) - 0.2 * (len(kept) + len(out))) <= 0.5


def test_natural_partition() -> None:
    config = PartitionConfig(kind="column", column="who", min_examples=1)
    partition = partition_rows(config, np.zeros(5), ["b", "a", "b", "c", "a"], 0)
    assert [rows.tolist() for rows in partition] == [[1, 4], [0, 2], [3]]
    with pytest.raises(DataError, match="row 1 of those trained on has no value"):
        partition_rows(config, np.zeros(3), ["a", None, "None"], 0)
    with pytest.raises(DataError, match=r"c \(1\)"):
        partition_rows(config.model_copy(update={"min_examples": 2}), np.zeros(5), ["b", "a", "b", "c", "a"], 0)
