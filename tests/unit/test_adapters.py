"""Every kind of adapter: what it trains, that its slopes are exact, and that others can open what is saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config

from families import FAMILIES, autograd_gradient, batch_loss, build, padded_batch, trainable
from packed import save_family
from spryfl.config import AdapterConfig, ModelConfig, RunConfig
from spryfl.errors import ConfigError, ModelError
from spryfl.federated.client import loaded
from spryfl.federated.rounds import run_round
from spryfl.forward_mode.budget import chunks_of
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.forward import loss_and_slopes
from spryfl.gradients.guided import GuidedGradient
from spryfl.models.adapters import ADAPTERS, dropout_modules, frozen_tensors
from spryfl.models.dry_run import DryRun, Work
from spryfl.models.layers import layer_calls
from spryfl.models.lean import make_lean
from spryfl.models.loading import load_model
from spryfl.models.singular import truncated_svd
from spryfl.models.units import trainable_units
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.workbench import Workbench

KINDS: dict[str, AdapterConfig] = {
    "lora": AdapterConfig(rank=2, alpha=2, dropout=0.1),
    "lora, A frozen": AdapterConfig(rank=2, frozen="a", dropout=0.1),
    "lora, B frozen": AdapterConfig(rank=2, frozen="b", dropout=0.1),
    "dora": AdapterConfig(kind="dora", rank=2, alpha=3, dropout=0.1),
    "dora, B frozen": AdapterConfig(kind="dora", rank=2, frozen="b", dropout=0.1),
    "lora_xs": AdapterConfig(kind="lora_xs", rank=2, dropout=0.1),
    "vera": AdapterConfig(kind="vera", rank=8, dropout=0.1),
    "tinylora": AdapterConfig(kind="tinylora", rank=2, num_values=3, dropout=0.1),
    "ia3": AdapterConfig(kind="ia3"),
    "bitfit": AdapterConfig(kind="bitfit"),
}
TRAINED = {  # of each module of a layer of BERT: 32 x 32, and 64 x 32 of its feed-forward
    "lora": [128, 128],
    "lora, A frozen": [64, 64],
    "lora, B frozen": [64, 64],
    "dora": [160, 160],
    "dora, B frozen": [96, 96],
    "lora_xs": [4, 4],
    "vera": [40, 40],
    "tinylora": [3, 3],
    "ia3": [32, 32, 64],
    "bitfit": [32, 32, 32, 32, 32, 64, 32, 32],  # four of attention, its norm, two of the feed-forward, its norm
}
WITHOUT_BIASES = "llama"
CASES = [(family, kind) for family in ("bert", "llama") for kind in KINDS if (family, kind) != ("llama", "bitfit")]


def test_every_kind_is_tested() -> None:
    assert {config.kind for config in KINDS.values()} | {"head"} == set(ADAPTERS)


def test_the_head_alone() -> None:
    """Nothing else is trained; a task without a head is refused."""
    head = AdapterConfig(kind="head")
    model = build("bert", adapter=head)
    assert {unit.name for unit in trainable_units(model)} == {"head"}
    with pytest.raises(ModelError, match="trains no head"):
        build("llama", adapter=head, task="prompted")


@pytest.mark.parametrize(("family", "kind"), [*CASES, ("opt", "ia3"), ("opt", "bitfit"), ("distilbert", "ia3")])
def test_slopes_and_gradients_are_exact(family: str, kind: str) -> None:
    """Against autograd through PEFT's own forward, in float64; in chunks and whole; each unit by itself too."""
    model, loss = build(family, adapter=KINDS[kind]), batch_loss(padded_batch())
    names = trainable(model)
    exact = autograd_gradient(model, loss, names)
    without = (".key.", ".k_proj.") if KINDS[kind].kind == "bitfit" else ()  # a shift of all scores changes no softmax
    told = [n for n in names if not any(part in n for part in without)]
    assert all(float(exact[n].abs().max()) > 1e-9 for n in told)
    generator = torch.Generator().manual_seed(2)
    tangents = {n: torch.randn((2, *exact[n].shape), generator=generator, dtype=torch.float64) for n in names}
    for part in (names, *(list(unit.parameters) for unit in trainable_units(model))):
        expected = sum((exact[n] * tangents[n]).flatten(1).sum(1) for n in part)
        for budget in (1, 10**9):
            with chunks_of(budget):
                value, slopes = loss_and_slopes(model, loss, {n: tangents[n] for n in part})
            assert torch.allclose(slopes, expected, rtol=1e-9, atol=1e-12)
            assert value == pytest.approx(float(loss(model).detach()), abs=1e-9)
    estimate = Backprop("per_layer", layer_calls).loss_and_gradient(model, loss, names)[1]
    assert all(torch.allclose(found, exact[n]) for n, found in zip(names, estimate, strict=True))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_guided_through_all_layers_is_the_gradient(family: str, kind: str) -> None:
    model, loss = build(family, adapter=KINDS[kind]), batch_loss(padded_batch())
    names = trainable(model)
    exact = autograd_gradient(model, loss, names)
    found = GuidedGradient(layer_calls, horizon=2).estimate(model, loss, names, DirectionStream(0, 1, 0).at_step(0), 3)
    assert all(torch.allclose(found.gradients[n].double(), exact[n], rtol=1e-5, atol=1e-8) for n in names)


