"""Two hundred malformed updates: each refused, counted and named, and the round goes on."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from spryfl.errors import SpryError, UpdateRefusedError
from spryfl.federated.client import LocalTraining
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate
from spryfl.federated.rounds import run_round
from spryfl.federated.server_optimizer import ServerUpdate
from spryfl.federated.state import FederatedState, Federation
from spryfl.federated.validation import validate_update

UNITS = {"low": ("low.a", "low.b"), "high": ("high.a",)}
VALUES = {"low.a": torch.ones(2, 3), "low.b": torch.zeros(3), "high.a": torch.ones(4)}
TRAINING = LocalTraining("epoch", 1, 4, "sgd", 0.1, 0.0, 2, "gaussian")


def federation(**changes: object) -> Federation:
    base = Federation(
        seed=0,
        num_clients=3,
        cohort_size=3,
        units=UNITS,
        shared=(),
        assignment="all",
        rotate=False,
        upload="values",
        training=TRAINING,
        server=ServerUpdate("sgd", 1.0),
    )
    return replace(base, **changes)


def honest(task: ClientTask) -> ClientUpdate:
    return ClientUpdate(task.round, task.client, 5, 0.5, {name: task.values[name] + 1 for name in task.parameters})


def malform(update: ClientUpdate, rng: random.Random) -> ClientUpdate:
    """Break one thing about an update, at random."""
    name = rng.choice(list(update.tensors))
    good = update.tensors[name]
    bad_value = good.clone()
    bad_value.view(-1)[rng.randrange(good.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    broken_tensors = [
        {**update.tensors, name: bad_value},
        {**update.tensors, name: good.double()},
        {**update.tensors, name: good.to(rng.choice([torch.int64, torch.bfloat16, torch.bool]))},
        {**update.tensors, name: good[None]},
        {**update.tensors, name: good.flatten()[:-1]},
        {**update.tensors, name: good.to_sparse()},
        {**update.tensors, name: good.tolist()},
        {**update.tensors, name: None},
        {**update.tensors, f"{name}.{rng.random()}": good},
        {key: value for key, value in update.tensors.items() if key != name},
        {},
    ]
    changes: list[dict[str, object]] = [{"tensors": tensors} for tensors in broken_tensors]
    changes += [{"num_examples": wrong} for wrong in (0, -3, 2.0, "9", None, True, 10**400)]
    changes += [{"loss": wrong} for wrong in (float("nan"), float("inf"), None, "0")]
    changes += [{"variance": wrong} for wrong in (-1.0, float("nan"), float("inf"), "1", True)]
    changes += [{"round": update.round + rng.choice([-1, 1])}, {"client": 99}, {"slopes": torch.zeros(2, 2)}]
    return replace(update, **rng.choice(changes))


class Hostile:
    """Client 0 is honest; client 1 sends a malformed update; client 2 fails."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for task in tasks:
            if task.client == 2:
                yield ClientFailure(2, "no battery")
            else:
                yield honest(task) if task.client == 0 else malform(honest(task), self.rng)


@pytest.mark.parametrize("case", range(200))
def test_malformed_updates_are_refused(case: int) -> None:
    state, report = run_round(FederatedState(0, VALUES), federation(), Hostile(random.Random(case)))
    assert report.num_updates == 1
    assert len(report.refused) == 1
    assert report.refused[0].reason
    forged = report.refused[0].client == 99  # then client 1's own task stays without an answer
    assert [(f.client, f.kind) for f in report.failures] == [(2, "raised"), *([(1, "lost")] if forged else [])]
    for name, value in VALUES.items():
        assert torch.equal(state.values[name], value + 1)  # the honest client's alone


def test_an_honest_update_passes() -> None:
    task = ClientTask(1, 0, 0, ("low",), UNITS["low"], VALUES, "values")
    validate_update(honest(task), task, None)


@pytest.mark.parametrize("rotate", [False, True])
def test_the_deal_starts_one_unit_further_each_round(rotate: bool) -> None:
    """Only if it is to: the released code gives the first unit to the first client of every round."""
    asked: list[dict[int, tuple[str, ...]]] = []

    class Watched:
        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
            asked.append({task.client: task.units for task in tasks})
            yield from map(honest, tasks)

    own = federation(assignment="split", rotate=rotate, num_clients=len(UNITS), cohort_size=len(UNITS))
    state = FederatedState(0, VALUES)
    for _ in UNITS:
        state, _ = run_round(state, own, Watched())
    names = list(UNITS)
    for round, dealt in enumerate(asked):
        start = round * rotate
        order = [*names[start:], *names[:start]]
        assert [dealt[client] for client in sorted(dealt)] == [(unit,) for unit in order]


def test_an_unassigned_unit_is_refused_by_name() -> None:
    task = ClientTask(1, 0, 0, ("low",), UNITS["low"], VALUES, "values")
    forged = replace(honest(task), tensors={**honest(task).tensors, "high.a": VALUES["high.a"]})
    with pytest.raises(UpdateRefusedError, match=r"'high\.a' was not assigned"):
        validate_update(forged, task, None)
    endless = replace(honest(task), tensors={**honest(task).tensors, "a" * 10**6: VALUES["high.a"]})
    with pytest.raises(UpdateRefusedError, match="was not assigned") as told:
        validate_update(endless, task, None)
    assert len(str(told.value)) < 200  # it goes on record


