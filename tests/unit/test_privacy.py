"""Privacy: noise of the right scale, bounded sensitivity, accountants against published values."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import batch_loss, build, padded_batch, trainable
from spryfl.config import parse_config
from spryfl.errors import ConfigError, UpdateRefusedError
from spryfl.federated.accounting import (
    ClientAccountant,
    ExampleAccountant,
    gaussian_epsilon,
    sampled_epsilon,
)
from spryfl.federated.aggregation import Contribution
from spryfl.federated.client import LocalTraining
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate
from spryfl.federated.privacy import ClientPrivacy
from spryfl.federated.rounds import run_round
from spryfl.federated.sampling import Sampling
from spryfl.federated.server_optimizer import ServerUpdate
from spryfl.federated.state import FederatedState, Federation
from spryfl.federated.validation import validate_update
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.forward import ForwardGradient
from spryfl.gradients.noise import Words, gaussian_noise, secret_words
from spryfl.gradients.private import PrivateSlopes
from spryfl.gradients.zeroth_order import ZerothOrder

TINY = 1e-12  # a noise multiplier that leaves the clipped sum to be seen


def seeded(seed: int) -> Words:
    bits = np.random.Philox(key=seed)
    return bits.random_raw


# Noise.


def test_noise_is_standard_normal() -> None:
    noise = gaussian_noise(seeded(0), torch.Size((500, 400))).flatten()
    assert float(noise.mean()) == pytest.approx(0, abs=4 / 200_000**0.5)
    assert float(noise.var()) == pytest.approx(1, abs=4 * (2 / 200_000) ** 0.5)
    for z in (-2.0, -1.0, 0.5, 3.0):
        expected = 0.5 * math.erfc(-z / 2**0.5)
        assert float((noise < z).double().mean()) == pytest.approx(expected, abs=4 * (0.25 / 200_000) ** 0.5)


def test_noise_is_finite_at_the_ends_of_the_uniform_numbers() -> None:
    ends = gaussian_noise(lambda count: np.array([0, 2**64 - 1], dtype=np.uint64), torch.Size((2,)))
    assert ends.isfinite().all()
    assert float(ends[0]) == -float(ends[1])
    assert float(ends[1]) > 8


def test_secret_noise_never_comes_again() -> None:
    torch.manual_seed(0)
    first = gaussian_noise(secret_words, torch.Size((4,)))
    torch.manual_seed(0)
    assert not torch.equal(first, gaussian_noise(secret_words, torch.Size((4,))))


# Clients.

VALUES = {"low": torch.zeros(1000), "high": torch.zeros(1000), "alone": torch.zeros(5)}


def proposal(client: int, low: float, high: float, num_examples: int = 1) -> Contribution:
    change = {"low": torch.full((1000,), low), "high": torch.full((1000,), high)}
    return Contribution(client, change, num_examples)


def test_the_noise_of_a_unit_is_that_of_a_sum_over_those_asked() -> None:
    """Of standard deviation z C / n_u: 4 clients were asked for "low", 2 for "high"."""
    asked = [("low", "high"), ("low", "high"), ("low",), ("low",)]
    found = [ClientPrivacy(2.0, 1.5, seeded(i)).noisy_mean([], asked, VALUES) for i in range(20)]
    assert set(found[0]) == {"low", "high"}
    low = torch.cat([change["low"] for change in found]).std()
    high = torch.cat([change["high"] for change in found]).std()
    assert float(low) == pytest.approx(2.0 * 1.5 / 4, rel=0.03)  # 20,000 numbers: its error is 0.5 %
    assert float(high) == pytest.approx(2.0 * 1.5 / 2, rel=0.03)


def test_clients_count_alike_and_those_that_sent_nothing_count_as_no_change() -> None:
    ours = [proposal(0, 0.01, 0.02, 1), proposal(1, 0.03, 0.02, 1000)]
    mean = ClientPrivacy(10.0, TINY, seeded(0)).noisy_mean(ours, [("low", "high")] * 4, VALUES)
    assert torch.allclose(mean["low"], torch.tensor(0.04 / 4))
    assert torch.allclose(mean["high"], torch.tensor(0.04 / 4))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4), st.integers(1, 4))
def test_one_client_moves_all_sums_together_by_two_clips_at_most(numbers: list[float], others: int) -> None:
    """Whatever it sends in place of what it sent, over however many units."""
    privacy, clip = ClientPrivacy(0.5, TINY, seeded(0)), 0.5
    rest = [proposal(i + 1, 0.1, 0.2) for i in range(others)]
    asked = [("low", "high")] * (others + 1)
    one, other = (privacy.noisy_mean([proposal(0, *pair), *rest], asked, VALUES) for pair in (numbers[:2], numbers[2:]))
    moved = torch.cat([(one[name] - other[name]).double() * (others + 1) for name in one])
    assert float(moved.norm()) <= 2 * clip * (1 + 1e-4)


def test_secret_cohorts_are_distinct_fair_and_in_no_order() -> None:
    privacy = ClientPrivacy(1.0, 1.0, seeded(0))
    cohorts = [privacy.sample_cohort(20, 5) for _ in range(400)]
    assert all(len(set(cohort)) == 5 for cohort in cohorts)
    counts = np.bincount(np.concatenate(cohorts), minlength=20)
    assert counts.min() > 60  # 100 expected, standard deviation under 9
    assert counts.max() < 140
    assert np.mean([cohort[0] < cohort[1] for cohort in cohorts]) == pytest.approx(0.5, abs=0.1)
    assert ClientPrivacy(1.0, 1.0).sample_cohort(1000, 10) != ClientPrivacy(1.0, 1.0).sample_cohort(1000, 10)


class SomeFail:
    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for i, task in enumerate(tasks):
            if i % 2:
                yield ClientFailure(task.client, "no battery")
            else:
                tensors = {name: task.values[name] + 0.001 for name in task.parameters}
                yield ClientUpdate(task.round, task.client, 3, 0.5, tensors)


def test_a_private_round() -> None:
    federation = Federation(
        seed=0,
        num_clients=8,
        cohort_size=4,
        units={"low": ("low",), "high": ("high",)},
        shared=(),
        assignment="all",
        rotate=False,
        upload="values",
        training=LocalTraining("epoch", 1, 4, "sgd", 0.1, 0.0, 1, "gaussian"),
        server=ServerUpdate("sgd", 1.0),
        privacy=ClientPrivacy(1.0, 0.5, seeded(1)),
    )
    state, report = run_round(FederatedState(0, VALUES), federation, SomeFail())
    assert report.num_updates == 2
    assert float(state.values["low"].std()) == pytest.approx(1.0 * 0.5 / 4, rel=0.1)
    assert float(state.values["low"].mean()) == pytest.approx(2 * 0.001 / 4, abs=4 * 0.125 / 1000**0.5)
    assert state.values["alone"] is VALUES["alone"]


# Examples.

ROWS = 3
PRIVATE = {"forward": ForwardGradient(2), "zeroth_order": ZerothOrder(2, 1e-4)}


@pytest.mark.parametrize("kind", PRIVATE)
def test_example_slopes_are_those_of_each_example_alone(kind: str) -> None:
    model, loss = build("bert"), batch_loss(padded_batch())
    names, draw = trainable(model)[:2], DirectionStream(0, 1, 2).at_step(0)
    parts, slopes = PRIVATE[kind].example_slopes(model, loss, names, draw)
    whole = PRIVATE[kind].estimate(model, loss, names, draw, ROWS)
    assert parts.shape == (ROWS,)
    assert slopes.shape == (2, ROWS)
    assert torch.allclose(slopes.sum(1).float(), whole.slopes, rtol=1e-4, atol=1e-7)
    assert float(parts.sum()) == pytest.approx(whole.loss)
    shapes = {name: model.get_parameter(name).shape for name in names}
    gradients = torch.autograd.grad(loss.parts(model)[1], [model.get_parameter(name) for name in names])
    for k, direction in enumerate(draw.directions(shapes, 2)):
        true = sum(float((g * direction[name]).sum()) for name, g in zip(names, gradients, strict=True))
        assert float(slopes[k, 1]) == pytest.approx(true, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("kind", PRIVATE)
def test_without_noise_and_clipping_private_slopes_are_the_estimators_own(kind: str) -> None:
    model, loss = build("bert"), batch_loss(padded_batch())
    names, draw = trainable(model)[:2], DirectionStream(0, 1, 2).at_step(0)
    plain = PRIVATE[kind].estimate(model, loss, names, draw, ROWS)
    ours = PrivateSlopes(PRIVATE[kind], 1e6, TINY * 1e-6, seeded(0)).estimate(model, loss, names, draw, ROWS)
    assert torch.allclose(ours.slopes, plain.slopes, rtol=1e-4, atol=1e-7)
    assert all(torch.allclose(ours.gradients[n], g, rtol=1e-3, atol=1e-6) for n, g in plain.gradients.items())


class Told:
    """An estimator whose examples' slopes are told to it; parts as for a mean over them."""

    def __init__(self, slopes: torch.Tensor) -> None:
        self.slopes = slopes

    def example_slopes(self, model: object, loss: object, parameters: object, draw: object) -> tuple[torch.Tensor, ...]:
        rows = self.slopes.shape[1]
        return torch.ones(rows) / rows, self.slopes / rows


