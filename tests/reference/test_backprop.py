"""Backprop with checkpointing against autograd in float64: families, budgets, row chunks, shared layers."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from families import (
    DECODERS,
    FAMILIES,
    autograd_gradient,
    batch_loss,
    build,
    drop_half,
    dropping_loss,
    padded_batch,
    trainable,
)
from spryfl.errors import ConfigError, ModelError
from spryfl.forward_mode.budget import chunks_of
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.revolve import num_advances
from spryfl.memory.meter import ActivationMeter
from spryfl.models.layers import layer_calls, transformer_layers

ROWS, TOKENS, HIDDEN = 3, 9, 32
STATE = ROWS * TOKENS * HIDDEN * 8  # bytes of one hidden state in float64
DEPTH = 6


deep = partial(build, layers=DEPTH)


def sweeping(num_states: int | None) -> Backprop:
    """Checkpointing per layer, or within the budget of some hidden states."""
    if num_states is None:
        return Backprop("per_layer", layer_calls)
    return Backprop("budgeted", layer_calls, num_states * STATE)


@pytest.fixture(params=[10**9, 1], ids=["whole", "row by row"])
def chunks(request: pytest.FixtureRequest) -> Iterator[int]:
    with chunks_of(request.param):
        yield request.param


def assert_exact(model: nn.Module, loss: Callable[[nn.Module], Tensor], names: list[str], estimator: Backprop) -> None:
    expected = autograd_gradient(model, loss, names)
    value, found = estimator.loss_and_gradient(model, loss, names)
    assert float(value) == pytest.approx(float(loss(model).detach()), abs=1e-12)
    for name, gradient in zip(names, found, strict=True):
        assert torch.allclose(expected[name], gradient, rtol=0, atol=1e-10), name
        assert float(gradient.abs().max()) > 0


@contextmanager
def counted_runs(model: nn.Module) -> Iterator[Counter[str]]:
    """How often each layer is called, and how often in a way that autograd records."""
    runs: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: runs.update([name])

    def count_recorded(name: str) -> Callable[..., None]:
        return lambda module, args, output: runs.update([name] if output.requires_grad else [])

    layers = list(dict.fromkeys(layer_calls(model)))
    handles = [layer.register_forward_pre_hook(count(f"layer {i}")) for i, layer in enumerate(layers)]
    for i, layer in enumerate(layers):
        inner = next(m for m in layer.modules() if isinstance(m, nn.LayerNorm) or "RMSNorm" in type(m).__name__)
        handles.append(inner.register_forward_hook(count_recorded(f"recorded {i}")))
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_autograds(family: str, chunks: int) -> None:
    model, loss = deep(family), batch_loss(padded_batch(left=family in DECODERS))
    assert_exact(model, loss, trainable(model), Backprop())
    own = [vars(layer)["forward"] for layer in transformer_layers(model)]
    for budget in (None, 1, 2, 3) if chunks > 1 else (None, 2):
        assert_exact(model, loss, trainable(model), sweeping(budget))
    assert [vars(layer)["forward"] for layer in transformer_layers(model)] == own


@pytest.mark.parametrize("budget", [None, 1, 2, 3, 4, 100])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_layers_run_the_fewest_times(family: str, budget: int | None) -> None:
    """Once up, once back, and the advances of the best schedule; row chunks call no layer again."""
    model, loss = deep(family), batch_loss(padded_batch())
    with counted_runs(model) as runs, chunks_of(1):
        sweeping(budget).loss_and_gradient(model, loss, trainable(model))
    extra = 0 if budget is None else num_advances(DEPTH, budget)
    assert sum(runs[f"layer {i}"] for i in range(DEPTH)) == 2 * DEPTH + extra
    assert all(runs[f"recorded {i}"] in (0, ROWS) for i in range(DEPTH))


@pytest.mark.parametrize(("budget", "extra"), [(None, 0), (1, 3), (2, 1), (3, 0)])
def test_nothing_is_recorded_below_the_lowest_wanted_layer(budget: int | None, extra: int) -> None:
    model, loss = deep("bert"), batch_loss(padded_batch())
    upper = [name for name in trainable(model) if any(f".layer.{i}." in name for i in (3, 5))]
    estimator = sweeping(budget)
    with counted_runs(model) as runs:
        estimator.loss_and_gradient(model, loss, upper)
    assert [runs[f"layer {i}"] for i in range(3)] == [1, 1, 1]
    assert sum(runs[f"layer {i}"] for i in (3, 4, 5)) == 6 + extra
    assert not any(runs[f"recorded {i}"] for i in range(3))
    assert_exact(model, loss, upper, estimator)


def test_the_head_alone_needs_no_layer_back() -> None:
    model, loss = deep("bert"), batch_loss(padded_batch())
    head = [name for name in trainable(model) if "classifier" in name]
    with counted_runs(model) as runs:
        Backprop("budgeted", layer_calls, STATE).loss_and_gradient(model, loss, head)
    assert all(runs[f"layer {i}"] == 1 and not runs[f"recorded {i}"] for i in range(DEPTH))
    assert_exact(model, loss, head, Backprop("budgeted", layer_calls, STATE))


@pytest.mark.parametrize("budget", [None, 2])
def test_parameters_below_the_layers(budget: int | None, chunks: int) -> None:
    model, loss = deep("albert"), batch_loss(padded_batch())
    below = [n for n, _ in model.named_parameters() if "embedding_hidden_mapping_in" in n or "position_emb" in n]
    names = below + trainable(model)
    for parameter in map(model.get_parameter, below):
        parameter.requires_grad_(True)
    for wanted in (names, below):
        assert_exact(model, loss, wanted, sweeping(budget))


def test_a_shared_layer_is_recorded_call_by_call() -> None:
    """ALBERT's one layer runs six times; without being told so, the schedule is longer and as right."""
    model, loss = deep("albert"), batch_loss(padded_batch())
    names = trainable(model)
    assert len(transformer_layers(model)) == 1
    assert len(layer_calls(model)) == DEPTH
    runs = {}
    for finder in (layer_calls, transformer_layers):
        with counted_runs(model) as counter:
            Backprop("budgeted", finder, 2 * STATE).loss_and_gradient(model, loss, names)
        runs[finder] = counter["layer 0"]
        assert_exact(model, loss, names, Backprop("budgeted", finder, 2 * STATE))
    assert runs[layer_calls] == 2 * DEPTH + num_advances(DEPTH, 2)
    assert runs[layer_calls] < runs[transformer_layers] < 4 * DEPTH


