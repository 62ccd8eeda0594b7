"""Adapters, through PEFT: a table from kind to what PEFT makes of it.

Some train so few numbers of a module that forward mode can afford a tangent for each of them, which makes its
gradient exact (`distribution = "orthogonal"` or `"coordinate"`, K = d).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, TinyLoraConfig, VeraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from spryfl.config import AdapterConfig, TaskKind
from spryfl.errors import ModelError
from spryfl.models.classes import MODEL_CLASSES
from spryfl.models.layers import transformer_layers
from spryfl.models.singular import own_values, singular_factors, use_every_entry

# Query and value projections by model family, as module-name suffixes; the first present pair is taken.
QUERY_VALUE: tuple[tuple[str, ...], ...] = (
    ("query", "value"),  # BERT, RoBERTa, ALBERT
    ("q_lin", "v_lin"),  # DistilBERT
    ("q_proj", "v_proj"),  # Llama, OPT, Mistral, Qwen, Gemma
)
# Key and value projections, and the feed-forward's second map: it is given what IA3 scales.
KEY_VALUE_MIDDLE: tuple[tuple[str, ...], ...] = (
    ("key", "value", "ffn_output"),  # ALBERT
    ("key", "value", "output.dense"),  # BERT, RoBERTa
    ("k_lin", "v_lin", "lin2"),  # DistilBERT
    ("k_proj", "v_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma
    ("k_proj", "v_proj", "fc2"),  # OPT
)
SECOND_MAPS = tuple(names[-1] for names in KEY_VALUE_MIDDLE)
ATTENTION_OUTPUT = "attention.output.dense"  # BERT's, which ends as the feed-forward's second map does
NAME = "default"  # PEFT's name of a model's only adapter


def _lora(config: AdapterConfig, targets: Sequence[str], head: Sequence[str], task: TaskType | None) -> PeftConfig:
    """LoRA (Hu et al. 2022): W x + (alpha / r) B A x, with A (r x in) and B (out x r) trained."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # PEFT only divides it
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=list(targets),
        modules_to_save=list(head),
        task_type=task,
    )


def _dora(config: AdapterConfig, targets: Sequence[str], head: Sequence[str], task: TaskType) -> PeftConfig:
    """DoRA (Liu et al. 2024): m V x / |V|, V = W + (alpha / r) B A; m (out), A and B trained, |V| of each row.

    As in its section 4.3, |V| counts as constant in gradients and tangents.
    """
    dora = _lora(config, targets, head, task)
    dora.use_dora = True
    return dora


def _ia3(config: AdapterConfig, targets: Sequence[str], head: Sequence[str], task: TaskType) -> PeftConfig:
    """IA3 (Liu et al. 2022): l * W x of keys and values, and W (l * x) of the feed-forward's second map; l trained."""
    second = [name for name in targets if name.endswith(SECOND_MAPS) and not name.endswith(ATTENTION_OUTPUT)]
    ambiguous = any(ATTENTION_OUTPUT.endswith(f".{name}") for name in second)
    return IA3Config(
        target_modules=list(targets),
        feedforward_modules=second,
        exclude_modules=[ATTENTION_OUTPUT] if ambiguous else None,
        modules_to_save=list(head),
        task_type=task,
    )


def _bitfit(config: AdapterConfig, targets: Sequence[str], head: Sequence[str], task: TaskType) -> PeftConfig:
    """BitFit (Ben Zaken et al. 2022): W x + b, b trained. PEFT has none, but its LoRA saves biases and reopens them."""
    return LoraConfig(r=1, bias="all", target_modules=list(targets), modules_to_save=list(head), task_type=task)


def _train_biases(model: PeftModel, config: AdapterConfig) -> None:
    """Train the biases of the layers' modules, or of the target modules alone; LoRA stays where it changes nothing."""
    inside = {parameter for layer in transformer_layers(model) for parameter in layer.parameters()}
    wanted = tuple(f".{name}" for name in config.target_modules or ())
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        if ".modules_to_save." in name:
            continue
        chosen = not wanted or path.removesuffix(".base_layer").endswith(wanted)
        parameter.requires_grad_(attribute == "bias" and parameter in inside and chosen)
    if not any(parameter.requires_grad for parameter in inside):
        raise ModelError("adapter.kind = 'bitfit': the layers to train have no biases; choose another kind: 'ia3'")


