"""Files below a folder, or keys of a Zarr store: listed, and read by ranges, whatever lies in their place."""

from __future__ import annotations

import itertools
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import IntegrityError, OpenError
from pipeline.keys import concurrency

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from contextlib import AbstractContextManager
    from io import FileIO

    from numpy.typing import NDArray
    from zarr.abc.store import Store

type Extend = Callable[[int, NDArray[np.uint8]], int]
"""Gives the checksum of bytes and of those that follow, from the checksum of the former and the latter."""

_STEP_NBYTES = 4 * 2**20
_FETCHED_NBYTES = 16 * 2**20
"""What is asked of a store at once: the chunks of a shard are small, and each request takes long."""


class Opened(Protocol):
    """A file or key that is there."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    def read(self, offset: int, nbytes: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes [offset, offset + nbytes) in parts, each good until the next; fewer where it ends."""


class Storage(Protocol):
    """Where files lie. Picklable."""

    def list_files(self) -> dict[str, int]:
        """Path below the root and size of all that is no folder; 0 for what is no file either."""

    def open(self, key: str) -> AbstractContextManager[Opened]:
        """Open one for reading.

        Raises
        ------
        IntegrityError
            Saying, after its name, what is wrong with it: it is gone, no file, cannot be read.
        """


def checksum(opened: Opened, offset: int, nbytes: int, extend: Extend) -> int:
    """Compute the checksum of a range; IntegrityError where the file ends within it."""
    value = read = 0
    for part in opened.read(offset, nbytes):
        value = extend(value, part)
        read += len(part)
    if read != nbytes:
        raise IntegrityError(f"ends within the bytes at {offset}")
    return value


@dataclass(frozen=True, slots=True)
class Folder:
    """Files below a local folder, links followed; or one file of it alone."""

    root: str
    only: str | None = None

    def list_files(self) -> dict[str, int]:
        """See `Storage.list_files`; OpenError where a folder cannot be listed."""
        if self.only is not None:
            return {self.only: os.stat(f"{self.root}/{self.only}").st_size}  # noqa: PTH116
        found = {}
        for folder, folders, names in os.walk(self.root, onerror=_refuse, followlinks=True):
            folders[:] = [name for name in folders if not _leads_back(folder, name)]
            base = os.path.relpath(folder, self.root).replace(os.sep, "/")
            for name in names:
                found[name if base == "." else f"{base}/{name}"] = _regular_nbytes(f"{folder}/{name}")
        return found

    @contextmanager
    def open(self, key: str) -> Iterator[Opened]:
        """See `Storage.open`."""
        path = f"{self.root}/{key}"
        try:
            try:
                status = os.stat(path)  # noqa: PTH116
            except ValueError as error:
                raise IntegrityError("cannot be the name of a file") from error
            if not stat.S_ISREG(status.st_mode):
                # To open a FIFO would wait for its writer.
                raise IntegrityError("is a folder" if stat.S_ISDIR(status.st_mode) else "is no file")
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                yield _OpenFile(file, os.fstat(file.fileno()).st_size)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise IntegrityError("is a link to nothing" if os.path.islink(path) else "is gone") from error  # noqa: PTH114
        except OSError as error:
            raise IntegrityError(f"cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class _OpenFile:
    file: FileIO
    nbytes: int

    def read(self, offset: int, nbytes: int) -> Iterator[NDArray[np.uint8]]:
        buffer = np.empty(min(nbytes, _STEP_NBYTES), np.uint8)
        self.file.seek(offset)
        while nbytes and (got := self.file.readinto(buffer[:nbytes])):
            yield buffer[:got]
            nbytes -= got


@dataclass(frozen=True, slots=True)
class Objects:
    """Keys of a Zarr store below a prefix, which is empty or ends in a slash."""

    store: Store
    prefix: str

    def list_files(self) -> dict[str, int]:
        """See `Storage.list_files`; OpenError where the store fails."""
        keys = self._call(self._list())
        sizes: list[int] = []
        for batch in itertools.batched(keys, concurrency()):
            sizes += self._call(self._sizes(batch))
        return {key.removeprefix(self.prefix): size for key, size in zip(keys, sizes, strict=True)}

    @contextmanager
    def open(self, key: str) -> Iterator[Opened]:
        """See `Storage.open`; OpenError where the store fails."""
        try:
            [nbytes] = self._call(self._sizes((self.prefix + key,)))
        except FileNotFoundError as error:
            raise IntegrityError("is gone") from error
        yield _OpenObject(self, self.prefix + key, nbytes)

    def fetch(self, key: str, offset: int, stop: int) -> NDArray[np.uint8]:
        """Read bytes [offset, stop) of a key."""
        from zarr.abc.store import RangeByteRequest
        from zarr.core.buffer import default_buffer_prototype

        buffer = self._call(self.store.get(key, default_buffer_prototype(), RangeByteRequest(offset, stop)))
        if buffer is None:
            raise IntegrityError("is gone")
        return buffer.as_numpy_array().view(np.uint8)

    async def _list(self) -> list[str]:
        return [key async for key in self.store.list_prefix(self.prefix)]

    async def _sizes(self, keys: tuple[str, ...]) -> list[int]:
        import asyncio

        return await asyncio.gather(*map(self.store.getsize, keys))

    def _call[T](self, coroutine: Coroutine[Any, Any, T]) -> T:
        from zarr.core.sync import sync

        try:
            return sync(coroutine)
        except FileNotFoundError:
            raise
        except Exception as error:  # a store raises what it likes
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise OpenError(f"a store can be read; {self.store} cannot: {reason}; check it") from error


@dataclass(slots=True)
class _OpenObject:
    objects: Objects
    key: str
    nbytes: int
    _first: int = 0
    _held: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    """What was fetched last: the bytes from `_first` on."""

    def read(self, offset: int, nbytes: int) -> Iterator[NDArray[np.uint8]]:
        stop = min(offset + nbytes, self.nbytes)
        while offset < stop:
            if not self._first <= offset < self._first + len(self._held):
                self._first = offset
                self._held = self.objects.fetch(self.key, offset, min(offset + _FETCHED_NBYTES, self.nbytes))
                if not len(self._held):
                    return
            part = self._held[offset - self._first : stop - self._first]
            offset += len(part)
            yield part


def _leads_back(folder: str, name: str) -> bool:
    """Whether a link leads to the folder that it lies in, or to one above."""
    path = f"{folder}/{name}"
    return os.path.islink(path) and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(path)}/")  # noqa: PTH114


def _regular_nbytes(path: str) -> int:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _refuse(error: OSError) -> None:
    raise OpenError(f"a folder can be listed; {error.filename}: {error.strerror}; check its permissions") from error
