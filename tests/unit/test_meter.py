"""What the meter says, by hand and against the process's own memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from families import batch_loss, build, padded_batch, trainable
from spryfl.forward_mode.dual import make_dual
from spryfl.gradients.forward import loss_and_slopes
from spryfl.memory.meter import ActivationMeter, MemoryMeter, adapter_bytes, weight_bytes


def test_tangents_are_told_apart_at_the_peak() -> None:
    with ActivationMeter() as meter:
        dual = make_dual(torch.zeros(1000), torch.zeros(3, 1000))  # 4 kB, 12 kB, and 16 kB stacked
        dual = dual * 2.0
        del dual
        torch.zeros(10)
    # At the peak stand the first dual and its double, and no more of what they were made of.
    assert meter.peak_bytes == 32_000
    assert meter.tangent_bytes == 12_000
    assert meter.live_bytes == 0


def test_parts_of_a_model() -> None:
    model = build("llama").float()
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad) + sum(b.nbytes for b in model.buffers())
    assert weight_bytes(model) == frozen
    assert adapter_bytes(model) == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    names = trainable(model)
    tangents = {name: torch.ones(3, *model.get_parameter(name).shape) for name in names}
    with MemoryMeter(model) as meter:
        loss_and_slopes(model, batch_loss(padded_batch()), tangents)
    assert meter.use.weights == frozen
    assert meter.use.tangents > meter.use.activations / 2 > 0  # three ride with each primal; temporaries do not count
    if sys.platform.startswith("linux"):
        assert meter.use.resident >= meter.use.resident_before > 0


GROWTH = """
import sys
sys.path.insert(0, {tests!r})
import torch
from spryfl.bench.measure import dense_model
from spryfl.bench.steps import STEPS, Subject
from spryfl.memory.allocator import return_large_blocks
from spryfl.memory.meter import MemoryMeter
from spryfl.models.shapes import shape_config
from spryfl.models.units import trainable_units

return_large_blocks(2**16)
model = dense_model(shape_config("bert-base", num_hidden_layers=4, hidden_size=256, num_attention_heads=4,
                                 intermediate_size=1024, max_position_embeddings=1024))
units = trainable_units(model)
STEPS[{step!r}](Subject(model, units, 1, 8), 1)
with MemoryMeter(model) as meter:
    STEPS[{step!r}](Subject(model, units, 16, 1024), 1)
use = meter.use
print(use.activations + use.tangents, use.resident - use.resident_before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident peak is read from /proc")
@pytest.mark.parametrize("step", ["inference", "forward", "backprop"])
def test_the_meter_agrees_with_resident_growth(step: str) -> None:
    """Within 10 %, in a process that gives freed memory back at once."""
    script = GROWTH.format(tests=str(Path(__file__).parents[1]), step=step)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    metered, grown = map(int, done.stdout.split())
    assert metered > 50e6  # large beside what the process holds for other reasons
    assert metered == pytest.approx(grown, rel=0.1)
