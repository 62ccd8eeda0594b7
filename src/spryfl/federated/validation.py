"""Every client update passes here before anything of it touches the model."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from spryfl.errors import UpdateRefusedError
from spryfl.federated.messages import ClientEvaluation, ClientTask, ClientUpdate, EvaluationTask

MAX_EXAMPLES = 2**40
UNBOUNDED = frozenset({"perplexity"})
"""Metrics that are infinite where a model is bad enough: to refuse them would make the mean over clients better."""


def validate_update(
    update: ClientUpdate,
    task: ClientTask | None,
    slopes_shape: tuple[int, int] | None,
    *,
    tells_loss: bool = True,
    most_examples: int = MAX_EXAMPLES,
) -> None:
    """Check an update against the task its sender was given.

    Args:
        update: from an untrusted client.
        task: what that client was asked for this round; None if nothing.
        slopes_shape: (steps, K for each group) expected for upload "slopes"; None for other uploads.
        tells_loss: whether it must tell its training loss; if not, it must not.
        most_examples: that its sender can have trained on: they are its weight, and of slopes the steps to replay.

    Raises:
        UpdateRefusedError: the first thing wrong, by name.
    """
    if task is None:
        raise UpdateRefusedError("it was not asked for an update this round, or has already sent one")
    if update.round != task.round:
        raise UpdateRefusedError(f"it is for round {update.round}, not {task.round}")
    _validate_count(update.num_examples, most_examples)
    if not tells_loss:
        if update.loss is not None:
            raise UpdateRefusedError("it told its training loss, which is private in this run")
    elif not isinstance(update.loss, float) or not math.isfinite(update.loss):
        raise UpdateRefusedError(f"its loss is {update.loss!r}")
    if update.variance is not None and not (isinstance(update.variance, float) and 0 <= update.variance < math.inf):
        raise UpdateRefusedError(f"its variance is {update.variance!r}, not a number from 0 up")
    if slopes_shape is None:
        _validate_tensors(update, task)
    else:
        _validate_slopes(update, slopes_shape)


def validate_evaluation(
    evaluation: ClientEvaluation, task: EvaluationTask | None, metric: str, most_examples: int = MAX_EXAMPLES
) -> None:
    """Check an evaluation against the task its sender was given.

    Args:
        evaluation: from an untrusted client.
        task: what that client was asked to evaluate; None if nothing.
        metric: the task's main one, which it must have.
        most_examples: that the client can have held out.

    Raises:
        UpdateRefusedError: the first thing wrong, by name.
    """
    if task is None:
        raise UpdateRefusedError("it was not asked for an evaluation, or has already sent one")
    if evaluation.round != task.round:
        raise UpdateRefusedError(f"its evaluation is for round {evaluation.round}, not {task.round}")
    _validate_count(evaluation.num_examples, most_examples)
    if not isinstance(evaluation.metrics, Mapping) or metric not in evaluation.metrics:
        raise UpdateRefusedError(f"its evaluation has no {metric}")
    for name, value in {"loss": evaluation.loss, **evaluation.metrics}.items():
        if not isinstance(value, float) or not (math.isfinite(value) or (name in UNBOUNDED and value == math.inf)):
            raise UpdateRefusedError(f"its {name} is {value!r}")


def _validate_count(count: object, most: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UpdateRefusedError(f"num_examples is {count!r}, not a positive whole number")
    if count > most:  # in JSON a number has as many digits as its sender likes; as a weight it must be a float
        raise UpdateRefusedError(f"num_examples is above {most:,}, which is the most it can have")


def require_norm(change: Mapping[str, Tensor], bound: float | None) -> None:
    """Check how far an update would move its parameters.

    Args:
        change: what it proposes, by parameter: trained minus old values, or minus a gradient.
        bound: on the L2 norm over all of them together; None for any.

    Raises:
        UpdateRefusedError: it would move them further, or its numbers overflow.
    """
    norm = math.sqrt(sum(float(delta.double().square().sum()) for delta in change.values()))
    if not math.isfinite(norm):
        raise UpdateRefusedError("its change has a value that is not finite")
    if bound is not None and norm > bound:
        raise UpdateRefusedError(f"its change has norm {norm:.3g}, above server.max_update_norm = {bound:g}")


def _validate_tensors(update: ClientUpdate, task: ClientTask) -> None:
    if update.slopes is not None:
        raise UpdateRefusedError("it sent slopes where tensors were asked for")
    foreign = sorted(set(update.tensors) - set(task.parameters))
    missing = sorted(set(task.parameters) - set(update.tensors))
    if foreign:
        raise UpdateRefusedError(f"parameter '{foreign[0][:100]}' was not assigned to it")
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