@pytest.mark.parametrize("budget", [None, 1, 3])
def test_dropout_draws_the_same_masks_again(budget: int | None) -> None:
    model, loss = deep("bert"), dropping_loss(padded_batch())
    drop_half(model)
    with torch.random.fork_rng():
        assert_exact(model, loss, trainable(model), sweeping(budget))


def test_weights_that_hooks_fetch_and_drop() -> None:
    """Streaming: outside a layer's call its frozen weights hold nothing, and every call fetches them once."""
    model, loss = deep("llama"), batch_loss(padded_batch())
    names = trainable(model)
    expected = autograd_gradient(model, loss, names)
    fetched = 0
    stored = {
        layer: {name: p.data for name, p in layer.named_parameters() if not p.requires_grad}
        for layer in transformer_layers(model)
    }

    def fetch(layer: nn.Module, *_: object) -> None:
        nonlocal fetched
        fetched += 1
        for name, data in stored[layer].items():
            layer.get_parameter(name).data = data

    def drop(layer: nn.Module, *_: object) -> None:
        for name in stored[layer]:
            layer.get_parameter(name).data = torch.empty(0, dtype=torch.float64)

    for layer in stored:
        drop(layer)
        layer.register_forward_pre_hook(fetch)
        layer.register_forward_hook(drop)
    for budget, extra in ((None, 0), (1, 15), (2, num_advances(DEPTH, 2))):
        fetched = 0
        _, found = sweeping(budget).loss_and_gradient(model, loss, names)
        assert fetched == 2 * DEPTH + extra
        assert all(torch.allclose(expected[n], g, rtol=0, atol=1e-10) for n, g in zip(names, found, strict=True))


