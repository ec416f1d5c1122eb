"""Chunks and shards under the keys of any Zarr store: listed, looked up, and read by ranges."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import IntegrityError, OpenError, PipelineError
from pipeline.matrix.chunks import Chunks, Problem
from pipeline.process import renewed
from pipeline.storage.concurrency import concurrency, gather
from pipeline.storage.listing import Found, _tells_sizes, ask_key, list_keys
from pipeline.storage.locations import name_store, plain, store_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import zarr
    from numpy.typing import NDArray
    from zarr.abc.store import ByteRequest

_INDEXES_NBYTES = 32 * 2**20
"""Of the indexes that a process holds: of 2,000 shards of 1,024 inner chunks."""
_LISTED_KEYS = 100
"""Keys that a listing tells in the time of asking for one alone: 1,000 a request, one after the other, against 10 at
once."""


class _Indexes:
    """Indexes of shards by run and key, those used last, for all threads of this process."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, str], NDArray[np.int64]] = OrderedDict()
        self._nbytes = 0
        self._lock = renewed(threading.Lock())

    def get(self, key: tuple[str, str]) -> NDArray[np.int64] | None:
        with self._lock:
            index = self._held.get(key)
            if index is not None:
                self._held.move_to_end(key)
            return index

    def put(self, key: tuple[str, str], index: NDArray[np.int64]) -> None:
        with self._lock:
            if key in self._held:
                return
            self._held[key] = index
            self._nbytes += index.nbytes
            while self._nbytes > _INDEXES_NBYTES:
                self._nbytes -= self._held.popitem(last=False)[1].nbytes


