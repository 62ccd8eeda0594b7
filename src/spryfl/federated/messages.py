"""What travels between server and clients, as plain data, and the seam that carries it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from spryfl.federated.failures import FailureKind
from spryfl.federated.fitting import PassSettings
from spryfl.federated.method import Upload
from spryfl.gradients.tangents import Groups

SEED_BYTES = 8
VARIANCE_BYTES = 8


@dataclass(frozen=True)
class ClientTask:
    """What the server asks of a client in one round.

    Attributes:
        client: its partition id.
        seed: the run's; with round, client, step, k and name it addresses every direction.
        units: the units it trains.
        parameters: those units' parameters, in the model's order.
        values: present value of **every** trainable parameter, float32 on the CPU: the units trained by
            others are part of the function this client differentiates.
        upload: what to send back.
        settings: with which its passes fit the client's memory.
        maps: backward maps of its layers, for guided tangents (`gradients.guesses.tensors_of`).
        momentum: the server's, of its parameters, where tangents are taken along it.
        last_change: the last global update of its parameters, where directions are chosen by it.
        groups: parameters that share tangents (`method.tangents_per`); None: all of them.
        deadline_seconds: from when the client begins; it stops itself then.
    """

    round: int
    client: int
    seed: int
    units: tuple[str, ...]
    parameters: tuple[str, ...]
    values: dict[str, Tensor]
    upload: Upload
    settings: PassSettings = field(default_factory=PassSettings)
    maps: dict[str, Tensor] = field(default_factory=dict)
    momentum: dict[str, Tensor] = field(default_factory=dict)
    last_change: dict[str, Tensor] = field(default_factory=dict)
    groups: Groups | None = None
    deadline_seconds: float | None = None

    @property
    def payload_bytes(self) -> int:
        """Tensor bytes and the seed; names and framing not counted."""
        return sum(map(_tensor_bytes, (self.values, self.maps, self.momentum, self.last_change))) + SEED_BYTES


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back.

    Attributes:
        num_examples: trained on this round; its weight in the mean.
        loss: mean training loss; None where examples are private (`LocalTraining.tells_loss`).
        tensors: trained values or gradients of the assigned parameters; empty for upload "slopes".
        slopes: (steps, K for each group) float32 for upload "slopes", else None.
        variance: of its steps' gradients, where methods ask for it (`federated.pacing`) and it took two steps at least.
        seconds: the client's computing time; cpu_seconds: of the processor alone, all threads, which neighbours
            on the same machine do not lengthen.
        peak_activation_bytes: measured; 0 where this update was not metered.
    """

    round: int
    client: int
    num_examples: int
    loss: float | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    slopes: Tensor | None = None
    variance: float | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_activation_bytes: int = 0

    @property
    def payload_bytes(self) -> int:
        """Tensor bytes and the variance; names and framing not counted."""
        scalars = 0 if self.variance is None else VARIANCE_BYTES
        return _tensor_bytes(self.tensors) + (0 if self.slopes is None else self.slopes.nbytes) + scalars


@dataclass(frozen=True)
class ClientFailure:
    """A client that returned nothing usable, and why."""

    client: int
    reason: str
    kind: FailureKind = "raised"


@dataclass(frozen=True)
class EvaluationTask:
    """What the server asks a client to evaluate on the rows it holds out.

    Attributes:
        client: its partition id.
        values: of every trainable parameter.
        training: what it trains first, from those values ("personalized"); None: nothing ("generalized").
        deadline_seconds: from when the client begins, training included.
    """

    round: int
    client: int
    values: dict[str, Tensor]
    training: ClientTask | None = None
    deadline_seconds: float | None = None


@dataclass(frozen=True)
class ClientEvaluation:
    """What a client sends back: no tensors.

    Attributes:
        num_examples: evaluated on; its weight in the mean.
        loss: mean over them; metrics: by name, the task's main one first.
    """

    round: int
    client: int
    num_examples: int
    loss: float
    metrics: Mapping[str, float]


class Runtime(Protocol):
    """Where clients run: tasks in; updates, evaluations and failures out, in any order.

    An update may be malformed, hostile, or late: the round loop validates it, and counts one of an earlier round as
    late. A task that gets no answer at all counts as lost.
    """

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """Have each task performed by its client."""
        ...

    def evaluate(self, tasks: Sequence[EvaluationTask]) -> Iterator[ClientEvaluation | ClientFailure]:
        """Have each client evaluate on the rows it holds out."""
        ...


def _tensor_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