def summed(slopes: torch.Tensor, clip: float, noise_multiplier: float, words: Words) -> torch.Tensor:
    """The released slopes times the number of examples."""
    model, rows = build("bert"), slopes.shape[1]
    private = PrivateSlopes(Told(slopes), clip, noise_multiplier, words)
    draw = DirectionStream(0, 1, 2).at_step(0)
    return private.estimate(model, batch_loss(padded_batch()), trainable(model)[:1], draw, rows).slopes * rows


def test_slopes_are_clipped_by_example_and_together() -> None:
    slopes = torch.tensor([[3.0, 0.0, 0.1], [4.0, 0.0, 0.2]])  # norms 5, 0, 0.22
    found = summed(slopes, 1.0, TINY, seeded(0))
    assert found.tolist() == pytest.approx([0.6 + 0.1, 0.8 + 0.2])


def test_an_example_that_overflows_adds_no_more_than_a_clip() -> None:
    for bad in (math.nan, math.inf, -math.inf, 3e38):
        found = summed(torch.tensor([[bad, 0.5], [bad, 0.0]]), 1.0, TINY, seeded(0))
        assert float((found - torch.tensor([0.5, 0.0])).norm()) <= 1 + 1e-5


def test_the_noise_of_slopes_is_the_multiplier_times_the_clip() -> None:
    """Whatever the number of examples: their sum is noised once."""
    for rows in (1, 7):
        found = summed(torch.zeros(4000, rows), 0.5, 3.0, seeded(rows))
        assert float(found.std()) == pytest.approx(1.5, rel=0.05)  # 4000 numbers: its error is 1.1 %


