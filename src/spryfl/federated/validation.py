"""Every client update passes here before anything of it touches the model."""

import math
from collections.abc import Mapping

import torch

from spryfl.errors import UpdateRefusedError
from spryfl.federated.messages import ClientEvaluation, ClientTask, ClientUpdate, EvaluationTask


def validate_update(update: ClientUpdate, task: ClientTask | None, slopes_shape: tuple[int, int] | None) -> None:
    """Check an update against the task its sender was given.

    Args:
        update: from an untrusted client.
        task: what that client was asked for this round; None if nothing.
        slopes_shape: (steps, K for each group) expected for upload "slopes"; None for other uploads.

    Raises:
        UpdateRefusedError: the first thing wrong, by name.
    """
    if task is None:
        raise UpdateRefusedError("it was not asked for an update this round, or has already sent one")
    if update.round != task.round:
        raise UpdateRefusedError(f"it is for round {update.round}, not {task.round}")
    _validate_count(update.num_examples)
    if not isinstance(update.loss, float) or not math.isfinite(update.loss):
        raise UpdateRefusedError(f"its loss is {update.loss!r}")
    if update.variance is not None and not (isinstance(update.variance, float) and 0 <= update.variance < math.inf):
        raise UpdateRefusedError(f"its variance is {update.variance!r}, not a number from 0 up")
    if slopes_shape is None:
        _validate_tensors(update, task)
    else:
        _validate_slopes(update, slopes_shape)


def validate_evaluation(evaluation: ClientEvaluation, task: EvaluationTask | None, metric: str) -> None:
    """Check an evaluation against the task its sender was given.

    Args:
        evaluation: from an untrusted client.
        task: what that client was asked to evaluate; None if nothing.
        metric: the task's main one, which it must have.

    Raises:
        UpdateRefusedError: the first thing wrong, by name.
    """
    if task is None:
        raise UpdateRefusedError("it was not asked for an evaluation, or has already sent one")
    if evaluation.round != task.round:
        raise UpdateRefusedError(f"its evaluation is for round {evaluation.round}, not {task.round}")
    _validate_count(evaluation.num_examples)
    if not isinstance(evaluation.metrics, Mapping) or metric not in evaluation.metrics:
        raise UpdateRefusedError(f"its evaluation has no {metric}")
    for name, value in {"loss": evaluation.loss, **evaluation.metrics}.items():
        if not isinstance(value, float) or not math.isfinite(value):
            raise UpdateRefusedError(f"its {name} is {value!r}")


def _validate_count(count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UpdateRefusedError(f"num_examples is {count!r}, not a positive whole number")


def _validate_tensors(update: ClientUpdate, task: ClientTask) -> None:
    if update.slopes is not None:
        raise UpdateRefusedError("it sent slopes where tensors were asked for")
    foreign = sorted(set(update.tensors) - set(task.parameters))
    missing = sorted(set(task.parameters) - set(update.tensors))
    if foreign:
        raise UpdateRefusedError(f"parameter '{foreign[0]}' was not assigned to it")
    if missing:
        raise UpdateRefusedError(f"parameter '{missing[0]}' is missing")
    for name, tensor in update.tensors.items():
        _validate_tensor(f"parameter '{name}'", tensor, task.values[name].shape)


def _validate_slopes(update: ClientUpdate, shape: tuple[int, int]) -> None:
    if update.tensors:
        raise UpdateRefusedError("it sent tensors where slopes were asked for")
    if update.slopes is None:
        raise UpdateRefusedError("its slopes are missing")
    _validate_tensor("slopes", update.slopes, torch.Size(shape))


def _validate_tensor(what: str, tensor: object, shape: torch.Size) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise UpdateRefusedError(f"{what} is not a dense tensor")
    if tensor.shape != shape:
        raise UpdateRefusedError(f"{what} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype != torch.float32:
        raise UpdateRefusedError(f"{what} has dtype {tensor.dtype}, expected torch.float32")
    if not torch.isfinite(tensor).all():
        raise UpdateRefusedError(f"{what} has a value that is not finite")
