"""Files below a folder, or keys of a Zarr store: listed, and read by ranges, whatever lies in their place."""

from __future__ import annotations

import itertools
import os
import stat
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import IntegrityError, OpenError, PipelineError
from pipeline.storage.concurrency import concurrency, gather, in_order
from pipeline.storage.filesystem import advise
from pipeline.storage.listing import hurried, list_keys, read_key
from pipeline.storage.locations import name_store, plain, store_error
from pipeline.storage.trust import read_document

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from contextlib import AbstractContextManager
    from io import FileIO

    from numpy.typing import NDArray
    from zarr.abc.store import Store

type Extend = Callable[[int, NDArray[np.uint8]], int]
"""Gives the checksum of bytes and of those that follow, from the checksum of the former and the latter."""

_STEP_NBYTES = 4 * 2**20
_IN_FLIGHT_NBYTES = 32 * 2**20
_FETCHED_NBYTES = 4 * 2**20
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

    @property
    def at_once(self) -> int:
        """Files that a task reads side by side."""

    def list_files(self) -> dict[str, int]:
        """Path below the root and size of all that is no folder; 0 for what is no file either."""

    def open(self, key: str, offset: int | None = None) -> AbstractContextManager[Opened]:
        """Open one for reading; `offset`: where the one reading of it will begin, if that is known.

        Raises
        ------
        IntegrityError
            Saying, after its name, what is wrong with it: it is gone, no file, cannot be read.
        """

    def read_document(self, key: str) -> bytes | None:
        """Return all bytes of one; None where it is absent, OpenError where it cannot be read."""


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

    @property
    def at_once(self) -> int:
        """See `Storage.at_once`."""
        return 1

    def read_document(self, key: str) -> bytes | None:
        """See `Storage.read_document`."""
        path = Path(self.root, key)
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            raise OpenError(f"metadata are a file; {path} is none; restore it")
        try:
            return read_document(path, follow=True)
        except OSError as error:
            raise OpenError(f"an output has metadata; {path}: {error.strerror}; restore it") from error

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
    def open(self, key: str, offset: int | None = None) -> Iterator[Opened]:  # noqa: ARG002 (that of a file is free)
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
                advise(file.fileno(), 0, 0, "SEQUENTIAL")
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

    @property
    def at_once(self) -> int:
        """See `Storage.at_once`."""
        return concurrency()

    @property
    def name(self) -> str:
        """Of the store and the prefix, for messages."""
        return f"{name_store(self.store)}/{self.prefix}".rstrip("/")

    def read_document(self, key: str) -> bytes | None:
        """See `Storage.read_document`."""
        return read_key(hurried(self.store), self.prefix + key)

    def list_files(self) -> dict[str, int]:
        """See `Storage.list_files`; OpenError where the store fails."""
        [found] = gather(list_keys(self.store, self.prefix))
        unknown = [key for key, told in found.items() if told.nbytes is None]
        sizes = {key: told.nbytes or 0 for key, told in found.items()}
        for batch in itertools.batched(unknown, concurrency()):
            sizes |= zip(batch, self._call(*map(self.store.getsize, batch)), strict=True)
        return {key.removeprefix(self.prefix): size for key, size in sizes.items()}

    @contextmanager
    def open(self, key: str, offset: int | None = None) -> Iterator[Opened]:
        """See `Storage.open`; OpenError where the store fails."""
        if offset is not None and (opened := self._open_at(self.prefix + key, offset)):
            yield opened
            return
        try:
            [nbytes] = self._call(self.store.getsize(self.prefix + key))
        except FileNotFoundError as error:
            raise IntegrityError("is gone") from error
        yield _OpenObject(self, self.prefix + key, nbytes)

    def _open_at(self, key: str, offset: int) -> _OpenObject | None:
        """Open a key by reading what is wanted of it, which tells its size, too; None where that cannot be."""
        from zarr.storage import ObjectStore

        if not isinstance(self.store, ObjectStore):
            return None
        try:
            [(size, first)] = self._call(_get_part(self.store.store, key, offset, offset + _FETCHED_NBYTES))
        except FileNotFoundError as error:
            raise IntegrityError("is gone") from error
        except OpenError as error:
            if error.passing:
                raise
            # It may be shorter than that, or have no bytes.
            return None
        return _OpenObject(self, key, size, offset, first)

    async def fetch(self, key: str, offset: int, stop: int) -> NDArray[np.uint8]:
        """Read bytes [offset, stop) of a key; the store raises what it likes."""
        from zarr.abc.store import RangeByteRequest
        from zarr.core.buffer import cpu

        buffer = await self.store.get(key, cpu.buffer_prototype, RangeByteRequest(offset, stop))
        if buffer is None:
            raise IntegrityError("is gone")
        return buffer.as_numpy_array().view(np.uint8)

    def fetch_all(self, key: str, offset: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        """Yield bytes [offset, stop) of a key, in parts, of which many are asked for at once."""
        firsts = range(offset, stop, _FETCHED_NBYTES)
        sized = (
            (min(_FETCHED_NBYTES, stop - first), partial(self.fetch, key, first, min(first + _FETCHED_NBYTES, stop)))
            for first in firsts
        )
        with closing(in_order(sized, most_nbytes=_IN_FLIGHT_NBYTES)) as parts:
            try:
                yield from parts
            except Exception as error:  # noqa: BLE001 (a store raises what it likes)
                raise self._failure(error) from plain(error)

    def _call[T](self, *coroutines: Coroutine[Any, Any, T]) -> list[T]:
        try:
            return gather(*coroutines)
        except FileNotFoundError:
            raise
        except Exception as error:  # noqa: BLE001 (a store raises what it likes)
            raise self._failure(error) from plain(error)

    def _failure(self, error: Exception) -> PipelineError:
        return store_error("a store can be read", self.name, error)


async def _get_part(store: Any, key: str, offset: int, stop: int) -> tuple[int, NDArray[np.uint8]]:
    """Size of an object, and its bytes [offset, stop), or as many as it has of them."""
    import obstore

    got = await obstore.get_async(store, key, options={"range": (offset, stop)})
    return got.meta["size"], np.frombuffer(await got.bytes_async(), np.uint8)


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
            if self._first <= offset < self._first + len(self._held):
                part = self._held[offset - self._first : stop - self._first]
            elif stop - offset > _FETCHED_NBYTES:
                yield from self.objects.fetch_all(self.key, offset, stop)
                return
            else:
                # More than is wanted now: what follows is wanted next.
                most = min(offset + _FETCHED_NBYTES, self.nbytes)
                self._first = offset
                [self._held] = self.objects.fetch_all(self.key, offset, most)
                part = self._held[: stop - offset]
            if not len(part):
                return
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