def test_a_private_run_neither_takes_nor_tells_losses() -> None:
    task = ClientTask(1, 0, 0, ("u",), ("low",), VALUES, "values")
    silent = ClientUpdate(1, 0, 5, None, {"low": VALUES["low"]})
    validate_update(silent, task, None, tells_loss=False)
    with pytest.raises(UpdateRefusedError, match="private"):
        validate_update(replace(silent, loss=0.5), task, None, tells_loss=False)
    with pytest.raises(UpdateRefusedError, match="its loss is None"):
        validate_update(silent, task, None)


# Accountants.


def test_gaussian_noise_against_the_published_calibration() -> None:
    """Balle & Wang 2018: (1, 1e-5) takes sigma = 3.7306 for sensitivity 1; here an exchange moves a sum by 2."""
    assert gaussian_epsilon(2 * 3.730632, 1, 1e-5) == pytest.approx(1.0, abs=1e-5)
    assert gaussian_epsilon(2 * 3.730632 * 10, 100, 1e-5) == pytest.approx(1.0, abs=1e-5)


def test_gaussian_noise_against_the_definition() -> None:
    """delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu) with mu = sensitivity / sigma."""
    epsilon, mu = gaussian_epsilon(3.0, 7, 1e-4), 2 * 7**0.5 / 3.0

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / 2**0.5)

    delta = phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(1e-4, rel=1e-3)


