"""Models whose weights take no memory, to be looked at and run on a few tokens before any download."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spryfl.config import ModelConfig, TaskKind
from spryfl.forward_mode.attention import ATTENTION_NAME, register_attention
from spryfl.models.classes import MODEL_CLASSES, require_class
from spryfl.models.sources import read_config


def skeleton(config: ModelConfig, num_labels: int = 2, task: TaskKind = "classification") -> PreTrainedModel:
    """The model with weights that take no memory: its configuration is all that is read.

    Every parameter is one zero seen through strides of 0, so a model of any size can be built, and run on
    a few tokens, on the smallest machine.
    """
    read = read_config(config, num_labels)
    require_class(read, config.name, task)
    return hollow_model(read, task=task)


def hollow_model(config: Any, dtype: torch.dtype | None = None, task: TaskKind = "classification") -> PreTrainedModel:
    """A task's model of a transformers configuration, all zeros, in next to no memory.

    Args:
        dtype: of its parameters; the configuration's own by default.
    """
    register_attention()
    config.use_cache = False
    config.pad_token_id = config.pad_token_id or 0
    with torch.device("meta"):
        model: PreTrainedModel = MODEL_CLASSES[task].auto.from_config(
            config, attn_implementation=ATTENTION_NAME, dtype=dtype
        )
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            hollow = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(hollow, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    model.tie_weights()
    return model.eval()
