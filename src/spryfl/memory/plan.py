"""What a step is predicted to take, and which way to train fits a budget. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PROCESS_BYTES = 570 * 10**6
"""Python, PyTorch, transformers, PEFT and this package, imported and warm, without a model: the resident peak
measured once on Linux with PyTorch 2.13 and transformers 5.23."""

EXACT_FIRST = {
    "backprop": 0,
    "backprop_checkpointed": 0,
    "backprop_budgeted": 0,
    "guided": 1,
    "forward": 2,
    "zeroth_order": 3,
}
"""An exact gradient goes further a step than a guess, a guess than noise, and an exact slope than a difference."""


@dataclass(frozen=True)
class PassCost:
    """Activation peak and operations of a pass over a model of `depth` layers; linear in the depth from there on.

    Attributes:
        peak_bytes, flops: at `depth`.
        layer_bytes, layer_flops: what one more layer adds.
    """

    depth: int
    peak_bytes: int
    flops: int
    layer_bytes: int = 0
    layer_flops: int = 0

    @classmethod
    def through(cls, found: Mapping[int, tuple[int, int]]) -> "PassCost":
        """From (peak bytes, flops) at two consecutive depths, or at the model's own alone."""
        (depth, (peak, flops)), *others = sorted(found.items())
        if not others:
            return cls(depth, peak, flops, 0, flops // depth)
        ((_, (next_peak, next_flops)),) = others
        return cls(depth, peak, flops, max(0, next_peak - peak), next_flops - flops)

    def peak_at(self, depth: int) -> int:
        return self.peak_bytes + (depth - self.depth) * self.layer_bytes

    def flops_at(self, depth: int) -> int:
        return self.flops + (depth - self.depth) * self.layer_flops


@dataclass(frozen=True)
class AdapterSize:
    """How much is trained.

    Attributes:
        num_units: without the head.
        unit_values, head_values: numbers of trainable values, of those units together and of the head.
    """

    num_units: int
    unit_values: int
    head_values: int

    @classmethod
    def through(cls, found: "Mapping[int, AdapterSize]", depth: int) -> "AdapterSize":
        """At a depth, from two consecutive ones; or at the only one known."""
        (first, size), *others = sorted(found.items(), key=lambda item: item[0])
        if not others:
            return size
        ((_, deeper),) = others
        times = depth - first
        return cls(
            size.num_units + times * (deeper.num_units - size.num_units),
            size.unit_values + times * (deeper.unit_values - size.unit_values),
            size.head_values,
        )


@dataclass(frozen=True)
class Prediction:
    """One way to train (or to infer), and what a step of it takes.

    Attributes:
        weights_bytes: frozen; streamed ones only as far as they are resident at a time.
        activation_bytes: peak of the tensors a step makes, tangents and unpacked weights included.
        adapter_bytes: trainable values, their gradient and the local optimizer's state.
        process_bytes: what the process takes without a model.
        relative_time: floating-point operations of a step over those of inference on the same batch.
        read_bytes: from disk a step, where weights are streamed.
        bytes_up: of a client a round, as values; bytes_up_slopes: as slopes, a step; None where there are none.
        note: a setting of this way that was chosen for it.
    """

    estimator: str
    precision: str
    streamed: bool
    weights_bytes: int
    activation_bytes: int
    adapter_bytes: int
    process_bytes: int
    relative_time: float
    read_bytes: int
    bytes_up: int
    bytes_up_slopes: int | None
    bytes_down: int
    note: str = ""

    @property
    def peak_bytes(self) -> int:
        """Resident, at the peak of a step."""
        return self.weights_bytes + self.activation_bytes + self.adapter_bytes + self.process_bytes

    @property
    def transfer_bytes(self) -> int:
        """Up and down, in a round."""
        return self.bytes_up + self.bytes_down

    @property
    def trains(self) -> bool:
        return self.estimator in EXACT_FIRST

    @property
    def name(self) -> str:
        return f"{self.estimator}, {self.precision}{', streamed' if self.streamed else ''}"

    def fits(self, budget_bytes: int | None) -> bool:
        return budget_bytes is None or self.peak_bytes <= budget_bytes


def recommend(
    predictions: Sequence[Prediction], budget_bytes: int | None, precisions: Sequence[str]
) -> Prediction | None:
    """The way to train with the fastest expected progress among those that fit; None if none does.

    Ways are ranked by how exact their gradient is (`EXACT_FIRST`), then by operations to a tenth of inference's;
    at equal ones weights in memory go before streamed ones, less reading before more, and the more wanted precision.

    Args:
        precisions: from the most wanted to the least.
    """
    fitting = [p for p in predictions if p.trains and p.fits(budget_bytes)]
    order = {precision: rank for rank, precision in enumerate(precisions)}

    def rank(p: Prediction) -> tuple[float, ...]:
        return (EXACT_FIRST[p.estimator], round(p.relative_time, 1), p.streamed, p.read_bytes, order[p.precision])

    return min(fitting, key=rank, default=None)


def least(predictions: Sequence[Prediction]) -> Prediction:
    """The way to train that takes the least memory."""
    return min((p for p in predictions if p.trains), key=lambda p: p.peak_bytes)


def adapter_state_bytes(num_trainable: int, itemsize: int) -> int:
    """What training a model's adapter holds beside its activations.

    Args:
        num_trainable: values.
        itemsize: bytes of one in the model.

    Each stands in the model and, while a client trains, saved from before; and in float32 as the value sent, its
    master copy, its gradient and AdamW's two moments.
    """
    return num_trainable * (2 * itemsize + 5 * 4)
