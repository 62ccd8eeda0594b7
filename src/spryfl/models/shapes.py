"""Well-known models by shape alone: their published configurations, for planning and measuring without a network.

Memory and time do not depend on what the weights are, so a shape says all that a plan or a benchmark needs.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AlbertConfig,
    BertConfig,
    DistilBertConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from spryfl.errors import ModelError, lookup_error

PREFIX = "shape:"


@dataclass(frozen=True)
class Shape:
    """A published configuration.

    Attributes:
        kind: the transformers configuration class.
        layers, hidden, heads, middle: the repeated layers, their width, query heads, feed-forward width.
        vocabulary: tokens.
        key_heads: of grouped-query attention; None where every query head has its own.
        more: whatever else differs from the class's defaults.
    """

    kind: type[PreTrainedConfig]
    layers: int
    hidden: int
    heads: int
    middle: int
    vocabulary: int
    key_heads: int | None = None
    more: dict[str, Any] = field(default_factory=dict)


_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_ALBERT = {"embedding_size": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_OPT = {"max_position_embeddings": 2048}
_LLAMA2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_SMOLLM2 = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
_QWEN3 = {"head_dim": 128, "max_position_embeddings": 40960}
_GEMMA = {"head_dim": 256, "max_position_embeddings": 8192}

SHAPES: dict[str, Shape] = {
    "bert-base": Shape(BertConfig, 12, 768, 12, 3072, 30522),
    "bert-large": Shape(BertConfig, 24, 1024, 16, 4096, 30522),
    "roberta-base": Shape(RobertaConfig, 12, 768, 12, 3072, 50265, more=_ROBERTA),
    "roberta-large": Shape(RobertaConfig, 24, 1024, 16, 4096, 50265, more=_ROBERTA),
    "distilbert-base": Shape(DistilBertConfig, 6, 768, 12, 3072, 30522),
    "albert-base-v2": Shape(AlbertConfig, 12, 768, 12, 3072, 30000, more=_ALBERT),
    "albert-large-v2": Shape(AlbertConfig, 24, 1024, 16, 4096, 30000, more=_ALBERT),
    "opt-125m": Shape(OPTConfig, 12, 768, 12, 3072, 50272, more=_OPT),
    "opt-1.3b": Shape(OPTConfig, 24, 2048, 32, 8192, 50272, more=_OPT),
    "opt-2.7b": Shape(OPTConfig, 32, 2560, 32, 10240, 50272, more=_OPT),
    "opt-6.7b": Shape(OPTConfig, 32, 4096, 32, 16384, 50272, more=_OPT),
    "opt-13b": Shape(OPTConfig, 40, 5120, 40, 20480, 50272, more=_OPT),
    "tinyllama-1.1b": Shape(LlamaConfig, 22, 2048, 32, 5632, 32000, 4, more={"rms_norm_eps": 1e-5}),
    "llama2-7b": Shape(LlamaConfig, 32, 4096, 32, 11008, 32000, more=_LLAMA2),
    "llama2-13b": Shape(LlamaConfig, 40, 5120, 40, 13824, 32000, more=_LLAMA2),
    "llama3-8b": Shape(LlamaConfig, 32, 4096, 32, 14336, 128256, 8, more={"max_position_embeddings": 8192}),
    "smollm2-135m": Shape(LlamaConfig, 30, 576, 9, 1536, 49152, 3, more=_SMOLLM2),
    "smollm2-360m": Shape(LlamaConfig, 32, 960, 15, 2560, 49152, 5, more=_SMOLLM2),
    "smollm2-1.7b": Shape(LlamaConfig, 24, 2048, 32, 8192, 49152, more=_SMOLLM2),
    "mistral-7b": Shape(
        MistralConfig, 32, 4096, 32, 14336, 32000, 8, more={"sliding_window": 4096, "max_position_embeddings": 32768}
    ),
    "qwen2-0.5b": Shape(Qwen2Config, 24, 896, 14, 4864, 151936, 2, more={"tie_word_embeddings": True}),
    "qwen2-7b": Shape(Qwen2Config, 28, 3584, 28, 18944, 152064, 4),
    "qwen3-0.6b": Shape(Qwen3Config, 28, 1024, 16, 3072, 151936, 8, more={**_QWEN3, "tie_word_embeddings": True}),
    "qwen3-8b": Shape(Qwen3Config, 36, 4096, 32, 12288, 151936, 8, more=_QWEN3),
    "gemma-2b": Shape(GemmaConfig, 18, 2048, 8, 16384, 256000, 1, more=_GEMMA),
    "gemma-7b": Shape(GemmaConfig, 28, 3072, 16, 24576, 256000, 16, more=_GEMMA),
}


def shape_config(name: str, num_labels: int = 2, **overrides: Any) -> PreTrainedConfig:
    """The transformers configuration of a well-known shape, for `AutoModelForSequenceClassification`.

    Args:
        name: with or without the prefix `shape:`.
        overrides: configuration fields to set otherwise, such as `num_hidden_layers=6`.

    Raises:
        ModelError: no such shape.
    """
    key = name.removeprefix(PREFIX)
    if key not in SHAPES:
        raise ModelError(lookup_error("shape", key, SHAPES))
    shape = SHAPES[key]
    settings: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        _MIDDLE.get(shape.kind, "intermediate_size"): shape.middle,
        "num_labels": num_labels,
        "pad_token_id": 0,
        "use_cache": False,
    }
    if hasattr(shape.kind(), "num_key_value_heads"):
        settings["num_key_value_heads"] = shape.key_heads or shape.heads
    if shape.kind is OPTConfig:
        settings["word_embed_proj_dim"] = shape.hidden
    return shape.kind(**{**settings, **shape.more, **overrides})


_MIDDLE: dict[type[PreTrainedConfig], str] = {OPTConfig: "ffn_dim", DistilBertConfig: "hidden_dim"}
