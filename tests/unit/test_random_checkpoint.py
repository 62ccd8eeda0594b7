"""Random checkpoints: complete folders, the same bytes for every layer, written once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from families import FAMILIES
from packed import open_model
from spryfl.bench.random_checkpoint import MARK, write_random_checkpoint
from spryfl.errors import ModelError
from spryfl.models.checkpoint import Checkpoint
from spryfl.models.shards import ShardWriter


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "opt", "bert", "albert"])
def test_a_folder_anyone_opens(family: str, precision: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    config = FAMILIES[family]()
    folder = write_random_checkpoint(config, tmp_path / "deep" / "x", precision, seed=3)
    _, info = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {
        "score" if family in ("llama", "opt") else "classifier"
    }
    assert not info["unexpected_keys"]
    loaded = open_model(folder)
    with torch.inference_mode():
        logits = loaded.model(input_ids=torch.arange(6).view(2, 3)).logits
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    if family == "llama":
        first, second = (loaded.model.base_model.model.model.layers[i].state_dict() for i in (0, 1))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items() if "lora" not in name)


def test_it_is_written_once(tmp_path: Path) -> None:
    config, folder = FAMILIES["llama"](), tmp_path / "x"
    write_random_checkpoint(config, folder, "float32", seed=0)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    write_random_checkpoint(FAMILIES["llama"](), folder, "float32", seed=0)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    config.num_hidden_layers = 3
    for arguments in ((config, folder, "float32", 0), (FAMILIES["llama"](), folder, "bfloat16", 0)):
        with pytest.raises(ModelError, match="holds other weights"):
            write_random_checkpoint(*arguments)  # type: ignore[arg-type]
    (folder / MARK).unlink()
    with pytest.raises(ModelError, match="holds other weights"):
        write_random_checkpoint(FAMILIES["llama"](), folder, "float32", seed=0)


def test_shards(tmp_path: Path) -> None:
    """A tensor larger than a shard has a file of its own; the index names the rest."""
    writer = ShardWriter(tmp_path, shard_bytes=100)
    tensors = {name: torch.full((size,), float(size)) for name, size in (("a", 10), ("b", 10), ("c", 60), ("d", 25))}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    stored = Checkpoint.open(tmp_path)
    assert len(set(stored.files.values())) == 3
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored.read(tensors).items())
    assert stored.shapes()["c"] == ((60,), "F32")
