"""Runs over Flower on this machine: SuperLink and SuperNodes are processes, the network is loopback."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr")

from flower_world import FlowerWorld
from spryfl.config import load_config
from spryfl.suite import run_suite
from spryfl.tracking.run_directory import RunDirectory

MINILM: dict[str, Any] = {
    "model": {"name": "builtin:minilm", "dtype": "float32", "device": "cpu"},
    "data": {"max_tokens": 16, "max_train_examples": 60, "max_test_examples": 40},
    "partition": {"kind": "iid", "num_clients": 3},
    "server": {"num_rounds": 5, "cohort_size": 3, "deadline_seconds": 120.0},
    "runtime": {"num_threads": 1},
}


def in_process(table: dict[str, Any], folder: Path) -> Path:
    """The same run without Flower; returns its directory."""
    file = folder / "in-process.toml"
    file.write_text(tomli_w.dumps(table))
    run_suite(load_config(file), folder / "in-process")
    return folder / "in-process"


def assert_same_adapter(one: Path, other: Path) -> None:
    for name in ("checkpoint.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    mine, yours = (RunDirectory(path).read_events() for path in (one, other))
    assert [(e.round, e.loss, e.accuracy, e.bytes_up) for e in mine] == [
        (e.round, e.loss, e.accuracy, e.bytes_up) for e in yours
    ]


def test_three_authenticated_nodes_train_what_one_process_trains(tmp_path: Path) -> None:
    """Certificates and node keys; five rounds of a real model end bitwise where they end in one process."""
    threads = torch.get_num_threads()
    expected = in_process(MINILM, tmp_path)
    torch.set_num_threads(threads)
    with FlowerWorld(tmp_path / "w", MINILM, secure=True) as world:
        for partition in (2, 0, 1):
            world.start_node(partition, world.make_key(f"node{partition}"))
        assert world.finish(world.submit(), 240) == "finished:completed", world.log()
        assert_same_adapter(world.run_dir, expected)
