"""One step of every estimator on one model, in one run: activation peak and seconds.

BERT-large's shape with random weights (neither memory nor time depends on their values), LoRA r 1 on query
and value of every layer, all of them and the head perturbed or differentiated. Forward mode, inference and
backprop run the same model; `torch.func.jvp` needs eager attention, as PyTorch's fused one has no jvp.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, TaskType
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from spryfl.forward_mode.attention import ATTENTION_NAME, register_attention
from spryfl.forward_mode.feed_forward import chunk_feed_forward
from spryfl.forward_mode.operators import use_lean_operators
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.forward import ForwardGradient
from spryfl.memory.meter import ActivationMeter
from spryfl.models.adapters import add_adapter
from spryfl.models.layers import transformer_layers
from spryfl.models.lean_lora import use_lean_lora
from spryfl.models.units import parameters_of, trainable_units

Row = dict[str, Any]
MB = 1e6


@dataclass(frozen=True)
class StepBench:
    """The work measured."""

    batch: int = 8
    tokens: int = 256
    layers: int = 24
    dtype: str = "float32"
    repeats: int = 3
    seed: int = 0


def measure_steps(bench: StepBench) -> list[Row]:
    """Meter one step of each estimator, then time `repeats` steps of each, taken in turn.

    In turn, so that a noisy neighbour slows all of them alike; the median is reported.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.seed)
        steps = _steps(bench)
    peaks, slopes = {}, {}
    for name, step in steps.items():
        with ActivationMeter() as meter:
            slopes[name] = step()
        peaks[name] = meter.peak_bytes
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(bench.repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    inference = median(seconds["inference"])
    return [
        {
            "estimator": name,
            "model": "bert-large shape",
            "layers": bench.layers,
            "batch": bench.batch,
            "tokens": bench.tokens,
            "dtype": bench.dtype,
            "threads": torch.get_num_threads(),
            "activation_peak_bytes": peaks[name],
            "seconds_per_step": median(seconds[name]),
            "times_inference": median(seconds[name]) / inference,
            "slope": slopes[name],
        }
        for name in steps
    ]


def as_markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    first = rows[0]
    lines = [
        f"BERT-large's shape, {first['layers']} layers, {first['dtype']}, batch {first['batch']}, {first['tokens']} "
        f"tokens, {first['threads']} threads; LoRA r 1 on query and value, all units.",
        "",
        "| estimator | activation peak (MB) | seconds a step | times inference | slope along one tangent |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        slope = "" if row["slope"] is None else f"{row['slope']:.6f}"
        lines.append(
            f"| {row['estimator']} | {row['activation_peak_bytes'] / MB:,.0f} | {row['seconds_per_step']:.2f} | "
            f"{row['times_inference']:.2f} | {slope} |"
        )
    return "\n".join(lines) + "\n"


def _steps(bench: StepBench) -> dict[str, Callable[[], float | None]]:
    """Each estimator's step; those that know it return the slope along the same tangent."""
    model = _adapted_bert(bench, ATTENTION_NAME)
    eager = _adapted_bert(bench, "eager")
    eager.load_state_dict(model.state_dict())
    use_lean_operators(model)
    use_lean_lora(model)
    chunk_feed_forward(model)
    names = parameters_of(trainable_units(model))
    ids = torch.randint(1000, 20000, (bench.batch, bench.tokens))
    labels = torch.randint(0, 2, (bench.batch,))

    def loss(model: nn.Module) -> Tensor:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return nn.functional.cross_entropy(logits.float(), labels)

    draw = DirectionStream(bench.seed, round=1, client=0).at_step(0)
    tangents = {name: draw(0, name, model.get_parameter(name).shape) for name in names}

    def inference() -> None:
        with torch.inference_mode():
            loss(model)

    def forward() -> float:
        estimate = ForwardGradient().estimate(model, loss, names, draw, bench.batch)
        assert estimate.slopes is not None
        return float(estimate.slopes[0])

    def func_jvp() -> float:
        return _func_jvp(eager, loss, tangents)

    def backprop(estimator: Backprop) -> float:
        gradients = estimator.estimate(model, loss, names, draw, bench.batch).gradients
        return sum(float((gradients[name] * tangents[name]).sum()) for name in names)

    return {
        "inference": inference,
        "forward": forward,
        "func_jvp": func_jvp,
        "backprop": lambda: backprop(Backprop()),
        "backprop_checkpointed": lambda: backprop(Backprop("per_layer", transformer_layers)),
    }


def _func_jvp(model: nn.Module, loss: Callable[[nn.Module], Tensor], tangents: dict[str, Tensor]) -> float:
    """The slope by `torch.func.jvp` of the same model."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return loss(self.model)

    wrapped = Loss()
    values = {name: p.detach() for name, p in wrapped.named_parameters()}
    own = {f"model.{name}": tangent.to(values[f"model.{name}"].dtype) for name, tangent in tangents.items()}

    def of(perturbed: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(wrapped, values | perturbed, ())

    with torch.no_grad():
        slope = torch.func.jvp(of, ({name: values[name] for name in own},), (own,))[1]
    return float(slope)


def _adapted_bert(bench: StepBench, attention: str) -> nn.Module:
    register_attention()
    config = BertConfig(
        hidden_size=1024, num_hidden_layers=bench.layers, num_attention_heads=16, intermediate_size=4096
    )
    base = BertForSequenceClassification._from_config(
        config, attn_implementation=attention, dtype=getattr(torch, bench.dtype)
    )
    lora = LoraConfig(r=1, lora_alpha=1, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS)
    return add_adapter(base, lora).eval()
