"""The tangents of one local step: how many there are, what each perturbs, and the gradient made of their slopes.

    g_u = c_u / K  sum_k s_uk v_uk        for each group u of parameters, of d_u numbers together

A group has K tangents, each nonzero in that group only: with one group for all parameters these are K directions,
with a group a unit a step has K slopes for each unit, and the variance of a unit's gradient no longer grows with
the other units' size. The tangents of a group are drawn independently, or jointly so that they are orthogonal. Then
K = d_u of them give the exact gradient, and more than d_u would say nothing new.

There are no antithetic pairs: a slope is linear in its tangent, so v and -v tell forward mode the same thing, and a
central difference of the zeroth order is such a pair already.

Independent directions can be chosen among candidates (FwdLLM's discriminative perturbation sampling, Xu et al. 2024,
section 3.3): of C K drawn for a tensor, the K with the largest cosine with a known vector, the last global update.
Where none is known, the first K are taken. The estimate is no longer unbiased: it leans towards the last update.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spryfl.errors import ConfigError, SpryError
from spryfl.gradients.kinds import Distribution, TangentsPer

Shapes = Mapping[str, torch.Size]
Groups = tuple[tuple[str, ...], ...]
"""Names of the parameters of each group."""


@dataclass(frozen=True)
class Draw:
    """The directions of one local step, from its seeded numbers.

    Attributes:
        numbers: (k, parameter, shape) -> independent numbers of mean 0 and variance 1, float32 on the CPU.
        words: (k, parameter, count) -> that many random 64-bit words.
        groups: None makes all parameters one group. Parameters that a step leaves out are left out here too.
        shrinkage: scale each group's gradient by the multiple that leaves the least squared error.
        num_candidates: C of each independent direction.
        known: parameter -> the vector that candidates are compared with.
    """

    numbers: Callable[[int, str, torch.Size], Tensor]
    words: Callable[[int, str, int], np.ndarray]
    distribution: Distribution = "gaussian"
    groups: Groups | None = None
    shrinkage: bool = False
    num_candidates: int = 1
    known: Mapping[str, Tensor] = field(default_factory=dict)
    _choices: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    def num_slopes(self, parameters: Sequence[str], num_tangents: int) -> int:
        """K for each group."""
        return num_tangents * len(self._groups(parameters))

    def rows(self, parameters: Sequence[str], num_tangents: int) -> dict[str, slice]:
        """Which of all directions are each parameter's own."""
        return {
            name: slice(start * num_tangents, (start + 1) * num_tangents)
            for start, group in enumerate(self._groups(parameters))
            for name in group
        }

    def directions(self, shapes: Shapes, num_tangents: int) -> Iterator[dict[str, Tensor]]:
        """The directions one by one, K of each group, as the parameters that are perturbed: float32 on the CPU.

        Raises:
            ConfigError: orthogonal directions are asked for, more than a group has dimensions.
        """
        joint = SPREADS[self.distribution].joint
        for group in self._groups(tuple(shapes)):
            own = {name: shapes[name] for name in group}
            if joint is None:
                chosen = {name: self._chosen(name, shape, num_tangents) for name, shape in own.items()}
                for k in range(num_tangents):
                    yield {name: self.numbers(chosen[name][k], name, shape) for name, shape in own.items()}
            else:
                require_dimensions(self.distribution, num_tangents, _dimensions(own), group)
                for row in joint(self, own, num_tangents):
                    yield _unflatten(row, own)

    def stacked(self, shapes: Shapes, num_tangents: int) -> dict[str, Tensor]:
        """All directions at once, by parameter: (num_slopes, *shape)."""
        rows = self.num_slopes(tuple(shapes), num_tangents)
        stacks = {name: torch.zeros((rows, *shape)) for name, shape in shapes.items()}
        for row, direction in enumerate(self.directions(shapes, num_tangents)):
            for name, values in direction.items():
                stacks[name][row] = values
        return stacks

    def gradient(self, slopes: Tensor, shapes: Shapes) -> dict[str, Tensor]:
        """The gradient that slopes along these directions make: g = (1/K) sum_k s_k v_k in each group of parameters.

        Client and server both call this, so what the server rebuilds from K scalars and a seed is bitwise what the
        client used (Spry's per-iteration mode; Panchal et al. 2024, section 3.2).

        Args:
            slopes: (num_slopes,) float32, K of each group in turn.
            shapes: of each parameter's gradient, by name.
        """
        groups = self._groups(tuple(shapes))
        num_tangents = slopes.numel() // len(groups)
        gradients = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for row, direction in enumerate(self.directions(shapes, num_tangents)):
            own = {name: shapes[name] for name in groups[row // num_tangents]}
            weight = 1.0
            if self.shrinkage:
                weight = SPREADS[self.distribution].shrinkage(num_tangents, _dimensions(own))
            for name, values in direction.items():
                gradients[name].add_(values, alpha=float(slopes[row]) / num_tangents * weight)
        return gradients

    def _chosen(self, name: str, shape: torch.Size, num_tangents: int) -> Sequence[int]:
        """Which of a tensor's drawn directions are used: K different ones, the nearest to what is known first."""
        known = self.known.get(name)
        if self.num_candidates == 1 or known is None:
            return range(num_tangents)
        if (name, num_tangents) not in self._choices:
            # One at a time, so that no more than a candidate stands; the cosine's other factor is the same for all.
            candidates = (self.numbers(k, name, shape) for k in range(self.num_candidates * num_tangents))
            nearness = torch.stack([torch.dot(v.flatten(), known.flatten()) / v.norm() for v in candidates])
            self._choices[name, num_tangents] = nearness.argsort(descending=True, stable=True)[:num_tangents].tolist()
        return self._choices[name, num_tangents]

    def _groups(self, parameters: Sequence[str]) -> Groups:
        if self.groups is None:
            return (tuple(parameters),)
        wanted = set(parameters)
        found = tuple(kept for group in self.groups if (kept := tuple(name for name in group if name in wanted)))
        if stray := wanted.difference(*found):
            raise SpryError(f"parameter '{min(stray)}' belongs to no group of tangents: its unit was not assigned")
        return found


def tangent_groups(per: TangentsPer, units: Sequence[Sequence[str]]) -> Groups:
    """What shares tangents: all parameters of a step, those of a unit, or each tensor by itself."""
    names = tuple(name for unit in units for name in unit)
    return {"step": (names,), "unit": tuple(map(tuple, units)), "tensor": tuple((name,) for name in names)}[per]


def require_dimensions(distribution: Distribution, num_tangents: int, d: int, group: Sequence[str]) -> None:
    """Raise ConfigError if a group has fewer dimensions than it is to have orthogonal tangents."""
    if SPREADS[distribution].joint is not None and num_tangents > d:
        listed = ", ".join(group[:3]) + (", .." if len(group) > 3 else "")
        raise ConfigError(
            f"method.num_tangents = {num_tangents}: only d = {d} tangents can be {distribution} among the {d} numbers "
            f"of {listed}, and these already give the exact gradient: lower it to {d}"
        )


# Joint draws: (the step's numbers, shapes of a group, K) -> (K, d), with rows of length sqrt(d).


def _orthogonal(draw: Draw, shapes: Shapes, num_tangents: int) -> Tensor:
    """Sqrt(d) times K orthonormal directions, uniform among all such (Stiefel manifold).

    E[q q^T] = I / d for each, so (1/K) sum_k (g . v_k) v_k = (d/K) P g with P a projection of mean (K/d) I: unbiased,
    and at K = d exactly g. Found in float64 and rounded to float32, as Gaussian numbers are.
    """
    rows = [
        torch.cat([draw.numbers(k, name, shape).flatten() for name, shape in shapes.items()])
        for k in range(num_tangents)
    ]
    q, r = np.linalg.qr(torch.stack(rows).double().numpy().T)  # (d, K), (K, K)
    # LAPACK chooses signs; those of a positive diagonal are Gram-Schmidt's, which keeps the distribution uniform.
    q *= np.sign(np.diag(r))
    return torch.from_numpy(np.ascontiguousarray(q.T) * np.sqrt(q.shape[0])).float()


def _coordinate(draw: Draw, shapes: Shapes, num_tangents: int) -> Tensor:
    """Sqrt(d) times K different coordinate directions, every choice alike: K exact partial derivatives."""
    words = np.concatenate([draw.words(0, name, shape.numel()) for name, shape in shapes.items()])
    chosen = np.argsort(words, kind="stable")[:num_tangents]
    rows = torch.zeros((num_tangents, words.size))
    rows[torch.arange(num_tangents), torch.from_numpy(chosen)] = words.size**0.5
    return rows


@dataclass(frozen=True)
class Spread:
    """How the directions of a group lie: one row of the table.

    Attributes:
        shrinkage: (K, d) -> the c that minimises E|c g_hat - g|^2. As g_hat is unbiased, that is
            c = E[g_hat . g] / E|g_hat|^2 = |g|^2 / (|g|^2 + V), where V = E|g_hat - g|^2 is known in units of |g|^2:
            (d + 1) / K for Gaussian, (d - 1) / K for random signs, d / K - 1 for orthogonal directions.
            What remains is E|c g_hat - g|^2 = (1 - c)|g|^2. Adam divides a constant factor out again; it matters for
            SGD and the server's mean, and between groups of different d.
        joint: draws a group's K directions together; None takes K independent ones.
    """

    shrinkage: Callable[[int, int], float]
    joint: Callable[[Draw, Shapes, int], Tensor] | None = None


SPREADS: dict[Distribution, Spread] = {
    "gaussian": Spread(lambda k, d: k / (k + d + 1)),
    "rademacher": Spread(lambda k, d: k / (k + d - 1)),
    "orthogonal": Spread(lambda k, d: k / d, _orthogonal),
    "coordinate": Spread(lambda k, d: k / d, _coordinate),
}


def _dimensions(shapes: Shapes) -> int:
    return sum(shape.numel() for shape in shapes.values())


def _unflatten(row: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    parts = row.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
