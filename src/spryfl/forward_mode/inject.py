"""Tangents enter at the perturbed parameters: for one pass, each of these is a dual number.

Modules that own none compute as ever, so layers below the lowest perturbed one see no dual number at all and
cost what inference costs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from spryfl.forward_mode.budget import carrying
from spryfl.forward_mode.dual import make_dual


@contextmanager
def injected(model: nn.Module, tangents: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters K tangents each during the passes inside.

    Args:
        model: left as it was found.
        tangents: by parameter name, each (K, *its parameter's shape); cast to its device and dtype.
    """
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, tangent in tangents.items():
            path, _, attribute = name.rpartition(".")
            owner, parameter = model.get_submodule(path), model.get_parameter(name)
            originals.append((owner, attribute, parameter))
            dual = make_dual(parameter.detach(), tangent.to(parameter.device, parameter.dtype))
            owner._parameters[attribute] = dual  # type: ignore[assignment]  # as functional_call does
        with carrying(max((t.shape[0] for t in tangents.values()), default=0)):
            yield
    finally:
        for owner, attribute, parameter in originals:
            owner._parameters[attribute] = parameter
