"""Baffle, FwdLLM and their variants, each without the defects of the public code."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spryfl.config import RunConfig, parse_config
from spryfl.errors import ConfigError
from spryfl.federated.aggregation import Contribution, aggregate
from spryfl.federated.answers import proposed_change
from spryfl.federated.client import Client, LocalTraining
from spryfl.federated.messages import ClientTask
from spryfl.federated.method import METHODS
from spryfl.federated.pacing import Halves, pooled_mean
from spryfl.federated.rounds import run_round
from spryfl.federated.server_optimizer import ServerUpdate
from spryfl.federated.state import Federation
from spryfl.gradients.directions import EVERYONE, DirectionStream
from spryfl.gradients.zeroth_order import ZerothOrder
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.workbench import Workbench

SHAPES = {"a": torch.Size((4, 3)), "b": torch.Size((5,))}
KNOWN = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}


class Cubic(nn.Module):
    """A loss whose central difference is known: (w . x)^3, with dropout on w that must be off."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.dropout(self.weight)).pow(3)


class Points:
    def __len__(self) -> int:
        return 4

    def batch(self, rows: list[int]) -> Tensor:
        return torch.arange(12, dtype=torch.float64).view(4, 3)[rows] / 6

    def losses(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)


def training(**changes: object) -> LocalTraining:
    return replace(LocalTraining("iteration", 1, 4, "sgd", 0.1, 0.0, 3, "gaussian"), **changes)


def task(client: int = 2, **changes: object) -> ClientTask:
    values = {"weight": Cubic().weight.detach().float()}
    return replace(ClientTask(1, client, 0, ("unit",), ("weight",), values, "slopes"), **changes)


@pytest.mark.parametrize("num_tangents", [1, 3])
def test_all_of_baffles_terms_weigh_the_same_and_see_no_dropout(num_tangents: int) -> None:
    """g = 1 / (2 sigma K) sum_k (L(w + sigma v_k) - L(w - sigma v_k)) v_k, rebuilt from the scalars that travel."""
    sigma, settings, model = METHODS["baffle"].step_size, training(num_tangents=num_tangents), Cubic()
    client = Client(model, Points(), ZerothOrder(num_tangents, sigma), settings, [model.dropout])
    update = client.update(task())
    assert update.tensors == {}
    federation = Federation(0, 3, 3, {}, (), "all", True, "slopes", settings, ServerUpdate("adam", 0.01))
    found = -proposed_change(update, task(), federation)["weight"].double()
    w, x, expected = Cubic().weight.detach(), Points().batch([0, 1, 2, 3]), torch.zeros(3, dtype=torch.float64)
    draw = settings.directions(task()).at_step(0)
    for k in range(num_tangents):
        v = draw.numbers(k, "weight", w.shape).double()
        difference = (x @ (w + sigma * v)).pow(3).mean() - (x @ (w - sigma * v)).pow(3).mean()
        expected += difference * v / (2 * sigma * num_tangents)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_baffles_clients_share_a_rounds_directions() -> None:
    """So that a sum of their scalars is all the server needs; other methods' clients differ."""
    for same in (False, True):
        settings = training(same_directions=same)
        drawn = [settings.directions(task(client)).draw(0, 0, "weight", torch.Size((3,))) for client in (2, 7)]
        assert torch.equal(*drawn) == same
    assert METHODS["baffle"].same_directions
    later = training(same_directions=True).directions(replace(task(), round=2))
    assert later.client == EVERYONE
    assert not torch.equal(later.draw(0, 0, "weight", torch.Size((3,))), drawn[0])


@pytest.mark.parametrize("num_candidates", [1, 4])
def test_a_seed_gives_k_different_directions_and_fresh_ones_at_every_step(num_candidates: int) -> None:
    seen: list[Tensor] = []
    for round in (1, 2):
        stream = DirectionStream(0, round, 3, num_candidates=num_candidates, known=KNOWN)
        for step in (0, 1):
            seen += [torch.cat([v["a"].flatten(), v["b"]]) for v in stream.at_step(step).directions(SHAPES, 3)]
    assert len({tuple(v.tolist()) for v in seen}) == 2 * 2 * 3
    again = DirectionStream(0, 1, 3, num_candidates=num_candidates, known=KNOWN).at_step(0)
    assert torch.equal(next(again.directions(SHAPES, 3))["b"], seen[0][12:])


def test_directions_are_the_candidates_nearest_to_the_last_update() -> None:
    plain = DirectionStream(0, 1, 3).at_step(0)
    chosen = list(DirectionStream(0, 1, 3, num_candidates=5, known=KNOWN).at_step(0).directions(SHAPES, 2))
    for name, shape in SHAPES.items():
        candidates = torch.stack([plain.numbers(k, name, shape).flatten() for k in range(10)])
        cosines = torch.cosine_similarity(candidates, KNOWN[name].flatten(), dim=1)
        best = candidates[cosines.argsort(descending=True)[:2]]
        assert torch.equal(torch.stack([v[name].flatten() for v in chosen]), best)
    first = DirectionStream(0, 1, 3, num_candidates=5).at_step(0)  # nothing is known in the first round
    assert all(
        torch.equal(v["a"], plain.numbers(k, "a", SHAPES["a"])) for k, v in enumerate(first.directions(SHAPES, 2))
    )