@pytest.mark.parametrize("kind", ["dora", "ia3", "bitfit"])
@pytest.mark.parametrize("method", ["spry", "spry_guided", "fedavg", "fedmezo"])
def test_a_round_trains_every_unit(kind: str, method: str, tiny_config: Callable[..., RunConfig]) -> None:
    given = KINDS[kind].model_dump(exclude_defaults=True)
    bench = Workbench.from_config(tiny_config(adapter=given, method__name=method))
    start = bench.initial_state()
    state, report = run_round(start, bench.federation, InProcessRuntime(bench.client, bench.batch_tokens))
    assert report.failures == report.refused == report.untrained == ()
    keys = {n for n in start.values if kind == "bitfit" and ".key." in n}  # to which the loss is indifferent
    assert all(not torch.equal(value, start.values[n]) for n, value in state.values.items() if n not in keys)


@pytest.mark.parametrize(("family", "kind"), [*CASES, *(("albert", kind) for kind in KINDS)])
def test_units_are_adapted_modules(family: str, kind: str) -> None:
    model = build(family, adapter=KINDS[kind])
    units = trainable_units(model)
    adapted = [unit for unit in units if not unit.is_head]
    assert len(adapted) == len(TRAINED[kind]) * (1 if family == "albert" else 2)
    assert sorted(name for unit in units for name in unit.parameters) == sorted(trainable(model))
    assert all(name.startswith(f"base_model.model.{unit.name}.") for unit in adapted for name in unit.parameters)
    if family == "bert":
        sizes = [sum(model.get_parameter(name).numel() for name in unit.parameters) for unit in adapted]
        assert sizes == TRAINED[kind] * 2


