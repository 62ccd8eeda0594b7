"""Assignment, sampling, aggregation and server optimizers, by hand-sized numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from spryfl.federated.aggregation import Contribution, aggregate
from spryfl.federated.assignment import assign_all, assign_split, assign_units
from spryfl.federated.local_optimizer import LocalOptimizer
from spryfl.federated.sampling import Sampling, inclusion
from spryfl.federated.schedule import Schedule
from spryfl.federated.server_optimizer import ServerUpdate


def test_more_units_than_clients() -> None:
    assert assign_split(["u0", "u1", "u2", "u3", "u4"], [7, 9]) == {7: ("u0", "u2", "u4"), 9: ("u1", "u3")}


def test_more_clients_than_units() -> None:
    assert assign_split(["u0", "u1"], [3, 5, 8]) == {3: ("u0",), 5: ("u1",), 8: ("u0",)}


def test_start_rotates() -> None:
    assert assign_split(["u0", "u1", "u2"], [3, 5], start=1) == {3: ("u0", "u1"), 5: ("u2",)}


def test_shared_units_go_to_everyone() -> None:
    assert assign_units("split", ["u0", "u1", "head"], [3, 5], 0, ["head"]) == {3: ("u0", "head"), 5: ("u1", "head")}
    assert assign_units("split", ["head"], [3, 5], 0, ["head"]) == {3: ("head",), 5: ("head",)}


def test_blocks_are_dealt_together() -> None:
    units, blocks = ["q0", "v0", "q1", "v1", "head"], [("q0", "v0"), ("q1", "v1"), ("head",)]
    lower, upper = ("q0", "v0", "head"), ("q1", "v1", "head")
    assert assign_units("split", units, [3, 5, 8], 0, ["head"], blocks) == {3: lower, 5: upper, 8: lower}
    assert assign_units("split", units, [3], 1, [], blocks) == {3: tuple(units)}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_every_client_works_and_every_unit_is_trained(num_units: int, num_clients: int, start: int) -> None:
    units = [f"u{i}" for i in range(num_units)]
    assigned = assign_split(units, list(range(num_clients)), start)
    assert set(assigned) == set(range(num_clients))
    assert all(assigned.values())
    trained = {unit for own in assigned.values() for unit in own}
    assert len(trained) == num_units  # more clients than units, or fewer: no unit is left out
    copies = [sum(unit in own for own in assigned.values()) for unit in units]
    assert max(copies) - min(copies) <= 1  # as even as can be
    assert assign_all(units, [1, 2], start) == {1: tuple(units), 2: tuple(units)}


def test_cohorts_are_seeded_distinct_and_fair() -> None:
    cohorts = [Sampling(20, 5).cohort(0, r) for r in range(1, 401)]
    assert cohorts[0] == Sampling(20, 5).cohort(0, 1)
    assert cohorts[0] != Sampling(20, 5).cohort(1, 1)
    assert all(len(set(cohort)) == 5 for cohort in cohorts)
    counts = [sum(client in cohort for cohort in cohorts) for client in range(20)]
    assert min(counts) > 60  # 100 expected, standard deviation under 9
    assert max(counts) < 140


def test_inclusion_by_size() -> None:
    """The first client's share of two places exceeds one; the others share the other place."""
    assert inclusion([6, 2, 1, 1], 2).tolist() == [1.0, 0.5, 0.25, 0.25]
    assert inclusion([1, 1, 1, 1], 2).tolist() == [0.5] * 4
    assert inclusion([5, 1], 3).tolist() == [1.0, 1.0]
    sampling = Sampling(4, 2, (6, 2, 1, 1))
    assert [sampling.weight(client, 99) for client in range(4)] == [6.0, 4.0, 4.0, 4.0]
    assert Sampling(4, 2).weight(1, 99) == 99


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 50))
def test_cohorts_by_size(sizes: list[int], cohort_size: int, seed: int) -> None:
    sampling = Sampling(len(sizes), cohort_size, tuple(sizes))
    probabilities = inclusion(sizes, cohort_size)
    assert sum(probabilities) == pytest.approx(min(cohort_size, len(sizes)))
    assert ((probabilities > 0) & (probabilities <= 1)).all()
    cohort = sampling.cohort(seed, 1)
    assert len(set(cohort)) == min(cohort_size, len(sizes))
    assert set(np.flatnonzero(probabilities == 1)) <= set(cohort)
    assert sum(sampling.weight(client, 1) for client in cohort) == pytest.approx(sum(sizes))


@pytest.mark.parametrize("sizes", [(), (30, 8, 4, 4, 2, 1, 1)])
def test_the_mean_over_cohorts_is_unbiased(sizes: tuple[int, ...]) -> None:
    """Of 6,000 cohorts of 3 of 7 clients: the weighted sum over all clients, within five standard errors."""
    examples, changes = (30, 8, 4, 4, 2, 1, 1), (1.0, -2.0, 3.0, 0.5, 7.0, -9.0, 20.0)
    sampling = Sampling(7, 3, sizes)
    scale = 1 if sizes else 7 / 3  # uniform cohorts weigh n, for n / p with p = 3 / 7
    found = [
        scale * sum(sampling.weight(c, examples[c]) * changes[c] for c in sampling.cohort(0, r)) for r in range(1, 6001)
    ]
    exact = sum(n * change for n, change in zip(examples, changes, strict=True))
    assert abs(np.mean(found) - exact) < 5 * np.std(found) / len(found) ** 0.5
    assert np.std(found) > 1  # cohorts do differ


