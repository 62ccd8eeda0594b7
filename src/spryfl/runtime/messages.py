"""Tasks and answers as parcels, and back. A client's answer is checked for form here, for content by the rounds."""

from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from spryfl.federated.failures import FailureKind
from spryfl.federated.fitting import PassSettings
from spryfl.federated.messages import ClientEvaluation, ClientFailure, ClientTask, ClientUpdate, EvaluationTask
from spryfl.federated.method import Upload
from spryfl.runtime.parcels import Parcel, failure_parcel

_TASK_TENSORS = ("values", "maps", "momentum", "last_change")
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Header(BaseModel):
    """Of an answer; a figure that is not finite arrives as it is, for the rounds to refuse by its name."""

    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")


class _TaskHeader(BaseModel):
    """A task without its tensors."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["task"] = "task"
    round: int
    client: int
    seed: int
    units: tuple[str, ...]
    parameters: tuple[str, ...]
    upload: Upload
    settings: PassSettings
    groups: tuple[tuple[str, ...], ...] | None
    deadline_seconds: float | None


class _EvaluationTaskHeader(BaseModel):
    """An evaluation's task without its tensors."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["evaluation_task"] = "evaluation_task"
    round: int
    client: int
    training: _TaskHeader | None
    deadline_seconds: float | None


_TASK: TypeAdapter[_TaskHeader | _EvaluationTaskHeader] = TypeAdapter(
    Annotated[_TaskHeader | _EvaluationTaskHeader, Field(discriminator="kind")]
)


class _UpdateHeader(_Header):
    kind: Literal["update"] = "update"
    round: int
    client: int
    num_examples: int
    loss: float | None
    variance: float | None
    seconds: _Amount
    cpu_seconds: _Amount
    peak_activation_bytes: Annotated[int, Field(ge=0)]


class _EvaluationHeader(_Header):
    kind: Literal["evaluation"] = "evaluation"
    round: int
    client: int
    num_examples: int
    loss: float
    metrics: Annotated[dict[Annotated[str, Field(max_length=100)], float], Field(max_length=100)]


class _FailureHeader(_Header):
    kind: Literal["failure"]
    reason: Annotated[str, Field(max_length=500)]
    failure: FailureKind


_HeaderT = TypeVar("_HeaderT", _UpdateHeader, _EvaluationHeader)
_UPDATE: TypeAdapter[_UpdateHeader | _FailureHeader] = TypeAdapter(
    Annotated[_UpdateHeader | _FailureHeader, Field(discriminator="kind")]
)
_EVALUATION: TypeAdapter[_EvaluationHeader | _FailureHeader] = TypeAdapter(
    Annotated[_EvaluationHeader | _FailureHeader, Field(discriminator="kind")]
)


def encode_task(task: ClientTask | EvaluationTask) -> Parcel:
    """A task as bytes; the tensors of all clients that get the same values are the same bytes."""
    if isinstance(task, ClientTask):
        tensors = {part: getattr(task, part) for part in _TASK_TENSORS}
        return Parcel(_task_header(task).model_dump_json(), save(_prefixed(tensors)))
    training = task.training
    header = _EvaluationTaskHeader(
        round=task.round,
        client=task.client,
        training=None if training is None else _task_header(training),
        deadline_seconds=task.deadline_seconds,
    )
    # What is trained first begins at the values that are evaluated: they travel once.
    own = {} if training is None else {part: getattr(training, part) for part in _TASK_TENSORS}
    return Parcel(header.model_dump_json(), save(_prefixed(own | {"values": task.values})))


def decode_task(parcel: Parcel) -> ClientTask | EvaluationTask:
    """The task again, bit by bit."""
    header = _TASK.validate_json(parcel.header)
    parts: dict[str, Any] = {part: {} for part in _TASK_TENSORS}
    for name, tensor in load(parcel.tensors).items():
        part, _, key = name.partition("/")
        parts[part][key] = tensor
    if isinstance(header, _TaskHeader):
        return _task(header, parts)
    training = None if header.training is None else _task(header.training, parts)
    return EvaluationTask(header.round, header.client, parts["values"], training, header.deadline_seconds)


def _task_header(task: ClientTask) -> _TaskHeader:
    row = {name: value for name, value in vars(task).items() if name not in _TASK_TENSORS}
    return _TaskHeader(**row | {"settings": asdict(task.settings)})


def _task(header: _TaskHeader, parts: dict[str, Any]) -> ClientTask:
    fields: dict[str, Any] = {name: getattr(header, name) for name in _TaskHeader.model_fields if name != "kind"}
    return ClientTask(**fields, **parts)


def encode_answer(answer: ClientUpdate | ClientEvaluation | ClientFailure) -> Parcel:
    """What a client sends back, as bytes."""
    if isinstance(answer, ClientFailure):
        return failure_parcel(answer.reason, answer.kind)
    if isinstance(answer, ClientEvaluation):
        return Parcel(_EvaluationHeader(**vars(answer)).model_dump_json())
    row = {name: value for name, value in vars(answer).items() if name not in ("tensors", "slopes")}
    tensors = _prefixed({"tensors": answer.tensors})
    if answer.slopes is not None:
        tensors["slopes"] = answer.slopes.contiguous()
    return Parcel(_UpdateHeader(**row).model_dump_json(), save(tensors))


def decode_update(parcel: Parcel, client: int) -> ClientUpdate | ClientFailure:
    """What an untrusted client sent for an update; anything malformed is a refusal that names what.

    Args:
        client: the partition id whose task it answers.
    """
    header = _header(_UPDATE, parcel, client)
    if isinstance(header, ClientFailure):
        return header
    try:
        tensors = load(parcel.tensors) if parcel.tensors else {}
    except Exception as error:  # a stranger's bytes: whatever they make the reader raise is the stranger's
        return ClientFailure(client, f"its tensors cannot be read: {' '.join(str(error).split())[:200]}", "refused")
    slopes = tensors.pop("slopes", None)
    foreign = [name for name in tensors if not name.startswith("tensors/")]
    if foreign:
        return ClientFailure(client, f"it sent a tensor '{foreign[0][:100]}' that is no part of an update", "refused")
    row = header.model_dump(exclude={"kind"})
    return ClientUpdate(**row, tensors={n.removeprefix("tensors/"): t for n, t in tensors.items()}, slopes=slopes)


def decode_evaluation(parcel: Parcel, client: int) -> ClientEvaluation | ClientFailure:
    """What an untrusted client sent for an evaluation, as `decode_update`."""
    header = _header(_EVALUATION, parcel, client)
    if isinstance(header, ClientFailure):
        return header
    if parcel.tensors:
        return ClientFailure(client, "it sent tensors, which are no part of an evaluation", "refused")
    return ClientEvaluation(**header.model_dump(exclude={"kind"}))


def _header(known: TypeAdapter[_HeaderT | _FailureHeader], parcel: Parcel, client: int) -> _HeaderT | ClientFailure:
    """An answer's header, or the failure that it tells of or is."""
    try:
        header = known.validate_json(parcel.header)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])[:100]
        return ClientFailure(client, f"its answer's header is malformed: {place}: {problem['msg'][:200]}", "refused")
    if isinstance(header, _FailureHeader):
        return ClientFailure(client, header.reason, header.failure)
    if header.client != client:
        return ClientFailure(client, f"it answered as client {header.client}", "refused")
    return header


def _prefixed(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor.contiguous() for part, own in parts.items() for name, tensor in own.items()}
