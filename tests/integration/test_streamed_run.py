"""A federated run whose model's layers stay on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from packed import save_family
from prompted import TEXTS, save_decoder
from spryfl.config import RunConfig
from spryfl.federated.rounds import run_round
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.workbench import Workbench


def require_the_same_rounds(make: Callable[..., RunConfig], **settings: Any) -> None:
    """Resident and streamed, bit for bit."""
    reports, evaluations = [], []
    for streamed in (False, True):
        bench = Workbench.from_config(make(model__streamed=streamed, **settings))
        runtime = InProcessRuntime(bench.client, bench.batch_tokens)
        state, report = run_round(bench.initial_state(), bench.federation, runtime)
        assert not report.failures
        assert any(not torch.equal(state.values[name], value) for name, value in bench.initial_state().values.items())
        reports.append((report.loss, report.bytes_up))
        evaluations.append(bench.evaluate(state.values))
    assert reports[0] == reports[1]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("method", ["spry", "fedmezo", "fedavg"])
def test_the_same_rounds(method: str, tiny_config: Callable[..., RunConfig], tiny_model: Path, tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path, tiny_model)
    require_the_same_rounds(tiny_config, model__name=str(folder), method__name=method)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["spry", "spry_guided", "fedyogi", "fedmezo"])
def test_the_same_rounds_of_a_language_model(
    method: str, tied: bool, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Its head is read from disk too, or from the embeddings it is tied to."""
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 12))
    require_the_same_rounds(
        tiny_config,
        model__name=str(save_decoder("llama", tmp_path / "model", tied=tied)),
        data__name=str(tmp_path / "texts.jsonl"),
        data__max_tokens=32,
        task={"kind": "language_model"},
        partition={"kind": "iid", "num_clients": 6},
        method__name=method,
        method__checkpointing="per_layer" if method == "fedyogi" else "none",
    )
