"""Packed weights: unpacking, quantizing on disk and while loading, and what stock transformers makes of it."""

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from families import FAMILIES, padded_batch
from packed import open_model, save_family
from spryfl.config import ModelConfig
from spryfl.errors import ModelError
from spryfl.forward_mode.budget import chunks_of
from spryfl.forward_mode.dual import make_dual
from spryfl.forward_mode.operators import use_lean_operators
from spryfl.forward_mode.packed import has_matrix_unit, product
from spryfl.models import shards
from spryfl.models.quantization import KINDS, packed_bytes, packed_parameter, quantize, unpackers
from spryfl.models.quantizing import natural, quantize_checkpoint
from spryfl.models.quiet import quiet_bitsandbytes
from spryfl.models.units import HEAD

bnb = pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _module(kind: str, weight: Tensor) -> nn.Module:
    make = bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt
    module = make(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = packed_parameter(quantize(weight, kind), CPU)
    return module


def _unpack(module: nn.Module, rows: slice, out: Tensor) -> None:
    unpackers()[type(module)](module, rows, out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_unpacking(kind: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    """What the format says, rounded once, whatever dtype was packed; rows that end inside a block included."""
    weight = torch.randn(250, 96, generator=torch.Generator().manual_seed(0)).to(stored)
    module = _module(kind, weight)
    dense = torch.empty(weight.shape, dtype=dtype)
    for start, stop in ((0, 3), (3, 100), (100, 180), (180, 250)):
        _unpack(module, slice(start, stop), dense[start:stop])
    parts = quantize(weight, kind)
    if kind == "nf4":
        # By hand: two codes a byte, 64 values a block, the blocks' scales packed themselves.
        state = bnb.functional.QuantState.from_dict({k: v for k, v in parts.items() if k != "weight"}, CPU)
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        bytes_ = parts["weight"].flatten().long()
        codes = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).flatten()
        expected = (state.code[codes].view(-1, 64) * scales.unsqueeze(1)).view(weight.shape)
    else:
        wide = torch.promote_types(dtype, torch.float32)
        expected = parts["weight"].to(wide) * (parts["SCB"] / 127).unsqueeze(1)
    assert torch.equal(dense, expected.to(dtype))
    worst = {"nf4": 0.17, "int8": 0.006}[kind] * weight.float().abs().max()
    assert (dense.float() - weight.float()).abs().max() < worst


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_blocks(kind: str) -> None:
    """With several blocks of rows and tokens: forward, back, and along a tangent as with the dense weight."""
    generator = torch.Generator().manual_seed(0)
    module: Any = _module(kind, torch.randn(250, 96, generator=generator))
    dense = torch.empty(250, 96, dtype=torch.float64)
    _unpack(module, slice(0, 250), dense)
    x = torch.randn(2, 75, 96, dtype=torch.float64, generator=generator)
    y = torch.randn(2, 75, 250, dtype=torch.float64, generator=generator)
    use_lean_operators(nn.Sequential(module), unpackers())
    with chunks_of(1):
        assert torch.allclose(module(x), x @ dense.t())
        value, slope = torch.func.jvp(module, (x,), (2 * x,))
        assert torch.allclose(value, x @ dense.t())
        assert torch.allclose(slope, 2 * x @ dense.t())
        x.requires_grad_()
        assert torch.allclose(torch.autograd.grad(module(x), x, y)[0], y @ dense)
        dual = module(make_dual(x.detach(), y[None, ..., :96]))
    assert torch.allclose(dual.stacked, torch.stack((x, y[..., :96])) @ dense.t())


@pytest.mark.skipif(has_matrix_unit(), reason="multiplies 16 bits as they are")
def test_products_of_16_bits_lose_nothing_but_their_own_rounding() -> None:
    module: Any = _module("nf4", torch.randn(70, 96, generator=torch.Generator().manual_seed(0)))
    dense = torch.empty(70, 96)
    _unpack(module, slice(0, 70), dense)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(product(x, module, _unpack), (x.float() @ dense.t()).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_known_before_packing(kind: str) -> None:
    for shape in [(64, 64), (70, 33), (300, 128)]:
        parts = quantize(torch.randn(shape), kind)
        fixed = {"weight.quant_map", "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4", "weight_format"}
        assert packed_bytes(shape, kind) == sum(t.nbytes for name, t in parts.items() if name not in fixed)


def test_a_repacked_weight_is_refused() -> None:
    module: Any = _module("nf4", torch.randn(32, 64))
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="repacked"):
        _unpack(module, slice(0, 32), torch.empty(32, 64))


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'spryfl\[quantization\]'"):
        open_model(tiny_model, quantization="nf4")


def test_only_the_noise_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    quiet_bitsandbytes()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "none")
    logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_three_ways_to_the_same_model(family: str, kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Quantized while loading, on disk, and by stock transformers: the same packed bytes and outputs."""
    source = save_family(family, tmp_path / "source", tiny_model, shard="20KB")
    copy = tmp_path / "copy"
    progress: list[tuple[int, int]] = []
    quantize_checkpoint(ModelConfig(name=str(source)), copy, kind, lambda done, total: progress.append((done, total)))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert progress[-1][0] == progress[-1][1] > progress[0][0]

    batch = {k: v for k, v in padded_batch().items() if k != "labels"}
    batch["input_ids"] = batch["input_ids"] % 50
    loaded, reopened = open_model(source, quantization=kind), open_model(copy)
    with torch.inference_mode():
        assert torch.equal(loaded.model(**batch).logits, reopened.model(**batch).logits)
    assert [unit.name for unit in loaded.units].count(HEAD) == 1
    assert loaded.units == open_model(source).units

    asked = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}
    config = BitsAndBytesConfig(
        **asked.get(kind, {"load_in_8bit": True}),
        llm_int8_skip_modules=["score", "classifier", "pre_classifier"],
    )
    stock = AutoModelForSequenceClassification.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    again = AutoModelForSequenceClassification.from_pretrained(copy, dtype=torch.float32)
    ours = again.state_dict()
    head = [name for name in ours if name.startswith(("score", "classifier", "pre_classifier"))]
    for name, tensor in stock.state_dict().items():
        assert name in head or torch.equal(tensor, ours[name]), name
    assert any(name.endswith(("absmax", "SCB")) for name in ours)
    use_lean_operators(again, unpackers())
    with torch.inference_mode():
        again.base_model(**batch)


def test_a_language_model_keeps_its_own_head(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(FAMILIES["llama"]()).save_pretrained(tmp_path / "source")
    quantize_checkpoint(ModelConfig(name=str(tmp_path / "source")), tmp_path / "copy", "nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_a_base_model_computes_in_another_dtype(tiny_model: Path, tmp_path: Path) -> None:
    """Packed bytes come from the weights as stored; embeddings stay as stored and rows are cast."""
    source = save_family("llama", tmp_path, tiny_model, dtype=torch.bfloat16)
    low, full = (open_model(source, quantization="nf4", dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert {p.dtype for p in low.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in full.model.parameters() if p.requires_grad} == {torch.float32}
    packed = {name: p for name, p in full.model.named_parameters() if p.dtype == torch.uint8}
    assert packed
    assert all(torch.equal(p, low.model.get_parameter(name)) for name, p in packed.items())
    ids = padded_batch()["input_ids"]
    with torch.inference_mode():
        assert low.model(input_ids=ids).logits.dtype == torch.bfloat16
        assert full.model(input_ids=ids).logits.dtype == torch.float32


def test_settings_that_contradict_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(ModelConfig(name=str(tiny_model)), tmp_path / "copy", "nf4")
    assert open_model(tmp_path / "copy", quantization="nf4").units == open_model(tmp_path / "copy").units
    with pytest.raises(ModelError, match=r"model.quantization = 'int8': .* is stored as nf4"):
        open_model(tmp_path / "copy", quantization="int8")
    with pytest.raises(ModelError, match="is quantized already"):
        quantize_checkpoint(ModelConfig(name=str(tmp_path / "copy")), tmp_path / "twice", "nf4")
    with pytest.raises(ModelError, match="exists already"):
        quantize_checkpoint(ModelConfig(name=str(tiny_model)), tmp_path / "copy", "nf4")
    config = json.loads((tmp_path / "copy/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "copy/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized by gptq"):
        open_model(tmp_path / "copy")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_damaged_weights_are_named(damage: str, streamed: bool, tiny_model: Path, tmp_path: Path) -> None:
    source = save_family("llama", tmp_path / "source", tiny_model, shard="20KB")
    victim = sorted(source.glob("*.safetensors"))[1]
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-7] if damage == "truncated" else b"\xff" * 64)
    for settings in ({"streamed": True}, {}) if streamed else ({}, {"quantization": "int8"}):
        with pytest.raises(ModelError, match=victim.name) as caught:
            open_model(source, **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=victim.name):
        quantize_checkpoint(ModelConfig(name=str(source)), tmp_path / "copy", "nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_lacks_a_layer(tiny_model: Path, tmp_path: Path) -> None:
    """Random values in its place would be trained in full by nobody's wish."""
    source = save_family("llama", tmp_path, tiny_model)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lack 9 tensors of its layers, such as model\.layers\.2"):
        open_model(source, quantization="nf4")


def test_labels_that_do_not_fit_the_folders_head(tmp_path: Path, tiny_model: Path) -> None:
    with torch.random.fork_rng():
        model = AutoModelForSequenceClassification.from_config(FAMILIES["llama"]())
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path)
    with pytest.raises(ModelError, match=r"score.weight is \(3, 32\) in the checkpoint, .* makes it \(5, 32\)"):
        open_model(tmp_path, num_labels=5, quantization="nf4")


def test_a_disk_too_small_is_seen_first(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 7))
    with pytest.raises(ModelError, match=r"about [\d,]+ bytes are needed, 7 are free"):
        quantize_checkpoint(ModelConfig(name=str(tiny_model)), tmp_path / "copy", "nf4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reported_by", ["system", "safetensors"])
