"""What every estimator promises, over a table of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from families import autograd_gradient, batch_loss, build, padded_batch, trainable
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.bottleneck import BottleneckGradient
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.estimator import GradientEstimator
from spryfl.gradients.exact_head import ExactHead
from spryfl.gradients.forward import ForwardGradient, loss_and_slopes
from spryfl.gradients.guided import GuidedGradient
from spryfl.gradients.tangents import Draw
from spryfl.gradients.zeroth_order import ZerothOrder
from spryfl.models.layers import layer_calls

ESTIMATORS: dict[str, Callable[[], GradientEstimator]] = {
    "forward": ForwardGradient,
    "forward, 3 tangents": lambda: ForwardGradient(3),
    "bottleneck": BottleneckGradient,
    "bottleneck, 3 tangents": lambda: BottleneckGradient(3),
    "zeroth order": ZerothOrder,
    "zeroth order, 3 directions": lambda: ZerothOrder(3, 1e-4),
    "backprop": Backprop,
    "backprop, checkpointed": lambda: Backprop("per_layer", layer_calls),
    "backprop, budgeted": lambda: Backprop("budgeted", layer_calls, 3 * 9 * 32 * 8),
    "guided": lambda: GuidedGradient(layer_calls),
    "guided, exploring": lambda: GuidedGradient(layer_calls, slopes_per="tensor", explore=True),
    "guided, the guess alone": lambda: GuidedGradient(layer_calls, slopes_per="none"),
    "forward, exact head": lambda: ExactHead(ForwardGradient(), layer_calls, HEAD),
    "zeroth order, exact head": lambda: ExactHead(ZerothOrder(), layer_calls, HEAD),
}
WITH_SLOPES = ("forward", "forward, 3 tangents", "zeroth order", "zeroth order, 3 directions")
HEAD = frozenset(f"base_model.model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias"))
DRAW = DirectionStream(0, 1, 0).at_step(0)
DRAWS: dict[str, Callable[[list[str]], Draw]] = {
    "gaussian": lambda names: DRAW,
    "rademacher": lambda names: DirectionStream(0, 1, 0, "rademacher").at_step(0),
    "orthogonal": lambda names: DirectionStream(0, 1, 0, "orthogonal").at_step(0),
    "coordinate": lambda names: DirectionStream(0, 1, 0, "coordinate").at_step(0),
    "gaussian, per tensor": lambda names: DirectionStream(0, 1, 0, groups=tuple((n,) for n in names)).at_step(0),
    "orthogonal, two groups": lambda names: DirectionStream(
        0, 1, 0, "orthogonal", (tuple(names[:1]), tuple(names[1:]))
    ).at_step(0),
    "shrunk": lambda names: DirectionStream(0, 1, 0, shrinkage=True).at_step(0),
    "nearest of candidates": lambda names: DirectionStream(0, 1, 0, num_candidates=3, known=Known()).at_step(0),
}


class Known(dict):
    """A last update of ones, for every LoRA matrix."""

    def get(self, name: str) -> Tensor | None:
        return torch.ones(2 * 32) if "lora" in name else None


@pytest.mark.parametrize(
    ("name", "draw"),
    [*((name, "gaussian") for name in ESTIMATORS), *(("forward, 3 tangents", d) for d in DRAWS if d != "gaussian")],
)
def test_contract(name: str, draw: str) -> None:
    model, batch = build("bert"), padded_batch()
    model.base_model.model.bert.encoder.layer[1].attention.self.query.lora_dropout["default"].train()
    names = [*trainable(model)[:3], *sorted(HEAD)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    required = [parameter.requires_grad for parameter in model.parameters()]
    estimate = ESTIMATORS[name]().estimate(model, batch_loss(batch), names, DRAWS[draw](names), 3)

    assert set(estimate.gradients) == set(names)
    assert all(g.shape == model.get_parameter(n).shape for n, g in estimate.gradients.items())
    assert all(g.dtype == torch.float32 and g.device.type == "cpu" for g in estimate.gradients.values())
    assert estimate.loss == pytest.approx(float(batch_loss(batch)(model).detach()), abs=1e-4)
    # The model is left as it was found, bitwise.
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert required == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", WITH_SLOPES)
@pytest.mark.parametrize("draw", DRAWS)
def test_gradient_is_what_the_slopes_rebuild(name: str, draw: str) -> None:
    """Bitwise: the server has the slopes and the seed only."""
    model = build("bert")
    names = trainable(model)
    directions = DRAWS[draw](names)
    estimate = ESTIMATORS[name]().estimate(model, batch_loss(padded_batch()), names, directions, 3)
    assert estimate.slopes is not None
    assert estimate.slopes.shape == (directions.num_slopes(names, 3 if "3" in name else 1),)
    assert estimate.slopes.dtype == torch.float32
    rebuilt = directions.gradient(estimate.slopes, {n: model.get_parameter(n).shape for n in names})
    assert all(torch.equal(rebuilt[n], estimate.gradients[n]) for n in names)


def test_zeroth_order_slope_is_near_forward_mode() -> None:
    model, loss = build("bert"), batch_loss(padded_batch())
    names = trainable(model)
    forward = ForwardGradient(2).estimate(model, loss, names, DRAW, 3).slopes
    difference = ZerothOrder(2, 1e-4).estimate(model, loss, names, DRAW, 3).slopes
    assert torch.allclose(forward, difference, rtol=1e-4, atol=1e-6)


def test_zeroth_order_runs_without_dropout() -> None:
    modes = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self) -> Tensor:
            modes.append(self.training)
            return nn.functional.dropout(self.weight, 0.5, self.training).sum()

    model = Watched().train()
    estimate = ZerothOrder(1, 0.5).estimate(model, lambda m: m(), ["weight"], DRAW, 1)
    assert modes == [False, False]
    assert model.training
    assert float(estimate.slopes[0]) == pytest.approx(
        float(DRAW.numbers(0, "weight", torch.Size((3,))).sum()), rel=1e-5
    )


def test_an_error_in_the_loss_leaves_the_model_whole() -> None:
    model = build("bert")
    before = {key: value.clone() for key, value in model.state_dict().items()}

    class Broken:
        def __call__(self, model: nn.Module) -> Tensor:
            batch_loss(padded_batch())(model)
            raise ValueError("broken")

        parts = __call__

    for estimator in (factory() for factory in ESTIMATORS.values()):
        with pytest.raises(ValueError, match="broken"):
            estimator.estimate(model, Broken(), trainable(model), DRAW, 3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_forward_gradient_is_unbiased_with_the_known_variance(distribution: str) -> None:
    """E[g] = grad L, and E|g - grad L|^2 = (d + 1)|grad L|^2 for Gaussian tangents, (d - 1) for signs.

    Slopes are linear in the tangent, so they are taken from the exact gradient: 4,000 draws on a real
    model's gradient, tolerance five standard errors.
    """
    model, loss = build("bert"), batch_loss(padded_batch())
    names = trainable(model)[:2]
    exact = autograd_gradient(model, loss, names)
    flat = torch.cat([exact[n].flatten() for n in names])
    num_draws, d = 4000, flat.numel()
    total, errors = torch.zeros(d, dtype=torch.float64), []
    for step in range(num_draws):
        draw = DirectionStream(0, 1, 0, distribution).at_step(step)
        v = torch.cat([draw.numbers(0, n, exact[n].shape).flatten() for n in names]).double()
        if step < 5:  # the linearity itself
            tangents = {n: draw.numbers(0, n, exact[n].shape).unsqueeze(0) for n in names}
            assert float(loss_and_slopes(model, loss, tangents)[1]) == pytest.approx(float(flat @ v), rel=1e-6)
        estimate = (flat @ v) * v
        total += estimate
        errors.append(float((estimate - flat).square().sum()))
    norm = float(flat.norm())
    factor = d + 1 if distribution == "gaussian" else d - 1
    mean_error = float((total / num_draws - flat).norm())
    assert mean_error < 2 * norm * (factor / num_draws) ** 0.5
    errors_mean = sum(errors) / num_draws
    standard_error = torch.tensor(errors).std().item() / num_draws**0.5
    assert errors_mean == pytest.approx(factor * norm**2, abs=5 * standard_error)


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
@pytest.mark.parametrize("inner", [ForwardGradient(2), ZerothOrder()], ids=["forward", "zeroth order"])
def test_the_exact_head_is_autograds_and_the_rest_is_the_inner_estimate(family: str, inner: GradientEstimator) -> None:
    model, loss = build(family), batch_loss(padded_batch())
    inside = {p for layer in layer_calls(model) for p in layer.parameters()}
    names = trainable(model)
    head = [name for name in names if model.get_parameter(name) not in inside]
    others = [name for name in names if name not in head]
    assert head
    estimator = ExactHead(inner, layer_calls, frozenset(head))
    found = estimator.estimate(model, loss, names, DRAW, 3).gradients
    exact = autograd_gradient(model, loss, head)
    near = 1e-5 if isinstance(inner, ForwardGradient) else 5e-3  # the latter's last pass was h along a direction
    assert all((found[name].double() - exact[name]).norm() < near * exact[name].norm() for name in head)
    plain = inner.estimate(model, loss, others, DRAW, 3).gradients
    assert all(torch.equal(found[name], plain[name]) for name in others)
    alone = estimator.estimate(model, loss, head, DRAW, 3).gradients
    assert all((alone[name].double() - exact[name]).norm() < 1e-5 * exact[name].norm() for name in head)
