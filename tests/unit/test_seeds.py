"""Mean, standard deviation and interval over seeds, by hand."""

import pytest

from spryfl.report.seeds import over_seeds


def test_three_seeds() -> None:
    found = over_seeds([0.70, 0.72, 0.74])
    assert found.mean == pytest.approx(0.72)
    assert found.std == pytest.approx(0.02)
    # t(0.975, 2) = 4.302653 from any table; the standard error is 0.02 / sqrt(3)
    assert found.high - found.mean == pytest.approx(4.302653 * 0.02 / 3**0.5, rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert str(found) == "0.720 ± 0.050 (n = 3)"


def test_other_confidence() -> None:
    found = over_seeds([1.0, 3.0], confidence=0.5)
    assert (found.mean, found.std) == (2.0, pytest.approx(2**0.5))
    assert found.high == pytest.approx(3.0)  # t(0.75, 1) = tan(pi / 4) = 1, the standard error is 1


def test_one_seed_tells_no_spread() -> None:
    found = over_seeds([0.5])
    assert (found.mean, found.std, found.low, found.high, found.num_seeds) == (0.5, None, None, None, 1)
    assert str(found) == "0.500 (n = 1)"