_indexes = _Indexes()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Keys(Chunks):
    """Chunks or shards under keys of any other store. Picklable where the store is.

    Coroutines run on Zarr's event loop, the one that the store's own connections may belong to.
    """

    array: zarr.Array[Any] = field(repr=False)
    run: str = ""
    """Of whose tasks those in one process read the index of a shard once; empty: each reads it."""

    def path(self, number: int, columns: tuple[int, ...] | None = None) -> str:
        """Key of a file; see `Chunks.path`."""
        rest = (0,) * (len(self.grid) - 1) if columns is None else columns
        return self._prefix + self.array.metadata.encode_chunk_key((number, *rest))

    def name(self, path: str, number: int) -> str:
        """Store, key and rows of a file, for messages."""
        return Chunks.name(self, f"{name_store(self.array.store)}/{path}", number)

    async def fetch(self, number: int, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Read bytes [offset, offset + nbytes) of file `number`, where columns are not chunked.

        Raises
        ------
        IntegrityError
            If the key is absent or too short.
        OpenError
            If the store fails.
        """
        from zarr.abc.store import RangeByteRequest

        path = self.path(number)
        read = await self._get(path, number, RangeByteRequest(offset, offset + nbytes))
        if read is None:
            raise self._is_gone(path, number)
        if len(read) != nbytes:
            raise self._ends_within(path, number, offset)
        return read

    async def fetch_file(self, number: int) -> NDArray[np.uint8] | None:
        """Read all of file `number`; None where it is absent and reads as the fill value. Errors as of `fetch`."""
        path = self.path(number)
        read = await self._get(path, number, None)
        if read is None and not self.fills:
            raise self._is_gone(path, number)
        return read

    async def fetch_index(self, path: str, number: int) -> tuple[NDArray[np.int64], int]:
        """Read the index of a shard; see `ShardIndex.parse`, and `fetch`. Of a run's tasks here, one reads it.

        Returns
        -------
        tuple
            The index, all of it absent where the shard is and reads as the fill value; and the bytes that were read.
        """
        known = _indexes.get((self.run, path))
        if known is not None:
            return known, 0
        index, nbytes = await self._read_index(path, number)
        if self.run:
            _indexes.put((self.run, path), index)
        return index, nbytes

    async def _read_index(self, path: str, number: int) -> tuple[NDArray[np.int64], int]:
        from zarr.abc.store import RangeByteRequest, SuffixByteRequest

        assert self.index is not None
        size = None
        if not self.index.at_end:
            read = await self._get(path, number, RangeByteRequest(0, self.index.nbytes))
        else:
            try:
                read = await self._get(path, number, SuffixByteRequest(self.index.nbytes))
            except OpenError as error:
                if error.passing:
                    raise
                # Some stores refuse to read from the end.
                size = await self._size(path)
                if size is None:
                    raise
                first = max(0, size - self.index.nbytes)
                read = await self._get(path, number, RangeByteRequest(first, size))
        if read is not None:
            return self.index.parse(read.tobytes(), size, self.name(path, number)), len(read)
        if self.fills:
            return np.full((self.index.chunks, 2), -1), 0
        raise self._is_gone(path, number)

    def read_indexes(self, files: Iterable[tuple[str, int]]) -> Iterator[NDArray[np.int64]]:
        """Yield the index of each shard, of its path and number, some at once."""
        for batch in itertools.batched(files, concurrency()):
            for index, _ in gather(*(self._read_index(path, number) for path, number in batch)):
                yield index

    def count(self) -> tuple[int, int, int]:
        """Files that are there, those there should be, and the bytes that the former take: by listing.

        Sizes that a listing does not tell are asked for; some stores read a key to know its size.
        """
        wanted = {path for number in range(self.grid[0]) for path in self.paths(number)}
        [listed] = gather(list_keys(self.array.store, self._prefix))
        known = [found.nbytes for path, found in listed.items() if path in wanted and found.nbytes is not None]
        unknown = [path for path, found in listed.items() if path in wanted and found.nbytes is None]
        nbytes = sum(known)
        for batch in itertools.batched(unknown, concurrency()):
            nbytes += sum(gather(*map(self.array.store.getsize, batch)))
        return len(known) + len(unknown), len(wanted), nbytes

    def find_problem(self, numbers: NDArray[np.int64]) -> Problem | None:
        """Look for a key that is not right, as far as the store tells; see `Chunks.find_problem`."""
        return self.judge(self.look_up(numbers))

    def judge(self, looked_up: Iterable[tuple[tuple[str, int], Found | None]]) -> Problem | None:
        """Return the first key of `look_up` that is not right."""
        for (path, number), found in looked_up:
            if found is None:
                words = "" if self.fills else "is absent"
            else:
                words = "" if found.nbytes is None else self.size_problem(found.nbytes)
            if words:
                return Problem(number, self.name(path, number), words)
        return None

    def look_up(self, numbers: NDArray[np.int64]) -> Iterator[tuple[tuple[str, int], Found | None]]:
        """Yield each file of these rows, its key and number, and what the store tells of it; None: it is absent.

        By one listing, where that takes less than asking for each.

        Raises
        ------
        OpenError
            If the store fails.
        """
        wanted = [(path, number) for number in numbers.tolist() for path in self.paths(number)]
        listed: dict[str, Found] = {}
        known = False
        if len(wanted) * _LISTED_KEYS > math.prod(self.grid):
            # Who may read a store may not list it, or it lists what it likes: keys that are not listed are asked for,
            # but for those of a sparse array, which may be many, and whose absence is no error.
            with contextlib.suppress(OpenError):
                [listed] = gather(list_keys(self.array.store, self._prefix))
                known = self.fills
        for batch in itertools.batched(wanted, concurrency()):
            asked = [each for each in batch if each[0] not in listed and not known]
            told = dict(zip(asked, gather(*(self._ask(*each) for each in asked)), strict=True))
            for each in batch:
                yield each, listed.get(each[0], told.get(each))

    async def _get(self, path: str, number: int, wanted: ByteRequest | None) -> NDArray[np.uint8] | None:
        from zarr.abc.store import RangeByteRequest
        from zarr.core.buffer import cpu

        try:
            buffer = await self.array.store.get(path, cpu.buffer_prototype, wanted)
        except Exception as error:  # noqa: BLE001 (a store raises what it likes)
            if isinstance(wanted, RangeByteRequest):
                size = await self._size(path)
                if size is not None and wanted.end > size:
                    raise self._ends_within(path, number, wanted.start) from plain(error)
            raise self._failure(path, number, error) from plain(error)
        return None if buffer is None else buffer.as_numpy_array().view(np.uint8)

    def _is_gone(self, path: str, number: int) -> IntegrityError:
        return IntegrityError(f"every chunk is there; {self.name(path, number)} is not; restore it")

    def _ends_within(self, path: str, number: int, offset: int) -> IntegrityError:
        return IntegrityError(
            f"every chunk is whole; {self.name(path, number)} ends within the bytes at {offset}; restore it"
        )

    def _failure(self, path: str, number: int, error: Exception) -> PipelineError:
        return store_error("a chunk can be read", self.name(path, number), error)

    async def _ask(self, path: str, number: int) -> Found | None:
        """Ask for what the store tells of a key, with one request; None: it is absent."""
        try:
            return await ask_key(self.array.store, path)
        except Exception as error:  # noqa: BLE001 (a store raises what it likes)
            raise self._failure(path, number, error) from plain(error)

    async def _size(self, path: str) -> int | None:
        """Return the bytes of a key; None where the store does not tell."""
        if _tells_sizes(self.array.store):
            with contextlib.suppress(Exception):
                return await self.array.store.getsize(path)
        return None

    @property
    def _prefix(self) -> str:
        return f"{self.array.path}/" if self.array.path else ""