def test_sampling_against_the_theorem_at_order_two() -> None:
    """Wang et al. 2019: e^D(2) <= 1 + q^2 min(4 (e^d(2) - 1), 2 e^d(2)), with d(2) = 2 / (2 sigma^2)."""
    from spryfl.federated import accounting

    q, sigma = 0.1, 1.5
    expected = math.log1p(q**2 * min(4 * math.expm1(1 / sigma**2), 2 * math.exp(1 / sigma**2)))
    assert accounting._divergences(2 * sigma, 1000, 100)[0] == pytest.approx(expected, rel=1e-9)


def test_the_smaller_bound_is_told() -> None:
    sampled, whole = ClientAccountant(2.0, 1e-5, 1000, 10), ClientAccountant(2.0, 1e-5, 10, 10)
    assert sampled.epsilon(50) == sampled_epsilon(2.0, 50, 1e-5, 1000, 10) < gaussian_epsilon(2.0, 50, 1e-5) / 20
    assert whole.epsilon(50) == gaussian_epsilon(2.0, 50, 1e-5)
    assert sampled.epsilon(10) < sampled.epsilon(50)


def test_an_example_pays_for_each_pass_of_the_client_asked_most_often() -> None:
    accountant = ExampleAccountant(4.0, 1e-5, 6, 2, seed=3, passes=2)
    counts = np.bincount(np.concatenate([Sampling(6, 2).cohort(3, r) for r in range(1, 10)]))
    assert accountant.epsilon(9) == gaussian_epsilon(4.0, 2 * int(counts.max()), 1e-5)
    again = ExampleAccountant(4.0, 1e-5, 6, 2, seed=3, passes=2)  # a resumed run's
    assert [again.epsilon(r) for r in (8, 9)][-1] == accountant.epsilon(9)


# Configuration.

EXAMPLE = {"level": "example", "clip": 1.0, "noise_multiplier": 1.0}
CLIENT = {"level": "client", "clip": 1.0, "noise_multiplier": 1.0}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"privacy": {"clip": 1.0}}, "clip belongs to level"),
        ({"privacy": {"level": "client", "clip": 1.0}}, "needs noise_multiplier"),
        ({"privacy": {**CLIENT, "delta": 0.02}}, r"delta = 0\.02 would allow publishing one of 100 clients"),
        ({"privacy": CLIENT, "server": {"aggregation": "median"}}, "measured for a mean"),
        ({"privacy": CLIENT, "server": {"clip_norm": 1.0}}, r"leave server\.clip_norm out"),
        ({"privacy": CLIENT, "clients": {"memory": ["1GB"]}}, r"clients\.memory"),
        ({"privacy": CLIENT, "method": {"estimator": "auto"}}, "'auto' would change"),
        *(
            ({"privacy": EXAMPLE, "method": {"name": name}}, r"do not make estimator '\w+' private")
            for name in ("fedavg", "spry_guided", "spry_bottleneck")
        ),
        ({"privacy": EXAMPLE, "method": {"estimator": "auto"}}, "do not make estimator 'auto' private"),
        ({"privacy": EXAMPLE, "method": {"exact_head": True}}, "exact_head sends a gradient without noise"),
        ({"privacy": EXAMPLE, "local": {"logit_adjustment": 1.0}}, "counts all of a client's labels"),
        ({"server": {"aggregation": "median"}, "method": {"name": "fwdllm"}}, "pools gradients over rounds as a mean"),
        ({"server": {"trim": 0.2}}, "trim belongs to aggregation = 'trimmed_mean'"),
        (
            {
                "privacy": {"level": "client", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3},
                "evaluation": {"held_out": 0.2},
            },
            "held_out",
        ),
        (
            {
                "privacy": {"level": "client", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3},
                "server": {"sampling": "size"},
            },
            "sampling",
        ),
        (
            {
                "privacy": {"level": "client", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3},
                "method": {"name": "fwdllm"},
            },
            "before they are noised",
        ),
    ],
)
def test_what_is_not_private_is_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(table)
