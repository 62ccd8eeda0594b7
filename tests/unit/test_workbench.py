"""What a configuration says is what rounds and clients go by."""

from collections.abc import Callable
from pathlib import Path

import pytest

from spryfl.config import RunConfig
from spryfl.errors import ConfigError
from spryfl.federated.schedule import Schedule
from spryfl.federated.server_optimizer import ServerUpdate
from spryfl.run import run_in
from spryfl.suite import run_suite
from spryfl.tracking.events import Note, Observer
from spryfl.workbench import Workbench


def test_what_is_configured_is_what_rounds_use(tiny_config: Callable[..., RunConfig]) -> None:
    server = {"optimizer": "adam", "learning_rate": 0.3, "beta1": 0.5, "beta2": 0.7, "tau": 0.02, "quorum": 0.4}
    server |= {"schedule": "linear", "num_rounds": 4, "schedule_rounds": 9, "warmup_rounds": 2, "cohort_size": 3}
    server |= {"max_update_norm": 5.0, "clip_norm": 2.0, "deadline_seconds": 7.0, "sampling": "size"}
    local = {"epochs": 3, "batch_size": 2, "optimizer": "sgd", "learning_rate": 0.2, "weight_decay": 0.1}
    bench = Workbench.from_config(tiny_config(server=server, local=local))
    own, training = bench.federation, bench.training
    assert own.server == ServerUpdate("adam", 0.3, 0.5, 0.7, 0.02, Schedule("linear", 9, 2))
    assert (own.quorum, own.max_update_norm, own.clip_norm, own.deadline_seconds) == (0.4, 5.0, 2.0, 7.0)
    assert (training.epochs, training.batch_size, training.optimizer) == (3, 2, "sgd")
    assert (training.learning_rate, training.weight_decay) == (0.2, 0.1)
    assert sum(own.sizes) == len(bench.train)
    assert own.sampling.sizes == own.sizes


class Notes(Observer):
    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.about: dict[str, str] = {}

    def noted(self, note: Note) -> None:
        self.texts[note.kind] = note.text
        self.about[note.kind] = note.about


def test_a_run_tells_of_clients_without_some_class(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    skewed = {"partition__alpha": 1e-10, "server__num_rounds": 1}
    bench = Workbench.from_config(tiny_config(**skewed))
    lacking = [client for client, own in enumerate(bench.label_counts.tolist()) if 0 in own]
    missing = bench.label_names[bench.label_counts[lacking[0]].tolist().index(0)]
    notes = Notes()
    run_in(tiny_config(**skewed), tmp_path / "run", [notes])
    assert notes.texts["missing_classes"].startswith(
        f"{len(lacking)} of 8 clients hold no row of some class (client {lacking[0]} none of '{missing}')"
    )
    assert notes.about["missing_classes"].endswith(", dirichlet 1e-10")  # another deal of the same data is told too
    for told in (tiny_config(**skewed, local__logit_adjustment=1.0), tiny_config(partition__alpha=1e10)):
        assert Workbench.from_config(told).missing_classes is None


def test_a_run_tells_of_texts_it_does_not_read_whole(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    whole = Workbench.from_config(tiny_config())
    assert whole.truncated("train", "test") is None
    limit = max(len(encoding["input_ids"]) for encoding in whole.train.encodings) - 1
    cut = [sum(len(e["input_ids"]) > limit for e in part.encodings) for part in (whole.train, whole.test)]
    notes = Notes()
    run_in(tiny_config(data__max_tokens=limit, server__num_rounds=1), tmp_path / "run", [notes])
    note = notes.texts["truncated"]
    assert note.startswith(f"{cut[0]} of {len(whole.train)} train texts")
    assert ("test texts" in note) == (cut[1] > 0)
    assert note.endswith(f"longer than data.max_tokens = {limit} and were truncated: raise it to have them read whole")


def test_own_data_needs_flower(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(partition={"kind": "own", "num_clients": 3})
    federation = Workbench.from_config(config).federation
    assert (federation.num_clients, federation.sizes) == (3, ())
    with pytest.raises(ConfigError, match="bring their own data"):
        run_suite(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