def test_weighted_mean_over_those_that_trained() -> None:
    ours = [
        Contribution(4, {"a": torch.tensor([2.0]), "b": torch.tensor([1.0])}, 3),
        Contribution(2, {"a": torch.tensor([6.0])}, 1),
    ]
    mean = aggregate(ours)
    assert mean["a"].tolist() == [3.0]  # (3 * 2 + 1 * 6) / 4
    assert mean["b"].tolist() == [1.0]
    assert mean["a"].dtype == torch.float32
    assert all(torch.equal(mean[n], aggregate(ours[::-1])[n]) for n in mean)  # order of arrival


VALUES = {"a": torch.tensor([1.0]), "b": torch.tensor([0.1])}
CHANGE = {"a": torch.tensor([0.5])}
# By hand with D = 0.5, b1 = 0.9, b2 = 0.99, tau = 0.001, v0 = 1e-6: m = 0.05 (adagrad: D);
# adagrad v = 0.250001; adam v = 0.00250099; yogi v = 1e-6 + 0.01 * 0.25 = 0.002501
EXPECTED = {
    "sgd": 1.0 + 0.01 * 0.5,
    "adagrad": 1.0 + 0.01 * 0.5 / (0.250001**0.5 + 0.001),
    "adam": 1.0 + 0.01 * 0.05 / (0.00250099**0.5 + 0.001),
    "yogi": 1.0 + 0.01 * 0.05 / (0.002501**0.5 + 0.001),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_server_optimizer(kind: str) -> None:
    values, moments = ServerUpdate(kind, 0.01).apply(VALUES, CHANGE, {})
    assert float(values["a"]) == pytest.approx(EXPECTED[kind], rel=1e-6)
    assert values["b"] is VALUES["b"]  # nobody trained it
    assert VALUES["a"].tolist() == [1.0]
    assert set(moments) == (set() if kind == "sgd" else {"m/a", "v/a"})


@pytest.mark.parametrize("kind", ["adagrad", "adam", "yogi"])
def test_moments_carry_over(kind: str) -> None:
    """Reddi et al. 2021, algorithm 2, without bias correction; adagrad without momentum, as in their experiments."""
    changes, tau = [0.5, -0.2, 0.05, 0.4], 1e-3
    update, values, moments = ServerUpdate(kind, 1.0), {"a": torch.zeros(1)}, {}
    m, v = 0.0, tau**2
    for change in changes:
        m = change if kind == "adagrad" else 0.9 * m + 0.1 * change
        if kind == "adagrad":
            v += change**2
        elif kind == "adam":
            v = 0.99 * v + 0.01 * change**2
        else:
            v -= 0.01 * change**2 * float(np.sign(v - change**2))
        before = values["a"]
        values, moments = update.apply(values, {"a": torch.tensor([change])}, moments)
        assert float(moments["m/a"]) == pytest.approx(m, rel=1e-5)
        assert float(moments["v/a"]) == pytest.approx(v, rel=1e-5)
        assert float(values["a"] - before) == pytest.approx(m / (v**0.5 + tau), rel=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_local_optimizers(name: str) -> None:
    """By hand: the rate, decay coupled (sgd, adam) or not (adamw), Adam's bias correction."""
    values = LocalOptimizer({"a": torch.tensor([2.0])}, name, 0.1, 0.5)
    w, m, v = 2.0, 0.0, 0.0
    for step, slope in enumerate([0.3, -1.0, 0.2], start=1):
        values.step({"a": torch.tensor([slope])})
        gradient = slope if name == "adamw" else slope + 0.5 * w
        if name == "adamw":
            w -= 0.1 * 0.5 * w
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w -= 0.1 * (gradient if name == "sgd" else m / (1 - 0.9**step) / ((v / (1 - 0.999**step)) ** 0.5 + 1e-8))
        assert float(values.values["a"]) == pytest.approx(w, rel=1e-5)


def test_yogi_lowers_its_second_moment() -> None:
    update = ServerUpdate("yogi", 0.01)
    values, moments = update.apply(VALUES, CHANGE, {"m/a": torch.zeros(1), "v/a": torch.ones(1)})
    assert float(moments["v/a"]) == pytest.approx(1 - 0.01 * 0.25)
    second, _ = update.apply(values, CHANGE, moments)
    assert float(second["a"]) > float(values["a"])


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_are_transformers_own(kind: str, warmup: int) -> None:
    """After the warm-up, which begins a step later here: there the first step has a rate of 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    (theirs,) = get_scheduler(name, optimizer, warmup, 10).lr_lambdas
    schedule = Schedule(kind, 10, warmup)
    factors = [schedule.factor(round) for round in range(1, 11)]
    assert factors[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert factors[warmup:] == pytest.approx([theirs(step) for step in range(warmup, 10)])
    assert min(factors) > 0


def test_a_server_follows_its_schedule() -> None:
    update = ServerUpdate("sgd", 0.5, schedule=Schedule("linear", 4))
    steps = [float(update.at(round).apply(VALUES, CHANGE, {})[0]["a"] - VALUES["a"]) for round in (1, 3)]
    assert steps[0] == pytest.approx(0.5 * float(CHANGE["a"]))
    assert steps[1] == pytest.approx(0.25 * float(CHANGE["a"]))


def test_sgd_of_rate_one_is_the_mean() -> None:
    values, _ = ServerUpdate("sgd", 1.0).apply(VALUES, {"a": torch.tensor([2.0])}, {})
    assert values["a"].tolist() == [3.0]