class Chain(nn.Module):
    """Layers and a head, with what `between` does between layers and `above` with all states."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda h: h, skip: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(5))
            self.head = nn.Linear(4, 1).double()
        self.between, self.skip = between, skip

    def forward(self, hidden: Tensor) -> Tensor:
        states = []
        for layer in self.layers:
            hidden = self.between(layer(hidden))
            states.append(hidden)
        return self.head(torch.tanh(sum(states) if self.skip else hidden)).sum()


CHAIN_INPUT = torch.linspace(-1, 1, 2 * 3 * 4, dtype=torch.float64).view(2, 3, 4)


def chain_loss(model: nn.Module) -> Tensor:
    return model(CHAIN_INPUT)


def test_an_output_used_above_too(chunks: int) -> None:
    model = Chain(skip=True)
    names = [name for name, _ in model.named_parameters()]
    for budget in (None, 192, 400):
        kind = "per_layer" if budget is None else "budgeted"
        assert_exact(model, chain_loss, names, Backprop(kind, lambda m: m.layers, budget))


def test_what_cannot_be_swept_is_named() -> None:
    names = ["layers.1.weight"]
    estimator = Backprop("per_layer", lambda m: m.layers)
    with pytest.raises(ModelError, match="Linear is not given just what the layer before it returned"):
        estimator.loss_and_gradient(Chain(between=torch.tanh), chain_loss, names)
    with pytest.raises(ConfigError, match=r"method.budget = 191 bytes: one layer's input takes 192 bytes"):
        Backprop("budgeted", lambda m: m.layers, 191).loss_and_gradient(Chain(), chain_loss, names)
    with pytest.raises(ModelError, match="calls none of the model's 0 layers"):
        Backprop("per_layer").loss_and_gradient(Chain(), chain_loss, names)
    widening = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)).double()
    with pytest.raises(ModelError, match=r"changes its input's shape, \(2, 3, 4\) to \(2, 3, 5\)"):
        Backprop("per_layer", list).loss_and_gradient(widening, lambda m: m(CHAIN_INPUT).sum(), ["0.weight"])
    for kind, budget in (("none", 5), ("per_layer", 5), ("budgeted", None)):
        with pytest.raises(ConfigError, match="go together"):
            Backprop(kind, budget_bytes=budget)


class Pairs(nn.Module):
    """A layer that returns and takes a second tensor, or takes an object that a run changes."""

    def __init__(self, passes: str) -> None:
        super().__init__()
        self.layer, self.passes = nn.Linear(4, 4).double(), passes

    def forward(self, hidden: Tensor, other: object = None) -> tuple[Tensor, Tensor]:
        out = self.layer(hidden)
        return (out + other if isinstance(other, Tensor) else out), out * 2


class PairsChain(nn.Module):
    def __init__(self, passes: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pairs(passes), Pairs(passes)])
        self.passes = passes

    def forward(self, hidden: Tensor) -> Tensor:
        first, second = self.layers[0](hidden, object() if self.passes == "object" else None)
        last, extra = self.layers[1](first, second if self.passes == "between" else None)
        return (last.sum() + extra.sum()) if self.passes == "above" else last.sum()


@pytest.mark.parametrize(
    ("passes", "message"),
    [("object", "is given a object"), ("between", "more than its hidden state"), ("above", "more than Pairs's hidden")],
)
def test_gradients_that_would_be_lost_are_named(passes: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Backprop("per_layer", lambda m: m.layers).loss_and_gradient(
            PairsChain(passes), chain_loss, ["layers.0.layer.weight"]
        )


def test_memory_falls_with_the_budget() -> None:
    """Deep and narrow: budgeted < per layer < none, and budgeted within its budget and one layer's work."""
    model, loss = build("bert", layers=12), batch_loss(padded_batch())
    names = trainable(model)
    lowest = [n for n in names if ".layer.11." in n]

    def peak(estimator: Backprop, names: list[str] = names) -> int:
        with ActivationMeter() as meter:
            estimator.loss_and_gradient(model, loss, names)
        return meter.peak_bytes

    one_layer = peak(Backprop("per_layer", layer_calls), lowest)
    plain, per_layer = peak(Backprop()), peak(Backprop("per_layer", layer_calls))
    gradients = sum(model.get_parameter(n).numel() * 8 for n in names)
    previous = per_layer
    for kept in (6, 3, 1):
        found = peak(Backprop("budgeted", layer_calls, kept * STATE))
        assert found < previous < plain
        assert found <= kept * STATE + one_layer + gradients
        previous = found
    with chunks_of(1):
        assert peak(Backprop("per_layer", layer_calls)) < per_layer
