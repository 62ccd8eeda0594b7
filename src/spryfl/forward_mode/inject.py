"""A tangent enters at the module that owns the perturbed parameter, by hooks.

While the module runs, its parameter is a dual number; before and after, it is itself. Layers below
the lowest perturbed module therefore see no dual number at all and cost what inference costs.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad


@contextmanager
def injected(model: nn.Module, tangents: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters tangents during the passes inside; call within a `dual_level`.

    Args:
        model: left as it was found.
        tangents: by parameter name, each of its parameter's shape; cast to its device and dtype.
    """
    by_site: dict[str, dict[tuple[nn.Module, str], Tensor]] = defaultdict(dict)
    for name, tangent in tangents.items():
        owner_path, _, attribute = name.rpartition(".")
        by_site[_running_ancestor(model, owner_path)][model.get_submodule(owner_path), attribute] = tangent
    handles = []
    try:
        for path, entries in by_site.items():
            site = _Site(entries)
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(site.enter))
            handles.append(module.register_forward_hook(site.leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _running_ancestor(model: nn.Module, path: str) -> str:
    """The nearest module, from `path` upwards, that has a forward: containers are never called."""
    while path and type(model.get_submodule(path)).forward is nn.Module.forward:
        path = path.rpartition(".")[0]
    return path


class _Site:
    """One module at which tangents enter: swaps parameters for dual numbers while it runs."""

    def __init__(self, entries: Mapping[tuple[nn.Module, str], Tensor]) -> None:
        self.entries = entries
        self.originals: dict[tuple[nn.Module, str], Any] = {}

    def enter(self, module: nn.Module, args: Any) -> None:
        for (owner, attribute), tangent in self.entries.items():
            parameter = owner._parameters[attribute]
            assert parameter is not None
            self.originals[owner, attribute] = parameter
            dual = forward_ad.make_dual(parameter.detach(), tangent.to(parameter.device, parameter.dtype))
            owner._parameters[attribute] = dual  # not a Parameter: as functional_call does

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        for (owner, attribute), parameter in self.originals.items():
            owner._parameters[attribute] = parameter
        self.originals.clear()
