"""What lies in memory, as the kernel counts it: pages of mapped files included."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from spryfl.bench.random_checkpoint import write_random_checkpoint
from spryfl.models.weights import count_weights

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")

MB = 10**6
LAYERS = 12
# 4.96 M weights a layer: 19.8 MB in float32, 2.6 MB in NF4.
SHAPE = LlamaConfig(
    vocab_size=16000,
    hidden_size=640,
    intermediate_size=1728,
    num_hidden_layers=LAYERS,
    num_attention_heads=10,
    num_key_value_heads=10,
    pad_token_id=0,
)
LAYER_WEIGHTS = 4 * 640 * 640 + 3 * 640 * 1728
PACKED = LAYERS * LAYER_WEIGHTS * 0.53  # bytes of the layers in NF4: 32 MB of 238
WEIGHT = 640 * 1728 * 4  # bytes of the largest weight in float32: 4.4 MB
GAPS = 25 * MB  # what blocks below the allocator's threshold leave at a peak; it does not grow with the model
REST = 5 * MB  # what is left beside the model afterwards
TABLE_BYTES = 16000 * 640 * 4  # 41 MB in float32

PROGRAM = """
import ctypes, json, sys
import torch
from pathlib import Path
from spryfl.config import AdapterConfig, ModelConfig
from spryfl.memory.allocator import return_large_blocks
from spryfl.models.loading import load_model
from spryfl.models.quantizing import quantize_checkpoint
import bitsandbytes, transformers.models.llama.modeling_llama

def resident(field):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[field].split()[0]) * 1024

def give_back():  # small blocks that are free, which the C library else keeps: more or less of them in each run
    ctypes.CDLL(None).malloc_trim(0)

def perform(folder, what, options):
    if what == "quantize":
        quantize_checkpoint(ModelConfig(name=str(folder)), Path(options["target"]), "nf4")
        return None
    config = ModelConfig(name=str(folder), dtype="float32", device="cpu", **options)
    loaded = load_model(config, AdapterConfig(), 2, seed=0)
    if what == "run":
        with torch.inference_mode():
            for _ in range(2):
                loaded.model(input_ids=torch.arange(2, 18).view(2, 8))
    return loaded

warm, folder, what, options = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
torch.set_num_threads(1)
return_large_blocks()
perform(warm, what, {**options, **({"target": options["target"] + "-warm"} if "target" in options else {})})
give_back()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew, without the libraries' own code
before = resident("VmRSS")
kept = perform(folder, what, options)
peak = resident("VmHWM")
give_back()
print(json.dumps([peak - before, resident("VmRSS") - before]))
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("random")
    small = LlamaConfig(**{**SHAPE.to_dict(), "vocab_size": 50, "num_hidden_layers": 2, "intermediate_size": 64})
    written = {}
    for precision in ("float32", "nf4"):
        written[precision] = write_random_checkpoint(SHAPE, folder / precision, precision, seed=0)
        write_random_checkpoint(small, folder / f"{precision}-warm", precision, seed=0)
    return written


def _growth(folder: Path, what: str, **options: Any) -> tuple[int, int]:
    """Peak and final growth of the resident set, in bytes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{folder}-warm", str(folder), what, json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    peak, after = json.loads(done.stdout.splitlines()[-1])
    print(f"{what} {options}: peak {peak / MB:.1f} MB, after {after / MB:.1f} MB")
    return peak, after


def test_a_streamed_model_holds_two_layers(stored: Any) -> None:
    """One that computes and one being fetched; of the 41 MB table of embeddings, the rows looked up."""
    peak, after = _growth(stored["float32"], "run", streamed=True)
    assert peak < 2.6 * LAYER_WEIGHTS * 4
    assert after < REST


def test_a_packed_streamed_model_holds_next_to_nothing(stored: Any) -> None:
    """Two packed layers of 2.6 MB, and one unpacked weight of 4.4 MB."""
    peak, after = _growth(stored["nf4"], "run", streamed=True)
    assert peak < 2 * PACKED / LAYERS + WEIGHT + GAPS
    assert after < REST


def test_a_packed_model_is_never_there_unpacked(stored: Any) -> None:
    peak, after = _growth(stored["nf4"], "run")
    assert after < PACKED + REST
    assert peak < PACKED + WEIGHT + GAPS
    predicted = count_weights(SHAPE, "nf4", torch.float32, num_tokens=16)  # of its table, the rows looked up
    assert after == pytest.approx(predicted.resident, rel=0.15)


def test_quantizing_while_loading_never_holds_the_model(stored: Any) -> None:
    """The packed model and a few copies of one weight; the table of embeddings stays in the file."""
    peak, after = _growth(stored["float32"], "load", quantization="nf4")
    assert after < PACKED + REST
    assert peak < PACKED + 6 * WEIGHT + GAPS


def test_quantizing_on_disk_never_holds_the_model(stored: Any, tmp_path: Path) -> None:
    """One shard of what is written, here all of it with the table, and a few copies of one weight."""
    peak, _ = _growth(stored["float32"], "quantize", target=str(tmp_path / "copy"))
    assert peak < PACKED + TABLE_BYTES + 6 * WEIGHT
