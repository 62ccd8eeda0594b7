"""Well-known shapes: as many parameters as their papers and model cards say."""

import pytest

from spryfl.errors import ModelError
from spryfl.models.shapes import SHAPES, shape_config
from spryfl.models.skeleton import hollow_model

# Of the base model, embeddings included, without its language-model head, in millions; from papers and model cards.
PUBLISHED = {
    "bert-base": 110,
    "bert-large": 335,
    "roberta-large": 355,
    "distilbert-base": 66.4 + 0.59,  # and its pre_classifier
    "albert-base-v2": 11.7,
    "opt-125m": 125,
    "opt-1.3b": 1316,
    "opt-6.7b": 6658,
    "opt-13b": 12853,
    "tinyllama-1.1b": 1100 - 32.000 * 2.048,
    "llama2-7b": 6738 - 32.000 * 4.096,
    "llama2-13b": 13016 - 32.000 * 5.120,
    "llama3-8b": 8030 - 128.256 * 4.096,
    "smollm2-135m": 134.5,
    "smollm2-1.7b": 1711,
    "mistral-7b": 7242 - 32.000 * 4.096,
    "qwen2-0.5b": 494,
    "qwen2-7b": 7616 - 152.064 * 3.584,
    "qwen3-0.6b": 596,
    "qwen3-8b": 8191 - 151.936 * 4.096,
    "gemma-2b": 2506,
    "gemma-7b": 8538,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_build(name: str) -> None:
    model = hollow_model(shape_config(name, num_labels=2))
    if name in PUBLISHED:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert millions == pytest.approx(PUBLISHED[name], rel=0.01)


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ModelError, match="Did you mean 'llama2-7b'"):
        shape_config("shape:llama-7b")


def test_depth_can_be_overridden() -> None:
    assert shape_config("shape:bert-large", num_hidden_layers=6).num_hidden_layers == 6