def test_a_second_update_of_a_client_is_refused() -> None:
    class Twice:
        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
            for task in tasks:
                yield honest(task)
                yield honest(task)

    _, report = run_round(FederatedState(0, VALUES), federation(), Twice())
    assert report.num_updates == 3
    assert len(report.refused) == 3


@pytest.mark.parametrize("slopes", [None, torch.zeros(1, 2), torch.zeros(2, 3), torch.full((2, 2), torch.nan)])
def test_malformed_slopes_are_refused(slopes: torch.Tensor | None) -> None:
    """Five examples in batches of four are two steps, of K = 2 slopes each."""
    task = ClientTask(1, 0, 0, ("low",), UNITS["low"], VALUES, "slopes")
    with pytest.raises(UpdateRefusedError, match="slopes"):
        validate_update(ClientUpdate(1, 0, 5, 0.5, {}, slopes), task, (2, 2))


def test_a_round_without_any_usable_update_says_why() -> None:
    class Broken:
        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientFailure]:
            yield from (ClientFailure(task.client, "out of memory") for task in tasks)

    with pytest.raises(SpryError, match="out of memory"):
        run_round(FederatedState(0, VALUES), federation(), Broken())


def test_units_nobody_trained_stay_bitwise() -> None:
    class OnlyClient:
        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
            for task in tasks:
                yield honest(task) if "low" in task.units else ClientFailure(task.client, "gone")

    state, report = run_round(
        FederatedState(0, VALUES, {}),
        federation(assignment="split", cohort_size=2, server=ServerUpdate("yogi", 0.01)),
        OnlyClient(),
    )
    assert report.untrained == ("high",)
    assert state.values["high.a"] is VALUES["high.a"]
    assert not torch.equal(state.values["low.a"], VALUES["low.a"])


def test_an_update_beyond_the_norm_bound_is_refused() -> None:
    """The honest change is 1 in each of 13 numbers: its norm is the root of 13."""

    class Honest:
        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
            yield from map(honest, tasks[:2])
            large = honest(tasks[2])
            yield replace(large, tensors={name: value * 100 for name, value in large.tensors.items()})

    state, report = run_round(FederatedState(0, VALUES), federation(max_update_norm=3.61), Honest())
    assert report.clients == (0, 1)
    assert "norm" in report.refused[0].reason
    assert torch.equal(state.values["high.a"], VALUES["high.a"] + 1)
    with pytest.raises(SpryError, match=r"3.61, above server.max_update_norm = 3.6"):
        run_round(FederatedState(0, VALUES), federation(max_update_norm=3.6), Honest())


def test_late_updates_are_dropped_and_counted_and_silence_is_a_failure() -> None:
    class Late:
        """Client 0 sends last round's update, then this one's; client 1 last round's alone; client 2 nothing."""

        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
            yield replace(honest(tasks[0]), round=1)
            yield honest(tasks[0])
            yield replace(honest(tasks[1]), round=1)

    _, report = run_round(FederatedState(1, VALUES), federation(), Late())
    assert report.clients == (0,)
    assert [f.client for f in report.late] == [0, 1]
    assert [(f.client, f.kind) for f in report.failures] == [(1, "lost"), (2, "lost")]


def test_the_round_goes_on_with_a_quorum_and_not_below() -> None:
    class First:
        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
            yield honest(tasks[0])
            yield from (ClientFailure(task.client, "too slow", "deadline") for task in tasks[1:])

    _, report = run_round(FederatedState(0, VALUES), federation(quorum=1 / 3), First())
    assert report.num_updates == 1
    with pytest.raises(SpryError, match=r"1 of 3 clients .* asks for 2; client 1: too slow"):
        run_round(FederatedState(0, VALUES), federation(quorum=0.5), First())


def test_units_nobody_returned_go_first_next_round() -> None:
    """Two units, three clients: the first unit dealt is trained twice. It is 'low', but for the round after 'high'."""
    dealt: list[list[tuple[str, ...]]] = []

    class Broken:
        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
            dealt.append([task.units for task in tasks])
            for task in tasks:
                broken = task.round == 1 and task.units == ("high",)
                yield ClientFailure(task.client, "gone") if broken else honest(task)

    state = FederatedState(0, VALUES)
    for _ in range(3):
        state, _ = run_round(state, federation(assignment="split"), Broken())
    low, high = ("low",), ("high",)
    assert dealt == [[low, high, low], [high, low, high], [low, high, low]]
    assert state.overdue == ()


def test_no_client_has_more_examples_than_it_was_dealt() -> None:
    """They are its weight, and of slopes the steps that the server replays."""
    dealt = replace(federation(), sizes=(5, 4, 5))

    class Inflated:
        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
            yield from (replace(honest(task), num_examples=5) for task in tasks)

    _, report = run_round(FederatedState(0, VALUES), dealt, Inflated())
    assert [(own.client, own.reason) for own in report.refused] == [
        (1, "num_examples is above 4, which is the most it can have")
    ]
    assert report.clients == (0, 2)


def test_tensors_where_slopes_were_asked_for_are_refused() -> None:
    task = ClientTask(1, 0, 0, ("low",), UNITS["low"], VALUES, "slopes")
    with pytest.raises(UpdateRefusedError, match="it sent tensors where slopes were asked for"):
        validate_update(replace(honest(task), slopes=torch.zeros(2, 2)), task, (2, 2))
