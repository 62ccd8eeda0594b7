"""Slopes against autograd's gradient . v, in float64, for every supported family."""

import pytest
import torch

from families import DECODERS, FAMILIES, autograd_gradient, batch_loss, build, padded_batch, trainable
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.forward import loss_and_slope
from spryfl.models.layers import transformer_layers

TOLERANCE = 1e-9


def random_tangents(model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randn(model.get_parameter(n).shape, generator=generator, dtype=torch.float64) for n in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_slope_is_gradient_times_tangent(family: str) -> None:
    model, loss = build(family), batch_loss(padded_batch())
    names = trainable(model)
    tangents = random_tangents(model, names)
    gradient = autograd_gradient(model, loss, names)
    expected = sum(float((gradient[n] * tangents[n]).sum()) for n in names)
    value, slope = loss_and_slope(model, loss, tangents)
    assert abs(expected) > 1e-3  # a slope of zero would prove nothing
    assert slope == pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE)
    assert value == pytest.approx(float(loss(model).detach()), abs=TOLERANCE)


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_slope_of_each_parameter_alone(family: str) -> None:
    """Tangents that start at any one place, with none below it."""
    model, loss = build(family), batch_loss(padded_batch())
    names = trainable(model)
    gradient = autograd_gradient(model, loss, names)
    for name, tangent in random_tangents(model, names).items():
        _, slope = loss_and_slope(model, loss, {name: tangent})
        assert slope == pytest.approx(float((gradient[name] * tangent).sum()), abs=TOLERANCE, rel=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_masked(family: str) -> None:
    """What stands at padded places changes neither loss nor slope, and the loss is that of stock attention."""
    batch = padded_batch(left=family in DECODERS)
    model, stock = build(family), build(family, attention="sdpa")
    tangents = random_tangents(model, trainable(model))
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7))
    value, slope = loss_and_slope(model, batch_loss(batch), tangents)
    assert value == pytest.approx(float(batch_loss(batch)(stock).detach()), abs=1e-12)
    assert (value, slope) == pytest.approx(loss_and_slope(model, batch_loss(other), tangents), abs=1e-12)
    unmasked = dict(other, attention_mask=torch.ones_like(batch["attention_mask"]))
    assert abs(loss_and_slope(model, batch_loss(unmasked), tangents)[1] - slope) > 1e-6  # a lost mask would show


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family: str) -> None:
    model, loss = build(family), batch_loss(padded_batch())
    names = trainable(model)

    def draw(k: int, name: str, shape: torch.Size) -> torch.Tensor:
        raise AssertionError("backprop draws no directions")

    plain = Backprop().estimate(model, loss, names, draw, 3)
    checkpointed = Backprop("per_layer", transformer_layers).estimate(model, loss, names, draw, 3)
    for name in names:
        assert torch.equal(plain.gradients[name], checkpointed.gradients[name])
    assert all("forward" not in vars(layer) for layer in transformer_layers(model))


def test_layers_below_the_lowest_tangent_carry_none() -> None:
    model, loss = build("bert"), batch_loss(padded_batch())
    seen: dict[str, bool] = {}

    def watch(name: str):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            seen[name] = torch.autograd.forward_ad.unpack_dual(hidden).tangent is not None

        return hook

    layers = transformer_layers(model)
    handles = [layer.register_forward_hook(watch(str(i))) for i, layer in enumerate(layers)]
    upper = [n for n in trainable(model) if ".layer.1." in n]
    loss_and_slope(model, loss, random_tangents(model, upper))
    for handle in handles:
        handle.remove()
    assert seen == {"0": False, "1": True}
