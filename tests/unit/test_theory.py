"""The theory bench on a tiny model: its exact figures by other means, its Monte Carlo within its tolerance."""

from pathlib import Path

import numpy as np
import pytest

from spryfl.bench.theory import TheoryBench, error_variance, measure_theory
from spryfl.bench.theory_report import as_markdown, disagreements, plot_theory
from spryfl.bench.theory_rounds import product_variance, round_variance


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tiny_data: Path) -> dict[str, object]:
    return measure_theory(
        TheoryBench(
            model=str(tiny_model),
            data=str(tiny_data),
            rows=60,
            num_tangents=256,
            per_pass=32,
            counts=(1, 4),
            alphas=(0.1, 100.0),
            clients=(4, 8),
            seeds=3,
            draws=1024,
            drawn_alphas=(0.1, 100.0),
        )
    )


def test_standard_errors_in_closed_form() -> None:
    """Against a hundred thousand simulated estimates; with such tails a variance is known to some hundredths then."""
    generator = np.random.default_rng(0)
    own, whole = np.array([0.6, 0.0, -0.8, 0.0]), np.array([0.2, 0.5, -0.5, 0.1])
    for k in (2, 8):
        tangents = generator.standard_normal((100_000, 2, k, 4))
        a, b = np.moveaxis(((tangents @ own)[..., None] * tangents).mean(axis=2), 1, 0)
        assert ((a - own) ** 2).sum(axis=1).var() == pytest.approx(error_variance(4, k), rel=0.05)
        products = ((a - whole) * (b - whole)).sum(axis=1)
        assert products.var() == pytest.approx(product_variance(own, own - whole, k), rel=0.1)


def test_monte_carlo_agrees_with_theory(measured: dict[str, object]) -> None:
    assert disagreements(measured) == []
    assert [(row["d"], row["k"]) for row in measured["variance"]] == [(d, k) for d in (64, 256) for k in (1, 4, 16)]
    assert all(row["slope_difference"] < 1e-4 for row in measured["variance"])
    wrong = measured["variance"][0] | {"theory": 2 * measured["variance"][0]["theory"]}
    assert disagreements({"variance": [wrong], "draws": [], "errors": []}) == ["variance at d = 64, K = 1"]


def test_bias_grows_with_heterogeneity(measured: dict[str, object]) -> None:
    for num_clients in (4, 8):
        unequal, equal, iid = [row for row in measured["bias"] if row["num_clients"] == num_clients]
        assert unequal["bias"] > equal["bias"] > 0
        assert unequal["label_distance"] > equal["label_distance"]
        assert iid["bias"] < unequal["bias"]
        assert iid["bias_after_rotation"] < 0.5 * iid["bias"]


def test_a_split_takes_work_off_clients_not_error_off_a_round() -> None:
    """Clients alike: dealt or not, a round errs as much; a head that all of them perturb makes a split err more."""
    gradient = np.array([0.3, -0.2, 0.5, 0.1, -0.4, 0.2, 0.6, -0.1])
    square, everything = gradient @ gradient, np.ones(8, dtype=bool)
    four = np.tile(gradient, (4, 1))
    assert round_variance(four, np.full((4, 8), 1 / 4), everything) == pytest.approx((8 + 1) / 4 * square)
    assert round_variance(four, np.kron(np.eye(4), np.ones(2)), everything) == pytest.approx((2 + 1) * square)

    three, head, dealt = four[:3], gradient[:2] @ gradient[:2], np.full((3, 8), 1 / 3)
    dealt[:, 2:] = np.kron(np.eye(3), np.ones(2))
    units = square - head
    by_hand = 2 * (3 * head + units) + units + (2 * (3 * head + units) + 3 * head) / 9
    assert round_variance(three, dealt, everything) == pytest.approx(by_hand)
    assert by_hand > round_variance(three, np.full((3, 8), 1 / 3), everything)
    assert round_variance(three, dealt, np.arange(8) >= 2) == pytest.approx((2 + 1) * units)


def test_the_report(measured: dict[str, object], tmp_path: Path) -> None:
    table = as_markdown(measured)
    assert table.count("| IID |") == 2 + 2 * 4
    assert f"| 4 | 256 | 16 | {measured['variance'][-1]['error']:,.1f} | 16.1 |" in table
    plot_theory(measured, tmp_path / "theory.png")
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")
