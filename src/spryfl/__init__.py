"""Federated finetuning of language models on machines that can afford inference, not training.

    from spryfl import load_config, run_suite
    summaries = run_suite(load_config(Path("my.toml")), Path("runs/my-first"))

Names are imported on first use: `import spryfl` does not import torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spryfl.config import RunConfig, load_config
    from spryfl.errors import SpryError
    from spryfl.federated.method import METHODS, Method
    from spryfl.federated.rounds import run_round
    from spryfl.federated.state import FederatedState, Federation
    from spryfl.forward_mode.support import check_support
    from spryfl.gradients.backprop import Backprop
    from spryfl.gradients.directions import DirectionStream
    from spryfl.gradients.estimator import GradientEstimate, GradientEstimator
    from spryfl.gradients.forward import ForwardGradient
    from spryfl.gradients.zeroth_order import ZerothOrder
    from spryfl.models.loading import load_model
    from spryfl.suite import run_suite

__version__ = version("spryfl")

_HOMES = {
    "RunConfig": "config",
    "load_config": "config",
    "SpryError": "errors",
    "METHODS": "federated.method",
    "Method": "federated.method",
    "FederatedState": "federated.state",
    "Federation": "federated.state",
    "run_round": "federated.rounds",
    "check_support": "forward_mode.support",
    "Backprop": "gradients.backprop",
    "DirectionStream": "gradients.directions",
    "GradientEstimate": "gradients.estimator",
    "GradientEstimator": "gradients.estimator",
    "ForwardGradient": "gradients.forward",
    "ZerothOrder": "gradients.zeroth_order",
    "load_model": "models.loading",
    "run_suite": "suite",
}

__all__ = [
    "METHODS",
    "Backprop",
    "DirectionStream",
    "FederatedState",
    "Federation",
    "ForwardGradient",
    "GradientEstimate",
    "GradientEstimator",
    "Method",
    "RunConfig",
    "SpryError",
    "ZerothOrder",
    "check_support",
    "load_config",
    "load_model",
    "run_round",
    "run_suite",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spryfl' has no attribute '{name}'")
    return getattr(import_module(f"spryfl.{_HOMES[name]}"), name)
