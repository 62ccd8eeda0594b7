"""Backward guesses: from the loss's gradient at one hidden state to its gradient at a lower one, without a pass.

    identity       the layers between count as identity: G_l = G
    backward maps  G_l[t] = c_t W + c V_{b(t)},  c_t = P^T G[t],  c = sum_t c_t

P is a basis of the gradients at the upper state. W carries what a token's own gradient says. V carries what
reaches a token from the one the loss sits on, by relative position b(t): in the lower layers most of the
gradient lies on other tokens than that one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spryfl.errors import ModelError

# Distances from the token the loss sits on, either way, at which a new position begins.
EDGES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32, 48, 64, 128)
NUM_POSITIONS = 2 * len(EDGES) + 1
COSINES = "cosines"
"""Stands beside laid-out maps: (places,) the cosine of each with the true gradients after the fit, lowest first."""


class Guess(Protocol):
    """Guesses a gradient at a lower hidden state."""

    def __call__(self, place: int, gradient: Tensor, mask: Tensor | None) -> Tensor:
        """Guess the gradient at the output of the call at `place`.

        Args:
            gradient: at the upper hidden state, (batch, tokens, hidden); not overwritten.
            mask: (batch, tokens), true at tokens that are no padding; None if none is.

        Returns:
            A tensor of its own, (batch, tokens, hidden), zero at padding.
        """
        ...


def identity(place: int, gradient: Tensor, mask: Tensor | None) -> Tensor:
    """The layers between count as identity."""
    return gradient.clone()


@dataclass(frozen=True)
class BackwardMap:
    """The fitted map of one layer.

    Attributes:
        basis: P, (hidden, rank).
        own: W, (rank, hidden).
        across: V, (positions, rank, hidden); None if other tokens are not modelled.
    """

    basis: Tensor
    own: Tensor
    across: Tensor | None = None

    def __call__(self, gradient: Tensor, mask: Tensor | None) -> Tensor:
        """Guess a gradient: (batch, tokens, hidden) -> (batch, tokens, hidden)."""
        code = gradient @ self.basis.to(gradient)  # (batch, tokens, rank)
        guess = code @ self.own.to(gradient)
        if self.across is not None:
            reaching = torch.einsum("br,prd->bpd", code.sum(1), self.across.to(gradient))  # (batch, positions, hidden)
            index = positions(gradient).unsqueeze(-1).expand_as(guess)
            guess += reaching.gather(1, index)
        return guess if mask is None else guess.mul_(mask.unsqueeze(-1))


@dataclass(frozen=True)
class MapGuess:
    """Backward maps, by the place of the layer's call.

    Raises:
        ModelError: there is no map for a place.
    """

    maps: Mapping[int, BackwardMap]

    def __call__(self, place: int, gradient: Tensor, mask: Tensor | None) -> Tensor:
        """See `Guess`."""
        if place not in self.maps:
            raise ModelError(f"no backward map for layer {place}: fit them anew: spry fit-maps")
        return self.maps[place](gradient, mask)


def tensors_of(maps: Mapping[int, BackwardMap]) -> dict[str, Tensor]:
    """Maps as plain tensors, "basis" (the same for all) and "PLACE/own", "PLACE/across", to be sent or stored."""
    tensors = {}
    for place, found in maps.items():
        tensors["basis"] = found.basis
        tensors[f"{place}/own"] = found.own
        if found.across is not None:
            tensors[f"{place}/across"] = found.across
    return tensors


def fault_of(tensors: Mapping[str, Tensor], num_places: int, hidden: int) -> str | None:
    """What keeps tensors from being maps as `with_cosines` lays them out; None if nothing does.

    Args:
        num_places: of the model, that are guessed for, from 0.
        hidden: width of its hidden states.
    """
    rank = tensors["basis"].shape[-1] if "basis" in tensors and tensors["basis"].dim() else 0
    places = range(num_places)
    needed: dict[str, tuple[int, ...]] = {"basis": (hidden, rank), COSINES: (num_places,)}
    needed |= {f"{place}/own": (rank, hidden) for place in places}
    allowed = needed | {f"{place}/across": (NUM_POSITIONS, rank, hidden) for place in places}
    for name in [*needed, *tensors]:
        if name not in tensors:
            return f"lacks {name}"
        if name not in allowed:
            return f"{name} is no map of a layer below the exact ones"
        found = tensors[name]
        if tuple(found.shape) != allowed[name] or not found.is_floating_point():
            return f"{name} is {found.dtype} of shape {tuple(found.shape)}, not floating-point of {allowed[name]}"
        if not bool(found.isfinite().all()):
            return f"{name} has a value that is not finite"
    return None


def maps_from(tensors: Mapping[str, Tensor]) -> dict[int, BackwardMap]:
    """The maps that `tensors_of` laid out."""
    places = sorted(int(name.partition("/")[0]) for name in tensors if name.endswith("/own"))
    return {p: BackwardMap(tensors["basis"], tensors[f"{p}/own"], tensors.get(f"{p}/across")) for p in places}


def maps_for(tensors: Mapping[str, Tensor], places: Collection[int]) -> dict[str, Tensor]:
    """Of laid-out maps, those of some places: what a client that trains there is sent."""
    own = {name: t for name, t in tensors.items() if "/" in name and int(name.partition("/")[0]) in places}
    return {"basis": tensors["basis"], **own} if own else {}


def with_cosines(tensors: Mapping[str, Tensor], cosines: Mapping[int, float]) -> dict[str, Tensor]:
    """Laid-out maps and what each layer's cosine was when they were fitted."""
    return dict(tensors) | {COSINES: torch.tensor([cosines[p] for p in sorted(cosines)], dtype=torch.float64)}


def cosines_of(tensors: Mapping[str, Tensor]) -> dict[int, float]:
    """What `with_cosines` noted, by place; nothing where nobody measured."""
    noted = tensors.get(COSINES)
    return {} if noted is None else dict(zip(sorted(maps_from(tensors)), noted.tolist(), strict=True))


def positions(gradient: Tensor) -> Tensor:
    """Each token's relative position to the one the loss sits on, the largest gradient of its row.

    Args:
        gradient: (batch, tokens, hidden).

    Returns:
        (batch, tokens), whole numbers below `NUM_POSITIONS`.
    """
    batch, tokens, _ = gradient.shape
    source = gradient.float().square().sum(-1).argmax(1, keepdim=True)  # (batch, 1)
    distance = torch.arange(tokens, device=gradient.device).expand(batch, tokens) - source
    edges = torch.tensor(EDGES, device=gradient.device)
    bucket = torch.bucketize(distance.abs(), edges, right=True)
    return torch.where(distance < 0, bucket + len(EDGES), bucket)
