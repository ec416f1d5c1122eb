"""Files in and out of the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from pipeline.formatting import MIB

if TYPE_CHECKING:
    from pathlib import Path


def warm_files(paths: list[Path]) -> None:
    """Read files once, so that their pages are in memory."""
    buffer = bytearray(8 * MIB)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_files(paths: list[Path]) -> None:
    """Ask the kernel to drop the pages of files; needs no root. Mapped pages stay."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(paths: list[Path]) -> float:
    """Return the part of the files' pages that is in memory, 0 to 1, from `mincore`.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "a"
    >>> _ = path.write_bytes(bytes(100_000))
    >>> cached_share([path])
    1.0
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    cached = pages = 0
    for path in paths:
        if size := path.stat().st_size:
            mapped = np.memmap(path, np.uint8, mode="r")
            states = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
            if libc.mincore(mapped.ctypes.data, size, states.ctypes.data):
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            cached += int((states & 1).sum())
            pages += len(states)
    return cached / pages if pages else 0.0
