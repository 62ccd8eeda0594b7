"""Runs over Flower on this machine: SuperLink and SuperNodes are processes, the network is loopback."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("flwr")

from flower_world import FlowerWorld, kill, processes_of, wait_for
from spryfl.config import load_config
from spryfl.suite import run_suite
from spryfl.tracking.run_directory import RunDirectory

MINILM: dict[str, Any] = {
    "model": {"name": "builtin:minilm", "dtype": "float32", "device": "cpu"},
    "data": {"max_tokens": 16, "max_train_examples": 60, "max_test_examples": 40},
    "partition": {"kind": "iid", "num_clients": 3},
    "server": {"num_rounds": 5, "cohort_size": 3, "deadline_seconds": 120.0},
    "evaluation": {"held_out": 0.2},
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
    assert [(e.round, e.loss, e.accuracy, e.bytes_up, e.held_out) for e in mine] == [
        (e.round, e.loss, e.accuracy, e.bytes_up, e.held_out) for e in yours
    ]


def test_three_authenticated_nodes_train_what_one_process_trains(tmp_path: Path) -> None:
    """Five rounds of a real model end bitwise where they end in one process, and clients' evaluations with them.

    A node without a known key stays out.
    """
    threads = torch.get_num_threads()
    expected = in_process(MINILM, tmp_path)
    torch.set_num_threads(threads)
    with FlowerWorld(tmp_path / "w", MINILM, secure=True) as world:
        strangers = [world.start_node(0), world.start_node(0, world.make_key("unknown", register=False))]
        for partition in (2, 0, 1):
            world.start_node(partition, world.make_key(f"node{partition}"))
        assert world.finish(world.submit(), 400) == "finished:completed", world.log()
        assert_same_adapter(world.run_dir, expected)
        held_out = world.events()[-1].held_out
        assert {name: (own["num_clients"], own["num_examples"]) for name, own in held_out.items()} == {
            "generalized": (3, 12),
            "personalized": (3, 12),
        }
        assert world.log().count("is here") == 3
        assert all(process.poll() not in (None, 0) for process in strangers)
        told = json.loads(world.spry("status", str(world.run_dir), "--json"))
    assert (told["finished"], told["rounds"], told["clients"], told["failures"]) == (True, 5, [0, 1, 2], {})


MISBEHAVING = """
import json
import time

import numpy as np
from flwr.app import Message
from safetensors.numpy import load, save

from spryfl.runtime.flower.wire import parcel_of, to_content
from spryfl.runtime.parcels import Parcel

honest = app


class Misbehaving(type(app)):
    def __call__(self, message, context):
        asked = json.loads(parcel_of(message).header)
        case = (asked.get("client"), asked.get("round"))
        if case == (1, 1):
            raise RuntimeError("no battery")
        if case == (2, 1):
            time.sleep(160)  # past its deadline and the server's patience
        if case == (3, 2):
            time.sleep(6)  # it is killed in the meantime, once
        reply = honest(message=message, context=context)
        parcel = parcel_of(reply)
        if asked["kind"] == "evaluation_task" and case[0] == 1:
            header = json.dumps(json.loads(parcel.header) | {"loss": float("nan")})
            return Message(to_content(Parcel(header)), reply_to=message)
        if case not in ((1, 2), (1, 3)):
            return reply
        tensors = load(parcel.tensors)
        name = next(iter(tensors))
        if case == (1, 2):
            tensors[name] = np.full_like(tensors[name], np.nan)
        else:
            tensors["tensors/another.unit"] = tensors[name]
        return Message(to_content(Parcel(parcel.header, save(tensors))), reply_to=message)