def _freeze_factor(model: PeftModel, config: AdapterConfig) -> None:
    """Leave one factor as it is drawn: A trains nothing in LoRA-FA (Zhang et al. 2023), B in its mirror image.

    Training starts at the base model either way, so a frozen B is drawn and A is zero. Orthonormal columns make
    the update as large as A's change.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and config.frozen != "none":
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            (a if config.frozen == "a" else b).requires_grad_(False)
            if config.frozen == "b":
                drawn = nn.init.orthogonal_(torch.empty(b.shape))
                with torch.no_grad():
                    b.copy_(drawn)
                    a.zero_()


def _freeze_all(model: PeftModel, config: AdapterConfig) -> None:
    """Leave LoRA at its start, where it changes nothing; the head is trained in full."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A[NAME].weight.requires_grad_(False)
            layer.lora_B[NAME].weight.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("adapter.kind = 'head': this task trains no head; choose another kind, such as 'lora'")


def _vera(config: AdapterConfig, targets: Sequence[str], head: Sequence[str], task: TaskType | None) -> PeftConfig:
    """VeRA (Kopiczko et al. 2024): W x + b * B (d * A x); b (out) and d (r) trained, A and B one pair for all."""
    return VeraConfig(
        r=config.rank,
        projection_prng_key=int(torch.randint(2**31, ())),  # of the seed under which the model is loaded
        save_projection=True,
        vera_dropout=config.dropout,
        target_modules=list(targets),
        modules_to_save=list(head),
        task_type=task,
    )


def _tinylora(config: AdapterConfig, targets: Sequence[str], head: Sequence[str], task: TaskType | None) -> PeftConfig:
    """TinyLoRA (arXiv:2602.04118): W x + B (sum_i v_i P_i) A x, with v trained, P random, A and B from W's SVD."""
    return TinyLoraConfig(
        r=config.rank,
        u=config.num_values or config.rank**2,
        projection_seed=int(torch.randint(2**31, ())),
        save_projection=True,
        tinylora_dropout=config.dropout,
        target_modules=list(targets),
        modules_to_save=list(head),
        task_type=task,
    )


def _finish_tinylora(model: PeftModel, config: AdapterConfig) -> None:
    own_values(model)


def _finish_xs(model: PeftModel, config: AdapterConfig) -> None:
    """LoRA-XS (Balazy et al. 2024): W x + B R A x; R (r x r) trained from zero, W = B A its truncated SVD.

    PEFT has none, but its TinyLoRA with one P_i for each entry of R is that, and PEFT reopens it.
    """
    use_every_entry(model)
    own_values(model)


@dataclass(frozen=True)
class Adapter:
    """One row of the table.

    Attributes:
        configure: (settings, target modules, head modules, PEFT's task) -> PEFT's configuration. May draw from the
            global generator, which is seeded while a model is loaded.
        finish: what PEFT leaves to do once its layers are in place.
        weights: what it needs the adapted weights to be: "resident", not streamed, or "dense", not packed either.
        default_targets: names of modules by model family; the first that are all present are adapted.
    """

    configure: Callable[[AdapterConfig, Sequence[str], Sequence[str], TaskType | None], PeftConfig]
    finish: Callable[[PeftModel, AdapterConfig], None] = lambda model, config: None
    weights: Literal["any", "resident", "dense"] = "any"
    default_targets: Sequence[tuple[str, ...]] = QUERY_VALUE


ADAPTERS: dict[str, Adapter] = {
    "lora": Adapter(_lora, _freeze_factor),
    "dora": Adapter(_dora, _freeze_factor, weights="dense"),
    "lora_xs": Adapter(_tinylora, _finish_xs, weights="dense"),
    "vera": Adapter(_vera),
    "tinylora": Adapter(_tinylora, _finish_tinylora, weights="dense"),
    "ia3": Adapter(_ia3, default_targets=KEY_VALUE_MIDDLE),
    "bitfit": Adapter(_bitfit, _train_biases, weights="resident"),
    "head": Adapter(_lora, _freeze_all),
}


