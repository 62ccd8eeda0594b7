"""K tangents: unbiased, of the variance theory gives, exact at K = d, and shrunk to the least error."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from families import autograd_gradient, batch_loss, build, padded_batch
from spryfl.config import AdapterConfig, RunConfig
from spryfl.errors import ConfigError, SpryError
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.forward import ForwardGradient, loss_and_slopes
from spryfl.gradients.tangents import SPREADS, Draw, tangent_groups
from spryfl.models.units import trainable_units
from spryfl.run import run
from spryfl.tracking.run_directory import create_run_directory
from spryfl.workbench import Workbench

SHAPES = {"low.a": torch.Size((2, 3)), "low.b": torch.Size((2,)), "high.a": torch.Size((4,))}
UNITS = (("low.a", "low.b"), ("high.a",))
NUM_STEPS = 2000
PER = {"step": [12], "unit": [8, 4], "tensor": [6, 2, 4]}  # dimensions of each group
K = 2


def draw_for(distribution: str, per: str, step: int = 0, *, shrinkage: bool = False) -> Draw:
    return DirectionStream(0, 1, 0, distribution, tangent_groups(per, UNITS), shrinkage).at_step(step)


def true_gradient() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def estimate(draw: Draw, gradient: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """From the slopes a linear loss of this gradient has."""
    slopes = [sum(float((gradient[n] * v).sum()) for n, v in row.items()) for row in draw.directions(SHAPES, k)]
    return draw.gradient(torch.tensor(slopes), SHAPES)


@cache
def estimates_of(distribution: str, per: str) -> list[dict[str, Tensor]]:
    return [estimate(draw_for(distribution, per, step), true_gradient(), K) for step in range(NUM_STEPS)]


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten() for name in SHAPES]).double()


def relative_variance(distribution: str, k: int, d: int) -> float:
    """E|g_hat - g|^2 / |g|^2 of one group."""
    return {"gaussian": (d + 1) / k, "rademacher": (d - 1) / k}.get(distribution, d / k - 1)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("distribution", SPREADS)
def test_unbiased_with_the_variance_of_theory(distribution: str, per: str) -> None:
    """E g_hat = g, and E|g_hat - g|^2 = sum_u V_u |g_u|^2, (d_u + 1) / K for Gaussian: five standard errors."""
    gradient = true_gradient()
    estimates = torch.stack([flat(one) for one in estimates_of(distribution, per)])
    exact = flat(gradient)
    standard_errors = estimates.std(0) / NUM_STEPS**0.5
    assert ((estimates.mean(0) - exact).abs() <= 5 * standard_errors + 1e-6).all()
    expected = sum(
        relative_variance(distribution, K, d) * sum(float(gradient[name].square().sum()) for name in group)
        for d, group in zip(PER[per], tangent_groups(per, UNITS), strict=True)
    )
    errors = (estimates - exact).square().sum(1)
    assert float(errors.mean()) == pytest.approx(expected, abs=float(5 * errors.std() / NUM_STEPS**0.5) + 1e-6)


def test_fewer_dimensions_a_group_fewer_errors() -> None:
    """Why K tangents a unit: the other unit's size no longer counts."""
    gradient = true_gradient()

    def error(per: str) -> float:
        found = [estimate(draw_for("gaussian", per, s), gradient, K) for s in range(500)]
        return float(torch.stack([(flat(one) - flat(gradient)).square().sum() for one in found]).mean())

    assert error("tensor") < error("unit") < error("step")


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("distribution", SPREADS)
def test_shrinkage_leaves_the_least_squared_error(distribution: str, per: str) -> None:
    """In each group the multiple that fits the draws best is the closed form, and the gradient is scaled by it."""
    gradient = true_gradient()
    plain = estimates_of(distribution, per)
    shrunk = estimate(draw_for(distribution, per, shrinkage=True), gradient, K)
    for d, group in zip(PER[per], tangent_groups(per, UNITS), strict=True):
        c = SPREADS[distribution].shrinkage(K, d)
        assert all(torch.allclose(shrunk[n], c * plain[0][n], atol=1e-6) for n in group)
        exact = torch.cat([gradient[n].flatten() for n in group])
        draws = torch.stack([torch.cat([one[n].flatten() for n in group]) for one in plain])
        # E|c g_hat - g|^2 is least at c = E[g_hat . g] / E|g_hat|^2.
        best = float((draws @ exact).mean() / draws.square().sum(1).mean())
        assert c == pytest.approx(best, rel=0.12)
        assert 0 < c <= 1

        def error(multiple: float, draws: Tensor = draws, exact: Tensor = exact) -> float:
            return float((multiple * draws - exact).square().sum(1).mean())

        assert error(c) <= min(error(0.7 * c), error(1.4 * c)) + 1e-9
        if K < d:
            assert error(c) == pytest.approx((1 - c) * float(exact.square().sum()), rel=0.15)


