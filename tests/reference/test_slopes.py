"""Slopes against autograd's gradient . v, in float64, for every supported family."""

import pytest
import torch

from families import DECODERS, FAMILIES, autograd_gradient, batch_loss, build, padded_batch, trainable
from spryfl.forward_mode.budget import chunks_of
from spryfl.forward_mode.dual import Dual
from spryfl.gradients.estimator import Loss
from spryfl.gradients.forward import loss_and_slopes
from spryfl.models.layers import transformer_layers

TOLERANCE = 1e-9
K = 2


def random_tangents(model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {n: (K, *model.get_parameter(n).shape) for n in names}
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


def exact_slopes(model: torch.nn.Module, loss: Loss, tangents: dict[str, torch.Tensor]) -> torch.Tensor:
    """Autograd's gradient . v for each of the K tangents."""
    gradient = autograd_gradient(model, loss, list(tangents))
    return sum((gradient[n] * tangents[n]).flatten(1).sum(1) for n in tangents)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1, 40_000, 10**9])
def test_slopes_are_gradient_times_tangent(family: str, budget: int) -> None:
    """All K in one pass, in chunks of one row and one token, of some, and whole."""
    model, loss = build(family), batch_loss(padded_batch())
    tangents = random_tangents(model, trainable(model))
    expected = exact_slopes(model, loss, tangents)
    with chunks_of(budget):
        value, slopes = loss_and_slopes(model, loss, tangents)
    assert (expected.abs() > 1e-3).all()  # slopes of zero would prove nothing
    assert torch.allclose(slopes, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert value == pytest.approx(float(loss(model).detach()), abs=TOLERANCE)


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_slopes_of_each_parameter_alone(family: str) -> None:
    """Tangents that start at any one place, with none below it."""
    model, loss = build(family), batch_loss(padded_batch())
    for name, tangent in random_tangents(model, trainable(model)).items():
        expected = exact_slopes(model, loss, {name: tangent})
        for budget in (1, 10**9):
            with chunks_of(budget):
                _, slopes = loss_and_slopes(model, loss, {name: tangent})
            assert torch.allclose(slopes, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_masked(family: str) -> None:
    """What stands at padded places changes neither loss nor slope, and the loss is that of stock attention."""
    batch = padded_batch(left=family in DECODERS)
    model, stock = build(family), build(family, attention="sdpa")
    tangents = random_tangents(model, trainable(model))
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7))
    value, slopes = loss_and_slopes(model, batch_loss(batch), tangents)
    assert value == pytest.approx(float(batch_loss(batch)(stock).detach()), abs=1e-12)
    with torch.inference_mode():
        assert float(batch_loss(batch)(model)) == pytest.approx(value, abs=1e-12)
    again, same = loss_and_slopes(model, batch_loss(other), tangents)
    assert again == pytest.approx(value, abs=1e-12)
    assert torch.allclose(same, slopes, atol=1e-12)
    unmasked = dict(other, attention_mask=torch.ones_like(batch["attention_mask"]))
    changed = loss_and_slopes(model, batch_loss(unmasked), tangents)[1]
    assert ((changed - slopes).abs() > 1e-6).all()  # a lost mask would show


def test_layers_below_the_lowest_tangent_carry_none() -> None:
    model, loss = build("bert"), batch_loss(padded_batch())
    seen: dict[str, bool] = {}

    def watch(name: str):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            seen[name] = isinstance(hidden, Dual)

        return hook

    layers = transformer_layers(model)
    handles = [layer.register_forward_hook(watch(str(i))) for i, layer in enumerate(layers)]
    upper = [n for n in trainable(model) if ".layer.1." in n]
    loss_and_slopes(model, loss, random_tangents(model, upper))
    for handle in handles:
        handle.remove()
    assert seen == {"0": False, "1": True}
