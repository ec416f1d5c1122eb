"""Arrays that worker processes on this host write into: memory without a name, or a file, found by its open descriptor.

The process that holds the array sends a `Handle`, some hundred bytes. Another one on the same host opens the descriptor
of the first through `/proc`, and writes by system calls; it maps nothing, since a first touch of each page costs more
than copying it, and a worker's memory limit counts what is mapped. When the holder is done, the kernel lets nobody
write into the memory any more but by its own map. A file cannot be sealed so: whoever writes into it holds a shared
lock, which the holder takes for itself before it lets go. Nothing has a name, so nothing is left behind by a process
that is killed.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.memory import count_shared

try:
    import fcntl
except ImportError:  # Windows, which has no /proc either.
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_SEALABLE = 2
"""MFD_ALLOW_SEALING."""
_NOT_EXECUTABLE = 8
"""MFD_NOEXEC_SEAL, which some systems insist on; Linux before 6.3 does not know it."""
_SEAL_FUTURE_WRITE = 16
"""Of Linux 5.1: maps that are there stay writable, and there will be no others."""
_POLL_SECONDS = 0.01
PAGE = mmap.ALLOCATIONGRANULARITY
"""Bytes of a page of memory."""


@dataclass(frozen=True, slots=True)
class Handle:
    """An array that a process holds open, as others on its host find it. Plain data, so that it travels anywhere."""

    pid: int
    fd: int
    name: str
    """What the link of the descriptor reads: it names this file and no other, whatever process has the number."""
    identity: tuple[int, int]
    """Device and inode."""
    offset: int
    """Byte of the file at which the array begins."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Handle:
        """Describe an array that begins `offset` bytes after this one."""
        return replace(self, offset=self.offset + offset, shape=shape, dtype=dtype)


@contextmanager
def open_handle(handle: Handle) -> Iterator[Writer | None]:
    """Open the array of another process, for writing until the block ends.

    Yields
    ------
    Writer or None
        None where this process cannot reach it: it runs on another host, in another container or for another user;
        or the holder has let go.
    """
    link = Path(f"/proc/{handle.pid}/fd/{handle.fd}")
    fd, found = -1, False
    try:
        # Before anything is opened, too: the process of this number may be a stranger's, its file a device.
        if str(link.readlink()) == handle.name:
            fd = os.open(link, os.O_WRONLY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Whoever lets go locks first: what is there under our lock stays until we unlock.
            found = str(link.readlink()) == handle.name and _identity(fd) == handle.identity
    except (OSError, AttributeError):
        found = False
    try:
        yield Writer(fd, handle) if found else None
    finally:
        if fd >= 0:
            os.close(fd)


class Writer:
    """Writes entries of an array into memory or a file that is open here."""

    def __init__(self, fd: int, handle: Handle) -> None:
        self._fd = fd
        self._handle = handle
        self.name = handle.name

    def write(self, entries: NDArray[Any], places: NDArray[np.int64]) -> None:
        """Write `entries[i]` to `places[i]`, as the system does: OSError where it cannot."""
        source = memoryview(np.ascontiguousarray(entries).reshape(-1).view(np.uint8))
        nbytes = len(source) // max(1, len(places))
        first = 0
        # What follows on each other goes by one call.
        breaks = np.flatnonzero(np.diff(places) != 1) + 1
        for stop in (*breaks.tolist(), len(places)):
            target = self._handle.offset + int(places[first]) * nbytes
            part = source[first * nbytes : stop * nbytes]
            while part:
                written = os.pwrite(self._fd, part, target)
                part, target = part[written:], target + written
            first = stop


class Shared:
    """An array that other processes may write into until it is closed. Made by `share_memory` and `share_file`."""

    handle: Handle

    def __init__(
        self, fd: int, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], mapped: mmap.mmap | None = None
    ) -> None:
        self._fd = fd
        self._mapped = mapped
        name = str(Path(f"/proc/self/fd/{fd}").readlink())
        self.handle = Handle(os.getpid(), fd, name, _identity(fd), offset, shape, dtype)
        # Where locks do not work, nothing is shared.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        self._forget = None if mapped is None else count_shared(mapped, fd)

    @property
    def array(self) -> NDArray[Any]:
        """The array in memory: what others write is there."""
        assert self._mapped is not None
        view: NDArray[Any] = np.ndarray(self.handle.shape, self.handle.dtype, self._mapped, self.handle.offset)
        return view

    def read(self, out: NDArray[Any], offset: int) -> None:
        """Fill an array, C-contiguous, with what lies at an offset in bytes; without touching the map."""
        target = memoryview(out.reshape(-1).view(np.uint8))
        while target:
            got = os.preadv(self._fd, [target], self.handle.offset + offset)
            target, offset = target[got:], offset + got

    def give_back(self, offset: int, nbytes: int) -> None:
        """Free the memory of whole pages [offset, offset + nbytes), which read as zeros from then on."""
        assert self._mapped is not None
        self._mapped.madvise(mmap.MADV_REMOVE, offset, nbytes)

    def close(self, seconds: float) -> bool:
        """Bar all others from writing; False where one holds a file open for longer than so many seconds.

        A process that was stopped, or hangs, may go on one day: what it writes then is what another has written
        already, but by that time the array may hold something else.
        """
        if self._fd < 0:
            return True
        fd, self._fd = self._fd, -1
        try:
            end = time.monotonic() + seconds
            while not (barred := _seal(fd) or _lock(fd)) and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
        finally:
            if self._forget is not None:
                self._forget()
            os.close(fd)
        return barred


def is_memory(name: str) -> bool:
    """Whether the name of a handle is that of memory, not of a file."""
    return name.startswith("/memfd:")


def share_memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Shared | None:
    """Make an array of zeros that processes of this host may write into; None where the system has no means.

    Pages take memory once they are written.
    """
    name, nbytes = f"random-windows-{uuid.uuid4().hex}", max(1, math.prod(shape) * dtype.itemsize)
    with suppress(OSError, AttributeError):
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | _NOT_EXECUTABLE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd = os.memfd_create(name, os.MFD_CLOEXEC | _SEALABLE)
        with _closing_on_error(fd):
            os.ftruncate(fd, nbytes)
            return Shared(fd, 0, shape, dtype, _map(fd, nbytes))
    return None


def share_file(array: NDArray[Any]) -> Shared | None:
    """Share the file that an `np.memmap` maps, C-contiguous; None where the system has no means."""
    assert isinstance(array, np.memmap)
    assert array.filename is not None
    with suppress(OSError, AttributeError):
        fd = os.open(array.filename, os.O_RDWR | os.O_CLOEXEC)
        with _closing_on_error(fd):
            return Shared(fd, array.offset, array.shape, array.dtype)
    return None


@contextmanager
def _closing_on_error(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


def _seal(fd: int) -> bool:
    """Let nobody write into memory any more who has not mapped it; False for a file, and where Linux is too old."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE)
    except OSError:
        return False
    return True


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _map(fd: int, nbytes: int) -> mmap.mmap:
    if sys.version_info >= (3, 13):
        # Else the map has a descriptor of its own, by which the file stays open, and locked.
        return mmap.mmap(fd, nbytes, trackfd=False)
    return mmap.mmap(fd, nbytes)
