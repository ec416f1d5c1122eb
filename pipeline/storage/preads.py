"""Reading ranges of a file: all announced first, each read in full."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import IntegrityError, OpenError
from pipeline.storage.filesystem import advise

if TYPE_CHECKING:
    from collections.abc import Iterable


class Reading(NamedTuple):
    """What reading the windows of a task took."""

    nbytes: int
    """Bytes read, as `Cost.nbytes_read` counts them."""
    decode_seconds: float
    """Seconds of it that decoding took; of all where zarr does both in one."""


def open_file(path: str, name: str) -> int:
    """Open a chunk's file for reading; `name` tells errors which. The caller closes the descriptor."""
    try:
        # Without the last flag, a pipe would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise IntegrityError(f"every chunk is there; {name} is not; restore it") from error
    except OSError as error:
        raise OpenError(f"a chunk can be read; {name} cannot: {error.strerror}; check its permissions") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IntegrityError(f"every chunk is there; {name} is no file; restore it")
    return fd


def announce(fd: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Tell the kernel all ranges (offset, bytes), so that the disk works on many at once, and to read nothing else."""
    advise(fd, 0, 0, "RANDOM")
    for offset, nbytes in ranges:
        advise(fd, offset, nbytes, "WILLNEED")


def read_fully(fd: int, buffers: list[memoryview], offset: int, nbytes: int, name: str) -> None:
    """Fill the buffers, `nbytes` in all, however few bytes one call gives.

    Raises
    ------
    IntegrityError
        Naming the file by `name` where it ends too early or cannot be read.
    """
    done = 0
    try:
        while done < nbytes:
            got = os.preadv(fd, buffers, offset + done)
            if not got:
                raise IntegrityError(f"every chunk is whole; {name} ends within the bytes at {offset}; restore it")
            done += got
            if done < nbytes:
                buffers = _after(buffers, got)
    except OSError as error:
        problem = f"{name} at byte {offset}: {error.strerror}"
        raise IntegrityError(f"a chunk can be read; {problem}; check the disk") from error


def _after(buffers: list[memoryview], nbytes: int) -> list[memoryview]:
    """Return the buffers that are left when the first `nbytes` are filled."""
    for number, buffer in enumerate(buffers):
        if nbytes < len(buffer):
            return [buffer[nbytes:], *buffers[number + 1 :]]
        nbytes -= len(buffer)
    return []
