"""Guided tangents against autograd, in float64 on tiny models of several families."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from families import autograd_gradient, batch_loss, build, drop_half, dropping_loss, padded_batch, trainable
from spryfl.config import AdapterConfig
from spryfl.errors import ModelError
from spryfl.forward_mode.budget import chunks_of
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.backward_maps import MapSettings, fit_backward_maps, gradients_by_layer, guess_quality
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.estimator import GradientEstimator
from spryfl.gradients.guesses import MapGuess, identity, positions, tensors_of
from spryfl.gradients.guided import GuidedGradient
from spryfl.memory.meter import ActivationMeter
from spryfl.models.adapters import dropout_modules
from spryfl.models.layers import layer_calls

DRAW = DirectionStream(0, 1, 0).at_step(0)
Gradients = dict[str, Tensor]


def flat(gradients: Gradients, names: list[str]) -> Tensor:
    return torch.cat([gradients[name].flatten().double() for name in names])


def in_layer(model: nn.Module, place: int) -> list[str]:
    """The trainable parameters of one layer."""
    own = set(layer_calls(model)[place].parameters())
    return [name for name in trainable(model) if model.get_parameter(name) in own]


def guided(model: nn.Module, names: list[str], **settings: object) -> Gradients:
    estimator = GuidedGradient(layer_calls, **settings)
    return estimator.estimate(model, batch_loss(padded_batch()), names, DRAW, 3).gradients


@pytest.mark.parametrize("family", ["bert", "albert", "distilbert", "llama", "opt", "gemma", "mistral"])
@pytest.mark.parametrize("slopes", ["none", "unit"])
def test_full_horizon_is_the_gradient(family: str, slopes: str) -> None:
    model = build(family)
    names = trainable(model)
    exact = autograd_gradient(model, batch_loss(padded_batch()), names)
    found = guided(model, names, horizon=2, slopes_per=slopes)
    for name in names:
        assert torch.allclose(found[name].double(), exact[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "opt"])
def test_the_top_layer_and_the_head_are_exact_without_a_guess(family: str) -> None:
    model = build(family)
    below = in_layer(model, 0)
    names = [name for name in trainable(model) if name not in below]
    exact = autograd_gradient(model, batch_loss(padded_batch()), names)

    def never(place: int, gradient: Tensor, mask: Tensor | None) -> Tensor:
        raise AssertionError("no guess is needed above the lowest layer")

    found = guided(model, names, guess=never)
    assert all(torch.allclose(found[name].double(), exact[name], rtol=1e-5, atol=1e-7) for name in names)


@pytest.mark.parametrize("slopes", ["step", "unit", "tensor"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_projection_on_the_guess(family: str, slopes: str) -> None:
    """g = (grad . v) v / |v|^2 for each group, v being the guess itself."""
    model = build(family)
    names = in_layer(model, 0)
    units = {name: name.partition(".lora_")[0] for name in names}
    exact = autograd_gradient(model, batch_loss(padded_batch()), names)
    guess = guided(model, names, slopes_per="none")
    found = guided(model, names, slopes_per=slopes, unit_of=units)
    key = {"step": lambda n: "", "unit": units.__getitem__, "tensor": lambda n: n}[slopes]
    groups = {key(name) for name in names}
    assert len(groups) == {"step": 1, "unit": 2, "tensor": 4}[slopes]
    norms = {name: guess[name].norm() for name in names}
    for group in groups:
        own = [name for name in names if key(name) == group]
        # Each tensor's guess is scaled to the same entry size before it becomes part of its group's direction.
        v = torch.cat([(guess[n] / norms[n] * guess[n].numel() ** 0.5).flatten().double() for n in own])
        g = flat(exact, own)
        assert torch.allclose(flat(found, own), (g @ v) / (v @ v) * v, rtol=1e-4, atol=1e-7)
        assert float(flat(found, own) @ g) >= 0


@pytest.mark.parametrize("horizon", [0, 2])
@pytest.mark.parametrize("chunks", [10**9, 1], ids=["whole", "row by row"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "opt"])
def test_guesses_of_several_layers_are_those_of_each_alone(family: str, chunks: int, horizon: int) -> None:
    """Of all layers, and of some with one between that has none."""
    model = build(family, layers=6)
    alone = [guided(model, in_layer(model, place), horizon=horizon, slopes_per="none") for place in range(6)]
    with chunks_of(chunks):
        for places in (range(6), (1, 3)):
            names = [name for place in places for name in in_layer(model, place)]
            found = guided(model, names, horizon=horizon, slopes_per="none")
            for place in places:
                for name, gradient in alone[place].items():
                    assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("slopes", ["none", "step"])
def test_memory_does_not_grow_with_the_layers_that_are_guessed_for(slopes: str) -> None:
    """Of all layers, at least; checkpointed backprop keeps a hidden state more for each."""

    rows = 64
    state = rows * 9 * 32 * 8  # bytes of one hidden state in float64

    def peak(estimator: GradientEstimator, layers: int) -> int:
        model, loss = build("bert", layers=layers), batch_loss(padded_batch(rows))
        with ActivationMeter() as meter:
            estimator.estimate(model, loss, trainable(model), DRAW, rows)
        return meter.peak_bytes

    guess = GuidedGradient(layer_calls, horizon=1, slopes_per=slopes)
    backprop = Backprop("per_layer", layer_calls)
    assert peak(guess, 12) - peak(guess, 4) < state
    assert peak(backprop, 12) - peak(backprop, 4) > 7 * state


def test_dropout_draws_the_same_masks_again() -> None:
    """Passed through exactly, row by row, with the masks of the pass that gave the loss."""
    model, loss = build("bert", layers=3), dropping_loss(padded_batch())
    drop_half(model)
    with torch.random.fork_rng(), chunks_of(1):
        names = trainable(model)
        exact = autograd_gradient(model, loss, names)
        found = GuidedGradient(layer_calls, horizon=3).estimate(model, loss, names, DRAW, 3).gradients
    assert all(torch.allclose(found[name].double(), exact[name], rtol=1e-5, atol=1e-7) for name in names)


@pytest.mark.parametrize("chunk", [10**9, 1], ids=["whole", "row by row"])
@pytest.mark.parametrize("family", ["bert", "albert", "llama"])
def test_slopes_are_taken_under_the_masks_of_the_guess(family: str, chunk: int) -> None:
    """The pass that starts at the second layer draws there what the first pass drew."""
    model, loss = (
        build(family, layers=3, adapter=AdapterConfig(rank=2, alpha=8, dropout=0.5)),
        dropping_loss(padded_batch()),
    )
    for dropout in dropout_modules(model):
        dropout.train()
    names = in_layer(model, 1)
    with torch.random.fork_rng(), chunks_of(chunk):
        exact = autograd_gradient(model, loss, names)
        guess, found = (
            GuidedGradient(layer_calls, slopes_per=slopes).estimate(model, loss, names, DRAW, 3).gradients
            for slopes in ("none", "tensor")
        )
    for name in names:
        v = guess[name].double()
        assert torch.allclose(found[name].double(), (exact[name] * v).sum() / v.square().sum() * v, rtol=1e-4), name


def test_a_mask_keeps_guesses_off_padding_and_the_pass_starts_at_the_assigned_layer() -> None:
    model, batch = build("llama"), padded_batch()
    seen = []

    def watching(place: int, gradient: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        assert torch.equal(mask, batch["attention_mask"].bool())
        return identity(place, gradient, mask)

    count = model.base_model.model.model.layers[0].register_forward_hook(lambda *_: seen.append(0))
    guided(model, in_layer(model, 0), guess=watching)
    count.remove()
    # Once in the first pass, once alone, once with tangents.
    assert len(seen) == 3


def test_exploring_makes_it_unbiased() -> None:
    """The mean over 400 draws holds what the guess misses, within four standard errors; without exploring, nothing."""

    def poor(place: int, gradient: Tensor, mask: Tensor | None) -> Tensor:
        return gradient.roll(1, dims=-1)

    model, loss = build("bert"), batch_loss(padded_batch())
    names = in_layer(model, 0)[:2]
    exact = flat(autograd_gradient(model, loss, names), names)
    v = flat(guided(model, names, guess=poor, slopes_per="none"), names)
    v = torch.cat(
        [part / part.norm() * part.numel() ** 0.5 for part in v.split([model.get_parameter(n).numel() for n in names])]
    )
    missing = exact - (exact @ v) / (v @ v) * v  # what the projection on the guess leaves out
    estimator = GuidedGradient(layer_calls, guess=poor, explore=True, slopes_per="step")
    shares = torch.tensor(
        [
            float(flat(estimator.estimate(model, loss, names, stream.at_step(step), 3).gradients, names) @ missing)
            for stream in [DirectionStream(0, 1, 0)]
            for step in range(400)
        ]
    ) / float(missing @ missing)
    standard_error = shares.std() / len(shares) ** 0.5
    assert standard_error < 0.1
    assert abs(shares.mean() - 1) < 4 * standard_error
    biased = flat(guided(model, names, guess=poor, slopes_per="step"), names)
    assert abs(float(biased @ missing)) < 0.01 * float(missing @ missing)


def test_momentum_is_a_second_direction() -> None:
    """With the gradient itself as momentum the projection is the gradient, whatever the guess."""
    model = build("bert")
    names = in_layer(model, 0)
    exact = autograd_gradient(model, batch_loss(padded_batch()), names)
    momentum = {name: gradient.float() for name, gradient in exact.items()}
    found = guided(model, names, momentum=momentum, slopes_per="tensor")
    assert all(torch.allclose(found[name].double(), exact[name], rtol=1e-4, atol=1e-6) for name in names)


def test_a_parameter_below_the_layers_is_named() -> None:
    model = build("bert")
    name = next(n for n, _ in model.named_parameters() if "word_embeddings" in n)
    with pytest.raises(ModelError, match="word_embeddings"):
        guided(model, [name])


# Backward maps.


def losses(model: nn.Module, count: int, seed: int = 0) -> list[partial[Tensor]]:
    """Losses of random token ids with random labels."""
    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        batch = padded_batch(6)
        batch["input_ids"] = torch.randint(3, 50, batch["input_ids"].shape, generator=generator)
        batch["labels"] = torch.randint(0, 3, (6,), generator=generator)
        found.append(batch_loss(batch))
    return found


def test_gradients_by_layer_are_autograds() -> None:
    model, loss = build("llama"), batch_loss(padded_batch())
    outputs = []
    hooks = [layer.register_forward_hook(lambda m, a, o: outputs.append(o)) for layer in layer_calls(model)]
    with torch.enable_grad():
        value = loss(model)
    for hook in hooks:
        hook.remove()
    exact = torch.autograd.grad(value, outputs)
    found = gradients_by_layer(model, loss, layer_calls(model), 0)
    assert torch.allclose(found.upper, exact[1], rtol=1e-9)
    assert torch.allclose(found.lower[0], exact[0], rtol=1e-9)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_maps_guess_better_than_identity_on_other_text(family: str) -> None:
    """Where the loss sits on one token, most of the lower gradient lies on others, and is modelled too."""
    model = build(family)
    layers, fresh = layer_calls(model), losses(model, 4, seed=1)
    quality = {"identity": guess_quality(model, fresh, layers, 0, identity)[0]}
    for name, across in (("own token", False), ("across tokens", True)):
        maps = fit_backward_maps(model, losses(model, 30), layers, MapSettings(across=across))
        quality[name] = guess_quality(model, fresh, layers, 0, MapGuess(maps))[0]
        # As a message or file has them; else a client's products round otherwise than the server's own.
        assert all(tensor.is_contiguous() for tensor in tensors_of(maps).values())
    assert quality["across tokens"] > max(quality["identity"], quality["own token"]), quality


def test_a_linear_model_is_mapped_exactly() -> None:
    """Where the layers between are linear and the same for every token, the map is their transpose."""
    torch.manual_seed(0)
    weight = torch.randn(8, 8, dtype=torch.float64)

    class Layer(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states @ self.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(torch.eye(8).double()), Layer(weight)])

        def forward(self, hidden: Tensor) -> Tensor:
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    model = Model()
    inputs = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(40)]
    targets = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(40)]
    batches = [lambda m, x=x, y=y: (m(x) * y).sum() for x, y in zip(inputs, targets, strict=True)]
    maps = fit_backward_maps(model, batches, list(model.layers), MapSettings(across=False, ridge=1e-12))
    assert torch.allclose(maps[0].basis @ maps[0].own, weight.T.float(), atol=1e-4)
    # With the loss on one token its own map and that of its position see the same: the penalty alone parts them.
    batches = [lambda m, x=x, y=y: (m(x) * y)[:, -1].sum() for x, y in zip(inputs, targets, strict=True)]
    with pytest.raises(ModelError, match=r"guide\.ridge = 1e-17 is too small"):
        fit_backward_maps(model, batches, list(model.layers), MapSettings(ridge=1e-17))


def test_positions_count_from_the_token_with_the_gradient() -> None:
    gradient = torch.zeros(2, 6, 4)
    gradient[0, 5], gradient[1, 2] = 1.0, 1.0
    found = positions(gradient)
    assert found[0, 5] == found[1, 2] == 0
    assert found[0, 4] == found[1, 1]  # one before
    assert found[1, 3] != found[1, 1]  # one after is another position


def test_a_horizon_that_leaves_nothing_to_guess_is_an_error() -> None:
    model = build("bert")
    with pytest.raises(ModelError, match="lower the horizon"):
        fit_backward_maps(model, losses(model, 1), layer_calls(model), MapSettings(horizon=1))
    with pytest.raises(ModelError, match="no text"):
        fit_backward_maps(model, [], layer_calls(model), MapSettings())
