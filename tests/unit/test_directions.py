"""Directions: the same everywhere, different at every address, with the moments estimators need."""

import numpy as np
import pytest
import torch
from scipy import stats

from spryfl.gradients.directions import DirectionStream

SHAPE = torch.Size((3, 5))
GAUSSIAN_BITS = [1051340411, 1030426802, -1085951705, -1084396472]
SIGNS = [-1.0, -1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0]


def test_bits_are_pinned() -> None:
    """Known values: a change here would break server and client of different versions silently."""
    gaussian = DirectionStream(seed=7, round=3, client=11).draw(2, 1, "layer.0.weight", torch.Size((4,)))
    signs = DirectionStream(7, 3, 11, "rademacher").draw(2, 1, "layer.0.weight", torch.Size((8,)))
    assert gaussian.view(torch.int32).tolist() == GAUSSIAN_BITS
    assert signs.tolist() == SIGNS


def test_every_part_of_the_address_matters() -> None:
    drawn = [
        DirectionStream(seed, round, client).draw(step, k, name, SHAPE)
        for seed, round, client, step, k, name in [
            (0, 1, 0, 0, 0, "a"),
            (1, 1, 0, 0, 0, "a"),
            (0, 2, 0, 0, 0, "a"),
            (0, 1, 1, 0, 0, "a"),
            (0, 1, 0, 1, 0, "a"),
            (0, 1, 0, 0, 1, "a"),
            (0, 1, 0, 0, 0, "b"),
        ]
    ]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert not torch.isclose(one, other).any()


def test_no_state_is_kept_and_none_is_touched() -> None:
    stream = DirectionStream(0, 1, 2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = stream.draw(0, 0, "a", SHAPE)
    stream.draw(5, 3, "b", SHAPE)
    torch.set_num_threads(1)
    again = stream.draw(0, 0, "a", SHAPE)
    assert torch.equal(first, again)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_gaussian_distribution() -> None:
    numbers = DirectionStream(1, 1, 1).draw(0, 0, "a", torch.Size((200_001,))).double().numpy()
    assert stats.kstest(numbers, "norm").pvalue > 0.01
    assert abs(np.corrcoef(numbers[:-1:2], numbers[1::2])[0, 1]) < 0.01  # the pairs Box-Muller makes


@pytest.mark.parametrize("count", [1, 63, 64, 65, 10_000])
def test_rademacher_is_signs(count: int) -> None:
    numbers = DirectionStream(1, 1, 1, "rademacher").draw(0, 0, "a", torch.Size((count,)))
    assert numbers.dtype == torch.float32
    assert set(numbers.tolist()) <= {-1.0, 1.0}
    if count == 10_000:
        assert abs(float(numbers.mean())) < 0.04
