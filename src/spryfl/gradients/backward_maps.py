"""Fitting backward maps by ridge regression, from true gradients on public text.

For every layer l, the gradient at its output is regressed on the gradient at the upper hidden state that guesses
start from: min |G_l - X W|^2 + lambda |W|^2, where X holds a token's own code, the codes that reach it, and where it
stands (`guesses.BackwardMap`). X is the same for all layers, so one factorization serves them all.

The gradients are taken layer by layer with layer inputs kept (per-layer checkpointing): a server does this, whose
memory holds that much.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spryfl.errors import ModelError
from spryfl.gradients.backprop import only_requiring_grad
from spryfl.gradients.estimator import Loss
from spryfl.gradients.guesses import NUM_POSITIONS, BackwardMap, Guess, positions
from spryfl.gradients.reverse import GradientSums, reverse_call
from spryfl.gradients.trace import trace

BASIS_BATCHES = 8  # enough for the few directions that a loss's gradient takes


@dataclass(frozen=True)
class MapSettings:
    """How backward maps are fitted.

    Attributes:
        horizon: of the estimator they serve: guesses start below the layers passed through exactly.
        rank: directions of the upper gradient that are carried; fewer where fewer explain all but `tolerance` of it.
        across: whether gradients on other tokens are modelled, by relative position.
        ridge: lambda, in units of the mean square of a column of X.
    """

    horizon: int = 0
    rank: int = 32
    across: bool = True
    ridge: float = 1e-3
    tolerance: float = 1e-4


@dataclass(frozen=True)
class GradientsByLayer:
    """True gradients of one batch at hidden states.

    Attributes:
        upper: where guesses start, (batch, tokens, hidden).
        lower: by place of a call below, at its output, of the same shape.
        mask: (batch, tokens), true at tokens that are no padding; None if none is.
    """

    upper: Tensor
    lower: dict[int, Tensor]
    mask: Tensor | None


def gradients_by_layer(model: nn.Module, loss: Loss, layers: Sequence[nn.Module], horizon: int) -> GradientsByLayer:
    """The gradient at every layer's output, from the one that guesses start from down to the lowest."""
    with torch.enable_grad(), only_requiring_grad(model, ()):
        traced = trace(model, loss, layers, (), lambda place: place > 0)
        gradient, upper, lower = traced.gradient, traced.gradient, {}
        last = len(traced.calls) - 1
        for place in range(last, -1, -1):
            if place == last - horizon:
                upper = gradient.clone()
            elif place < last - horizon:
                lower[place] = gradient.clone()
            if place > 0:
                reverse_call(
                    traced.calls[place], traced.kept.pop(place), gradient, (), GradientSums(), needs_input=True
                )
    return GradientsByLayer(upper, lower, traced.mask)


