"""Layers on disk: the same numbers as in memory, two layers at a time, no thread left behind."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, padded_batch
from packed import open_model, save_family
from spryfl.config import ModelConfig
from spryfl.errors import ModelError
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.forward import loss_and_slopes
from spryfl.memory.meter import ActivationMeter
from spryfl.models.layers import layer_calls, transformer_layers
from spryfl.models.loading import AdaptedModel
from spryfl.models.quantizing import quantize_checkpoint

STREAMABLE = [family for family in FAMILIES if family != "albert"]


def _stored(family: str, precision: str, folder: Path, tokenizer: Path) -> Path:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    source = save_family(family, folder / "source", tokenizer, dtype, shard="20KB")
    if precision in ("float32", "bfloat16"):
        return source
    quantize_checkpoint(ModelConfig(name=str(source)), folder / "copy", precision)
    return folder / "copy"


def _logits(loaded: AdaptedModel) -> Tensor:
    batch = {k: v for k, v in padded_batch().items() if k != "labels"}
    with torch.inference_mode():
        return loaded.model(**batch).logits


def _resident(loaded: AdaptedModel) -> list[int]:
    """The layers with weights in memory."""
    layers = transformer_layers(loaded.model)
    return [i for i, layer in enumerate(layers) if all(p.device.type != "meta" for p in layer.parameters())]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4", "int8"])
@pytest.mark.parametrize("family", STREAMABLE)
def test_the_same_numbers(family: str, precision: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = _stored(family, precision, tmp_path, tiny_model)
    whole, streamed = open_model(folder), open_model(folder, streamed=True)
    assert whole.units == streamed.units
    for unit in whole.units:
        for name in unit.parameters:
            value = streamed.model.get_parameter(name)
            assert value.device.type == "cpu"
            assert torch.equal(whole.model.get_parameter(name), value)
    assert streamed.num_trainable == whole.num_trainable
    assert _resident(streamed) == []
    for _ in range(2):
        assert torch.equal(_logits(whole), _logits(streamed))
        assert _resident(streamed) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_that_are_read_are_no_activations(dtype: str, tiny_model: Path, tmp_path: Path) -> None:
    """The first layer is fetched where the meter looks on, and those of another type are cast there."""
    folder = save_family("llama", tmp_path, tiny_model)
    peaks = []
    for streamed in (False, True):
        loaded = open_model(folder, streamed=streamed, dtype=dtype)
        with ActivationMeter() as meter:
            _logits(loaded)
        peaks.append(meter.peak_bytes)
    assert peaks[0] == peaks[1]


def test_the_same_slopes_and_gradients(tiny_model: Path, tmp_path: Path) -> None:
    """Forward mode with two tangents, and every kind of backprop: bitwise those of the resident model."""
    folder = save_family("llama", tmp_path, tiny_model)
    models = open_model(folder), open_model(folder, streamed=True)
    batch = padded_batch()
    found = []
    for loaded in models:
        names = [name for unit in loaded.units for name in unit.parameters]
        generator = torch.Generator().manual_seed(5)
        tangents = {n: torch.randn(2, *loaded.model.get_parameter(n).shape, generator=generator) for n in names}

        def loss(model: torch.nn.Module) -> Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return torch.nn.functional.cross_entropy(logits, batch["labels"])

        value, slopes = loss_and_slopes(loaded.model, loss, tangents)
        kinds = (("none", None), ("per_layer", None), ("budgeted", 10**5))
        gradients = [
            gradient
            for kind, budget in kinds
            for gradient in Backprop(kind, layer_calls, budget).loss_and_gradient(loaded.model, loss, names)[1]
        ]
        found.append([torch.tensor(value), slopes, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4", "int8"])
@pytest.mark.parametrize("family", STREAMABLE)
def test_plain_backprop(family: str, precision: str, tiny_model: Path, tmp_path: Path) -> None:
    """What autograd stores refers to no weight on disk: each layer is loaded again for its backward pass."""
    folder = _stored(family, precision, tmp_path, tiny_model)
    gradients = []
    for settings in ({}, {"streamed": True}):
        loaded = open_model(folder, **settings)
        trained = [p for p in loaded.model.parameters() if p.requires_grad]
        logits = loaded.model(**{k: v for k, v in padded_batch().items() if k != "labels"}).logits
        if loaded.streamed is not None:
            assert _resident(loaded) == []
        gradients.append(torch.autograd.grad(logits.square().sum(), trained, allow_unused=True))
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients[0])
    for whole, streamed in zip(*gradients, strict=True):
        assert (whole is None) == (streamed is None)
        assert whole is None or torch.equal(whole, streamed)
    assert _resident(loaded) == []


@pytest.fixture
def streamed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdaptedModel:
    monkeypatch.setitem(FAMILIES, "llama", lambda: _deeper(5))
    return open_model(save_family("llama", tmp_path, tiny_model), streamed=True)


_LLAMA = FAMILIES["llama"]


def _deeper(num_layers: int) -> Any:
    config = _LLAMA()
    config.num_hidden_layers = num_layers
    return config


def _fetched(streamed: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills up with the layers that are read, in order."""
    store: Any = streamed.streamed._store  # type: ignore[union-attr]
    fetch, order = store.fetch, []
    monkeypatch.setattr(store, "fetch", lambda index: (order.append(index), fetch(index))[1])
    return order


