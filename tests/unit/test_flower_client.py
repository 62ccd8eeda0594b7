"""The process that outlives messages, what a client is configured by, and what never leaves it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch

from flower_world import wait_for
from spryfl.config import RunConfig, parse_config
from spryfl.errors import ConfigError, SpryError
from spryfl.federated.messages import ClientFailure, ClientTask, ClientUpdate, EvaluationTask
from spryfl.presets import FLOWER_APP
from spryfl.runtime.flower import performer, warm
from spryfl.runtime.flower.settings import own_data_of, partition_of, read_order
from spryfl.runtime.messages import decode_evaluation, decode_update, encode_task
from spryfl.runtime.parcels import Parcel
from spryfl.workbench import Workbench


@pytest.fixture
def tiny_file(tiny_table: dict[str, dict[str, object]], tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(tiny_table))
    return file


def order(file: Path, task: ClientTask | EvaluationTask | None = None, **changes: object) -> Parcel:
    asked = None if task is None else encode_task(task)
    header = {"file": str(file), "overrides": [], "client": 1, "data": None, "labels": ["0", "1"], "shared": False}
    header |= {"task": None if asked is None else asked.header} | changes
    return Parcel(json.dumps(header), b"" if asked is None else asked.tensors)


def task_of(config: RunConfig) -> ClientTask:
    bench = Workbench.from_config(config)
    unit = next(iter(bench.federation.units))
    return ClientTask(1, 1, 0, (unit,), bench.federation.units[unit], bench.initial_state().values, "values")


def test_a_client_computes_what_it_would_in_process(tiny_file: Path, tiny_table: dict[str, dict[str, object]]) -> None:
    """Though it loads its own rows alone."""
    config = parse_config(tiny_table)
    task = task_of(config)
    theirs = Workbench.from_config(config).client(1).update(task)
    for shared in (False, True):
        ours = decode_update(performer.answer(order(tiny_file, task, shared=shared)), 1)
        assert (ours.loss, ours.num_examples) == (theirs.loss, theirs.num_examples)
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)


def test_a_clients_own_data_stays_with_it(
    tiny_file: Path, tiny_table: dict[str, dict[str, object]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All its rows are trained on, labelled as the server's; an error that quotes one is told here alone."""
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps({"text": "the film is bad", "label": 0}) for _ in range(5)))
    task = task_of(parse_config(tiny_table))
    answer = decode_update(performer.answer(order(tiny_file, task, data=str(own))), 1)
    assert answer.num_examples == 5  # one class alone is no problem: the server names the classes
    own.write_text(json.dumps({"text": "x", "label": "secret"}))
    refused = decode_update(performer.answer(order(tiny_file, task, data=str(own))), 1)  # as it is now, not as it was
    assert "secret" not in refused.reason
    assert "'secret', which is none of the server's: 0, 1" in capfd.readouterr().err


