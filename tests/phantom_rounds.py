"""Rounds on a device that is not the CPU: nothing is left on the wrong one, and what comes out is the CPU's.

Run by tests/integration/test_accelerator.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phantom import on_any_device
from prompted import TEMPLATE, WORDS, save_decoder
from spryfl.config import RunConfig
from spryfl.data.task import Evaluation
from spryfl.federated.rounds import run_round
from spryfl.map_keeper import MapKeeper
from spryfl.models.loading import resolve_device
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.workbench import Workbench

GUIDED = {"method__name": "fedyogi_guided", "guide__horizon": 1}
CASES: dict[str, dict[str, Any]] = {
    "spry": {},
    "slopes alone": {"method__name": "spry_per_iteration", "method__num_tangents": 3},
    "orthogonal": {"method__distribution": "orthogonal", "method__num_tangents": 2, "method__tangents_per": "unit"},
    "exact head": {"method__exact_head": True},
    "bottleneck": {"method__name": "spry_bottleneck"},
    "zeroth order": {"method__name": "fedmezo"},
    "chosen directions": {"method__name": "fwdllm_plus", "method__num_tangents": 1, "method__num_candidates": 3},
    "guided": GUIDED | {"guide__slopes": "unit"},
    "guess alone": GUIDED | {"guide__slopes": "none"},
    "backprop": {"method__name": "fedavg"},
    "checkpointed": {"method__name": "fedyogi", "method__checkpointing": "per_layer"},
    "budgeted": {"method__name": "fedyogi", "method__checkpointing": "budgeted", "method__budget": "8KB"},
    "dropout, run again": {"method__name": "fedyogi", "method__checkpointing": "per_layer", "adapter__dropout": 0.2},
    "small chunks": {"method__chunk": "32KB"},
    "private": {"privacy__level": "example", "privacy__clip": 1e6, "privacy__noise_multiplier": 1e-30},
    "held out": {"evaluation__held_out": 0.3},
    "streamed": {"model__streamed": True},
    "bfloat16": {"model__dtype": "bfloat16"},
    "auto": {"method__estimator": "auto"},
} | {kind: {"adapter__kind": kind} for kind in ("dora", "lora_xs", "vera", "ia3", "bitfit", "head")}


def trained(config: RunConfig) -> tuple[dict[str, Tensor], Evaluation]:
    """The values after two rounds, and what they are worth."""
    bench = Workbench.from_config(config)
    keeper, runtime = MapKeeper.of(bench), InProcessRuntime(bench.client, bench.batch_tokens)
    state = keeper.start(bench.initial_state())
    for _ in range(2):
        state, report = run_round(state, bench.federation, runtime)
        assert report.failures == report.refused == ()
        state, _, _ = keeper.keep(state)
    return state.values, bench.evaluate(state.values)


@pytest.mark.parametrize("case", CASES)
def test_two_rounds(case: str, tiny_config: Callable[..., RunConfig]) -> None:
    assert_alike(lambda **device: tiny_config(**CASES[case], **device))


def test_guides_whose_maps_the_server_fits(tiny_config: Callable[..., RunConfig], public: Path) -> None:
    guide = {"guess": "maps", "text": str(public), "num_texts": 24, "check_every": 1, "refit_below": 1.0}
    assert_alike(lambda **device: tiny_config(method__name="spry_guided", guide=guide, **device))


@pytest.mark.parametrize(
    ("task", "estimator"),
    [
        ({"kind": "prompted", "template": TEMPLATE, "label_words": WORDS}, "guided"),
        ({"kind": "language_model", "template": "{text}"}, "forward"),
    ],
)
def test_decoders(task: dict[str, Any], estimator: str, tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    model = str(save_decoder("llama", tmp_path))
    tokens = {"data__max_tokens": 48, "partition__kind": "iid"}
    assert_alike(
        lambda **device: tiny_config(task=task, method__estimator=estimator, model__name=model, **tokens, **device)
    )


def assert_alike(make: Callable[..., RunConfig]) -> None:
    """What the CPU comes to, whose kernels these are; but for rounding, where some are fused on the CPU alone."""
    torch.set_num_threads(1)
    with on_any_device():
        expected, expected_score = trained(make())
        values, score = trained(make(model__device="phantom"))
    assert all(value.device.type == "cpu" for value in values.values())
    for name, value in values.items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name
    assert score.loss == pytest.approx(expected_score.loss, rel=1e-5)
    assert score.metrics == pytest.approx(expected_score.metrics, rel=1e-5)


def test_a_tensor_on_the_wrong_device_is_found() -> None:
    here = torch.ones(3, device="phantom")
    assert (here + torch.tensor(1.0)).cpu().tolist() == [2.0] * 3
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        here + torch.ones(3)
    assert resolve_device("phantom").type == "phantom"
    assert resolve_device("auto").type == "cpu"