def fit_backward_maps(
    model: nn.Module,
    losses: Iterable[Loss],
    layers: Sequence[nn.Module],
    settings: MapSettings,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[int, BackwardMap]:
    """Fit a map for every layer below the ones passed through exactly and the next.

    Args:
        losses: one a batch of public text; more batches than `BASIS_BATCHES`' worth of memory are never held.
        layers: of the model, in the order it calls them.
        progress: told how many batches are done.

    Returns:
        By place of the layer's call, float32 on the CPU.

    Raises:
        ModelError: the horizon leaves no layer to guess for, or no loss was given.
    """
    if settings.horizon >= len(layers) - 1:
        raise ModelError(
            f"guide.horizon = {settings.horizon}: the gradient is then known at all {len(layers)} layers of the model; "
            "nothing is left to guess: lower the horizon, or leave the maps out"
        )
    waiting: list[GradientsByLayer] = []
    fit: _Regression | None = None
    for done, loss in enumerate(losses, 1):
        waiting.append(gradients_by_layer(model, loss, layers, settings.horizon))
        if fit is None and len(waiting) == BASIS_BATCHES:
            fit = _Regression(_basis(waiting, settings), settings.across)
        while fit is not None and waiting:
            fit.add(waiting.pop())
        progress(done)
    if fit is None and waiting:
        fit = _Regression(_basis(waiting, settings), settings.across)
        for found in waiting:
            fit.add(found)
    if fit is None:
        raise ModelError("backward maps: no text to fit them on")
    return fit.solve(settings.ridge)


def guess_quality(
    model: nn.Module, losses: Iterable[Loss], layers: Sequence[nn.Module], horizon: int, guess: Guess
) -> dict[int, float]:
    """Mean cosine of guessed and true gradients over batches, by place of the layer's call."""
    cosines: dict[int, list[float]] = {}
    for loss in losses:
        found = gradients_by_layer(model, loss, layers, horizon)
        for place, true in found.lower.items():
            guessed = guess(place, found.upper, found.mask)
            cosine = nn.functional.cosine_similarity(guessed.flatten().float(), true.flatten().float(), dim=0)
            cosines.setdefault(place, []).append(float(cosine))
    return {place: sum(values) / len(values) for place, values in sorted(cosines.items())}


def _basis(found: Sequence[GradientsByLayer], settings: MapSettings) -> Tensor:
    """(hidden, rank): the directions that carry most of the upper gradients' energy; float64."""
    rows = torch.cat([g.upper.flatten(0, 1).cpu() for g in found]).double()  # not every device has float64
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if values[0] == 0:
        raise ModelError("backward maps: the loss's gradient at the last hidden state is zero on all of the text")
    rest = 1 - values.cumsum(0) / values.sum()
    needed = int((rest > settings.tolerance).sum()) + 1
    basis: Tensor = vectors[:, : min(needed, settings.rank)]
    return basis


class _Regression:
    """Normal equations X'X W = X'G_l of every layer, summed batch by batch in float64."""

    def __init__(self, basis: Tensor, across: bool) -> None:
        self._basis, self._across = basis, across
        rank = basis.shape[1]
        self._size = rank * (1 + (NUM_POSITIONS if across else 0))
        self._gram = torch.zeros(self._size, self._size, dtype=torch.float64)
        self._products: dict[int, Tensor] = {}

    def add(self, found: GradientsByLayer) -> None:
        """Take in one batch; padding has no gradient and counts for nothing."""
        code = found.upper.cpu().double() @ self._basis  # (batch, tokens, rank)
        real = torch.ones(code.shape[:2], dtype=torch.bool) if found.mask is None else found.mask.cpu()
        columns = [code]
        if self._across:
            place = nn.functional.one_hot(positions(found.upper).cpu(), NUM_POSITIONS).double()
            columns.append(torch.einsum("btp,br->btpr", place, code.sum(1)).flatten(2))
        x = torch.cat(columns, -1)[real]  # (tokens that count, size)
        self._gram += x.T @ x
        for place_of_call, gradient in found.lower.items():
            product = x.T @ gradient.cpu().double()[real]
            self._products[place_of_call] = self._products.get(place_of_call, 0) + product

    def solve(self, ridge: float) -> dict[int, BackwardMap]:
        """The maps; columns that never occurred get zero.

        Contiguous, as they will be sent and read: products of another layout are rounded otherwise.

        Raises:
            ModelError: the penalty is too small for columns that cannot be told apart.
        """
        penalty = ridge * self._gram.diagonal().mean().clamp(min=1e-300)
        factor, failed = torch.linalg.cholesky_ex(self._gram + penalty * torch.eye(self._size, dtype=torch.float64))
        if failed:
            raise ModelError(f"guide.ridge = {ridge:g} is too small to fit maps with: raise it; 1e-3 is the default")
        rank, basis, maps = self._basis.shape[1], self._basis.float().contiguous(), {}
        for place, product in sorted(self._products.items()):
            weights = torch.cholesky_solve(product, factor).float().contiguous()
            across = weights[rank:].reshape(NUM_POSITIONS, rank, -1) if self._across else None
            maps[place] = BackwardMap(basis, weights[:rank].clone(), across)
        return maps
