"""Sizes in bytes as people write them: 64MiB, 1.5GB, 4096; and rates: 20MB/s."""

import re
from math import isfinite

from spryfl.errors import ConfigError

UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}
SIZE = re.compile(r"\s*(\d+(?:_\d+)*(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """Bytes of a size: a whole number of them, or text such as "64MiB" (2^20) or "1.5GB" (10^9).

    Raises:
        ConfigError: not a size, or less than one byte.
    """
    number_of_bytes = 0
    if isinstance(size, int) and not isinstance(size, bool):
        number_of_bytes = size
    elif isinstance(size, str) and (match := SIZE.fullmatch(size)) and match[2].lower() in UNITS:
        given = float(match[1].replace("_", "")) * UNITS[match[2].lower()]
        number_of_bytes = int(given) if isfinite(given) else 0
    if number_of_bytes < 1:
        raise ConfigError(f"not a size: {size!r}. Write a number of bytes, or text such as '64MiB' or '1.5GB'")
    return number_of_bytes


def short_size(number_of_bytes: int) -> str:
    """A size in three digits, as people read them: 6.46 GB."""
    value = float(number_of_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def parse_rate(rate: str) -> int:
    """Bytes a second of a rate such as "20MB/s" or "512KiB/s"; "/s" may be left out.

    Raises:
        ConfigError: not a rate; bits ("20Mbit/s") are not taken for bytes.
    """
    try:
        return parse_size(rate.strip().removesuffix("/s"))
    except ConfigError:
        raise ConfigError(f"not a rate: {rate!r}. Write bytes a second, such as '20MB/s' or '512KiB/s'") from None