def adapt(base: nn.Module, config: AdapterConfig, head: Sequence[str], task: TaskKind = "classification") -> PeftModel:
    """Put an adapter on a model, its initial values drawn from the global generator.

    Args:
        base: changed in place.
        config: the run's adapter part.
        head: names of modules trained in full.

    Raises:
        ModelError: the target modules are not in the model, are smaller than the rank, or are packed and would have
            to be decomposed.
    """
    kind, targets = ADAPTERS[config.kind], target_modules(config, base)
    peft_config = kind.configure(config, targets, head, MODEL_CLASSES[task].peft)
    factors: AbstractContextManager[Any] = nullcontext()
    if kind.weights == "dense":
        _require_dense(config, base, targets)
        factors = singular_factors(balanced=config.kind == "tinylora")
    with factors:
        model = add_adapter(base, peft_config)
    kind.finish(model, config)
    return model


def add_adapter(base: nn.Module, config: PeftConfig) -> PeftModel:
    """Put PEFT's layers on a model; their values take its dtype, as float32 masters live outside."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for the old name of its checkpointing flag; no user can mend that.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(base, config, autocast_adapter_dtype=False)


def require_weights(config: AdapterConfig, *, streamed: bool) -> None:
    """Raise ModelError if an adapter is made from weights that stay on disk, or trains them."""
    if streamed and ADAPTERS[config.kind].weights != "any":
        raise ModelError(
            f"adapter.kind = '{config.kind}' is made of the layers' own weights, which model.streamed leaves "
            "on disk: leave model.streamed out, or use kind = 'lora' with frozen = 'a' or 'b'"
        )


def _require_dense(config: AdapterConfig, base: nn.Module, targets: Sequence[str]) -> None:
    adapted = [module for path, module in base.named_modules() if path.endswith(tuple(targets))]
    if not all(module.weight.is_floating_point() for module in adapted if isinstance(module, nn.Linear)):
        raise ModelError(
            f"adapter.kind = '{config.kind}': it is not made from packed weights: leave model.quantization "
            "out and name a model in full precision, or use kind = 'vera', or 'lora' with frozen = 'a' or 'b'"
        )


def frozen_tensors(model: nn.Module) -> list[Tensor]:
    """The adapter's own tensors that are not trained, each once: frozen factors and projections."""
    found: dict[Tensor, None] = {}
    for _, part in _own_parts(model):
        for tensor in (*part.parameters(), *part.buffers()):
            if not tensor.requires_grad and tensor.is_floating_point():
                found[tensor] = None
    return list(found)


def dropout_modules(model: nn.Module) -> list[nn.Module]:
    """The adapter's own dropout modules."""
    return [dropout for name, part in _own_parts(model) if name.endswith("_dropout") for dropout in part.children()]


def own_modules(model: nn.Module) -> set[nn.Module]:
    """All modules that an adapter adds beside the linear maps it is put around."""
    return {module for _, part in _own_parts(model) for module in part.modules()}


def _own_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that each adapted module adds to its base layer, by name."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            yield from ((name, part) for name, part in layer.named_children() if name != "base_layer")


def target_modules(config: AdapterConfig, model: nn.Module) -> tuple[str, ...]:
    """The modules to adapt: those asked for, or the first known ones of the adapter's kind that the model has."""
    paths = [f".{path}" for path, _ in model.named_modules()]

    def missing(names: Sequence[str]) -> list[str]:
        return [name for name in names if not any(path.endswith(f".{name}") for path in paths)]

    if config.target_modules is not None:
        linear = sorted({p.rpartition(".")[2] for p, m in model.named_modules() if isinstance(m, nn.Linear)})
        if unknown := missing(config.target_modules):
            raise ModelError(f"adapter.target_modules: no module named {unknown} here. Linear ones: {linear}")
        if unfit := [name for name in config.target_modules if not _have_matrices(model, name)]:
            raise ModelError(f"adapter.target_modules: {unfit} are no linear maps here. Linear ones: {linear}")
        return config.target_modules
    for names in ADAPTERS[config.kind].default_targets:
        if not missing(names):
            return names
    raise ModelError(
        f"adapter.target_modules: none are known by default for this model and kind = '{config.kind}'; name them"
    )


def _have_matrices(model: nn.Module, name: str) -> bool:
    """Whether all modules of that name have a matrix of weights, which an adapter is put around."""
    named = [module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")]
    return all(isinstance(own := getattr(module, "weight", None), Tensor) and own.dim() > 1 for module in named)
