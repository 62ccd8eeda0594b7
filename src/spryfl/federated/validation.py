"""Every client update passes here before anything of it touches the model."""

import math

import torch

from spryfl.errors import UpdateRefusedError
from spryfl.federated.messages import ClientTask, ClientUpdate


def validate_update(
    update: ClientUpdate, task: ClientTask | None, slopes_shape: tuple[int, int] | None, *, tells_loss: bool = True
) -> None:
    """Check an update against the task its sender was given.

    Args:
        update: from an untrusted client.
        task: what that client was asked for this round; None if nothing.
        slopes_shape: (steps, K for each group) expected for upload "slopes"; None for other uploads.
        tells_loss: whether it must tell its training loss; if not, it must not.

    Raises:
        UpdateRefusedError: the first thing wrong, by name.
    """
    if task is None:
        raise UpdateRefusedError("it was not asked for an update this round, or has already sent one")
    if update.round != task.round:
        raise UpdateRefusedError(f"it is for round {update.round}, not {task.round}")
    if isinstance(update.num_examples, bool) or not isinstance(update.num_examples, int) or update.num_examples < 1:
        raise UpdateRefusedError(f"num_examples is {update.num_examples!r}, not a positive whole number")
    if not tells_loss:
        if update.loss is not None:
            raise UpdateRefusedError("it told its training loss, which is private in this run")
    elif not isinstance(update.loss, float) or not math.isfinite(update.loss):
        raise UpdateRefusedError(f"its loss is {update.loss!r}")
    if slopes_shape is None:
        _validate_tensors(update, task)
    else:
        _validate_slopes(update, slopes_shape)


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