@pytest.mark.filterwarnings(
    "ignore:Careful, disabling adapter layers with bias"
)  # which bitfit's still are at the base
@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_at_the_base_model(kind: str, tiny_model: Path) -> None:
    """And the run's seed alone decides what is drawn."""

    def load(seed: int):
        return load_model(ModelConfig(name=str(tiny_model), dtype="float32"), KINDS[kind], 3, seed)

    loaded, again, other = load(5), load(5), load(6)
    drawn = [frozen_tensors(one.model) for one in (loaded, again, other)]
    ids = torch.arange(5, 14).view(1, -1)
    with torch.inference_mode():
        adapted = loaded.model(input_ids=ids).logits
        with loaded.model.disable_adapter():  # the head's own copy steps back too
            hidden = loaded.model.base_model.model.bert(input_ids=ids).pooler_output
        head = next(unit for unit in loaded.units if unit.is_head)
        weight, bias = (loaded.model.get_parameter(name) for name in head.parameters)
        assert torch.allclose(adapted, nn.functional.linear(hidden, weight, bias), atol=1e-6)
    assert bool(drawn[0]) == (kind not in ("lora", "dora", "ia3"))
    assert all(torch.equal(one, same) for one, same in zip(drawn[0], drawn[1], strict=True))
    if kind not in ("lora", "dora", "ia3", "lora_xs"):  # singular vectors are the model's
        assert not all(torch.equal(one, same) for one, same in zip(drawn[0], drawn[2], strict=True))
    rates = [module.p for module in dropout_modules(loaded.model) if isinstance(module, nn.Dropout)]
    assert rates == [KINDS[kind].dropout] * (4 if KINDS[kind].dropout else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_opens_with_peft(kind: str, tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    given = KINDS[kind].model_dump(exclude_defaults=True)
    bench = Workbench.from_config(tiny_config(adapter=given))
    values = bench.initial_state().values
    generator = torch.Generator().manual_seed(1)
    values = {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in values.items()}
    bench.save_adapter(values, tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(bench.config.model.name, num_labels=2)
    opened = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    ids = torch.arange(5, 14).view(1, -1)
    with torch.inference_mode():
        before = bench.adapted.model(input_ids=ids).logits  # saving leaves the model as it was
        with loaded(bench.adapted.model, values):
            expected = bench.adapted.model(input_ids=ids).logits
    assert torch.allclose(opened(input_ids=ids).logits, expected, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_dry_runs_know_every_kind(kind: str, packed: bool) -> None:
    if packed and KINDS[kind].kind == "dora":
        pytest.skip("its lengths are not taken of packed weights")
    work = Work(FAMILIES["bert"](), KINDS[kind], 2, 8, packed=packed)
    dry = DryRun(work)
    assert dry.adapter.unit_values == 2 * sum(TRAINED[kind])
    assert dry.forward(2).peak_at(2) > dry.inference().peak_at(2) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_packed_base_weights(kind: str, quantization: str, tmp_path: Path, tiny_model: Path) -> None:
    """Slopes against backprop through PEFT's forward over the same packed weights."""
    folder = save_family("bert", tmp_path / "model", tiny_model)
    config = ModelConfig(name=str(folder), dtype="float32", device="cpu", quantization=quantization)
    if ADAPTERS[KINDS[kind].kind].weights == "dense":
        with pytest.raises(ModelError, match="is not made from packed weights"):
            load_model(config, KINDS[kind], 3, seed=0)
        return
    model = load_model(config, KINDS[kind], 3, seed=0).model
    generator = torch.Generator().manual_seed(3)
    names, loss = trainable(model), batch_loss(padded_batch())
    for name in names:
        model.get_parameter(name).data.normal_(0, 0.3, generator=generator)
    _, found = Backprop().loss_and_gradient(model, loss, names)
    tangents = {n: torch.randn((2, *model.get_parameter(n).shape), generator=generator) for n in names}
    expected = sum((g * tangents[n]).flatten(1).sum(1) for n, g in zip(names, found, strict=True))
    assert torch.allclose(loss_and_slopes(model, loss, tangents)[1], expected, rtol=1e-3, atol=1e-4)


def test_factors_are_the_best_of_their_rank() -> None:
    weight = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    for balanced in (False, True):
        left, right = truncated_svd(weight, 3, balanced=balanced)
        assert torch.allclose(left @ right, (u[:, :3] * s[:3]) @ vh[:3])
    assert torch.allclose(truncated_svd(weight, 3, balanced=False)[1].norm(dim=1), torch.ones(3).double())
    for seed in range(5):  # whatever is drawn, they have one sign: each column's largest entry is positive
        torch.manual_seed(seed)
        again = truncated_svd(weight, 3, balanced=False)[0]
        assert torch.allclose(again.gather(0, again.abs().argmax(0, keepdim=True)), again.abs().amax(0, keepdim=True))
    with pytest.raises(ModelError, match=r"adapter\.rank = 8 exceeds .*\(12, 7\): lower it to 7"):
        truncated_svd(weight, 8, balanced=True)


def test_streamed_weights_have_no_singular_vectors(tiny_model: Path) -> None:
    config = ModelConfig(name=str(tiny_model), streamed=True)
    for kind in ("lora_xs", "dora", "bitfit"):
        with pytest.raises(ModelError, match=r"leave model.streamed out, or use kind = 'lora' with frozen"):
            load_model(config, KINDS[kind], 2, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "vera", "alpha": 2.0}, "alpha belongs to kind = 'lora' or 'dora', not 'vera': leave it out"),
        ({"kind": "lora_xs", "frozen": "a"}, "frozen belongs to kind = 'lora'"),
        ({"kind": "ia3", "dropout": 0.1}, "dropout belongs to kind = 'lora' or .*, not 'ia3'"),
        ({"kind": "bitfit", "rank": 4}, "rank belongs to kind = 'lora' or .*, not 'bitfit'"),
        ({"num_values": 3}, "num_values belongs to kind = 'tinylora', not 'lora'"),
        ({"kind": "tinylora", "rank": 2}, r"needs num_values from 1 to rank\^2 = 4, got None"),
        ({"kind": "tinylora", "rank": 2, "num_values": 5}, r"to rank\^2 = 4, got 5: set it, or raise rank"),
        ({"kind": "lora_xs", "rank": 64}, "a rank of 32 at most, not 64"),
    ],
)
def test_settings_of_another_kind(
    fields: dict[str, object], message: str, tiny_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(adapter=fields)


def test_a_models_only_own_vector_is_its_modules() -> None:
    """PEFT lists every TinyLoRA vector under the first module; the server could then assign one unit only."""
    model = build("bert", adapter=KINDS["tinylora"])
    before = set(trainable(model))
    make_lean(model)  # a second time changes nothing
    assert set(trainable(model)) == before
    assert len({name.partition(".tinylora_v.")[0] for name in before if "tinylora" in name}) == 4


def test_dora_is_pefts_without_dropout() -> None:
    """Outputs and gradients of a layer, with and without a backward pass, of a weight that has moved."""
    layer = build("bert", adapter=KINDS["dora"]).base_model.model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert len(parameters) == 3
    found = []
    for forward in (layer, lambda x: type(layer).forward(layer, x)):
        output = forward(x)
        found.append((output, *torch.autograd.grad(output.square().sum(), parameters)))
    assert all(torch.allclose(ours, theirs, rtol=1e-10) for ours, theirs in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.allclose(layer(x), found[0][0], rtol=1e-10)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_dora_on_gpt2s_transposed_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square ones too, where a wrong side shows in no shape."""
    small = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, pad_token_id=0)
    monkeypatch.setitem(FAMILIES, "gpt2", lambda: small)
    adapter = AdapterConfig(kind="dora", rank=2, target_modules=("c_attn", "c_proj"))
    model = build("gpt2", adapter=adapter)
    found = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(found) == 6
    for layer in found:
        size = layer.get_base_layer().weight.shape[0]
        x = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        theirs = type(layer).forward(layer, x)
        assert torch.allclose(layer(x), theirs, rtol=1e-10)
        with torch.no_grad():
            assert torch.allclose(layer(x), theirs, rtol=1e-10)


@pytest.mark.parametrize(
    ("family", "modules"),
    [("bert", ("key", "dense")), ("llama", ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))],
)
def test_rank_stabilized_lora_of_other_modules(family: str, modules: tuple[str, ...]) -> None:
    """Kalajdzievski 2023: scaled by alpha / sqrt(rank)."""
    config = AdapterConfig(rank=4, alpha=3, rslora=True, target_modules=modules)
    model, loss = build(family, adapter=config), batch_loss(padded_batch())
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert {layer.scaling["default"] for layer in layers} == {1.5}
    names = trainable(model)
    exact = autograd_gradient(model, loss, names)
    generator = torch.Generator().manual_seed(2)
    tangents = {n: torch.randn((1, *exact[n].shape), generator=generator, dtype=torch.float64) for n in names}
    expected = sum(float((exact[n] * tangents[n]).sum()) for n in names)
    assert {part for n in names for part in modules if f".{part}." in n} == set(modules)
    assert float(loss_and_slopes(model, loss, tangents)[1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["dora", "dora, B frozen", "vera", "tinylora", "lora_xs"])
def test_dropout_is_the_same_in_forward_mode(kind: str) -> None:
    """With the same mask forward mode's slope is autograd's, and it is another than without."""
    model, batch = build("bert", adapter=KINDS[kind]), batch_loss(padded_batch())
    names = trainable(model)
    tangents = {n: torch.ones((1, *model.get_parameter(n).shape), dtype=torch.float64) for n in names}
    found = []
    for training in (False, True):
        for dropout in dropout_modules(model):
            dropout.training = training

        def loss(model: nn.Module) -> torch.Tensor:
            torch.manual_seed(3)
            return batch(model)

        exact = sum(float(gradient.sum()) for gradient in autograd_gradient(model, loss, names).values())
        found.append(float(loss_and_slopes(model, loss, tangents)[1]))
        assert found[-1] == pytest.approx(exact, rel=1e-9)
    assert found[0] != pytest.approx(found[1], rel=1e-6)


def test_ia3_leaves_berts_attention_output_alone() -> None:
    adapted = {unit.name.partition("layer.0.")[2] for unit in trainable_units(build("bert", adapter=KINDS["ia3"]))}
    assert adapted - {""} == {"attention.self.key", "attention.self.value", "output.dense"}


def test_bitfit_of_some_modules_and_of_none() -> None:
    some = build("bert", adapter=AdapterConfig(kind="bitfit", target_modules=("query", "intermediate.dense")))
    assert {unit.name.rpartition("layer.")[2][2:] for unit in trainable_units(some) if not unit.is_head} == {
        "attention.self.query",
        "intermediate.dense",
    }
    with pytest.raises(ModelError, match="have no biases; choose another kind"):
        build(WITHOUT_BIASES, adapter=KINDS["bitfit"])