def test_a_disk_that_fills(reported_by: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        if reported_by == "system":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", fail)
    with pytest.raises(ModelError, match=r"not enough space .* nothing was left behind") as caught:
        quantize_checkpoint(ModelConfig(name=str(tiny_model)), tmp_path / "copy", "nf4")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(ModelConfig(name=str(tiny_model)), tmp_path / "copy", "nf4", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_layers_in_their_order() -> None:
    assert sorted(["a.10.w", "a.2.w", "a.b"], key=natural) == ["a.b", "a.2.w", "a.10.w"]


@pytest.mark.slow
def test_a_gguf_file(tmp_path: Path) -> None:
    """Unpacked whole, then packed: on disk and in memory alike, whatever the model computes in."""
    quantize_checkpoint(ModelConfig(name="builtin:smollm2"), tmp_path / "copy", "nf4")
    ids = torch.arange(5, 25).view(2, 10)
    for dtype in ("float32", "bfloat16"):
        outputs = []
        for folder, quantization in ((tmp_path / "copy", "none"), (Path("builtin:smollm2"), "nf4")):
            loaded = open_model(folder, quantization=quantization, dtype=dtype, num_labels=2)
            with torch.inference_mode():
                outputs.append(loaded.model(input_ids=ids).logits)
        assert torch.equal(*outputs)
    with pytest.raises(ModelError, match="spry quantize builtin:smollm2"):
        open_model(Path("builtin:smollm2"), streamed=True)
