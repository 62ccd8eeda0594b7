"""What a pass will take, predicted by running it without data.

The program itself runs on tensors that have a shape and a type but no memory (PyTorch's fake tensors), under
the meter that also measures real passes. So chunks, kernels and what autograd stores need no formulas that
could go out of step with the code. Layers repeat: two shallow models tell what a deep one takes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from spryfl.config import AdapterConfig
from spryfl.forward_mode.budget import DEFAULT_CHUNK_BYTES, chunks_of, dry_run, repeats
from spryfl.forward_mode.inject import injected
from spryfl.gradients.backprop import Backprop
from spryfl.memory.meter import ActivationMeter
from spryfl.memory.plan import PassCost
from spryfl.models.adapters import adapter_config, add_adapter
from spryfl.models.heads import head_modules
from spryfl.models.layers import layer_calls, transformer_layers
from spryfl.models.lean import make_lean
from spryfl.models.loading import hollow_model
from spryfl.models.units import parameters_of, trainable_units

SHALLOW = (2, 3)
"""Depths that are run; with one layer, the first would also be the last."""


@dataclass(frozen=True)
class Work:
    """One step's work on a model, to be tried out.

    Attributes:
        config: transformers' own, of the whole model.
        dtype: what it computes in.
        packed: whether the layers' linear maps are held in 4 or 8 bits and unpacked for each product.
        head: modules trained in full; the known classification heads by default.
    """

    config: Any
    adapter: AdapterConfig
    batch: int
    tokens: int
    dtype: torch.dtype = torch.float32
    packed: bool = False
    head: tuple[str, ...] | None = None

    @property
    def num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def state_bytes(self) -> int:
        """Of one hidden state: (batch, tokens, hidden)."""
        return self.batch * self.tokens * int(self.config.get_text_config().hidden_size) * self.dtype.itemsize


class PassMeter(ActivationMeter):
    """Counts floating-point operations too, matrix products and attention as PyTorch's own counter does.

    Attributes:
        flops: a multiplication and an addition are two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        count = flop_registry.get(func._overloadpacket)
        if output is not NotImplemented and count is not None:
            self.flops += repeats() * count(*args, **(kwargs or {}), out_val=output)
        return output


class DryRun:
    """The passes of one piece of work, each predicted when first asked for.

    A pass is a function of its settings only, so one of these serves all precisions that compute in its dtype,
    streamed or not, and clients of any memory.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.inference = cache(self._inference)
        self.forward = cache(self._forward)
        self.backprop = cache(self._backprop)

    @cached_property
    def models(self) -> dict[int, "HollowModel"]:
        """By depth; the whole model where it is shallow, or where its layers are not all alike."""
        kinds = getattr(self.work.config.get_text_config(), "layer_types", None) or ()
        alike = len(set(kinds)) <= 1 and self.work.num_layers > SHALLOW[-1]
        return {depth: HollowModel(self.work, depth) for depth in (SHALLOW if alike else (self.work.num_layers,))}

    def _inference(self, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> PassCost:
        return self._predict(HollowModel.infer, chunk_bytes)

    def _forward(self, num_tangents: int = 1, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> PassCost:
        """One forward-mode pass with K tangents in all trainable parameters."""
        return self._predict(partial(HollowModel.carry, num_tangents=num_tangents), chunk_bytes)

    def _backprop(self, checkpointed: bool = False, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> PassCost:
        return self._predict(partial(HollowModel.differentiate, checkpointed=checkpointed), chunk_bytes)

    def _predict(self, run: Callable[["HollowModel"], None], chunk_bytes: int) -> PassCost:
        found = {}
        for depth, model in self.models.items():
            with chunks_of(chunk_bytes), dry_run(), model.mode, PassMeter() as meter:
                run(model)
            found[depth] = (meter.peak_bytes, meter.flops)
        return PassCost.through(found)


class HollowModel:
    """A model of some depth, adapted and lean, whose tensors have no memory."""

    def __init__(self, work: Work, depth: int) -> None:
        base = hollow_model(shallower(work.config, depth), work.dtype)
        head = head_modules(base, ()) if work.head is None else list(work.head)
        model = add_adapter(base, adapter_config(work.adapter, base, head)).eval()
        if work.packed:
            pack(model)
        make_lean(model, {PackedLinear: PackedLinear.unpack})
        self.model = model
        self.mode = FakeTensorMode()
        self.names = parameters_of(trainable_units(model))
        hollow_out(model, self.mode)
        with self.mode:
            self._ids = torch.ones((work.batch, work.tokens), dtype=torch.long)
            self._labels = torch.zeros(work.batch, dtype=torch.long)

    def loss(self, model: nn.Module) -> Tensor:
        """Without an attention mask: whether any token is padding is a question to data."""
        return nn.functional.cross_entropy(model(input_ids=self._ids).logits.float(), self._labels)

    def infer(self) -> None:
        with torch.no_grad():
            self.loss(self.model)

    def carry(self, num_tangents: int) -> None:
        shapes = {name: self.model.get_parameter(name).shape for name in self.names}
        tangents = {name: torch.empty((num_tangents, *shape)) for name, shape in shapes.items()}
        with torch.no_grad(), injected(self.model, tangents):
            self.loss(self.model)

    def differentiate(self, checkpointed: bool) -> None:
        estimator = Backprop("per_layer" if checkpointed else "none", layer_calls)
        estimator.loss_and_gradient(self.model, self.loss, self.names)


class PackedLinear(nn.Module):
    """Stands for a linear map whose weight is held in 4 or 8 bits: it unpacks to a tensor of the right size."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        packed = torch.zeros((), dtype=torch.uint8).expand(self.out_features, self.in_features)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.unpack(input.dtype), self.bias)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        return torch.empty((self.out_features, self.in_features), dtype=dtype, device=self.weight.device)


def pack(model: nn.Module) -> None:
    """Put stand-ins in the place of the layers' frozen linear maps."""
    for module in [module for layer in transformer_layers(model) for module in layer.modules()]:
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not child.weight.requires_grad:
                setattr(module, name, PackedLinear(child))


def hollow_out(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers by fake ones; a tensor in two places stays one."""
    fakes: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in fakes:
                    fake = mode.from_tensor(parameter.detach())
                    fakes[parameter] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = fakes[parameter]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


def shallower(config: Any, depth: int) -> Any:
    """A copy of a transformers configuration with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return config
