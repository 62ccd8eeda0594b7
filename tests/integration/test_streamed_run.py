"""A federated run whose model's layers stay on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest

from packed import save_family
from spryfl.config import RunConfig
from spryfl.federated.rounds import run_round
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.workbench import Workbench


@pytest.mark.parametrize("method", ["spry", "fedmezo"])
def test_the_same_rounds(method: str, tiny_config: Callable[..., RunConfig], tiny_model: Path, tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path, tiny_model)
    reports, accuracies = [], []
    for streamed in (False, True):
        bench = Workbench.from_config(
            tiny_config(model__name=str(folder), model__streamed=streamed, method__name=method)
        )
        runtime = InProcessRuntime(bench.client, bench.batch_tokens)
        state, report = run_round(bench.initial_state(), bench.federation, runtime)
        assert not report.failures
        reports.append((report.loss, report.bytes_up))
        accuracies.append(bench.evaluate(state.values))
    assert reports[0] == reports[1]
    assert accuracies[0] == accuracies[1]