def _failing_at(layer: int, fetch: Callable[[int], Any]) -> Callable[[int], Any]:
    def fail(index: int) -> Any:
        if index == layer:
            raise OSError(5, "the disk is gone")
        return fetch(index)

    return fail


def test_each_layer_is_read_once_a_pass(streamed: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    order = _fetched(streamed, monkeypatch)
    _logits(streamed)
    _logits(streamed)
    assert order == [0, 1, 2, 3, 4] * 2


def test_a_backward_pass_reads_each_layer_once_more(streamed: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    order = _fetched(streamed, monkeypatch)
    inside: list[int] = []
    for layer in transformer_layers(streamed.model):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda _: inside.append(len(_resident(streamed))))
    logits = streamed.model(input_ids=padded_batch()["input_ids"]).logits
    logits.sum().backward()
    assert order == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    assert set(inside) == {1}
    assert _resident(streamed) == []


def test_a_backward_pass_that_fails(streamed: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one goes as if nothing had been, and leaves nothing in memory."""
    store: Any = streamed.streamed._store  # type: ignore[union-attr]
    fetch = store.fetch
    trained = [p for p in streamed.model.parameters() if p.requires_grad]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(streamed.model(input_ids=padded_batch()["input_ids"]).logits.sum(), trained)

    expected = gradients()
    logits = streamed.model(input_ids=padded_batch()["input_ids"]).logits

    monkeypatch.setattr(store, "fetch", _failing_at(2, fetch))
    with pytest.raises(OSError, match="the disk is gone"):
        torch.autograd.grad(logits.sum(), trained)
    monkeypatch.setattr(store, "fetch", fetch)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    assert _resident(streamed) == []


@pytest.mark.parametrize(
    ("calls", "read"),
    [
        ([0, 1, 2, 3, 4, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]),  # a pass and a sweep back
        ([0, 1, 2, 3, 4, 2, 3, 4, 4, 3, 2, 0], None),  # recomputed from a kept input
        ([3, 0, 4, 2], None),
    ],
)
def test_any_order_of_calls(
    calls: list[int], read: list[int] | None, streamed: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = _fetched(streamed, monkeypatch)
    layers: Any = streamed.streamed
    for index in calls:
        layers._enter(index)
        assert _resident(streamed) == [index]
        layers._leave(index)
    layers._take_prefetch()
    assert read is None or order == read


def test_what_goes_wrong_while_prefetching(streamed: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the thread met is what the caller sees; afterwards the model works again."""
    expected = _logits(streamed)
    store: Any = streamed.streamed._store  # type: ignore[union-attr]
    fetch = store.fetch

    monkeypatch.setattr(store, "fetch", _failing_at(2, fetch))
    with pytest.raises(OSError, match="the disk is gone"):
        _logits(streamed)
    assert _resident(streamed) == []
    monkeypatch.setattr(store, "fetch", fetch)
    assert torch.equal(_logits(streamed), expected)


def test_a_file_that_is_cut_short_under_way(streamed: AdaptedModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.unlink()  # a mapping keeps the old file
    path.write_bytes(content[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors: corrupt or truncated"):
        _logits(streamed)


def test_a_layer_that_raises_is_dropped(streamed: AdaptedModel) -> None:
    layers = transformer_layers(streamed.model)
    layers[1].mlp.forward = lambda x: 1 / 0  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError):
        _logits(streamed)
    assert _resident(streamed) == []


def test_no_thread_is_left(streamed: AdaptedModel) -> None:
    _logits(streamed)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("spry-prefetch")] == []
