"""What kind of transformers model each task runs: a table."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from peft import TaskType
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from spryfl.config import TaskKind
from spryfl.errors import ModelError


@dataclass(frozen=True)
class ModelClass:
    """A base model with its topmost layer.

    Attributes:
        auto: transformers' class that makes one of a configuration.
        peft: what PEFT calls it; it decides which class opens the saved adapter. None takes PEFT's general one, as
            the one for question answering (0.21) drops token_type_ids.
    """

    auto: Any
    peft: TaskType | None

    @property
    def writes(self) -> bool:
        """Whether it goes on with a text, so that what it knows lies in all of its weights."""
        return self.peft is TaskType.CAUSAL_LM


MODEL_CLASSES: dict[TaskKind, ModelClass] = {
    "classification": ModelClass(AutoModelForSequenceClassification, TaskType.SEQ_CLS),
    "prompted": ModelClass(AutoModelForCausalLM, TaskType.CAUSAL_LM),
    "qa": ModelClass(AutoModelForQuestionAnswering, None),
    "language_model": ModelClass(AutoModelForCausalLM, TaskType.CAUSAL_LM),
}


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and load reports: a head missing from the checkpoint is expected here."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # A GGUF file's bar heeds neither; where there is none under this name, nothing is lost.
        bar = getattr(modeling_gguf_pytorch_utils, "tqdm", iter)
        with patch.object(modeling_gguf_pytorch_utils, "tqdm", partial(bar, disable=True), create=True):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


MIXED_ROWS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("xlnet", lambda config: True, "tokens before the batch"),
    ("bloom", lambda config: True, "the batch and heads into one dimension"),  # of its alibi
    ("falcon", lambda config: config.alibi, "the batch and heads into one dimension"),
)
"""(kind of model, configurations of it, what it puts where) of those whose layers cannot take some rows at a time."""


def require_class(config: Any, name: str, task: TaskKind) -> None:
    """Raise ModelError if a task needs a model that this transformers configuration has none of.

    Transformers makes a "causal" BERT too, which sees the whole text and never learned to go on with it.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name}: {config.model_type} has an encoder and a decoder, which no task here trains: take an encoder, "
            "such as BERT, or a decoder, such as Llama"
        )
    for kind, concerned, mixed in MIXED_ROWS:
        if config.model_type == kind and concerned(config):
            raise ModelError(
                f"{name}: {kind} puts {mixed}, so its layers cannot be run some rows at a time, as all methods here "
                "do: take another model, such as builtin:minilm"
            )
    made = MODEL_CLASSES[task]
    if made.auto.__name__ in (getattr(config, "auto_map", None) or {}):
        return
    there = type(config) in made.auto._model_mapping
    if task in ("classification", "qa"):
        if not there:
            raise ModelError(
                f"task.kind = '{task}': transformers has no {made.auto.__name__} for {name}, a {config.model_type} "
                "model: take another, such as builtin:minilm"
            )
        return
    if not there or not _is_causal(config):
        raise ModelError(
            f"task.kind = '{task}': {name} is a {config.model_type} model, no decoder that goes on with a prompt: "
            "take one such as builtin:smollm2, or task.kind = 'classification'"
        )


def _is_causal(config: Any) -> bool:
    """By its attention modules, as configurations of decoders may say `is_decoder = False` (GPT-NeoX)."""
    with quietly(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return {getattr(module, "is_causal", None) for module in model.modules()} != {None, False}


def output_head(model: nn.Module) -> str | None:
    """Path of the linear map to the vocabulary; None where a model has none, as classifiers."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return next((path for path, module in model.named_modules() if module is head), None)
