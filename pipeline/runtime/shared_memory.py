"""Arrays that worker processes on this host write into: memory without a name, or a file, found by its open descriptor.

The process that holds the array sends a `Handle`, some hundred bytes. Another one on the same host opens the descriptor
of the first through `/proc`, and writes by system calls; it maps nothing, since a first touch of each page costs more
than copying it, and a worker's memory limit counts what is mapped. The kernel lets one process at a time write into a
file, so that memory is cut into stripes, a file each, which the holder maps one behind the other. When the holder is
done, the kernel lets nobody write into the memory any more but by its own map. A file on disk cannot be sealed so:
whoever writes into it holds a shared lock, which the holder takes for itself before it lets go. Nothing has a name, so
nothing is left behind by a process that is killed.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
import time
import uuid
import weakref
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.formatting import MIB
from pipeline.memory import count_shared
from pipeline.storage.filesystem import flush

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
_MAP_FIXED = 0x10
_NO_ACCESS = 0
"""PROT_NONE."""
_STRIPES = 16
"""Files of a large array: two processes that write to places at random wait for each other every sixteenth time."""
_LEAST_STRIPE_NBYTES = 4 * MIB
_POLL_SECONDS = 0.01
PAGE = mmap.ALLOCATIONGRANULARITY
"""Bytes of a page of memory."""
type Map = ctypes.Array[ctypes.c_uint8]


class OpenFile(NamedTuple):
    """A file that a process holds open, as others on its host find it."""

    fd: int
    name: str
    """What the link of the descriptor reads: it names this file and no other, whatever process has the number."""
    identity: tuple[int, int]
    """Device and inode."""


@dataclass(frozen=True, slots=True)
class Handle:
    """An array that a process holds open, as others on its host find it. Plain data, so that it travels anywhere."""

    pid: int
    files: tuple[OpenFile, ...]
    stripe_nbytes: int
    """Bytes of each file but the last."""
    offset: int
    """Byte at which the array begins, counted through the files."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def name(self) -> str:
        """What the first file is called."""
        return self.files[0].name

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
    with ExitStack() as stack:
        fds = [_open_file(handle.pid, file, stack) for file in handle.files]
        yield None if -1 in fds else Writer(fds, handle)


def _open_file(pid: int, file: OpenFile, stack: ExitStack) -> int:
    """Open a file that another process holds, under a lock, until the stack ends; -1 if it is not there."""
    link = Path(f"/proc/{pid}/fd/{file.fd}")
    with suppress(OSError, AttributeError):
        # Before anything is opened, too: the process of this number may be a stranger's, its file a device.
        if str(link.readlink()) == file.name:
            fd = os.open(link, os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Whoever lets go locks first: what is there under our lock stays until we unlock.
            if str(link.readlink()) == file.name and _identity(fd) == file.identity:
                return fd
    return -1


class Writer:
    """Writes entries of an array into memory or a file that is open here."""

    def __init__(self, fds: list[int], handle: Handle) -> None:
        self._fds = fds
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
                number, at = divmod(target, self._handle.stripe_nbytes)
                written = os.pwrite(self._fds[number], part[: self._handle.stripe_nbytes - at], at)
                part, target = part[written:], target + written
            first = stop


class FileArray(Writer):
    """An array in a file that is written and read by system calls, entry by entry, where it cannot be mapped."""

    def __init__(
        self, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], *, writable: bool
    ) -> None:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        weakref.finalize(self, os.close, fd)
        status = os.fstat(fd)
        file = OpenFile(fd, str(path), (status.st_dev, status.st_ino))
        super().__init__([fd], Handle(os.getpid(), (file,), sys.maxsize, offset, shape, dtype))
        self.filename, self.offset, self.shape, self.dtype = path, offset, shape, dtype
        self.nbytes = self._handle.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: Any) -> NDArray[Any]:
        """Read the entries of a slice, or at an array of places."""
        numbers = np.arange(*places.indices(len(self))) if isinstance(places, slice) else np.asarray(places)
        out = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        nbytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = memoryview(out.reshape(-1).view(np.uint8))
        for number, place in enumerate(numbers.tolist()):
            target, at = data[number * nbytes : (number + 1) * nbytes], self.offset + place * nbytes
            while target:
                got = os.preadv(self._fds[0], [target], at)
                if not got:
                    raise OSError(errno.EIO, "ends too early", str(self.filename))
                target, at = target[got:], at + got
        return out

    def __setitem__(self, places: NDArray[np.int64], entries: NDArray[Any]) -> None:
        self.write(np.asarray(entries, self.dtype), places)

    def flush(self) -> None:
        """Flush what was written to the disk."""
        flush(self._fds[0])


