"""Which estimator fits a budget and goes furthest in a second: hand-made tables, and the cosines behind them."""

import json
from pathlib import Path

import pytest
import torch

from spryfl.federated.choosing import Candidate, choose
from spryfl.federated.fitting import PassSettings
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.progress import forward_cosine, guided_cosine, identity_cosine
from spryfl.gradients.tangents import Distribution

MB = 10**6


def candidate(name: str, megabytes: int, seconds: float, progress: float) -> Candidate:
    return Candidate(name, PassSettings(estimator=name), megabytes * MB, seconds, progress)


TABLE = [
    candidate("backprop", 900, 2.5, 1.0),
    candidate("backprop checkpointed per layer", 688, 3.0, 1.0),
    candidate("guided h=2", 660, 2.0, 0.5),
    candidate("forward K=8", 620, 4.0, 0.05),
]


@pytest.mark.parametrize(
    ("megabytes", "name"),
    [
        (None, "backprop"),
        (900, "backprop"),
        (899, "backprop checkpointed per layer"),
        (688, "backprop checkpointed per layer"),
        (687, "guided h=2"),
        (659, "forward K=8"),
    ],
)
def test_the_fastest_progress_that_fits(megabytes: int | None, name: str) -> None:
    choice = choose(TABLE, None if megabytes is None else megabytes * MB)
    assert choice is not None
    assert choice.candidate.name == name
    assert choice.candidate.settings.estimator == name


def test_the_reason_is_one_line_with_room_and_the_next_best() -> None:
    choice = choose(TABLE, 700 * MB)
    assert choice is not None
    assert choice.reason == (
        "backprop checkpointed per layer: fits 700 MB with 12 MB to spare; progress per second 1.0, next guided h=2 "
        "0.75"
    )
    free, alone = choose(TABLE, None), choose(TABLE, 650 * MB)
    assert free is not None
    assert free.reason == "backprop: progress per second 1.0, next backprop checkpointed per layer 0.83"
    assert alone is not None
    assert alone.reason == "forward K=8: fits 650 MB with 30 MB to spare; the only one of 4 that fits"


def test_speed_decides_as_much_as_the_cosine() -> None:
    """An estimate of half the cosine wins where its step takes less than half the time."""
    exact, guess = candidate("exact", 100, 3.0, 1.0), candidate("guess", 100, 1.4, 0.5)
    choice = choose([exact, guess], None)
    assert choice is not None
    assert choice.candidate is guess


def test_nothing_fits() -> None:
    assert choose(TABLE, 619 * MB) is None
    assert choose([], None) is None


def test_ties_take_the_least_memory_then_the_first() -> None:
    large, small = candidate("large", 200, 1.0, 0.995), candidate("small", 100, 1.0, 0.99)
    twin, far = candidate("twin", 100, 1.0, 0.99), candidate("far", 10, 1.0, 0.98)
    choice = choose([large, small, twin, far], None)
    assert choice is not None
    assert choice.candidate is small


def test_where_no_progress_is_expected_the_fastest_is_taken() -> None:
    choice = choose([candidate("slow", 10, 2.0, 0.0), candidate("fast", 20, 1.0, 0.0)], None)
    assert choice is not None
    assert choice.candidate.name == "fast"
    assert "no progress expected" in choice.reason


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "orthogonal"])
@pytest.mark.parametrize("num_tangents", [1, 4, 16])
def test_forward_cosine_against_monte_carlo(distribution: Distribution, num_tangents: int) -> None:
    """E[g_hat . g] / sqrt(E|g_hat|^2 |g|^2) over 4000 draws, to a tenth; the mean cosine is less by a fifth at most."""
    d, draws = 40, 4000
    gradient = torch.randn(d, generator=torch.Generator().manual_seed(7))
    dot = square = cosine = 0.0
    stream = DirectionStream(3, 1, 0, distribution)
    for step in range(draws):
        rows = stream.at_step(step).stacked({"w": gradient.shape}, num_tangents)["w"]
        estimate = (rows @ gradient) @ rows / num_tangents
        dot += float(estimate @ gradient) / draws
        square += float(estimate.square().sum()) / draws
        cosine += float(torch.cosine_similarity(estimate, gradient, dim=0)) / draws
    expected = forward_cosine(distribution, num_tangents, d)
    assert dot / (square**0.5 * float(gradient.norm())) == pytest.approx(expected, rel=0.1)
    assert 0.75 * expected < cosine < 1.1 * expected


def test_the_table_of_cosines() -> None:
    assert forward_cosine("gaussian", 8, 991) == pytest.approx((8 / 1000) ** 0.5)
    assert forward_cosine("orthogonal", 40, 40) == 1.0
    assert forward_cosine("rademacher", 1, 1) == 1.0
    assert identity_cosine(0) == 1.0
    assert identity_cosine(6) == 0.0
    assert guided_cosine([1.0, 0.2], "none") == pytest.approx(0.6)
    assert guided_cosine([-0.2], "none") == 0.0
    assert guided_cosine([-0.2], "step") == guided_cosine([-0.2], "unit") == pytest.approx(0.2)
    assert guided_cosine([1.0, 0.2], "unit") == pytest.approx((1.04 / 2) ** 0.5)
    assert guided_cosine([], "unit") == 1.0


def test_cosines_of_the_identity_guess_are_those_measured() -> None:
    """The mean of before and after training, `spry bench frontier --quality`; the uppermost of 6 layers is exact."""
    path = Path(__file__).parents[2] / "docs/results/gradient-quality.json"
    rows = [row for row in json.loads(path.read_text()) if row["estimator"] == "guided identity"]
    for distance in range(6):
        measured = [row["cosine"] for row in rows if row["layer"] == 5 - distance]
        assert len(measured) == 2
        assert identity_cosine(distance) == pytest.approx(sum(measured) / 2, abs=0.005)
