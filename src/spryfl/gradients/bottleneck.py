"""Bottleneck tangents: LoRA's A is not perturbed itself, but its output z = A x, apart for every example and token.

    s_ik  = sum_t dL_i/dz_it . v_ikt,    v_ikt ~ N(0, I) of size rank      (K directions: one forward-mode pass)
    G_it  = (1/K) sum_k s_ik v_ikt                                         (estimates dL_i/dz_it)
    g_A   = sum_i sum_t G_it x_it^T

An example's loss depends on its own z alone, so one pass gives a slope for each example where parameter-space
tangents give one for the batch, and an example's slope is taken among (tokens x rank) numbers instead of
(rank x in). Compare Ren et al. 2022, "Scaling Forward Gradient With Local Losses", which perturbs activations.
Parameters that are not an A have directions of their own beside, zero where A's are not and the other way round,
so that neither adds to the other's error.

An input x of each assigned A, (rows, tokens, in), is kept until the slopes are known; its tangents, (K, rows,
tokens, rank), too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spryfl.errors import ModelError
from spryfl.forward_mode.budget import carrying
from spryfl.forward_mode.dual import Dual, carrying_tangents, split
from spryfl.forward_mode.inject import injected
from spryfl.forward_mode.patching import Forward, patched_forwards
from spryfl.gradients.calls import seeing_mask
from spryfl.gradients.estimator import GradientEstimate, Loss, SeparableLoss, TokenLoss
from spryfl.gradients.tangents import Draw

LOW = "lora_A"  # what PEFT calls the maps to the bottleneck
REMEDY = "use estimator = 'forward', or adapter.kind = 'lora' on attention's projections, with frozen = 'none' or 'b'"


@dataclass(frozen=True)
class BottleneckGradient:
    """Forward mode along `num_tangents` (K) directions of z, and K of each group of other parameters, in one pass.

    Directions of z are independent numbers, whatever the draw's distribution and shrinkage.
    """

    num_tangents: int = 1

    def estimate(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw, num_examples: int
    ) -> GradientEstimate:
        """See `GradientEstimator.estimate`. Slopes are not returned: without the inputs x they say nothing.

        Raises:
            ModelError: the loss does not tell the examples' parts, or the model has no bottleneck, or one that is
                not given rows and tokens.
        """
        if not isinstance(loss, SeparableLoss):
            raise ModelError("bottleneck tangents: the loss has no `parts`, one an example: use estimator = 'forward'")
        lows = bottlenecks(model, parameters)
        others = {name: model.get_parameter(name).shape for name in parameters if name not in lows}
        num_own = draw.num_slopes(list(lows), self.num_tangents) if lows else 0
        num_others = draw.num_slopes(list(others), self.num_tangents) if others else 0
        tangents = {
            name: torch.cat((stack.new_zeros(num_own, *stack.shape[1:]), stack))
            for name, stack in draw.stacked(others, self.num_tangents).items()
        }
        own = draw.rows(list(lows), self.num_tangents)
        places = {
            module: _Bottleneck(name, own[name], num_own + num_others, num_examples, draw)
            for name, module in lows.items()
        }
        with torch.no_grad(), injected(model, tangents), carrying(num_own + num_others), _entering(model, places):
            parts, slopes = split(loss.token_parts(model) if isinstance(loss, TokenLoss) else loss.parts(model))
        if parts.shape[0] != num_examples:
            raise ModelError(f"bottleneck tangents: {parts.shape[0]} parts of the loss for {num_examples} examples")
        if slopes is None:
            slopes = parts.new_zeros((num_own + num_others, *parts.shape))
        reached = _reached(slopes)
        gradients = {place.parameter: place.gradient(reached, module.weight) for module, place in places.items()}
        if others:
            summed = slopes[num_own:].flatten(1).sum(1).to("cpu", torch.float32)
            gradients |= draw.gradient(summed, others)
        return GradientEstimate({name: gradients[name] for name in parameters}, float(parts.sum()), None)


def bottlenecks(model: nn.Module, parameters: Sequence[str]) -> dict[str, nn.Linear]:
    """The maps to a bottleneck, by the parameter that is their weight.

    Raises:
        ModelError: there is none in the model.
    """
    found: dict[str, nn.Linear] = {}
    for name in parameters:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if f".{LOW}." in f".{path}." and attribute == "weight" and isinstance(module, nn.Linear):
            found[name] = module
    if not found and not any(path.endswith(LOW) and len(list(m.children())) for path, m in model.named_modules()):
        raise ModelError(f"bottleneck tangents: the model has no {LOW}, so no bottleneck to perturb: {REMEDY}")
    return found


@dataclass
class _Bottleneck:
    """One A during a pass: its tangents enter at its output, its inputs are kept.

    Attributes:
        parameter: the name of A.
        own: which of the pass's directions are its own.
        num_directions: of the pass.
        num_rows: of the batch; a call may see some of them only, and more calls the ones that follow.
        mask: (rows, tokens), true at tokens that are no padding; None where the model was given none.
    """

    parameter: str
    own: slice
    num_directions: int
    num_rows: int
    draw: Draw
    mask: Tensor | None = None
    _seen: int = 0
    _tangents: Tensor = field(default_factory=lambda: torch.zeros(()))
    _kept: list[tuple[slice, Tensor, Tensor]] = field(default_factory=list)

    def entered(self, x: Tensor, low: Tensor) -> Dual:
        """The output of a call, with its own tangents added to those that came from below.

        Args:
            x: (some rows, tokens, in), maybe a dual.
            low: A x, (some rows, tokens, rank), a dual if x is.
        """
        call, start = divmod(self._seen, self.num_rows)
        rows = slice(start, start + low.shape[0])
        if low.dim() != 3 or rows.stop > self.num_rows:
            raise ModelError(
                f"bottleneck tangents: '{self.parameter}' is given {tuple(x.shape)}, not (rows, tokens, in) of "
                f"{self.num_rows} rows, so examples cannot be told apart: {REMEDY}"
            )
        if start == 0:  # drawn for all rows, so that chunks of rows change no number
            self._tangents = self._drawn(call, low)
        self._seen += low.shape[0]
        own = self._tangents[:, rows]
        # A dual's memory is used again by layers above; a plain input is never overwritten.
        self._kept.append((rows, x.stacked[0].clone() if isinstance(x, Dual) else x.detach(), own))
        found = carrying_tangents(low, self.num_directions)
        assert isinstance(found, Dual)
        found.stacked[1:][self.own] += own
        return found

    def gradient(self, slopes: Tensor, weight: Tensor) -> Tensor:
        """Of A, float32 on the CPU; slopes: (directions, rows, 1 or tokens)."""
        precise = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros_like(weight, dtype=precise)
        for rows, x, own in self._kept:
            along = slopes[self.own, rows].to(precise)
            if along.shape[-1] not in (1, x.shape[1]):
                raise ModelError(
                    f"bottleneck tangents: the loss has {along.shape[-1]} parts a row, '{self.parameter}' sees "
                    f"{x.shape[1]} tokens: give a part for each token, or one for each row"
                )
            at_low = (along.unsqueeze(-1) * own.to(precise)).mean(0)  # (rows, tokens, rank)
            total += at_low.flatten(0, 1).T @ x.flatten(0, 1).to(precise)
        return total.float().cpu()

    def _drawn(self, call: int, low: Tensor) -> Tensor:
        """(K, rows, tokens, rank): none at padding, which no loss depends on, so that it adds no error."""
        shape = torch.Size((self.num_rows, *low.shape[1:]))
        address = f"{self.parameter}@bottleneck/{call}"
        drawn = torch.stack([self.draw.numbers(k, address, shape) for k in range(self.own.stop - self.own.start)])
        tangents = drawn.to(low.device, low.dtype)
        if self.mask is not None and self.mask.shape == shape[:2]:
            tangents *= self.mask.unsqueeze(-1)
        return tangents


@contextmanager
def _entering(model: nn.Module, places: dict[nn.Linear, _Bottleneck]) -> Iterator[None]:
    """Let tangents enter at the outputs of these modules during one pass inside."""

    def perturbed(module: nn.Module, forward: Forward) -> Forward:
        place = next(place for known, place in places.items() if known is module)
        return lambda x: place.entered(x, forward(x))

    def see(mask: Tensor | None) -> None:
        for place in places.values():
            place.mask = mask

    with patched_forwards(list(places), perturbed), seeing_mask(model, see):
        yield


def _reached(slopes: Tensor) -> Tensor:
    """What counts for z at a token: its row's slope, or the slopes of the parts at it and after.

    Args:
        slopes: (directions, rows), or (directions, rows, tokens).
    """
    return slopes.unsqueeze(-1) if slopes.dim() == 2 else slopes.flip(-1).cumsum(-1).flip(-1)
