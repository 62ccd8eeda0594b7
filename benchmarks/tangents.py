"""K tangents: one pass of our dual tensor, K passes of it, and PyTorch's own way (vmap over jvp).

    python benchmarks/tangents.py

BERT-large's width, 4 layers, batch 4, 128 tokens, float32, LoRA r 1 on query and value, all units. Steps are
taken in turn; seconds are medians, peaks are metered. PyTorch's forward mode needs eager attention.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from spryfl.bench.measure import dense_model
from spryfl.bench.steps import LossModule, Subject, eager_attention
from spryfl.forward_mode.budget import NO_LIMIT, chunks_of
from spryfl.gradients.forward import loss_and_slopes
from spryfl.memory.meter import ActivationMeter
from spryfl.models.shapes import shape_config
from spryfl.models.units import trainable_units

K, REPEATS = 8, 3


def main() -> None:
    model = dense_model(shape_config("bert-large", num_hidden_layers=4))
    subject = Subject(model, trainable_units(model), batch=4, tokens=128)
    loss, names = subject.loss(), subject.parameters
    shapes = {name: model.get_parameter(name).shape for name in names}
    tangents = {
        name: torch.stack([subject.draw.numbers(k, name, shape) for k in range(K)]) for name, shape in shapes.items()
    }
    values = {name: model.get_parameter(name).detach() for name in names}

    def vmap_of_jvp() -> Tensor:
        wrapped = LossModule(subject)

        def of(perturbed: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(wrapped, {f"model.{n}": p for n, p in perturbed.items()}, ())

        def slope(one: dict[str, Tensor]) -> Any:
            return torch.func.jvp(of, (values,), (one,))[1]

        with torch.no_grad(), chunks_of(NO_LIMIT), eager_attention(model):
            slopes: Tensor = torch.func.vmap(slope)(tangents)
            return slopes

    def passes(num_tangents: int) -> Callable[[], Tensor]:
        parts = [{n: t[k : k + num_tangents] for n, t in tangents.items()} for k in range(0, K, num_tangents)]
        return lambda: torch.cat([loss_and_slopes(model, loss, part)[1] for part in parts])

    def inference() -> Tensor:
        with torch.inference_mode(), chunks_of(NO_LIMIT):
            return loss(model)

    steps = {
        "inference": inference,
        "one pass, one tangent": lambda: loss_and_slopes(model, loss, {n: t[:1] for n, t in tangents.items()})[1],
        f"{K} passes": passes(1),
        f"one pass, {K} tangents": passes(K),
        "torch.func.vmap of jvp": vmap_of_jvp,
    }
    peaks, slopes = {}, {}
    for name, step in steps.items():
        with ActivationMeter() as meter:
            slopes[name] = step()
        peaks[name] = meter.peak_bytes
    expected = slopes[f"{K} passes"]
    for name in (f"one pass, {K} tangents", "torch.func.vmap of jvp"):
        assert torch.allclose(slopes[name], expected, rtol=1e-3, atol=1e-5), name
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    base = median(seconds["inference"])
    print("| way | seconds | times inference | activation peak (MB) |\n| --- | ---: | ---: | ---: |")
    for name in steps:
        taken = median(seconds[name])
        print(f"| {name} | {taken:.2f} | {taken / base:.2f} | {peaks[name] / 1e6:,.1f} |")


if __name__ == "__main__":
    main()
