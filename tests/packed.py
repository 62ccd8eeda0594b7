"""Checkpoints to quantize and stream, and quantized models that compute with unpacked weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from families import FAMILIES
from spryfl.config import AdapterConfig, ModelConfig
from spryfl.models.loading import AdaptedModel, load_model


def save_family(
    family: str, folder: Path, tokenizer: Path, dtype: torch.dtype = torch.float32, shard: str = "50GB"
) -> Path:
    """A tiny random model without its head, as its base class saves it."""
    config = FAMILIES[family]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    model.base_model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


def open_model(folder: Path, *, num_labels: int = 3, dtype: str = "float32", **settings: Any) -> AdaptedModel:
    """The adapted model, its B matrices no longer zero."""
    config = ModelConfig(name=str(folder), dtype=dtype, device="cpu", **settings)
    loaded = load_model(config, AdapterConfig(rank=2), num_labels, seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3, generator=generator)
    return loaded
