"""The exception tree. A message says what is wrong, which value, why, and the remedy."""

import errno
import re
from collections.abc import Iterable
from difflib import get_close_matches


class SpryError(Exception):
    """A problem the user can mend: the command line shows one line and exits with code 2."""


class ConfigError(SpryError):
    """A run's configuration is impossible or has an unknown key."""


class DataError(SpryError):
    """A dataset is missing, has the wrong columns or labels, or cannot be partitioned."""


class ModelError(SpryError):
    """A model cannot be found, verified or loaded."""


class UnsupportedModuleError(SpryError):
    """A model has modules that forward mode, or all of our kernels, cannot pass through."""


class RunDirectoryError(SpryError):
    """A run directory cannot be written, or holds no run to resume."""


class UpdateRefusedError(SpryError):
    """A client update failed validation: it is counted and named, and the round goes on."""


class DeadlineError(SpryError):
    """A client did not finish a task in the time it was given."""


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The system's numbers for a disk, a quota or a file that takes no more."""


def is_full_disk(error: BaseException) -> bool:
    """Whether the system says that nothing more can be written, itself or as safetensors and tokenizers quote it."""
    quoted = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None
    return number in FULL_DISK


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def lookup_error(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that stands in none of a table's rows."""
    names = sorted(known)
    return f"unknown {kind} '{name}'.{nearest(name, names)} Known: {', '.join(names)}."


def require_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the first name that stands in none of a table's rows.

    Raises:
        SpryError: naming it, the nearest and all there are.
    """
    rows = list(known)
    for name in names:
        if name not in rows:
            raise SpryError(lookup_error(kind, name, rows))