class Shared:
    """An array that other processes may write into until it is closed. Made by `share_memory` and `share_file`."""

    handle: Handle

    def __init__(
        self,
        fds: list[int],
        stripe_nbytes: int,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        mapped: Map | None = None,
    ) -> None:
        self._fds = fds
        self._mapped = mapped
        files = [OpenFile(fd, str(Path(f"/proc/self/fd/{fd}").readlink()), _identity(fd)) for fd in fds]
        self.handle = Handle(os.getpid(), tuple(files), stripe_nbytes, offset, shape, dtype)
        # Where locks do not work, nothing is shared.
        fcntl.flock(fds[0], fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fds[0], fcntl.LOCK_UN)
        self._forget = None if mapped is None else count_shared(mapped, fds)

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
            number, at = divmod(self.handle.offset + offset, self.handle.stripe_nbytes)
            got = os.preadv(self._fds[number], [target[: self.handle.stripe_nbytes - at]], at)
            target, offset = target[got:], offset + got

    def give_back(self, offset: int, nbytes: int) -> None:
        """Free the memory of whole pages [offset, offset + nbytes), which read as zeros from then on."""
        assert self._mapped is not None
        begin = ctypes.addressof(self._mapped) + offset
        if _libc().madvise(begin, nbytes, mmap.MADV_REMOVE) != 0:
            raise _os_error()

    def close(self, seconds: float) -> bool:
        """Bar all others from writing; False where one holds a file open for longer than so many seconds.

        A process that was stopped, or hangs, may go on one day: what it writes then is what another has written
        already, but by that time the array may hold something else.
        """
        fds, self._fds = self._fds, []
        try:
            end = time.monotonic() + seconds
            while not (barred := all(_seal(fd) or _lock(fd) for fd in fds)) and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
        finally:
            if self._forget is not None:
                self._forget()
            _close(fds)
        return barred


def is_memory(name: str) -> bool:
    """Whether the name of a handle is that of memory, not of a file."""
    return name.startswith("/memfd:")


def share_memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Shared | None:
    """Make an array of zeros that processes of this host may write into; None where the system has no means.

    Pages take memory once they are written.
    """
    nbytes = max(1, math.prod(shape) * dtype.itemsize)
    stripe_nbytes = -(-max(_LEAST_STRIPE_NBYTES, -(-nbytes // _STRIPES)) // PAGE) * PAGE
    sizes = [min(stripe_nbytes, nbytes - first) for first in range(0, nbytes, stripe_nbytes)]
    fds: list[int] = []
    with suppress(OSError, AttributeError), _closing_on_error(fds):
        for size in sizes:
            fds.append(_make_memory())
            os.ftruncate(fds[-1], size)
        return Shared(fds, stripe_nbytes, 0, shape, dtype, _map(fds, sizes))
    return None


def share_file(array: np.memmap[Any, Any] | FileArray) -> Shared | None:
    """Share the file of an array, C-contiguous; None where the system has no means."""
    assert array.filename is not None
    fds: list[int] = []
    with suppress(OSError, AttributeError), _closing_on_error(fds):
        fds.append(os.open(array.filename, os.O_RDWR | os.O_CLOEXEC))
        return Shared(fds, sys.maxsize, array.offset, array.shape, array.dtype)
    return None


@contextmanager
def _closing_on_error(fds: list[int]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _close(fds)
        raise


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _make_memory() -> int:
    name = f"random-windows-{uuid.uuid4().hex}"
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | _NOT_EXECUTABLE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, os.MFD_CLOEXEC | _SEALABLE)
    # Other users do not reach the link in `/proc`, and could not open what it leads to either.
    os.fchmod(fd, 0o600)
    return fd


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


def _map(fds: list[int], sizes: list[int]) -> Map:
    """Map files one behind the other, until nobody uses the map any more. Python's `mmap` cannot choose the address."""
    libc, nbytes = _libc(), sum(sizes)
    begin = libc.mmap(None, nbytes, _NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if begin == _FAILED:
        raise _os_error()
    mapped: Map = (ctypes.c_uint8 * nbytes).from_address(begin)
    weakref.finalize(mapped, libc.munmap, begin, nbytes).atexit = False
    at = begin
    for fd, size in zip(fds, sizes, strict=True):
        if libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == _FAILED:
            raise _os_error()
        at += size
    return mapped


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.argtypes = [pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.mmap.restype = pointer
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, ctypes.c_int]
    return libc


_FAILED = ctypes.c_void_p(-1).value


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