@pytest.mark.parametrize("distribution", ["orthogonal", "coordinate"])
def test_directions_are_orthogonal_and_as_long_as_needed(distribution: str) -> None:
    stacked = draw_for(distribution, "unit").stacked(SHAPES, 3)
    rows = torch.cat([stacked[name].flatten(1) for name in SHAPES], 1).double()  # (K a unit, 12)
    expected = torch.diag(torch.tensor([8.0] * 3 + [4.0] * 3, dtype=torch.float64))
    assert torch.allclose(rows @ rows.T, expected, atol=1e-5)
    assert not stacked["high.a"][:3].any()
    assert not stacked["low.a"][3:].any()
    if distribution == "coordinate":
        assert ((rows != 0).sum(1) == 1).all()


def test_more_directions_than_dimensions() -> None:
    with pytest.raises(ConfigError, match=r"num_tangents = 5: only d = 4 tangents can be orthogonal .* lower it to 4"):
        draw_for("orthogonal", "unit").stacked(SHAPES, 5)
    assert draw_for("gaussian", "unit").stacked(SHAPES, 5)["low.b"].shape == (10, 2)


def test_a_step_may_leave_parameters_out_but_not_bring_others() -> None:
    draw = draw_for("gaussian", "unit")
    part = {"low.b": SHAPES["low.b"]}
    assert draw.num_slopes(list(part), 3) == 3
    assert torch.equal(draw.stacked(part, 3)["low.b"], draw.stacked(SHAPES, 3)["low.b"][:3])
    with pytest.raises(SpryError, match="parameter 'other' belongs to no group"):
        draw.num_slopes(["low.b", "other"], 3)


@pytest.mark.parametrize("distribution", ["orthogonal", "coordinate"])
def test_as_many_tangents_as_dimensions_give_the_exact_gradient(distribution: str) -> None:
    """Of LoRA-XS's four units of four numbers, forward only, in one pass; against autograd in float64."""
    model = build("bert", adapter=AdapterConfig(kind="lora_xs", rank=2))
    loss = batch_loss(padded_batch())
    units = [unit.parameters for unit in trainable_units(model) if not unit.is_head]
    names = [name for unit in units for name in unit]
    exact = autograd_gradient(model, loss, names)
    shapes = {name: exact[name].shape for name in names}
    for per, k in (("unit", 4), ("step", 16)):
        draw = DirectionStream(0, 1, 0, distribution, tangent_groups(per, units)).at_step(0)
        found = ForwardGradient(k).estimate(model, loss, names, draw, 3)
        assert found.slopes is not None
        assert found.slopes.shape == (16,)
        for name in names:  # slopes and directions travel in float32
            assert torch.allclose(found.gradients[name].double(), exact[name], rtol=1e-4, atol=1e-7)
        _, slopes = loss_and_slopes(model, loss, draw.stacked(shapes, k))
        rows = torch.cat([draw.stacked(shapes, k)[n].flatten(1) for n in names], 1).double()
        solved = torch.linalg.solve(rows, slopes)
        assert torch.allclose(solved, torch.cat([exact[n].flatten() for n in names]), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("upload", ["values", "slopes"])
def test_a_run_with_exact_gradients_from_slopes(tiny_config: Callable[..., RunConfig], tmp_path, upload: str) -> None:
    """The server knows how many slopes each client owes, and comes to the same whatever travels."""
    config = tiny_config(
        adapter={"kind": "lora_xs", "rank": 2},
        method={
            "name": "spry",
            "num_tangents": 4,
            "distribution": "orthogonal",
            "tangents_per": "unit",
            "upload": upload,
        },
        server__num_rounds=1,
    )
    summary = run(config, create_run_directory(tmp_path / "run"), (), "exact")
    assert summary.rounds == 1
    assert summary.num_failures == summary.num_refused == 0


def test_too_many_directions_show_before_the_run(tiny_config: Callable[..., RunConfig]) -> None:
    adapter = {"kind": "lora_xs", "rank": 2}
    method = {"name": "spry", "num_tangents": 5, "distribution": "coordinate", "tangents_per": "unit"}
    with pytest.raises(ConfigError, match=r"method\.num_tangents = 5: only d = 4 tangents"):
        Workbench.from_config(tiny_config(adapter=adapter, method=method))
    with pytest.raises(ConfigError, match=r"method\.num_tangents = 9: only d = 4 tangents"):  # the head has none
        Workbench.from_config(
            tiny_config(
                adapter=adapter, method={**method, "num_tangents": 9, "tangents_per": "step", "exact_head": True}
            )
        )
    bench = Workbench.from_config(tiny_config(adapter=adapter, method={**method, "tangents_per": "step"}))
    assert bench.training == replace(bench.training, tangents_per="step", distribution="coordinate")
