"""The task of a configuration: an explicit table from its kind to what makes it."""

from collections.abc import Callable

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from spryfl.config import RunConfig, TaskKind
from spryfl.data.classification import Classification, tokenize
from spryfl.data.examples import Examples
from spryfl.data.language_model import LanguageModel, tokenize_texts
from spryfl.data.loading import Rows
from spryfl.data.prompted import PromptedClassification, label_tokens, tokenize_prompts
from spryfl.data.question_answering import QuestionAnswering
from spryfl.data.task import Task
from spryfl.data.windows import tokenize_questions
from spryfl.forward_mode.loss import require_bare_logits
from spryfl.forward_mode.next_token import takes_positions
from spryfl.models.loading import AdaptedModel

Encode = Callable[[Dataset], Examples]


def _classification(config: RunConfig, rows: Rows, adapted: AdaptedModel) -> tuple[Task, Encode]:
    tokenizer = adapted.tokenizer
    task = Classification(DataCollatorWithPadding(tokenizer), adapted.model.device)
    return task, lambda split: tokenize(split, config.data, tokenizer)


def _prompted(config: RunConfig, rows: Rows, adapted: AdaptedModel) -> tuple[Task, Encode]:
    tokenizer, device = adapted.tokenizer, adapted.model.device
    words = torch.tensor(label_tokens(config.data, config.task, tokenizer, rows.label_names), device=device)
    positions = takes_positions(adapted.model.get_base_model())
    task = PromptedClassification(words, tokenizer.pad_token_id, positions, device)
    return task, lambda split: tokenize_prompts(split, config.data, config.task, tokenizer)


def _question_answering(config: RunConfig, rows: Rows, adapted: AdaptedModel) -> tuple[Task, Encode]:
    tokenizer, settings = adapted.tokenizer, config.task
    device, most = adapted.model.device, settings.max_answer_tokens
    task = QuestionAnswering(tokenizer, device, most, settings.null_threshold)
    return task, lambda split: tokenize_questions(split, config.data, settings, tokenizer)


def _language_model(config: RunConfig, rows: Rows, adapted: AdaptedModel) -> tuple[Task, Encode]:
    require_bare_logits(adapted.model, config.model.name)
    task = LanguageModel(adapted.tokenizer, adapted.model.device)
    return task, lambda split: tokenize_texts(split, config.data, config.task, adapted.tokenizer)


TASKS: dict[TaskKind, Callable[[RunConfig, Rows, AdaptedModel], tuple[Task, Encode]]] = {
    "classification": _classification,
    "prompted": _prompted,
    "qa": _question_answering,
    "language_model": _language_model,
}
"""Each makes the task, and what tokenizes rows for it."""
