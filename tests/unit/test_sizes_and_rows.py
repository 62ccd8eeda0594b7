"""Sizes as people write them; a batch's rows."""

import pytest
import torch

from spryfl.errors import ConfigError
from spryfl.forward_mode.rows import take_rows
from spryfl.sizes import parse_rate, parse_size, short_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1, 1),
        ("4096", 4096),
        ("1_000 B", 1000),
        ("64MiB", 64 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("1.5 gib", 3 * 2**29),
        ("2kB", 2000),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text: int | str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", [0, -1, True, 1.5, None, "", "MiB", "64 MiBs", "-3MB", "0.1B", "1e9", "4G", "nan", "1" * 400]
)
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ConfigError, match=r"not a size: .*64MiB"):
        parse_size(text)


def test_rates_and_short_sizes() -> None:
    assert parse_rate("20MB/s") == 20_000_000
    assert parse_rate("512KiB") == 2**19
    with pytest.raises(ConfigError, match=r"not a rate: '20Mbit/s'.*'20MB/s'"):
        parse_rate("20Mbit/s")
    sizes = (0, 999, 1000, 9994, 9996, 99_940, 999_499, 999_500, 6_460_000_000, 5 * 10**15)
    shown = ["0 B", "999 B", "1.00 kB", "9.99 kB", "10.0 kB", "99.9 kB", "999 kB", "1.00 MB", "6.46 GB", "5000 TB"]
    assert [short_size(size) for size in sizes] == shown


def test_rows() -> None:
    hidden, mask, shared = torch.arange(12).view(3, 4), torch.ones(3, 1, 4, 4), torch.ones(1, 4)
    positions = torch.arange(3)  # as many tokens as rows
    tree = ((hidden, None), {"mask": mask, "shared": shared, "positions": positions, "flag": True})
    (taken, nothing), named = take_rows(tree, slice(1, 3), 3)
    assert torch.equal(taken, hidden[1:])
    assert taken.data_ptr() == hidden[1:].data_ptr()
    assert named["mask"].shape == (2, 1, 4, 4)
    assert named["shared"] is shared
    assert named["positions"] is positions
    assert (nothing, named["flag"]) == (None, True)
    assert take_rows(tree, slice(0, 1), 1) is tree
