"""Shared fixtures: a tiny model on disk with a real tokenizer, and a tiny labelled file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from spryfl.config import RunConfig, parse_config, with_overrides

settings.register_profile("ours", deadline=None, derandomize=True)  # the machine is shared; a test has its seed
settings.load_profile("ours")

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "plot", "cast", "the", "a", "is", "was"]
SHARED_DATA = Path(__file__).parents[2] / "shared/data"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT of random weights, saved as transformers saves models."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,  # features that differ between words without any training
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).bert.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety sentences whose label is the tone of their adjective, as JSONL."""
    path = tmp_path_factory.mktemp("tiny-data") / "reviews.jsonl"
    rows = [
        {"text": f"the {noun} {verb} {tone}" + " the film" * (i % 3), "label": int(tone in WORDS[:3]), "topic": noun}
        for i, (noun, verb, tone) in enumerate(
            (noun, verb, tone)
            for noun in ("film", "plot", "cast")
            for verb in ("is", "was")
            for tone in WORDS[:6]
            for _ in range(3)
        )
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_table(tiny_model: Path, tiny_data: Path) -> dict[str, dict[str, object]]:
    """The tables of a run that takes seconds."""
    return {
        "model": {"name": str(tiny_model), "dtype": "float32", "device": "cpu"},
        "data": {"name": str(tiny_data), "max_tokens": 16},
        "partition": {"num_clients": 8, "min_examples": 3},
        "local": {"batch_size": 4},
        "server": {"num_rounds": 3, "cohort_size": 3},
        "evaluation": {"every": 1},
    }


@pytest.fixture
def tiny_config(tiny_table: dict[str, dict[str, object]]) -> Callable[..., RunConfig]:
    """Makes the tiny run's configuration with dotted overrides."""

    def make(**overrides: object) -> RunConfig:
        return parse_config(with_overrides(tiny_table, {k.replace("__", "."): v for k, v in overrides.items()}))

    return make


@pytest.fixture
def suite_table(tiny_table: dict[str, Any]) -> dict[str, Any]:
    """Two methods, two seeds, on the tiny run's settings."""
    base = tiny_table | {"server": {"num_rounds": 2, "cohort_size": 2, "learning_rate": 0.01}}
    return {
        "title": "Tiny <suite>",
        "seeds": [0, 1],
        "reference": "fedyogi",
        "base": base,
        "dataset": [{"name": "reviews", "target": 0.1}],
        "method": [{"name": "spry", "label": "Spry"}, {"name": "fedyogi"}],
    }


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A run sets the threads it asks for; the next test has those that it would have had."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the datasets in {SHARED_DATA}, which is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Public text for maps to be fitted on, a text a line."""
    path = tmp_path_factory.mktemp("public") / "public.txt"
    nouns, tones = ("film", "plot", "cast"), ("good", "bad", "great", "poor", "fine", "awful")
    path.write_text("\n".join(f"a {noun} is {tone}" for noun in nouns for tone in tones for _ in range(4)))
    return path
