"""A client's process that outlives messages: Flower starts a new one for each, but torch and the model load once.

The process that Flower starts for a message hands it on over a socket that only its user can reach. It waits no longer
than the task's deadline, and before that for a new worker to load model and data, then kills the worker; the next
message starts another. A worker ends with the process that started the client app (Flower's SuperExec, which lives as
long as its SuperNode).
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spryfl.errors import SpryError
from spryfl.runtime.parcels import Parcel, failure_parcel, receive_parcel, send_parcel

START_SECONDS = 60.0
LOADING_SECONDS = 900.0  # of a large model from a slow disk; no deadline, or who loads for longer never takes part
TAKEN, LOADED = Parcel('{"kind": "taken"}'), Parcel('{"kind": "loaded"}')
"""What a worker says before it answers: that it has the message, and that model and data are there."""
LOOK_SECONDS = 1.0


def ask(order: Parcel, timeout: float | None, parent: int | None = None) -> Parcel:
    """Have the worker of this node answer, starting it if there is none.

    Args:
        order: as `performer.prepare` takes it.
        timeout: seconds after loading at which the worker is killed; None for no limit.
        parent: the process the worker belongs to; this process's parent by default.
    """
    with _connected(parent or os.getppid()) as connection:
        address = connection.getpeername()
        at_once = timeout if _loaded(address).exists() else LOADING_SECONDS
        try:
            connection.settimeout(seconds := at_once)
            send_parcel(connection, order)
            receive_parcel(connection)
            connection.settimeout(seconds := LOADING_SECONDS)  # also of data that have changed since
            receive_parcel(connection)
            connection.settimeout(seconds := timeout)
            return receive_parcel(connection)
        except TimeoutError:
            os.kill(_peer(connection), signal.SIGKILL)
            Path(address).unlink(missing_ok=True)  # until it is quite dead its socket would still take connections
            return failure_parcel(f"stopped: it had not finished after {seconds:g} s", "deadline")
        except ConnectionError:
            return failure_parcel("its worker process died (out of memory?)", "lost")


@contextmanager
def _connected(parent: int) -> Iterator[socket.socket]:
    folder = _private_folder(parent)
    address = str(folder / "socket")
    with socket.socket(socket.AF_UNIX) as connection:
        with (folder / "lock").open("w") as lock:  # two messages at once start one worker
            fcntl.flock(lock, fcntl.LOCK_EX)
            if connection.connect_ex(address) != 0:
                Path(address).unlink(missing_ok=True)
                _loaded(address).unlink(missing_ok=True)
                _start(address, parent)
                _wait_for(connection, address)
        yield connection


def _private_folder(parent: int) -> Path:
    """A folder that only this user can enter, so that nobody else can ask the worker or pose as it."""
    own = Path(tempfile.gettempdir()) / f"spry-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    status = own.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or own.is_symlink():
        raise SpryError(f"{own}: others can enter it; remove it, or set TMPDIR to another place")
    folder = own / str(parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _loaded(address: str) -> Path:
    """There while model and data are loaded, which a task's deadline must not count."""
    return Path(address).with_name("loaded")


def _start(address: str, parent: int) -> None:
    command = [sys.executable, "-m", "spryfl.runtime.flower.warm", address, str(parent)]
    no_input = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    os.posix_spawn(sys.executable, command, os.environ, file_actions=[no_input], setsid=True)


def _wait_for(connection: socket.socket, address: str) -> None:
    end = time.monotonic() + START_SECONDS
    while connection.connect_ex(address) != 0:
        if time.monotonic() > end:
            raise SpryError(f"the client's worker process did not start within {START_SECONDS:g} s")
        time.sleep(0.05)


def _peer(connection: socket.socket) -> int:
    """The process at the other end (Linux)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def serve(address: str, parent: int) -> None:
    """Answer one message after another until the parent is gone."""
    threading.Thread(target=_end_with, args=(parent, Path(address).parent), daemon=True).start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        from spryfl.runtime.flower.performer import prepare  # torch: only once the socket is there

        while True:
            connection, _ = listener.accept()
            with connection, suppress(ConnectionError):  # whoever asked may be gone
                order = receive_parcel(connection)
                send_parcel(connection, TAKEN)
                is_task = json.loads(order.header)["task"] is not None  # to say who it is takes no data
                if is_task:
                    _loaded(address).unlink(missing_ok=True)
                perform = prepare(order)
                if is_task:
                    _loaded(address).touch()
                send_parcel(connection, LOADED)
                send_parcel(connection, perform())


def _end_with(parent: int, folder: Path) -> None:
    """End this process when its parent is gone, whatever it is doing."""
    while _alive(parent):
        time.sleep(LOOK_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _alive(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for long to be collected (Linux)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
