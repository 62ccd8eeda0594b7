"""Guided tangents: a guess of the gradient's direction, made exact in length and sign by forward mode.

    G    = dL/dh at the last hidden state                                   (with the first pass)
    G_l  = guess of dL/dh_l, an assigned layer's output                      (no pass)
    v    = (dh_l / dw)^T G_l                                                (that layer alone, run again)
    g    = (s / |v|^2) v,  s = grad L . v                                   (one forward-mode pass from layer l on)

g is the projection of the gradient on v: whatever the guess, a direction of descent on the batch, and never
longer than the gradient. Back-propagating exactly through the uppermost `horizon` layers before guessing makes
the guess better; through all of them, g is the gradient.

Guesses depend on G alone, so they need no way down: several assigned layers are run again from the lowest up, each
differentiated as it is passed. Whatever their number, the first pass keeps one layer's input for them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from spryfl.errors import ModelError
from spryfl.gradients.backprop import only_requiring_grad
from spryfl.gradients.estimator import GradientEstimate, Loss
from spryfl.gradients.forward import loss_and_slopes
from spryfl.gradients.guesses import Guess, MapGuess, identity, maps_from
from spryfl.gradients.kinds import SlopesPer
from spryfl.gradients.reverse import GradientSums, reverse_call
from spryfl.gradients.tangents import Draw
from spryfl.gradients.trace import REMEDY, Trace, trace

Directions = dict[str, Tensor]
"""By parameter name: (directions, *the parameter's shape), float32 on the CPU."""


@dataclass(frozen=True)
class GuidedGradient:
    """The gradient's projection on guessed directions.

    Attributes:
        layers: finds the model's layers in the order it calls them.
        guess: carries the gradient from the uppermost hidden state it is known at to a layer's output.
        horizon: layers, from the top, that are back-propagated through exactly; their inputs are kept.
        slopes_per: one slope for all guided parameters of a step, one for each unit or each tensor (as many
            tangents ride along), or none: the guess itself is the estimate, for one pass less.
        unit_of: parameter -> its unit, for slopes per unit.
        explore: add a random tangent orthogonal to the guided one, scaled so that the estimate is unbiased
            for Gaussian draws: E[(d - n) (g . q) q] over unit q orthogonal to n directions is the rest of g.
        momentum: the server's momentum of each parameter, a second direction to project on; empty for none.
    """

    layers: Callable[[nn.Module], Sequence[nn.Module]]
    guess: Guess = identity
    horizon: int = 0
    slopes_per: SlopesPer = "unit"
    unit_of: Mapping[str, str] = field(default_factory=dict)
    explore: bool = False
    momentum: Mapping[str, Tensor] = field(default_factory=dict)

    def guided_by(self, maps: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> "GuidedGradient":
        """The same with what the server sent: maps laid out as tensors, and its momentum."""
        guess = MapGuess(maps_from(maps)) if maps else self.guess
        return replace(self, guess=guess, momentum=momentum)

    def estimate(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str], draw: Draw, num_examples: int
    ) -> GradientEstimate:
        """See `GradientEstimator.estimate`. Slopes are not returned: their directions cannot be drawn again.

        Raises:
            ModelError: a parameter lies below the layers, where no guess reaches.
        """
        names = {model.get_parameter(name): name for name in parameters}
        traced, guided, lowest = self.guess_gradients(model, loss, parameters)
        gradients = {name: torch.zeros(p.shape) for p, name in names.items()}
        # A shared layer's parameter may be reached exactly in one call and by a guess in another.
        for sums in (traced.sums, guided) if self.slopes_per == "none" else (traced.sums,):
            for parameter, gradient in sums.sums.items():
                gradients[names[parameter]] += gradient.float().cpu()
        if self.slopes_per != "none" and guided.sums:
            directions = self._directions(
                {names[p]: g.float().cpu() + gradients[names[p]] for p, g in guided.sums.items()}
            )
            groups = self._groups(directions)
            gradients |= self._projected(model, loss, traced, lowest, directions, groups, draw)
        return GradientEstimate(gradients, float(traced.loss), None)

    def guess_gradients(
        self, model: nn.Module, loss: Loss, parameters: Sequence[str]
    ) -> tuple[Trace, GradientSums, int]:
        """Without slopes: the traced pass with exact gradients, guessed ones, and the lowest layer with parameters."""
        names = {model.get_parameter(name): name for name in parameters}
        with torch.enable_grad(), only_requiring_grad(model, parameters) as wanted:
            layers = self.layers(model)
            own = {layer: [p for p in layer.parameters() if p in names] for layer in layers}
            lowest = min((i for i, layer in enumerate(layers) if own[layer]), default=len(layers))
            passed = max(lowest, len(layers) - self.horizon)  # layers from here on are passed through exactly
            traced = trace(model, loss, layers, wanted, lambda place: place == lowest or place >= passed)
            self._down(traced, own, lowest, passed)
            guided = self._up(traced, own, lowest, passed)
        _require_reached(names, own, traced.sums, guided)
        return traced, guided, lowest

    def _down(self, traced: Trace, own: Mapping[nn.Module, list[nn.Parameter]], lowest: int, passed: int) -> None:
        """Exactly through the calls from the last down to `passed`; leaves the gradient at the input of that one."""
        for place in range(len(traced.calls) - 1, passed - 1, -1):
            call, hidden, mine = traced.calls[place], traced.kept.pop(place), own[traced.calls[place].layer]
            reverse_call(call, hidden, traced.gradient, mine, traced.sums, needs_input=place > lowest)

    def _up(self, traced: Trace, own: Mapping[nn.Module, list[nn.Parameter]], lowest: int, passed: int) -> GradientSums:
        """Guessed gradients of the calls from `lowest` up to `passed`; at the last one's output it is known."""
        guided = GradientSums()
        mine = [place for place in range(lowest, passed) if own[traced.calls[place].layer]]
        if not mine:
            return guided
        hidden = traced.kept.pop(lowest)
        if self.slopes_per != "none":  # the pass that takes them begins there, and `hidden` moves on
            traced.kept[lowest] = hidden.clone() if len(mine) > 1 else hidden
        for place in range(lowest, mine[-1] + 1):
            call = traced.calls[place]
            if place not in mine:
                hidden = call.output_of(hidden)
                continue
            known = place == passed - 1
            arriving = traced.gradient if known else self.guess(place, traced.gradient, traced.mask)
            sums, onward = traced.sums if known else guided, hidden if place < mine[-1] else None
            reverse_call(call, hidden, arriving, own[call.layer], sums, needs_input=False, onward=onward)
        return guided

    def _directions(self, guided: dict[str, Tensor]) -> Directions:
        """The guess, and the server's momentum where there is one, each scaled to entries of about 1."""
        found = {}
        for name, guess in guided.items():
            candidates = [guess, *([self.momentum[name]] if name in self.momentum else [])]
            found[name] = torch.stack([_scaled(candidate) for candidate in candidates])
        most = max(direction.shape[0] for direction in found.values())
        return {name: torch.cat((d, d.new_zeros(most - d.shape[0], *d.shape[1:]))) for name, d in found.items()}

    def _groups(self, directions: Directions) -> list[list[str]]:
        """Parameters that share slopes; those whose directions are all zero get none."""
        key: Callable[[str], str] = {
            "step": lambda name: "",
            "unit": lambda name: self.unit_of.get(name, name),
            "tensor": lambda name: name,
        }[self.slopes_per]
        found: dict[str, list[str]] = {}
        for name, direction in directions.items():
            if self.explore or bool(direction.any()):
                found.setdefault(key(name), []).append(name)
        return list(found.values())

    def _projected(
        self,
        model: nn.Module,
        loss: Loss,
        traced: Trace,
        start: int,
        directions: Directions,
        groups: list[list[str]],
        draw: Draw,
    ) -> dict[str, Tensor]:
        """The gradient's projection on the directions of each group of parameters, from one forward-mode pass."""
        if not groups:
            return {}
        spans = [self._span(group, directions, draw) for group in groups]
        num_rows = [len(span) for span in spans]
        offsets = [sum(num_rows[:i]) for i in range(len(spans))]
        tangents = {}
        for group, span, offset in zip(groups, spans, offsets, strict=True):
            for name, rows in _unflattened(span, group, directions).items():
                tangents[name] = torch.zeros((sum(num_rows), *rows.shape[1:]))
                tangents[name][offset : offset + len(span)] = rows
        with traced.resumed(start):
            _, slopes = loss_and_slopes(model, loss, tangents)
        slopes = slopes.cpu().double()
        gradients: dict[str, Tensor] = {}
        for group, span, offset in zip(groups, spans, offsets, strict=True):
            weights = slopes[offset : offset + len(span)]
            if self.explore:  # the last row stands for all directions it could have been
                weights = weights.clone()
                weights[-1] *= span.shape[1] - (len(span) - 1)
            gradient = (weights @ span).unsqueeze(0)
            gradients |= {name: rows[0].float() for name, rows in _unflattened(gradient, group, directions).items()}
        return gradients

    def _span(self, group: Sequence[str], directions: Directions, draw: Draw) -> Tensor:
        """(n, d): orthonormal rows that span a group's directions, float64; a random one last, to explore."""
        flat = torch.cat([directions[name].flatten(1) for name in group], dim=1).double()  # (directions, d)
        rows = list(flat[flat.norm(dim=1) > 0])
        if self.explore:
            drawn = [draw.numbers(0, name, directions[name].shape[1:]).flatten() for name in group]
            rows.append(torch.cat(drawn).double())
        span: list[Tensor] = []
        for row in rows:
            rest = row.clone()
            for _ in range(2):  # twice is enough (Kahan; Parlett 1980)
                for unit in span:
                    rest -= (rest @ unit) * unit
            if rest.norm() > 1e-6 * row.norm():
                span.append(rest / rest.norm())
        return torch.stack(span)


def _scaled(direction: Tensor) -> Tensor:
    """With entries of about 1, so that no precision drowns it; zero stays zero."""
    norm = direction.norm()
    return direction * (direction.numel() ** 0.5 / norm) if norm > 0 else torch.zeros_like(direction)


def _unflattened(rows: Tensor, group: Sequence[str], like: Directions) -> dict[str, Tensor]:
    """(n, d) -> by parameter, (n, *its shape)."""
    shapes = [like[name].shape[1:] for name in group]
    parts = rows.split([shape.numel() for shape in shapes], dim=1)
    return {
        name: part.reshape(len(rows), *shape).float() for name, part, shape in zip(group, parts, shapes, strict=True)
    }


def _require_reached(
    names: Mapping[nn.Parameter, str],
    own: Mapping[nn.Module, list[nn.Parameter]],
    exact: GradientSums,
    guided: GradientSums,
) -> None:
    inside = {parameter for parameters in own.values() for parameter in parameters}
    for parameter, name in names.items():
        if parameter not in inside and parameter not in exact.sums and parameter not in guided.sums:
            raise ModelError(f"guided tangents: '{name}' lies below the layers, where no guess reaches: {REMEDY}")