def test_own_data_are_loaded_anew_only_when_they_change(
    tiny_file: Path, tiny_table: dict[str, dict[str, object]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    rows = [json.dumps({"text": "the film is bad " * 9, "label": 0})] * 3
    (own / "train.jsonl").write_text("\n".join(rows))
    task = task_of(parse_config(tiny_table))

    def num_examples() -> int:
        return decode_update(performer.answer(order(tiny_file, task, data=str(own))), 1).num_examples

    assert num_examples() == 3
    assert "client 1: 3 of 3 train texts are longer than data.max_tokens = 16" in capfd.readouterr().err
    (first,) = performer._kept.values()
    (own / "notes.log").write_text("not read")
    (own / ".#train.jsonl").symlink_to("nowhere")  # an editor's
    assert num_examples() == 3
    assert list(performer._kept.values()) == [first]
    (own / "train.jsonl").write_text("\n".join(rows * 2))
    assert num_examples() == 6


def test_a_client_evaluates_what_it_would_in_process(
    tiny_file: Path, tiny_table: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    """The model it is sent and what it makes of that, on the rows it holds out, cut alike though it loads no others."""
    config = parse_config(tiny_table | {"evaluation": {"held_out": 0.3}})
    tiny_file.write_text(tomli_w.dumps(tiny_table | {"evaluation": {"held_out": 0.3}}))
    training = task_of(config)
    client = Workbench.from_config(config).client(1)
    for task in (EvaluationTask(1, 1, training.values), EvaluationTask(1, 1, training.values, training)):
        theirs = client.evaluate(task)
        for shared in (False, True):
            assert decode_evaluation(performer.answer(order(tiny_file, task, shared=shared)), 1) == theirs


def test_a_client_holds_out_of_its_own_data(
    tiny_file: Path, tiny_table: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    tiny_file.write_text(tomli_w.dumps(tiny_table | {"evaluation": {"held_out": 0.3}}))
    own = tmp_path / "own.jsonl"
    task = task_of(parse_config(tiny_table))
    asked = EvaluationTask(1, 1, task.values)
    for num_rows, num_trained, num_held in ((10, 7, 3), (1, 1, 0)):
        own.write_text("\n".join(json.dumps({"text": "the film is bad", "label": 0}) for _ in range(num_rows)))
        header = {"data": str(own)}
        assert decode_update(performer.answer(order(tiny_file, task, **header)), 1).num_examples == num_trained
        found = decode_evaluation(performer.answer(order(tiny_file, asked, **header)), 1)
        if num_held:
            assert found.num_examples == num_held
        else:
            assert isinstance(found, ClientFailure)


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def test_the_worker_outlives_messages_and_dies_with_its_parent(
    tiny_file: Path, tiny_table: dict[str, dict[str, object]], tmp_path: Path, parent: subprocess.Popen[bytes]
) -> None:
    def ask(timeout: float | None = 120, task: ClientTask | None = None) -> dict[str, object]:
        return json.loads(warm.ask(order(tiny_file, task), timeout, parent.pid).header)

    def worker() -> int:
        with warm._connected(parent.pid) as connection:
            return warm._peer(connection)

    first = ask()
    assert (first["kind"], first["client"]) == ("presence", 1)
    process = worker()
    assert ask() == first
    assert ask(task=task_of(parse_config(tiny_table)))["kind"] == "update"
    assert worker() == process
    os.kill(process, signal.SIGSTOP)  # it hangs
    late = ask(0.2)
    assert (late["failure"], late["kind"]) == ("deadline", "failure")
    assert ask() == first
    assert worker() != process
    parent.kill()
    parent.wait()
    folder = tmp_path / f"spry-{os.getuid()}" / str(parent.pid)
    wait_for(lambda: not folder.exists(), 30, "the worker has ended")


SLOW_TO_LOAD = """
import socket, sys, time
from spryfl.runtime.flower.warm import LOADED, TAKEN
from spryfl.runtime.parcels import Parcel, receive_parcel, send_parcel
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
while True:
    connection, _ = listener.accept()
    receive_parcel(connection)
    send_parcel(connection, TAKEN)
    time.sleep(2)
    send_parcel(connection, LOADED)
    send_parcel(connection, Parcel("{}"))
"""


def test_loading_does_not_count_to_a_deadline(
    tmp_path: Path, parent: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a client whose model takes longer to load than its deadline is would never take part, nor one of new data."""
    workers = []

    def start(address: str, _: int) -> None:
        workers.append(subprocess.Popen([sys.executable, "-c", SLOW_TO_LOAD, address]))

    monkeypatch.setattr(warm, "_start", start)
    try:
        assert warm.ask(Parcel("{}"), 0.5, parent.pid) == Parcel("{}")
        folder = tmp_path / f"spry-{os.getuid()}" / str(parent.pid)
        (folder / "loaded").touch()
        assert warm.ask(Parcel("{}"), 0.5, parent.pid) == Parcel("{}")  # it loads anew
        monkeypatch.setattr(warm, "LOADING_SECONDS", 0.5)
        (folder / "socket").unlink()
        assert json.loads(warm.ask(Parcel("{}"), 60, parent.pid).header)["failure"] == "deadline"
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def test_a_folder_others_can_enter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"spry-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(SpryError, match="others can enter it"):
        warm.ask(Parcel("{}"), 1.0)


def test_run_config_and_node_config_are_checked(tiny_file: Path) -> None:
    given = read_order(tiny_file, {"set": "server.num_rounds=9 seed=4", "run-dir": "/tmp/x"})
    assert (given.config.server.num_rounds, given.config.seed, given.run_dir) == (9, 4, Path("/tmp/x"))
    with pytest.raises(ConfigError, match=r"'run_dir': unknown. Did you mean 'run-dir'\?"):
        read_order(tiny_file, {"run_dir": "x"})
    with pytest.raises(ConfigError, match=r"unknown key 'server\.rounds'"):
        read_order(tiny_file, {"set": "server.rounds=9"})
    assert partition_of({"partition-id": 2}, 3) == 2
    for wrong in ({}, {"partition-id": 3}, {"partition-id": "0"}, {"partition-id": True}, {"partition-id": -1}):
        with pytest.raises(ConfigError, match="clients are 0 to 2"):
            partition_of(wrong, 3)
    for key, wrong, message in (
        ("set", "label='a", "No closing quotation: close what is quoted"),
        ("wait-seconds", "soon", "wait-seconds='soon': give a number of seconds"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_order(tiny_file, {key: wrong})


def test_own_data_go_with_a_partition_of_their_own() -> None:
    assert own_data_of({"data": "rows.jsonl"}, "own") == "rows.jsonl"
    assert own_data_of({}, "iid") is None
    with pytest.raises(ConfigError, match=r"names no data, but partition\.kind = 'own'"):
        own_data_of({}, "own")
    with pytest.raises(ConfigError, match=r"it names data of its own, but partition\.kind = 'iid'") as told:
        own_data_of({"data": "rows.jsonl"}, "iid")
    assert "rows" not in str(told.value)  # it travels


def test_where_a_column_decides_the_data_tell_how_many_clients_there_are(
    tiny_table: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    partition = {"kind": "column", "column": "topic"}
    server = {"num_rounds": 1, "cohort_size": 3}
    file.write_text(tomli_w.dumps(tiny_table | {"partition": partition, "server": server}))
    given = read_order(file, {})
    assert partition_of({"partition-id": 150}, given.num_clients) == 150
    with pytest.raises(ConfigError, match="clients are 0 and up"):
        partition_of({"partition-id": -1}, given.num_clients)
    task = replace(task_of(given.config), client=2)
    assert isinstance(decode_update(performer.answer(order(file, task, client=2)), 2), ClientUpdate)
    refused = decode_update(performer.answer(order(file, task, client=3)), 3)
    assert refused.reason == "partition-id 3: the data make 3 clients, 0 to 2"


def test_the_app_that_comes_with_the_package_is_valid() -> None:
    """What `spry init --flower` copies is examples/flower, and its run is one."""
    example = Path(__file__).parents[2] / "examples/flower"
    names = sorted(path.name for path in FLOWER_APP.iterdir() if path.is_file())
    assert names == sorted(path.name for path in example.iterdir() if path.is_file())
    assert all((FLOWER_APP / name).read_bytes() == (example / name).read_bytes() for name in names)
    assert read_order(FLOWER_APP / "run.toml", {}).config.server.quorum == 0.5
