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
    """Ask the kernel to drop the pages of files; needs no root. Pages that someone has mapped stay."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_share(paths: list[Path]) -> float:
    """Part of the files' pages that is in memory, 0 to 1, as `mincore` tells.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "a"
    >>> _ = path.write_bytes(bytes(100_000))
    >>> cached_share([path])
    1.0
    """
    libc = ctypes.CDLL(None, use_errno=True)
    held = pages = 0
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        mapped = np.memmap(path, np.uint8, mode="r")
        states = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
        if libc.mincore(
            ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(states.ctypes.data)
        ):
            raise OSError(ctypes.get_errno(), "mincore", str(path))
        held += int((states & 1).sum())
        pages += len(states)
    return held / pages if pages else 0.0
