"""Tiny random models of every supported family, with LoRA, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
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

from spryfl.config import AdapterConfig, TaskKind
from spryfl.forward_mode.attention import ATTENTION_NAME, register_attention
from spryfl.models.adapters import adapt
from spryfl.models.classes import MODEL_CLASSES
from spryfl.models.heads import head_modules
from spryfl.models.lean import make_lean

COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 3,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**COMMON),
    "roberta": lambda: RobertaConfig(**COMMON, bos_token_id=1, eos_token_id=2),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32, num_labels=3
    ),
    "albert": lambda: AlbertConfig(**COMMON, embedding_size=16, bos_token_id=1, eos_token_id=2),
    "llama": lambda: LlamaConfig(**GROUPED),
    "opt": lambda: OPTConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
        pad_token_id=0,
        num_labels=3,
        use_cache=False,
    ),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "gemma": lambda: GemmaConfig(**GROUPED, head_dim=8),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=4),
}

RANK_2 = AdapterConfig(rank=2, alpha=2)
DECODERS = ("llama", "opt", "qwen2", "qwen3", "gemma", "mistral")


def build(
    family: str,
    *,
    attention: str = ATTENTION_NAME,
    seed: int = 0,
    adapter: AdapterConfig = RANK_2,
    task: TaskKind = "classification",
    layers: int = 2,
) -> nn.Module:
    """A tiny adapted model with lean operators."""
    register_attention()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = FAMILIES[family]()
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * layers
        config.num_labels = 2 if task == "qa" else config.num_labels  # a start and an end
        base = MODEL_CLASSES[task].auto.from_config(config, attn_implementation=attention)
        base = base.double()
        model = adapt(base, adapter, head_modules(base, (), task), task).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)  # LoRA's B starts at zero, which would hide errors
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)
    make_lean(model)
    return model


def drop_half(model: nn.Module) -> None:
    """Dropout of one half in every dropout module."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
            module.train()


def dropping_loss(batch: dict[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    """`batch_loss` with the same dropout masks each time."""

    def loss(model: nn.Module) -> Tensor:
        torch.manual_seed(3)
        return batch_loss(batch)(model)

    return loss


def _rms_norm(module: nn.Module, hidden: Tensor) -> Tensor:
    """Transformers' RMS norms compute in float32 whatever they are given; here float64 stays float64."""
    offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    scaled = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)
    return scaled * (module.weight + offset)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def padded_batch(rows: int = 3, tokens: int = 9, *, left: bool = False) -> dict[str, Tensor]:
    """Token ids, a mask with padding on one side, and labels; the same every time."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, tokens - 4 :] = 0
    mask[1, tokens - 1 :] = 0
    mask = mask.flip(1) if left else mask
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 3}


@dataclass(frozen=True)
class BatchLoss:
    """A batch's mean loss, and each row's part of it."""

    batch: dict[str, Tensor]

    def __call__(self, model: nn.Module) -> Tensor:
        return self._losses(model, "mean")

    def parts(self, model: nn.Module) -> Tensor:
        losses = self._losses(model, "none")
        return losses / losses.shape[0]

    def _losses(self, model: nn.Module, reduction: str) -> Tensor:
        batch = self.batch
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], reduction=reduction)


def batch_loss(batch: dict[str, Tensor]) -> BatchLoss:
    return BatchLoss(batch)


def autograd_gradient(model: nn.Module, loss: Callable[[nn.Module], Tensor], names: list[str]) -> dict[str, Tensor]:
    parameters = [model.get_parameter(name) for name in names]
    with torch.enable_grad():
        found = torch.autograd.grad(loss(model), parameters)
    return dict(zip(names, found, strict=True))
