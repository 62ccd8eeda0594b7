"""Adapters, through PEFT: a table from kind to PEFT configuration."""

import warnings
from collections.abc import Callable, Sequence

from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from spryfl.config import AdapterConfig, TaskKind
from spryfl.errors import ModelError
from spryfl.models.classes import MODEL_CLASSES

# Query and value projections by model family, as module-name suffixes; the first present pair is taken.
QUERY_VALUE: tuple[tuple[str, str], ...] = (
    ("query", "value"),  # BERT, RoBERTa, ALBERT
    ("q_lin", "v_lin"),  # DistilBERT
    ("q_proj", "v_proj"),  # Llama, OPT, Mistral, Qwen, Gemma
)


def _lora(config: AdapterConfig, targets: Sequence[str], head: Sequence[str], kind: TaskType) -> PeftConfig:
    """LoRA (Hu et al. 2022): W x + (alpha / r) B A x, with A (r x in) and B (out x r) trained."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # PEFT only divides it
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=list(targets),
        modules_to_save=list(head),
        task_type=kind,
    )


ADAPTERS: dict[str, Callable[[AdapterConfig, Sequence[str], Sequence[str], TaskType], PeftConfig]] = {"lora": _lora}


def adapter_config(
    config: AdapterConfig, model: nn.Module, head: Sequence[str], task: TaskKind = "classification"
) -> PeftConfig:
    """The PEFT configuration of an adapter for a model.

    Args:
        config: the run's adapter part.
        model: the base model; looked at for its projections' names.
        head: names of modules trained in full.

    Raises:
        ModelError: the target modules are not in the model.
    """
    return ADAPTERS[config.kind](config, target_modules(config, model), head, MODEL_CLASSES[task].peft)


def add_adapter(base: nn.Module, config: PeftConfig) -> PeftModel:
    """Put an adapter on a model; its values take the model's dtype, as float32 masters live outside."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for the old name of its checkpointing flag; no user can mend that.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(base, config, autocast_adapter_dtype=False)


def dropout_modules(model: nn.Module) -> list[nn.Module]:
    """The adapter's own dropout modules."""
    return [
        dropout
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for dropout in getattr(layer, "lora_dropout", {}).values()
    ]


def target_modules(config: AdapterConfig, model: nn.Module) -> tuple[str, ...]:
    """The modules to adapt: those asked for, or the model's query and value projections."""
    suffixes = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    if config.target_modules is not None:
        missing = [name for name in config.target_modules if name.rpartition(".")[2] not in suffixes]
        if missing:
            linear = sorted({p.rpartition(".")[2] for p, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ModelError(f"adapter.target_modules: no module named {missing} here. Linear ones: {linear}")
        return config.target_modules
    for pair in QUERY_VALUE:
        if suffixes.issuperset(pair):
            return pair
    raise ModelError("adapter.target_modules: no query and value projections known for this model; name them")
