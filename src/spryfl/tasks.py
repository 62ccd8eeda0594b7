"""The task of a configuration: an explicit table from its kind to what makes it."""

from collections.abc import Callable

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from spryfl.config import RunConfig, TaskKind
from spryfl.data.classification import Classification, tokenize
from spryfl.data.examples import Examples
from spryfl.data.loading import LabelledRows
from spryfl.data.prompted import PromptedClassification, label_tokens, tokenize_prompts
from spryfl.data.task import Task
from spryfl.forward_mode.next_token import takes_positions
from spryfl.models.loading import AdaptedModel

Encode = Callable[[Dataset], Examples]


def _classification(config: RunConfig, rows: LabelledRows, adapted: AdaptedModel) -> tuple[Task, Encode]:
    tokenizer = adapted.tokenizer
    task = Classification(DataCollatorWithPadding(tokenizer), adapted.model.device)
    return task, lambda split: tokenize(split, config.data, tokenizer)


def _prompted(config: RunConfig, rows: LabelledRows, adapted: AdaptedModel) -> tuple[Task, Encode]:
    tokenizer, device = adapted.tokenizer, adapted.model.device
    words = torch.tensor(label_tokens(config.data, config.task, tokenizer, rows.label_names), device=device)
    positions = takes_positions(adapted.model.get_base_model())
    task = PromptedClassification(words, tokenizer.pad_token_id, positions, device)
    return task, lambda split: tokenize_prompts(split, config.data, config.task, tokenizer)


TASKS: dict[TaskKind, Callable[[RunConfig, LabelledRows, AdaptedModel], tuple[Task, Encode]]] = {
    "classification": _classification,
    "prompted": _prompted,
}
"""Each makes the task, and what tokenizes rows for it."""
