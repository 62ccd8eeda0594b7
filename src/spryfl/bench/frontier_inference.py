"""What stock inference takes on the frontier's tasks: the memory that estimators are measured against."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from spryfl.bench.frontier import variant_config
from spryfl.bench.frontier_works import VARIANTS
from spryfl.forward_mode.budget import NO_LIMIT, chunks_of
from spryfl.memory.meter import MemoryMeter
from spryfl.workbench import Workbench

PEAKS_FILE = "frontier-inference.json"
NUM_BATCHES = 8

StockPeaks = dict[str, int]
"""Task -> bytes."""


def stock_peaks(tasks: Sequence[str], data: Path, out: Path) -> StockPeaks:
    """The activation peak of unchunked inference of each task's batches, as an earlier bench left it in `out` or anew.

    The same model and kernels as the estimators', the largest of the first batches of the training data.
    """
    path = out / PEAKS_FILE
    peaks: StockPeaks = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    missing = [task for task in tasks if task not in peaks]
    for task in missing:
        peaks[task] = _measured(Workbench.from_config(variant_config(task, VARIANTS["backprop"], data, {}, 0)))
    if missing:
        path.write_text(json.dumps(peaks, indent=1) + "\n", encoding="utf-8")
    return peaks


def _measured(bench: Workbench) -> int:
    size, found = bench.config.local.batch_size, 0
    for start in range(0, size * NUM_BATCHES, size):
        batch = bench.task.batch(bench.train, list(range(start, start + size)))
        with MemoryMeter(bench.adapted.model) as meter, torch.inference_mode(), chunks_of(NO_LIMIT):
            bench.task.losses(bench.adapted.model, batch).mean()
        found = max(found, meter.use.activations)
    return found
