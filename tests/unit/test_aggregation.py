"""Aggregation against hostile clients: by hand-sized numbers, and for every kind of upload."""

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spryfl.federated.aggregation import AGGREGATIONS, Contribution, aggregate, clipped, num_trimmed
from spryfl.federated.client import LocalTraining
from spryfl.federated.messages import ClientTask, ClientUpdate
from spryfl.federated.rounds import run_round
from spryfl.federated.server_optimizer import ServerUpdate
from spryfl.federated.state import FederatedState, Federation

VALUES = {"a": torch.zeros(2), "b": torch.zeros(3)}


def of(values: Sequence[float], weights: Sequence[int] | None = None) -> list[Contribution]:
    weights = weights or [1] * len(values)
    return [Contribution(i, {"a": torch.tensor([v])}, w) for i, (v, w) in enumerate(zip(values, weights, strict=True))]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("mean", [1.0, 2.0, 9.0], 4.0),
        ("median", [7.0], 7.0),
        ("median", [1.0, 9.0], 5.0),  # of two: the mean
        ("median", [1.0, 9.0, 2.0], 2.0),
        ("median", [1.0, 9.0, 2.0, 4.0], 3.0),  # between the middle two
        ("trimmed_mean", [1.0, 9.0], 5.0),
        ("trimmed_mean", [1.0, 9.0, 2.0], 2.0),  # one at each end, as a fifth of three is rounded up
        ("trimmed_mean", [1.0, 2.0, 3.0, 5.0, 100.0], 10 / 3),
        ("trimmed_mean", [0.0, 1.0, 2.0, 3.0, 6.0, 50.0], 2.5),  # two at each end
    ],
)
def test_by_hand(kind: str, values: list[float], expected: float) -> None:
    assert float(aggregate(of(values), kind, 0.2)["a"]) == pytest.approx(expected)


def test_only_the_mean_believes_numbers_of_examples() -> None:
    ours = of([1.0, 2.0, 6.0], [1, 1, 2])
    assert [float(aggregate(ours, kind)["a"]) for kind in ("mean", "median", "trimmed_mean")] == [3.75, 2.0, 2.0]


def test_trimming_leaves_something() -> None:
    assert [num_trimmed(0.1, n) for n in (1, 2, 3, 10, 11, 30)] == [0, 0, 1, 1, 2, 3]
    assert [num_trimmed(0.49, n) for n in (3, 4, 5)] == [1, 1, 2]


NUMBERS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9)


@given(NUMBERS, st.sampled_from(list(AGGREGATIONS)), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_results_lie_between(values: list[float], kind: str, rng: object) -> None:
    ours = of(values)
    result = aggregate(ours, kind)["a"]
    rng.shuffle(ours)
    assert torch.equal(aggregate(ours, kind)["a"], result)
    renamed = [Contribution(len(values) - c.client, c.change, 1) for c in ours]  # other clients, the same changes
    assert float(aggregate(renamed, kind)["a"]) == pytest.approx(float(result), rel=1e-6, abs=1e-6)
    assert min(values) - 1 <= float(result) <= max(values) + 1


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=9), st.floats(-(2.0**100), 2.0**100, width=32))
def test_one_hostile_client_cannot_leave_the_honest_range(honest: list[float], hostile: float) -> None:
    for kind in ("median", "trimmed_mean"):
        result = float(aggregate(of([*honest, hostile]), kind, 0.1)["a"])
        assert min(honest) - 1e-3 <= result <= max(honest) + 1e-3


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=5, max_size=5), st.floats(1e-3, 1e3))
def test_clipping_bounds_the_norm_over_all_units_and_keeps_the_direction(numbers: list[float], bound: float) -> None:
    change = {"a": torch.tensor(numbers[:2]), "b": torch.tensor(numbers[2:])}
    ours = clipped(Contribution(0, change, 1), bound).change
    flat, before = torch.cat([ours["a"], ours["b"]]), torch.cat([change["a"], change["b"]]).double()
    assert float(flat.norm()) <= bound * (1 + 1e-9)
    if float(before.norm()) <= bound:
        assert torch.equal(flat, before)
    else:
        assert float(flat.norm()) == pytest.approx(bound)
        assert torch.allclose(flat * before.norm(), before * flat.norm())


def test_a_change_that_overflowed_counts_as_none() -> None:
    ours = clipped(Contribution(0, {"a": torch.tensor([1.0, math.inf])}, 1), 1.0)
    assert ours.change["a"].tolist() == [0.0, 0.0]


class OneHostile:
    """Clients propose 0.1 each, or slopes of 0.1; client 0 proposes something huge but finite."""

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
        for task in tasks:
            size = 1e20 if task.client == 0 else 0.1
            sign = -1 if task.upload == "gradients" else 1
            tensors = {name: torch.full_like(task.values[name], sign * size) for name in task.parameters}
            if task.upload == "slopes":
                yield ClientUpdate(task.round, task.client, 4, 0.5, {}, torch.full((1, 1), size))
            else:
                yield ClientUpdate(task.round, task.client, 4, 0.5, tensors)


@pytest.mark.parametrize("upload", ["values", "gradients", "slopes"])
def test_a_hostile_client_moves_the_mean_but_not_the_median(upload: str) -> None:
    training = LocalTraining("iteration" if upload != "values" else "epoch", 1, 4, "sgd", 0.1, 0.0, 1, "gaussian")
    moved = {}
    for kind, clip in (("mean", None), ("median", None), ("trimmed_mean", None), ("mean", 1.0)):
        federation = Federation(
            seed=0,
            num_clients=5,
            cohort_size=5,
            units={"u": ("a", "b")},
            shared=(),
            assignment="all",
            rotate=False,
            upload=upload,
            training=training,
            server=ServerUpdate("sgd", 1.0),
            aggregation=kind,
            trim=0.2,
            clip_norm=clip,
        )
        state, _ = run_round(FederatedState(0, VALUES), federation, OneHostile())
        moved[kind, clip] = float(torch.cat([*state.values.values()]).norm())
    assert moved["mean", None] > 1e18
    assert moved["median", None] < 1
    assert moved["trimmed_mean", None] < 1
    assert moved["mean", 1.0] <= 1.0
