"""Sizes and checksums of written files, by which any change shows."""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ENTRIES_NBYTES = 2**20


def extend_crc32(checksum: int, data: Any) -> int:
    """Extend a crc32 by more bytes.

    Not crc32c: where each part of a file ends in its own crc32c, that of the whole tells of the parts' sizes alone.

    Examples
    --------
    >>> extend_crc32(extend_crc32(0, b"1234"), b"56789") == 0xCBF43926
    True
    """
    return zlib.crc32(data, checksum)


class FileRecord(NamedTuple):
    """One file as it was written."""

    key: str
    """Path below the output's folder, with slashes."""
    nbytes: int
    crc32: int
    """Of all its bytes; see `extend_crc32`."""
    tag: str = ""
    """What an object store calls these bytes; empty for a file in a folder."""


def record_entries(array: NDArray[Any], places: NDArray[np.int64]) -> FileRecord:
    """Tell what entries of an array hold, one after the other; the key is empty."""
    checksum = 0
    step = max(1, _ENTRIES_NBYTES // max(1, array[:1].nbytes))
    for first in range(0, len(places), step):
        entries = np.ascontiguousarray(array[places[first : first + step]])
        checksum = extend_crc32(checksum, entries.reshape(-1).view(np.uint8))
    return FileRecord("", len(places) * array[:1].nbytes, checksum)


def digest_array(array: NDArray[Any]) -> str:
    """SHA-256 of the values, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()
