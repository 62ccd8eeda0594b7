"""One case of a work, measured in this process: `python -m spryfl.bench.measure WORK CASE CACHE`.

A process of its own for each case, so that its resident peak is its own. Prints one JSON row.
"""

import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from spryfl.bench.random_checkpoint import write_random_checkpoint
from spryfl.bench.steps import STEPS, Subject
from spryfl.bench.truth import measure_truth
from spryfl.bench.works import (
    GROWTH_BATCH,
    GROWTH_CASES,
    GROWTH_LAYERS,
    GROWTH_SHAPE,
    GROWTH_TOKENS,
    WORKS,
    Case,
    Work,
)
from spryfl.config import AdapterConfig, ModelConfig
from spryfl.forward_mode.attention import ATTENTION_NAME, register_attention
from spryfl.memory.meter import MemoryMeter, reset_resident_peak, resident_peak_bytes
from spryfl.models.adapters import adapt
from spryfl.models.heads import head_modules
from spryfl.models.lean import make_lean
from spryfl.models.loading import load_model
from spryfl.models.shapes import shape_config
from spryfl.models.units import Unit, trainable_units

Row = dict[str, Any]
SPREAD = 4  # units, evenly over the layers, for the mean of Spry's assignments
SEED = 0
NARROW = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "max_position_embeddings": 2048}


def measure(work: Work, case: Case, cache: Path) -> Row:
    """One step of a case (of several units in turn, for `units = "one"`), metered and timed.

    Args:
        cache: where checkpoints of random weights are kept.
    """
    model = _model(work, cache)
    loading = resident_peak_bytes()
    units = trainable_units(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        # A first step of the smallest size, so that what is made once (threads, kernels) is not counted.
        STEPS["inference"](Subject(model, units, 1, 2, SEED), 1)
        rows = [
            _step(work, case, Subject(model, chosen, work.batch, work.tokens, SEED)) for chosen in _units(case, units)
        ]
    means = {key: sum(row[key] for row in rows) / len(rows) for key in ("seconds_per_step", "cpu_seconds_per_step")}
    highest = max(rows, key=lambda row: row["activation_peak_bytes"])
    resident = max(loading, *(row["resident_peak_bytes"] for row in rows))
    return highest | {"resident_peak_bytes": resident} | means


def _step(work: Work, case: Case, subject: Subject) -> Row:
    with MemoryMeter(subject.model) as meter:
        slope, seconds, cpu_seconds = _timed(case, subject)
    if work.timed_apart:
        slope, seconds, cpu_seconds = _timed(case, subject)
    return work.row(case) | {
        "layers": subject.model.config.num_hidden_layers,
        "activation_peak_bytes": meter.use.activations + meter.use.tangents,
        "resident_peak_bytes": meter.use.resident,
        "tangent_bytes": meter.use.tangents,
        "weight_bytes": meter.use.weights,
        "adapter_bytes": meter.use.adapter,
        "seconds_per_step": seconds,
        "cpu_seconds_per_step": cpu_seconds,  # of all threads; what neighbours take is not in it
        "slope": slope,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }


def _timed(case: Case, subject: Subject) -> tuple[float | None, float, float]:
    """(slope, seconds, CPU seconds) of a step."""
    started, cpu_started = time.perf_counter(), time.process_time()
    slope = STEPS[case.estimator](subject, case.k)
    return slope, time.perf_counter() - started, time.process_time() - cpu_started


def _units(case: Case, units: Sequence[Unit]) -> list[Sequence[Unit]]:
    """What each step perturbs: everything, or one unit after another with the head."""
    if case.units == "all":
        return [units]
    head = [unit for unit in units if unit.is_head]
    dealt = [unit for unit in units if not unit.is_head]
    return [[dealt[(2 * i + 1) * len(dealt) // (2 * SPREAD)], *head] for i in range(SPREAD)]


def _model(work: Work, cache: Path) -> nn.Module:
    """The adapted lean model with random weights: made in memory if dense and resident, else from disk."""
    changed = {} if work.layers is None else {"num_hidden_layers": work.layers}
    if work.precision == "float32" and not work.streamed:
        return dense_model(shape_config(work.shape, **changed))
    depth = "" if work.layers is None else f"-{work.layers}-layers"
    folder = cache / f"{work.shape}{depth}-{work.precision}"
    write_random_checkpoint(shape_config(work.shape, **changed), folder, work.precision, SEED)
    reset_resident_peak()  # writing the checkpoint is not part of the work
    settings = ModelConfig(name=str(folder), dtype="bfloat16", streamed=work.streamed)
    return load_model(settings, AdapterConfig(), num_labels=2, seed=SEED).model


def dense_model(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A lean sequence classifier of random weights with LoRA r 1 on query and value."""
    register_attention()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        base = AutoModelForSequenceClassification.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
        model = adapt(base, AdapterConfig(), head_modules(base, [])).eval()
    make_lean(model)
    return model


def measure_growth() -> list[Row]:
    """Activation peaks over layers and tokens, on a narrow BERT: they do not depend on what is in the way."""
    rows = []
    for layers in GROWTH_LAYERS:
        model = dense_model(shape_config("bert-base", num_hidden_layers=layers, **NARROW))
        for tokens in GROWTH_TOKENS:
            work = Work("growth", GROWTH_SHAPE, "float32", False, GROWTH_BATCH, tokens, GROWTH_CASES)
            subject = Subject(model, trainable_units(model), GROWTH_BATCH, tokens, SEED)
            for case in GROWTH_CASES:
                rows.append(_step(work, case, subject))
                print(f"growth: {layers} layers, {tokens} tokens, {case.estimator}", file=sys.stderr, flush=True)
    return rows


def main(name: str, number: str, cache: str) -> None:
    """Measure and print."""
    whole = {"growth": measure_growth, "truth": measure_truth}
    if name in whole:
        print(json.dumps(whole[name]()))
        return
    work = WORKS[name]
    print(json.dumps([measure(work, work.cases[int(number)], Path(cache))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
