"""What travels between server and clients, as plain data, and the seam that carries it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from spryfl.federated.fitting import PassSettings
from spryfl.federated.method import Upload
from spryfl.gradients.tangents import Groups

SEED_BYTES = 8


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
        groups: parameters that share tangents (`method.tangents_per`); None: all of them.
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
    groups: Groups | None = None

    @property
    def payload_bytes(self) -> int:
        """Tensor bytes and the seed; names and framing not counted."""
        return sum(map(_tensor_bytes, (self.values, self.maps, self.momentum))) + SEED_BYTES


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back.

    Attributes:
        num_examples: trained on this round; its weight in the mean.
        loss: mean training loss; None where examples are private (`LocalTraining.tells_loss`).
        tensors: trained values or gradients of the assigned parameters; empty for upload "slopes".
        slopes: (steps, K for each group) float32 for upload "slopes", else None.
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
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_activation_bytes: int = 0

    @property
    def payload_bytes(self) -> int:
        """Tensor bytes; names and framing not counted."""
        return _tensor_bytes(self.tensors) + (0 if self.slopes is None else self.slopes.nbytes)


@dataclass(frozen=True)
class ClientFailure:
    """A client that returned nothing usable, and why."""

    client: int
    reason: str


class Runtime(Protocol):
    """Where clients run: tasks in; updates and failures out, in any order.

    An update may be malformed or hostile: the round loop validates it.
    """

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """Have each task performed by its client."""
        ...


def _tensor_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
