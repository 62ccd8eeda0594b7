"""One process at a time in a folder: two that go on with the same run would write over each other."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from spryfl.errors import RunDirectoryError

LOCK_FILE = ".lock"


@contextmanager
def held(folder: Path, name: str = LOCK_FILE, seconds: float = 0) -> Iterator[None]:
    """Keep other processes from a folder while inside; the system lets go when a process ends, however it does.

    Args:
        name: of the file that is locked.
        seconds: to wait for another one's end.

    Raises:
        RunDirectoryError: another one is at work there.
    """
    end = time.monotonic() + seconds
    with (folder / name).open("w") as lock:
        while not _locked(lock):
            if time.monotonic() >= end:
                raise RunDirectoryError(f"{folder}: another process is at work there: wait for it, or stop it")
            time.sleep(1)
        yield


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