app = Misbehaving()
"""


def tiny(tiny_table: dict[str, dict[str, Any]], **server: object) -> dict[str, Any]:
    return tiny_table | {
        "method": {"name": "fedavg_split"},
        "server": {"learning_rate": 1.0, **server},
        "runtime": {"num_threads": 1},
    }


@pytest.mark.flower
@pytest.mark.timeout(1800)
def test_a_run_goes_on_whatever_its_clients_do(
    tiny_table: dict[str, dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    """Raising, hanging, NaN, a forged unit, a node killed and started anew, another base model: counted by kind.

    So are those that do not, or not honestly, evaluate at the end.
    """
    folder = tmp_path / "w"
    table = tiny(tiny_table, num_rounds=4, cohort_size=5, deadline_seconds=120.0)
    table |= {"model": {**table["model"], "name": "./base"}, "partition": {"kind": "iid", "num_clients": 5}}
    table |= {"evaluation": {**table["evaluation"], "held_out": 0.2}}
    with FlowerWorld(folder, table, extra=MISBEHAVING) as world:
        shutil.copytree(tiny_model, folder / "base")
        shutil.copytree(tiny_model, folder / "other/base")
        weights = folder / "other/base/model.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
        nodes = [world.start_node(partition) for partition in range(4)]
        world.start_node(4, cwd=folder / "other")
        run = world.submit()
        world.wait_for_round(1, 500)
        wait_for(lambda: "ROUND 2" in (folder / "4-flower-supernode.log").read_text(), 120, "node 3 has its task")
        kill(nodes[3])
        world.start_node(3)
        assert world.finish(run, 500) == "finished:completed", world.log()
        events = world.events()[1:]
    reasons = {(e.round, int(r.partition(":")[0])): r for e in events for r in (*e.failures, *e.refused)}
    assert "no battery" in reasons[1, 1]
    assert "no answer by its deadline" in reasons[1, 2]
    assert "not finite" in reasons[1 + 1, 1]
    assert "'another.unit' was not assigned" in reasons[3, 1]
    assert all("another base model" in reasons[number, 4] for number in range(1, 5))
    assert [(e.round, client) for e in events for client in (0, 3) if client not in e.clients] == []
    assert [late for e in events for late in e.late] == ["2: its update of round 1 came too late"]
    assert events[0].failure_kinds == {"raised": 1, "deadline": 1, "refused": 1}
    assert list(events[-1].held_out) == ["generalized", "personalized"]
    for own in events[-1].held_out.values():
        assert own["num_clients"] == 3
        liar, stranger = own["failures"]
        assert liar == "1: its loss is nan"
        assert stranger.startswith("4: it holds another base model")


SLOW = """
import json
import time

from spryfl.runtime.flower.wire import parcel_of

quick = app


class Slow(type(app)):
    def __call__(self, message, context):
        if json.loads(parcel_of(message).header)["kind"] == "task":
            time.sleep(6)
        return quick(message=message, context=context)


