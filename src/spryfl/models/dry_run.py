"""What a pass will take, predicted by running it without data.

The program itself runs on tensors that have a shape and a type but no memory (PyTorch's fake tensors), under
the meter that also measures real passes. So chunks, kernels and what autograd stores need no formulas that
could go out of step with the code. Layers repeat, and so do chunks: two shallow models tell what a deep one
takes, and the first two chunks and the last what all of them take.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from spryfl.config import AdapterConfig, TaskKind
from spryfl.forward_mode.budget import DEFAULT_CHUNK_BYTES, NO_LIMIT, chunks_of, dry_run
from spryfl.forward_mode.inject import injected
from spryfl.forward_mode.loss import row_losses
from spryfl.forward_mode.next_token import next_token_logits, takes_positions
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.guided import GuidedGradient
from spryfl.memory.meter import ActivationMeter
from spryfl.memory.plan import AdapterSize, PassCost
from spryfl.models.adapters import adapt, dropout_modules, own_modules
from spryfl.models.classes import output_head
from spryfl.models.heads import head_modules
from spryfl.models.layers import layer_calls
from spryfl.models.lean import make_lean
from spryfl.models.skeleton import hollow_model
from spryfl.models.units import parameters_of, trainable_units

SHALLOW = (2, 3)
"""Depths that are run: from the second layer on, all are alike."""

Pass = tuple[Any, ...]
"""A method of `HollowModel` and its settings."""


@dataclass(frozen=True)
class Work:
    """One step's work on a model, to be tried out.

    Attributes:
        config: transformers' own, of the whole model.
        dtype: what it computes in.
        packed: whether frozen linear maps are held in 4 or 8 bits and unpacked for each product.
        head: modules trained in full; the known classification heads by default.
        task: what the model is for, and so which loss it has.
    """

    config: Any
    adapter: AdapterConfig
    batch: int
    tokens: int
    dtype: torch.dtype = torch.float32
    packed: bool = False
    head: tuple[str, ...] | None = None
    task: TaskKind = "classification"

    @property
    def num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def state_bytes(self) -> int:
        """Of one hidden state: (batch, tokens, hidden)."""
        return self.batch * self.tokens * int(self.config.get_text_config().hidden_size) * self.dtype.itemsize


class DryRun:
    """The passes of one piece of work, each predicted when first asked for.

    One of these serves all precisions that compute alike, streamed or not, and clients of any memory.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self._done: dict[tuple[Pass, int, int], tuple[int, int]] = {}

    def inference(self, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> PassCost:
        """A pass without gradients."""
        return self._cost(("infer",), chunk_bytes)

    def forward(
        self, num_tangents: int = 1, chunk_bytes: int = DEFAULT_CHUNK_BYTES, *, upper: bool = False
    ) -> PassCost:
        """One forward-mode pass with K tangents in all trainable parameters.

        Args:
            upper: of all layers but the first. Where tangents begin above it, the hidden state without them still
                stands, and so does the embeddings' output, which the model holds until its end.
        """
        return self._cost(("carry", num_tangents), chunk_bytes, upper)

    def backprop(
        self, checkpointed: bool = False, chunk_bytes: int = DEFAULT_CHUNK_BYTES, *, upper: bool = False
    ) -> PassCost:
        """Reverse mode, storing every activation or each layer's input; `upper` as above."""
        return self._cost(("differentiate", checkpointed), chunk_bytes, upper)

    def guided(self, horizon: bool = False, chunk_bytes: int = DEFAULT_CHUNK_BYTES, *, upper: bool = False) -> PassCost:
        """A guessed gradient in every layer; the pass that takes slopes is `forward`.

        Args:
            horizon: the last layer is passed through exactly.
        """
        return self._cost(("guide", horizon), chunk_bytes, upper)

    @cached_property
    def models(self) -> "dict[int, HollowModel]":
        """By depth; the whole model where its layers are not all alike."""
        kinds = getattr(self.work.config.get_text_config(), "layer_types", None) or ()
        depths = SHALLOW if len(set(kinds)) <= 1 else (self.work.num_layers,)
        return {depth: HollowModel(self.work, depth) for depth in depths}

    @cached_property
    def adapter(self) -> AdapterSize:
        """Of the whole model's adapter and head."""
        return AdapterSize.through({depth: model.adapter for depth, model in self.models.items()}, self.work.num_layers)

    def _cost(self, what: Pass, chunk_bytes: int, upper: bool = False) -> PassCost:
        """Chunks bound the peak, but change neither the operations nor what one more layer adds."""
        cost = PassCost.through({depth: self._run(what, depth, NO_LIMIT) for depth in self.models})
        if not upper:
            return replace(cost, peak_bytes=self._run(what, cost.depth, chunk_bytes)[0])
        depth = max(self.models)  # two layers have tangents, as in deeper models
        peak, _ = self._run((*what, True), depth, chunk_bytes)
        return replace(cost, depth=depth, peak_bytes=peak, flops=self._run((*what, True), depth, NO_LIMIT)[1])

    def _run(self, what: Pass, depth: int, chunk_bytes: int) -> tuple[int, int]:
        """Peak bytes of a pass and its operations, some of which are left out where it runs in chunks."""
        key = (what, depth, chunk_bytes)
        if key not in self._done:
            name, *settings = what
            model = self.models[depth]
            with chunks_of(chunk_bytes), dry_run(), model.mode, PassMeter() as meter:
                getattr(model, name)(*settings)
            self._done[key] = (meter.peak_bytes, meter.flops)
        return self._done[key]


class HollowModel:
    """A model of some depth, adapted and lean, whose tensors have no memory."""

    def __init__(self, work: Work, depth: int) -> None:
        base = hollow_model(shallower(work.config, depth), work.dtype, work.task)
        head = head_modules(base, (), work.task) if work.head is None else list(work.head)
        model = adapt(base, work.adapter, head, work.task).eval()
        if work.packed:
            pack(model, [base.get_submodule(path) for path in [output_head(base)] if path])
        make_lean(model, {PackedLinear: unpack_nothing})
        for dropout in dropout_modules(model):
            dropout.training = work.adapter.dropout > 0  # as in a client's update
        units = trainable_units(model)
        values = {unit: sum(model.get_parameter(name).numel() for name in unit.parameters) for unit in units}
        self.adapter = AdapterSize(
            num_units=sum(not unit.is_head for unit in units),
            unit_values=sum(count for unit, count in values.items() if not unit.is_head),
            head_values=sum(count for unit, count in values.items() if unit.is_head),
        )
        self.model, self._task = model, work.task
        self.names = parameters_of(units)
        lowest = set(layer_calls(model)[0].parameters())
        self.upper_names = [name for name in self.names if model.get_parameter(name) not in lowest]
        self.mode = FakeTensorMode()
        hollow_out(model, self.mode)
        with self.mode:
            ids = torch.ones((work.batch, work.tokens), dtype=torch.long)
            self._inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if work.task == "prompted":
                if takes_positions(base):
                    self._inputs["position_ids"] = torch.ones_like(ids)
                self._words = torch.zeros(base.config.num_labels, dtype=torch.long)
            self._labels = torch.zeros(work.batch, dtype=torch.long)

    def loss(self, model: nn.Module) -> Tensor:
        """As the task's own in `data`, of a batch without padding, all of whose tokens are to be written."""
        if self._task == "language_model":
            return row_losses(model, self._inputs, self._inputs["input_ids"]).mean()
        if self._task == "prompted":
            return self._cross_entropy(next_token_logits(model, self._inputs, self._words))
        output = model(**self._inputs)
        if self._task == "qa":
            return self._cross_entropy(output.start_logits) + self._cross_entropy(output.end_logits)
        return self._cross_entropy(output.logits)

    def _cross_entropy(self, logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.float(), self._labels)

    def infer(self) -> None:
        with torch.no_grad():
            self.loss(self.model)

    def carry(self, num_tangents: int, upper: bool = False) -> None:
        names = self.upper_names if upper else self.names
        shapes = {name: self.model.get_parameter(name).shape for name in names}
        tangents = {name: torch.empty((num_tangents, *shape)) for name, shape in shapes.items()}
        with torch.no_grad(), injected(self.model, tangents):
            self.loss(self.model)

    def differentiate(self, checkpointed: bool, upper: bool = False) -> None:
        estimator = Backprop("per_layer" if checkpointed else "none", layer_calls)
        estimator.loss_and_gradient(self.model, self.loss, self.upper_names if upper else self.names)

    def guide(self, horizon: bool, upper: bool = False) -> None:
        estimator = GuidedGradient(layer_calls, horizon=int(horizon), slopes_per="none")
        estimator.guess_gradients(self.model, self.loss, self.upper_names if upper else self.names)


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
            self.flops += count(*args, **(kwargs or {}), out_val=output)
        return output


class PackedLinear(nn.Module):
    """Stands for a linear map whose weight is held in 4 or 8 bits: it unpacks to a tensor of the right size."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        packed = torch.zeros((), dtype=torch.uint8).expand(self.out_features, self.in_features)
        self.weight = nn.Parameter(packed, requires_grad=False)


def unpack_nothing(module: nn.Module, rows: slice, out: Tensor) -> None:
    """The weight of a stand-in, whatever its values."""


def pack(model: nn.Module, dense: Sequence[nn.Module] = ()) -> None:
    """Put stand-ins in the place of a model's frozen linear maps, but for `dense` ones and an adapter's factors."""
    own = own_modules(model)
    for module in [module for module in model.modules() if module not in own]:
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child not in dense and not child.weight.requires_grad:
                setattr(module, name, PackedLinear(child))


def hollow_out(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers by fake ones; a parameter in two places stays one."""
    fakes: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in fakes:
                    fake = mode.from_tensor(parameter.detach())
                    fakes[parameter] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = fakes[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


def shallower(config: Any, depth: int) -> Any:
    """A copy of a transformers configuration with another depth, its weights in full precision."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = [kinds[i % len(kinds)] for i in range(depth)]
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # stand-ins take the part of packed modules
    return config
