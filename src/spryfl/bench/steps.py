"""One step of every estimator on one adapted model: what the benches measure.

All run the same model, kernels and dtype. Forward mode, zeroth order and checkpointed backprop take the batch
in the same chunks; `inference` and plain `backprop` are transformers' own (fused attention, no chunks), and
`torch.func.jvp` needs eager attention, as PyTorch's fused one has no jvp.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spryfl.forward_mode.budget import NO_LIMIT, chunks_of
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.estimator import GradientEstimate
from spryfl.gradients.forward import ForwardGradient
from spryfl.gradients.tangents import Draw
from spryfl.gradients.zeroth_order import ZerothOrder
from spryfl.models.layers import layer_calls
from spryfl.models.units import Unit, parameters_of

KEPT_STATES = 2  # of budgeted backprop: as many hidden states as forward mode holds with one tangent


@dataclass(frozen=True)
class Subject:
    """A model and a batch of random tokens.

    Attributes:
        model: adapted and lean, in evaluation mode.
        units: perturbed or differentiated.
        batch, tokens: of the batch.
    """

    model: Any
    units: Sequence[Unit]
    batch: int
    tokens: int
    seed: int = 0

    @property
    def parameters(self) -> tuple[str, ...]:
        return parameters_of(self.units)

    @property
    def draw(self) -> Draw:
        return DirectionStream(self.seed, round=1, client=0).at_step(0)

    def loss(self) -> Callable[[nn.Module], Tensor]:
        """The loss of the batch, the same every time."""
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary, device = self.model.config.vocab_size, self.model.device
        ids = torch.randint(3, vocabulary, (self.batch, self.tokens), generator=generator).to(device)
        labels = torch.randint(0, 2, (self.batch,), generator=generator).to(device)

        def loss(model: Any) -> Tensor:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            return nn.functional.cross_entropy(logits.float(), labels)

        return loss

    def state_bytes(self) -> int:
        """Of one hidden state."""
        dtype = next(self.model.get_parameter(name).dtype for name in self.parameters)
        return int(self.batch * self.tokens * self.model.config.hidden_size * dtype.itemsize)


class LossModule(nn.Module):
    """A subject's loss as a module of no arguments, as `torch.func.functional_call` needs it."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model, self._loss = subject.model, subject.loss()

    def forward(self) -> Tensor:
        return self._loss(self.model)


def inference(subject: Subject, k: int) -> None:
    """The loss, as transformers computes it."""
    with torch.inference_mode(), chunks_of(NO_LIMIT):
        subject.loss()(subject.model)


def forward(subject: Subject, k: int) -> float:
    """K tangents in one pass."""
    return _slope(subject, ForwardGradient(k).estimate(*_asked(subject)))


def zeroth_order(subject: Subject, k: int) -> float:
    """One central difference for each of K directions."""
    return _slope(subject, ZerothOrder(k).estimate(*_asked(subject)))


def backprop(subject: Subject, k: int) -> float:
    """Every activation stored."""
    return _slope(subject, Backprop().estimate(*_asked(subject)))


def backprop_checkpointed(subject: Subject, k: int) -> float:
    """Each layer's input stored."""
    return _slope(subject, Backprop("per_layer", layer_calls).estimate(*_asked(subject)))


def backprop_budgeted(subject: Subject, k: int) -> float:
    """As many layers' inputs stored as take what forward mode's hidden state takes."""
    budget = KEPT_STATES * subject.state_bytes()
    return _slope(subject, Backprop("budgeted", layer_calls, budget).estimate(*_asked(subject)))


def func_jvp(subject: Subject, k: int) -> float:
    """`torch.func.jvp` of the whole model, one tangent."""
    model, wrapped = subject.model, LossModule(subject)
    values = {f"model.{name}": model.get_parameter(name).detach() for name in subject.parameters}
    own = {
        key: subject.draw.numbers(0, key.removeprefix("model."), value.shape).to(value.device, value.dtype)
        for key, value in values.items()
    }

    def of(perturbed: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(wrapped, perturbed, ())

    with torch.no_grad(), chunks_of(NO_LIMIT), eager_attention(model):
        return float(torch.func.jvp(of, (values,), (own,))[1])


STEPS: dict[str, Callable[[Subject, int], float | None]] = {
    "inference": inference,
    "forward": forward,
    "func_jvp": func_jvp,
    "zeroth_order": zeroth_order,
    "backprop": backprop,
    "backprop_checkpointed": backprop_checkpointed,
    "backprop_budgeted": backprop_budgeted,
}


def _asked(subject: Subject) -> tuple[nn.Module, Callable[[nn.Module], Tensor], Sequence[str], Draw, int]:
    return subject.model, subject.loss(), subject.parameters, subject.draw, subject.batch


def _slope(subject: Subject, estimate: GradientEstimate) -> float:
    """The slope along direction 0: measured, or the gradient's own."""
    if estimate.slopes is not None:
        return float(estimate.slopes[0])
    return sum(float((g * subject.draw.numbers(0, name, g.shape)).sum()) for name, g in estimate.gradients.items())


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Let the passes inside run on the attention that `torch.func.jvp` can differentiate."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