app = Slow()
"""


@pytest.mark.flower
@pytest.mark.timeout(1800)
def test_a_registered_node_killed_in_a_round_is_back_within_it(
    tiny_table: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """The SuperLink turns its key away while it takes the node for online; started again and again it gets in."""
    table = tiny(tiny_table, num_rounds=1, cohort_size=2, deadline_seconds=300.0)
    table |= {"partition": {"kind": "iid", "num_clients": 2}}
    with FlowerWorld(tmp_path / "w", table, secure=True, extra=SLOW) as world:
        keys = [world.make_key(f"node{partition}") for partition in (0, 1)]
        starts = [world.start_node(partition, keys[partition]) for partition in (0, 1)]
        run = world.submit()
        wait_for(lambda: "ROUND 1" in (world.folder / "2-flower-supernode.log").read_text(), 500, "it has its task")
        kill(starts[-1])

        def is_done() -> bool:
            if starts[-1].poll() is not None:
                starts.append(world.start_node(1, keys[1]))
            return any(event.round == 1 for event in world.events())

        wait_for(is_done, 400, "round 1 is done")
        assert world.finish(run, 300) == "finished:completed", world.log()
        assert world.events()[-1].clients == (0, 1)
        assert len(starts) > 2


@pytest.mark.flower
@pytest.mark.timeout(1800)
def test_killed_servers_go_on_from_their_last_round(tiny_table: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """The server's process, then the SuperLink; what is trained is bitwise what one process trains.

    Guided, with all that it brings down: maps, fitted anew on the way, and the server's momentum.
    """
    table = tiny(tiny_table, num_rounds=7, cohort_size=2) | {"partition": {"kind": "iid", "num_clients": 2}}
    table["method"] = {"name": "spry_guided"}
    table["guide"] = {"guess": "maps", "text": table["data"]["name"], "check_every": 2, "refit_below": 1.0}
    table["guide"] |= {"text_columns": ["text"], "num_texts": 24, "momentum": True}
    threads = torch.get_num_threads()
    expected = in_process(table, tmp_path)
    torch.set_num_threads(threads)
    with FlowerWorld(tmp_path / "w", table) as world:
        for partition in (0, 1):
            world.start_node(partition)
        world.submit()
        world.wait_for_round(1, 500)
        (server,) = processes_of(world.folder, "flwr-serverapp")
        os.kill(server, signal.SIGKILL)
        seen = world.events()[-1].round
        world.submit()
        world.wait_for_round(seen + 1, 400)
        kill(world.superlink)
        world.start_superlink()
        assert not (world.run_dir / "summary.json").exists()
        assert world.finish(world.submit(), 300) == "finished:completed", world.log()
        assert world.log().count("going on after round") == 2
        assert sum(event.maps_fitted for event in world.events()) > 0
    assert_same_adapter(world.run_dir, expected)


@pytest.mark.flower
@pytest.mark.timeout(1800)
def test_clients_bring_data_of_their_own(tiny_table: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """However many rows each has; a node that names none takes no part, and says why."""
    table = tiny(tiny_table, num_rounds=2, cohort_size=3, quorum=0.5)
    table |= {"partition": {"kind": "own", "num_clients": 3}, "evaluation": {"held_out": 0.2}}
    files = [tmp_path / f"rows{client}.jsonl" for client in (0, 1)]
    for file, num_rows in zip(files, (100, 15), strict=True):
        rows = [{"text": f"the film is {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(num_rows)]
        file.write_text("\n".join(map(json.dumps, rows)))
    with FlowerWorld(tmp_path / "w", table) as world:
        for client, file in enumerate(files):
            world.start_node(client, extra=f"data='{file}'")
        world.start_node(2)
        run = world.submit(wait_seconds=60.0)
        assert world.finish(run, 500) == "finished:completed", world.log()
        events = world.events()[1:]
        assert "takes no part: node config: it names no data, but partition.kind = 'own'" in world.log()
    assert [event.clients for event in events] == [(0, 1)] * 2
    assert [event.failure_kinds for event in events] == [{"absent": 1}] * 2
    assert events[-1].held_out["generalized"]["num_examples"] == 20 + 3


@pytest.mark.flower
@pytest.mark.timeout(1800)
def test_a_simulation_of_a_hundred_clients(tiny_table: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """In Ray's processes, one processor each; again bitwise what one process trains."""
    pytest.importorskip("ray")
    rows = [{"text": f"the film {i} is {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(400)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    table = tiny(tiny_table, num_rounds=2, cohort_size=20) | {"partition": {"kind": "iid", "num_clients": 100}}
    table["data"] = {**table["data"], "name": str(data)}
    threads = torch.get_num_threads()
    expected = in_process(table, tmp_path)
    torch.set_num_threads(threads)
    with FlowerWorld(tmp_path / "w", table, simulation=True) as world:
        nodes = "num-supernodes=100 client-resources-num-cpus=1 init-args-num-cpus=2"
        assert world.finish(world.submit("--federation-config", nodes), 500) == "finished:completed", world.log()
    assert_same_adapter(world.run_dir, expected)
