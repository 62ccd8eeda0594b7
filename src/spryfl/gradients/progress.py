"""How far a step along an estimate is expected to go, in units of a step along the exact gradient.

A step of fixed length along an estimate g_hat lowers the loss, to first order, by its length times
|g| cos(g_hat, g). So an estimate's progress is its cosine with the gradient:

    backprop           1
    forward gradient   sqrt(K / (K + d + 1)) for K Gaussian tangents in d dimensions, sqrt(K / d) for orthogonal ones
    guided             of the guess: measured on public text where there are backward maps, else `IDENTITY_COSINES`

An unbiased estimate has E[g_hat . g] = |g|^2 and E|g_hat|^2 = |g|^2 / c, where c = K / (K + d + 1) for Gaussian
tangents (`tangents.Spread.shrinkage` of each distribution). A step normalized by the root mean square, as Adam's is,
has the expected progress E[g_hat . g] / sqrt(E|g_hat|^2 |g|^2) = sqrt(c). The mean of the cosine itself is a little
smaller where K is small, by a factor sqrt(2 / pi) at K = 1, as slopes then differ in size.
"""

from collections.abc import Sequence
from math import sqrt

from spryfl.gradients.kinds import Distribution, SlopesPer
from spryfl.gradients.tangents import SPREADS

EXACT = 1.0
IDENTITY_COSINES = (EXACT, 0.60, 0.28, 0.28, 0.26, 0.16)
"""Of the identity guess, by how many layers lie between a layer's output and the uppermost hidden state whose gradient
is known; further down 0. Measured on MiniLM (6 layers, horizon 0, SNLI), the mean of before and after training
(docs/results/gradient-quality.json); other horizons and models are taken to be like it."""


def forward_cosine(distribution: Distribution, num_tangents: int, dimensions: int) -> float:
    """Expected progress of a forward gradient of K tangents in d dimensions."""
    return min(EXACT, sqrt(max(0.0, SPREADS[distribution].shrinkage(num_tangents, dimensions))))


def identity_cosine(distance: int) -> float:
    """Of the identity guess that many layers below the uppermost hidden state whose gradient is known."""
    return IDENTITY_COSINES[distance] if distance < len(IDENTITY_COSINES) else 0.0


def guided_cosine(cosines: Sequence[float], slopes_per: SlopesPer) -> float:
    """Expected progress of a guided estimate, from the cosine of each unit's part, exact parts being 1.

    Parts of the gradient are taken to be of equal size. The guess as it is has the mean cosine, and one slope for all
    gives it the right sign. A slope for each part makes it the gradient's projection, c_i |g_i| long along a direction
    of cosine c_i, and the whole then has the root of the mean square, which is no less.
    """
    if not cosines:
        return EXACT
    mean = sum(cosines) / len(cosines)
    if slopes_per == "none":
        return max(0.0, mean)
    return abs(mean) if slopes_per == "step" else sqrt(sum(c * c for c in cosines) / len(cosines))
