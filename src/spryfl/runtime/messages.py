"""Tasks and answers as parcels, and back. A client's answer is checked for form here, for content by the rounds."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from spryfl.federated.failures import FailureKind
from spryfl.federated.fitting import PassSettings
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate
from spryfl.federated.method import Upload
from spryfl.runtime.parcels import Parcel, failure_parcel

_TASK_TENSORS = ("values", "maps", "momentum", "last_change")
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


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


class _FailureHeader(_Header):
    kind: Literal["failure"]
    reason: Annotated[str, Field(max_length=500)]
    failure: FailureKind


_ANSWER: TypeAdapter[_UpdateHeader | _FailureHeader] = TypeAdapter(
    Annotated[_UpdateHeader | _FailureHeader, Field(discriminator="kind")]
)


def encode_task(task: ClientTask) -> Parcel:
    """A task as bytes; the tensors of all clients that get the same values are the same bytes."""
    row = {name: value for name, value in vars(task).items() if name not in _TASK_TENSORS}
    header = _TaskHeader(**row | {"settings": asdict(task.settings)})
    return Parcel(header.model_dump_json(), save(_prefixed({part: getattr(task, part) for part in _TASK_TENSORS})))


def decode_task(parcel: Parcel) -> ClientTask:
    """The task again, bit by bit."""
    header = _TaskHeader.model_validate_json(parcel.header)
    parts: dict[str, Any] = {part: {} for part in _TASK_TENSORS}
    for name, tensor in load(parcel.tensors).items():
        part, _, key = name.partition("/")
        parts[part][key] = tensor
    fields: dict[str, Any] = {name: getattr(header, name) for name in _TaskHeader.model_fields if name != "kind"}
    return ClientTask(**fields, **parts)


def encode_answer(answer: ClientUpdate | ClientFailure) -> Parcel:
    """What a client sends back, as bytes."""
    if isinstance(answer, ClientFailure):
        return failure_parcel(answer.reason, answer.kind)
    row = {name: value for name, value in vars(answer).items() if name not in ("tensors", "slopes")}
    tensors = _prefixed({"tensors": answer.tensors})
    if answer.slopes is not None:
        tensors["slopes"] = answer.slopes.contiguous()
    return Parcel(_UpdateHeader(**row).model_dump_json(), save(tensors))


def decode_answer(parcel: Parcel, client: int) -> ClientUpdate | ClientFailure:
    """What an untrusted client sent; anything malformed is a refusal that names what.

    Args:
        client: the partition id whose task it answers.
    """
    try:
        header = _ANSWER.validate_json(parcel.header)
        tensors = load(parcel.tensors) if parcel.tensors else {}
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        return ClientFailure(client, f"its answer's header is malformed: {place}: {problem['msg']}", "refused")
    except (SafetensorError, ValueError, KeyError) as error:
        return ClientFailure(client, f"its tensors cannot be read: {' '.join(str(error).split())[:200]}", "refused")
    if isinstance(header, _FailureHeader):
        return ClientFailure(client, header.reason, header.failure)
    if header.client != client:
        return ClientFailure(client, f"it answered as client {header.client}", "refused")
    slopes = tensors.pop("slopes", None)
    foreign = [name for name in tensors if not name.startswith("tensors/")]
    if foreign:
        return ClientFailure(client, f"it sent a tensor '{foreign[0][:100]}' that is no part of an update", "refused")
    row = header.model_dump(exclude={"kind"})
    return ClientUpdate(**row, tensors={n.removeprefix("tensors/"): t for n, t in tensors.items()}, slopes=slopes)


def _prefixed(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor.contiguous() for part, own in parts.items() for name, tensor in own.items()}