def test_more_clients_than_units_and_every_client_works(tiny_config: Callable[..., RunConfig]) -> None:
    bench = Workbench.from_config(tiny_config(method__name="spry", server__cohort_size=8))
    assert len(bench.federation.units) == 5
    tasks: list[ClientTask] = []

    class Watched(InProcessRuntime):
        def run(self, given):
            tasks.extend(given)
            return super().run(given)

    _, report = run_round(bench.initial_state(), bench.federation, Watched(bench.client, bench.batch_tokens))
    assert report.num_updates == len({t.client for t in tasks}) == 8
    assert report.untrained == ()
    assert all(len(t.units) == 2 for t in tasks)  # one of its own, and the head


def test_the_variance_is_that_of_two_half_means() -> None:
    halves = Halves()
    halves.add({"a": torch.tensor([1.0, 0.0])}, 1)
    assert halves.variance is None
    halves.add({"a": torch.tensor([3.0, 0.0])}, 2)
    assert halves.variance == 1.0  # ((1 - 3)^2 + 0) / 2, over two numbers
    halves.add({"a": torch.tensor([5.0, 0.0])}, 3)  # the first half's mean: (1 + 3 * 5) / 4 = 4
    assert halves.variance == pytest.approx(torch.tensor([4.0, 3.0]).var().item() / 2)
    assert halves.mean()["a"].tolist() == [pytest.approx(22 / 6), 0.0]


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 9)), min_size=2, max_size=9), st.integers(1, 8))
def test_pooled_rounds_end_as_one_large_round(drawn: list[tuple[float, int]], cut: int) -> None:
    ours = [Contribution(i, {"a": torch.tensor([value])}, weight) for i, (value, weight) in enumerate(drawn)]
    first, second = ours[:cut], ours[cut:]
    nothing, pool = pooled_mean({}, first, -1.0)
    assert nothing == {}
    change, left = pooled_mean(pool, second, 1e9)
    assert left == {}
    assert torch.allclose(change["a"], aggregate(ours)["a"], atol=1e-5)


def rounds(bench: Workbench, number: int):
    state, reports = bench.initial_state(), []
    for _ in range(number):
        state, report = run_round(state, bench.federation, InProcessRuntime(bench.client, bench.batch_tokens))
        reports.append(report)
    return state, reports


def test_fwdllm_waits_until_its_gradients_agree(tiny_config: Callable[..., RunConfig]) -> None:
    never = Workbench.from_config(tiny_config(method__name="fwdllm", method__variance_threshold=1e-12))
    start = never.initial_state()
    state, reports = rounds(never, 2)
    assert [report.num_pooled for report in reports] == [3, 6]
    assert all(torch.equal(value, start.values[name]) for name, value in state.values.items())
    assert state.last_change == {}
    assert [report.untrained for report in reports] == [(), ()]  # what they trained waits
    variance = Halves(state.pool).variance
    assert variance is not None
    once = Workbench.from_config(tiny_config(method__name="fwdllm", method__variance_threshold=1.01 * variance))
    state, reports = rounds(once, 2)
    assert reports[1].num_pooled == 0
    assert any(not torch.equal(value, start.values[name]) for name, value in state.values.items())
    assert set(state.last_change) == set(state.values)
    assert state.pool == {}


def test_fwdllm_plus_leaves_noisy_clients_out(tiny_config: Callable[..., RunConfig]) -> None:
    options = {"method__name": "fwdllm_plus", "method__num_tangents": 1, "server__cohort_size": 8}
    options |= {"partition__kind": "iid", "local__batch_size": 2}
    bench = Workbench.from_config(tiny_config(**options, method__variance_threshold=1e-12))
    state, (report,) = rounds(bench, 1)
    assert report.num_left_out == report.num_updates == 8
    start = bench.initial_state().values
    assert all(torch.equal(value, start[name]) for name, value in state.values.items())
    client, parameters = bench.client(0), tuple(start)
    given = ClientTask(1, 0, 0, tuple(bench.federation.units), parameters, start, "values")
    variance = client.update(given).variance
    assert variance is not None
    some = Workbench.from_config(tiny_config(**options, method__variance_threshold=variance))
    _, (report,) = rounds(some, 1)
    assert report.num_left_out < 8


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"num_candidates": 3, "estimator": "bottleneck"}, "set num_candidates = 1, or estimator = 'zeroth_order'"),
        ({"name": "fwdllm", "distribution": "orthogonal"}, "set num_candidates = 1, or distribution = 'gaussian'"),
        ({"name": "spry", "variance_threshold": 1.0}, "choose 'fwdllm' or 'fwdllm_plus'"),
    ],
)
def test_settings_that_do_not_go_together(method: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"method": method})


def test_a_method_s_own_settings_yield_to_those_asked_for() -> None:
    own = parse_config({"method": {"name": "baffle_plus"}}).method
    assert (own.own_num_tangents, own.own_step_size) == (10, 1e-4)
    asked = parse_config({"method": {"name": "baffle_plus", "num_tangents": 2, "step_size": 0.1}}).method
    assert (asked.own_num_tangents, asked.own_step_size) == (2, 0.1)
