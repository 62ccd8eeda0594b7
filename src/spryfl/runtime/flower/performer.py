"""What a client does with a message: it says who it is, or performs a task on data that never leaves it."""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from spryfl.config import RunConfig, load_config
from spryfl.data.loading import files_of
from spryfl.errors import SpryError
from spryfl.federated.messages import ClientEvaluation, ClientFailure, ClientUpdate, EvaluationTask
from spryfl.models.fingerprint import base_fingerprint
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.runtime.messages import decode_task, encode_answer
from spryfl.runtime.parcels import Parcel
from spryfl.workbench import Workbench


def answer(order: Parcel) -> Parcel:
    """Do what a parcel asks: see `prepare`."""
    return prepare(order)()


def prepare(order: Parcel) -> Callable[[], Parcel]:
    """Load what a parcel asks for, which takes long at first.

    Returns:
        What then does it and answers.

    Args:
        order: its header holds `file` and `overrides` of the configuration, `client`, `data` (the path of the client's
            own data, or null), `labels` (the class names, or null before they are known), `shared` (whether this
            process stands for many clients) and `task` (a task's header, or null where the client is asked who it is);
            its tensors are the task's.
    """
    header = json.loads(order.header)
    if header["task"] is None:
        return partial(_told, header, lambda: _presence(header))
    names = ("file", "overrides") if header["shared"] else ("file", "overrides", "client", "data", "labels")
    loaded = [_frozen(header[name]) for name in names]
    try:
        runtime = _shared_runtime(*loaded) if header["shared"] else _runtime(*loaded)
    except SpryError as error:
        return partial(_told, header, partial(ClientFailure, header["client"], str(error)))
    return partial(_told, header, lambda: _performed(runtime, Parcel(header["task"], order.tensors)))


def _performed(runtime: InProcessRuntime, order: Parcel) -> ClientUpdate | ClientEvaluation | ClientFailure:
    task = decode_task(order)
    (result,) = runtime.evaluate([task]) if isinstance(task, EvaluationTask) else runtime.run([task])
    return result


def _told(
    header: dict[str, Any], work: Callable[[], Parcel | ClientUpdate | ClientEvaluation | ClientFailure]
) -> Parcel:
    """What work comes to, as a parcel; an error is told in this process's log, and as much of it as may travel."""
    try:
        result = work()
    except SpryError as error:
        result = ClientFailure(header["client"], str(error))
    if isinstance(result, Parcel):
        return result
    if isinstance(result, ClientFailure) and result.kind == "raised":
        print(f"client {result.client}: {result.reason}", file=sys.stderr, flush=True)
        if header["data"] is not None:  # a message may quote a row
            result = replace(result, reason="it raised an error, which its own log tells")
    return encode_answer(result)


def _presence(header: dict[str, Any]) -> Parcel:
    """Which partition this is, and the hash of the base model it holds."""
    base = _fingerprint(header["file"], _frozen(header["overrides"]))
    return Parcel(json.dumps({"kind": "presence", "client": header["client"], "base": base}))


@lru_cache(maxsize=1)
def _fingerprint(file: str, overrides: tuple[str, ...]) -> str:
    return base_fingerprint(load_config(Path(file), overrides).model)


_kept: dict[tuple[Any, ...], InProcessRuntime] = {}
"""The one model and data of this process, by what they were loaded for."""


def _runtime(
    file: str, overrides: tuple[str, ...], client: int, data: str | None, labels: tuple[str, ...]
) -> InProcessRuntime:
    """The client's model and data, unless its data have changed since they were loaded."""

    def load() -> Workbench:
        bench = Workbench.of_client(_configured(file, overrides), client, data, labels)
        cut = bench.truncated("train")
        if cut is not None:
            print(f"client {client}: {cut}", file=sys.stderr, flush=True)
        return bench

    return _loaded_once((file, overrides, client, data, labels, _written(data)), load)


def _shared_runtime(file: str, overrides: tuple[str, ...]) -> InProcessRuntime:
    """One model and all rows, for every client of a simulation that this process is asked to be."""
    return _loaded_once((file, overrides), lambda: Workbench.from_config(_configured(file, overrides)))


def _loaded_once(key: tuple[Any, ...], load: Callable[[], Workbench]) -> InProcessRuntime:
    """What was loaded for a key, kept while the process lives and is asked for no other."""
    if key not in _kept:
        _kept.clear()  # before the next is loaded: a client need not have the memory for two
        bench = load()
        _kept[key] = InProcessRuntime(bench.client, bench.batch_tokens)
    return _kept[key]


def _written(data: str | None) -> tuple[tuple[str, int, int], ...]:
    """Path, time of writing (ns) and bytes of every file that the client's own data is read from."""
    if data is None:
        return ()
    found = []
    with suppress(OSError):  # reading them says what is wrong
        for file in files_of(Path(data).expanduser()):
            status = file.stat()
            found.append((str(file), status.st_mtime_ns, status.st_size))
    return tuple(found)


def _configured(file: str, overrides: tuple[str, ...]) -> RunConfig:
    config = load_config(Path(file), overrides)
    if config.runtime.num_threads is not None:
        torch.set_num_threads(config.runtime.num_threads)
    return config


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
