"""Units: what the server assigns. A unit is the trainable parameters of one adapted module."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from spryfl.models.layers import layer_calls

HEAD = "head"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Unit:
    """The trainable parameters of one adapted module, or of the whole head.

    Attributes:
        name: the module's path in the base model, or "head".
        parameters: full names, in the model's order.
    """

    name: str
    parameters: tuple[str, ...]

    @property
    def is_head(self) -> bool:
        return self.name == HEAD


def trainable_units(model: nn.Module) -> tuple[Unit, ...]:
    """Group a PEFT model's trainable parameters by adapted module, from the lowest layer up.

    Everything PEFT trains in full (`modules_to_save`: the classification head) is one unit, "head".
    """
    grouped: dict[str, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grouped[_unit_of(model, name)].append(name)
    return tuple(Unit(name, tuple(parameters)) for name, parameters in grouped.items())


def _unit_of(model: nn.Module, parameter: str) -> str:
    """Walk up from the parameter to the module that PEFT adapted or trains in full."""
    path = parameter
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, ModulesToSaveWrapper):
            return HEAD
        if isinstance(module, BaseTunerLayer):
            return path.removeprefix(_PEFT_PREFIX)
    return parameter.rpartition(".")[0].removeprefix(_PEFT_PREFIX)


def parameters_of(units: Sequence[Unit]) -> tuple[str, ...]:
    """The parameter names of several units, in order."""
    return tuple(name for unit in units for name in unit.parameters)


def unit_places(model: nn.Module, units: Sequence[Unit]) -> dict[str, tuple[int, ...]]:
    """Unit -> the places, in the order of calls from 0, of the layers it lies in; none for the head."""
    own = [set(layer.parameters()) for layer in layer_calls(model)]
    found = {}
    for unit in units:
        parameters = {model.get_parameter(name) for name in unit.parameters}
        found[unit.name] = tuple(place for place, inside in enumerate(own) if inside & parameters)
    return found


def layer_blocks(places: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, ...], ...]:
    """Units by the layer they lie in, from the lowest up; those in none, each alone, at the end."""
    blocks: dict[tuple[int, ...], list[str]] = {}
    for unit, own in places.items():
        if own:
            blocks.setdefault(own, []).append(unit)
    alone = [(unit,) for unit, own in places.items() if not own]
    return (*(tuple(blocks[own]) for own in sorted(blocks)), *alone)
