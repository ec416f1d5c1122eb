"""Numbers as a person reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 2**20


def count_of(count: int, noun: str) -> str:
    """Write a number of things.

    Examples
    --------
    >>> count_of(1, "shard"), count_of(2000, "shard")
    ('1 shard', '2,000 shards')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def list_some(names: Sequence[object], most: int = 10) -> str:
    """Write names in a row, so many at most.

    Examples
    --------
    >>> list_some(["a.h5", "b.h5", "c.h5"], 2)
    'a.h5, b.h5 and 1 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def format_size(nbytes: float) -> str:
    """Write a number of bytes with a binary prefix and three digits.

    Examples
    --------
    >>> format_size(2_560_000_000)
    '2.38 GiB'
    >>> format_size(999)
    '999 B'
    """
    if abs(nbytes) < 1024:
        return f"{nbytes:.0f} B"
    # Floats end where integers go on.
    value = float(min(nbytes, 1e300))
    units = ["KiB", "MiB", "GiB", "TiB", "PiB"]
    while units:
        unit, *units = units
        value /= 1024
        if abs(value) < 1000:
            break
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {unit}"
