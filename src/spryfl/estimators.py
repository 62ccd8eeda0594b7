"""The gradient estimator of a configuration: an explicit table from its name to what makes it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from spryfl.config import RunConfig
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.bottleneck import BottleneckGradient
from spryfl.gradients.estimator import GradientEstimator
from spryfl.gradients.exact_head import ExactHead
from spryfl.gradients.forward import ForwardGradient
from spryfl.gradients.guided import GuidedGradient
from spryfl.gradients.private import PrivateSlopes
from spryfl.gradients.zeroth_order import ZerothOrder
from spryfl.models.layers import layer_calls
from spryfl.models.units import Unit

ESTIMATORS: dict[str, Callable[[RunConfig], GradientEstimator]] = {
    "forward": lambda config: ForwardGradient(config.method.own_num_tangents),
    "bottleneck": lambda config: BottleneckGradient(config.method.own_num_tangents),
    "zeroth_order": lambda config: ZerothOrder(config.method.own_num_tangents, config.method.own_step_size),
    "guided": lambda config: GuidedGradient(
        layer_calls, horizon=config.guide.horizon, slopes_per=config.own_slopes, explore=config.guide.explore
    ),
    "backprop": lambda config: Backprop(config.method.checkpointing, layer_calls, config.method.budget),
}
CHOSEN_AMONG = ("backprop", "guided", "forward")
"""What `method.estimator = "auto"` chooses among."""


def new_estimator(name: str, config: RunConfig, units: Sequence[Unit]) -> GradientEstimator:
    """An estimator of `ESTIMATORS` as a configuration has it, with the exact head and the privacy it asks for."""
    estimator = ESTIMATORS[name](config)
    if isinstance(estimator, GuidedGradient):
        unit_of = {parameter: unit.name for unit in units for parameter in unit.parameters}
        estimator = replace(estimator, unit_of=unit_of)
    if config.method.exact_head and name not in ("backprop", "guided"):
        head = {parameter for unit in units if unit.is_head for parameter in unit.parameters}
        estimator = ExactHead(estimator, layer_calls, frozenset(head))
    if config.privacy.level == "example":
        assert isinstance(estimator, ForwardGradient | ZerothOrder)  # the configuration allows no other
        estimator = PrivateSlopes(estimator, *config.privacy.strength)
    return estimator
