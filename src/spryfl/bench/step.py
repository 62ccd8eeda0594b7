"""`spry bench step`: one step of every estimator on one model, in one process and in turn.

BERT-large's shape with random weights (neither memory nor time depends on their values), LoRA r 1 on query
and value of every layer, all of them and the head perturbed or differentiated.
"""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from spryfl.bench.measure import dense_model
from spryfl.bench.steps import STEPS, Subject
from spryfl.memory.meter import ActivationMeter
from spryfl.models.shapes import shape_config
from spryfl.models.units import trainable_units

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
    model = dense_model(shape_config("bert-large", num_hidden_layers=bench.layers), getattr(torch, bench.dtype))
    subject = Subject(model, trainable_units(model), bench.batch, bench.tokens, bench.seed)
    peaks, slopes = {}, {}
    for name, step in STEPS.items():
        with ActivationMeter() as meter:
            slopes[name] = step(subject, 1)
        peaks[name] = meter.peak_bytes
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(bench.repeats):
        for name, step in STEPS.items():
            started = time.perf_counter()
            step(subject, 1)
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
        for name in STEPS
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
