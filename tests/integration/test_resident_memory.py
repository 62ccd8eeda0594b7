"""What lies in memory, as the kernel counts it: pages of mapped files included."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from spryfl.bench.random_checkpoint import write_random_checkpoint

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
TABLE_BYTES = 16000 * 640 * 4  # 41 MB in float32

PROGRAM = """
import json, sys
import torch
from pathlib import Path
from packed import use_dense_weights
from spryfl.config import AdapterConfig, ModelConfig
from spryfl.memory.allocator import return_large_blocks
from spryfl.models.loading import load_model
from spryfl.models.quantizing import quantize_checkpoint
import bitsandbytes, transformers.models.llama.modeling_llama

def resident(field):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[field].split()[0]) * 1024

folder, what, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
return_large_blocks()
torch.randn(64, 64) @ torch.randn(64, 64)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = resident("VmRSS")
if what == "quantize":
    quantize_checkpoint(ModelConfig(name=str(folder)), Path(options["target"]), "nf4")
else:
    config = ModelConfig(name=str(folder), dtype="float32", device="cpu", **options)
    loaded = load_model(config, AdapterConfig(), 2, seed=0)
    use_dense_weights(loaded.model)
    ids = torch.arange(2, 18).view(2, 8)
    if what == "run":
        with torch.inference_mode():
            loaded.model(input_ids=ids)
            loaded.model(input_ids=ids)
print(json.dumps([resident("VmHWM") - before, resident("VmRSS") - before]))
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("random")
    return {p: write_random_checkpoint(SHAPE, folder / p, p, seed=0) for p in ("float32", "nf4")}  # type: ignore[arg-type]


def _growth(folder: Path, what: str, **options: Any) -> tuple[int, int]:
    """Peak and final growth of the resident set, in bytes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), what, json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    peak, after = json.loads(done.stdout.splitlines()[-1])
    print(what, options, peak / MB, after / MB)
    return peak, after


def test_a_streamed_model_holds_two_layers(stored: Any) -> None:
    layer = LAYER_WEIGHTS * 4
    peak, after = _growth(stored["float32"], "run", streamed=True)
    assert peak < 3 * layer
    assert after < layer


def test_a_packed_streamed_model_holds_next_to_nothing(stored: Any) -> None:
    """Two packed layers and one unpacked weight; of the 20 MB table of embeddings the rows looked up."""
    peak, _ = _growth(stored["nf4"], "run", streamed=True)
    assert peak < 2 * LAYER_WEIGHTS // 2 + 3 * 640 * 1728 * 4 + 15 * MB


def test_a_packed_model_is_never_there_unpacked(stored: Any) -> None:
    packed = LAYERS * LAYER_WEIGHTS * 0.53
    peak, _ = _growth(stored["nf4"], "run")
    assert peak < packed + 3 * 640 * 1728 * 4 + 15 * MB


def test_quantizing_while_loading_never_holds_the_model(stored: Any) -> None:
    """The packed model and two weights; the table of embeddings stays in the file."""
    packed = LAYERS * LAYER_WEIGHTS * 0.53
    peak, after = _growth(stored["float32"], "load", quantization="nf4")
    assert peak < packed + 4 * 640 * 1728 * 4 + 15 * MB < LAYERS * LAYER_WEIGHTS * 4
    assert after < packed + 15 * MB


def test_quantizing_on_disk_never_holds_the_model(stored: Any, tmp_path: Path) -> None:
    """One shard of what is written, here all of it, the table included, and two weights."""
    packed = LAYERS * LAYER_WEIGHTS * 0.53 + TABLE_BYTES
    peak, _ = _growth(stored["float32"], "quantize", target=str(tmp_path / "copy"))
    assert peak < packed + 4 * 640 * 1728 * 4 + 15 * MB < LAYERS * LAYER_WEIGHTS * 4
