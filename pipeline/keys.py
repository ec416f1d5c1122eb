"""Chunks and shards under the keys of any Zarr store: listed, looked up, and read by ranges."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.chunks import Chunks, Problem
from pipeline.errors import IntegrityError, OpenError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator

    import zarr
    from numpy.typing import NDArray
    from zarr.abc.store import ByteRequest

_LISTED_KEYS = 100
"""Keys that a listing tells in the time of asking for one alone: 1,000 a request, one after the other, against 10 at
once."""


class Found(NamedTuple):
    """What a store tells of a key that is there."""

    nbytes: int | None
    """None: it does not tell."""
    tag: str = ""
    """Another one as soon as its bytes change: its entity tag, or the time of its last change."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Keys(Chunks):
    """Chunks or shards under keys of any other store. Picklable where the store is.

    Coroutines run on Zarr's event loop, the one that the store's own connections may belong to.
    """

    array: zarr.Array[Any]

    def path(self, number: int, columns: tuple[int, ...] | None = None) -> str:
        """Key of a file; see `Chunks.path`."""
        rest = (0,) * (len(self.grid) - 1) if columns is None else columns
        return self._prefix + self.array.metadata.encode_chunk_key((number, *rest))

    def name(self, path: str, number: int) -> str:
        """Store, key and rows of a file, for messages."""
        return Chunks.name(self, f"{str(self.array.store).rstrip('/')}/{path}", number)

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
        if len(read) != nbytes:
            raise self._ends_within(path, number, offset)
        return read

    async def fetch_index(self, path: str, number: int) -> NDArray[np.int64]:
        """Read the index of a shard; see `ShardIndex.parse`, and `fetch`."""
        from zarr.abc.store import RangeByteRequest, SuffixByteRequest

        assert self.index is not None
        size = None
        if not self.index.at_end:
            read = await self._get(path, number, RangeByteRequest(0, self.index.nbytes))
        else:
            try:
                read = await self._get(path, number, SuffixByteRequest(self.index.nbytes))
            except OpenError:
                # Some stores refuse to read from the end.
                size = await self._size(path)
                if size is None:
                    raise
                first = max(0, size - self.index.nbytes)
                read = await self._get(path, number, RangeByteRequest(first, size))
        return self.index.parse(read.tobytes(), size, self.name(path, number))

    def read_indexes(self, files: Iterable[tuple[str, int]]) -> Iterator[NDArray[np.int64]]:
        """Yield the index of each shard, of its path and number, some at once; see `fetch_index`."""
        for batch in itertools.batched(files, concurrency()):
            yield from self._gather(*(self.fetch_index(path, number) for path, number in batch))

    def count(self) -> tuple[int, int, int]:
        """Files that are there, those there should be, and the bytes that the former take: by listing.

        Sizes that a listing does not tell are asked for; some stores read a key to know its size.
        """
        wanted = {path for number in range(self.grid[0]) for path in self.paths(number)}
        [listed] = self._gather(self._list())
        known = [found.nbytes for path, found in listed.items() if path in wanted and found.nbytes is not None]
        unknown = [path for path, found in listed.items() if path in wanted and found.nbytes is None]
        nbytes = sum(known)
        for batch in itertools.batched(unknown, concurrency()):
            nbytes += sum(self._gather(*map(self.array.store.getsize, batch)))
        return len(known) + len(unknown), len(wanted), nbytes

    def find_problem(self, numbers: NDArray[np.int64]) -> Problem | None:
        """Look for a key that is not right, as far as the store tells; see `Chunks.find_problem`."""
        for (path, number), found in self.look_up(numbers):
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
                [listed] = self._gather(self._list())
                known = self.fills
        for batch in itertools.batched(wanted, concurrency()):
            asked = [each for each in batch if each[0] not in listed and not known]
            told = dict(zip(asked, self._gather(*(self._ask(*each) for each in asked)), strict=True))
            for each in batch:
                yield each, listed.get(each[0], told.get(each))

    async def _get(self, path: str, number: int, wanted: ByteRequest) -> NDArray[np.uint8]:
        from zarr.abc.store import RangeByteRequest
        from zarr.core.buffer import default_buffer_prototype

        try:
            buffer = await self.array.store.get(path, default_buffer_prototype(), wanted)
        except Exception as error:  # a store raises what it likes
            if isinstance(wanted, RangeByteRequest):
                size = await self._size(path)
                if size is not None and wanted.end > size:
                    raise self._ends_within(path, number, wanted.start) from error
            raise self._failure(path, number, error) from error
        if buffer is None:
            raise IntegrityError(f"every chunk is there; {self.name(path, number)} is not; restore it")
        return buffer.as_numpy_array().view(np.uint8)

    def _ends_within(self, path: str, number: int, offset: int) -> IntegrityError:
        return IntegrityError(
            f"every chunk is whole; {self.name(path, number)} ends within the bytes at {offset}; restore it"
        )

    def _failure(self, path: str, number: int, error: Exception) -> OpenError:
        return OpenError(f"a chunk can be read; {self.name(path, number)} cannot: {_reason(error)}; check the store")

    async def _ask(self, path: str, number: int) -> Found | None:
        """Ask for what the store tells of a key, with one request; None: it is absent."""
        from zarr.storage import ObjectStore

        store = self.array.store
        try:
            if isinstance(store, ObjectStore):
                import obstore

                return _found(await obstore.head_async(store.store, path))
            if self._tells_sizes:
                return Found(await store.getsize(path))
            return Found(None) if await store.exists(path) else None
        except FileNotFoundError:
            return None
        except Exception as error:  # a store raises what it likes
            raise self._failure(path, number, error) from error

    async def _size(self, path: str) -> int | None:
        """Return the bytes of a key; None where the store does not tell."""
        if self._tells_sizes:
            with contextlib.suppress(Exception):
                return await self.array.store.getsize(path)
        return None

    @property
    def _tells_sizes(self) -> bool:
        """Whether the store knows sizes; others read all of a key."""
        from zarr.abc.store import Store

        return type(self.array.store).getsize is not Store.getsize

    async def _list(self) -> dict[str, Found]:
        """Return the keys under the array, with what a listing tells of them."""
        from zarr.storage import ObjectStore

        store = self.array.store
        try:
            if isinstance(store, ObjectStore):
                import obstore

                batches = obstore.list(store.store, self._prefix)
                return {each["path"]: _found(each) async for batch in batches for each in batch}
            return {path: Found(None) async for path in store.list_prefix(self._prefix)}
        except Exception as error:  # a store raises what it likes
            raise OpenError(f"a store can be listed; {store} cannot: {_reason(error)}; check the store") from error

    def _gather[T](self, *coroutines: Coroutine[Any, Any, T]) -> list[T]:
        from zarr.core.sync import sync

        async def gather() -> list[T]:
            return await asyncio.gather(*coroutines)

        return sync(gather())

    @property
    def _prefix(self) -> str:
        return f"{self.array.path}/" if self.array.path else ""


def _found(told: Any) -> Found:
    """What an object store tells of a key."""
    # A listing tells milliseconds where a request for one key tells seconds.
    return Found(told["size"], told["e_tag"] or f"{told['last_modified']:%Y-%m-%dT%H:%M:%S}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def concurrency() -> int:
    """Requests of a task that are in flight at once, as Zarr is configured."""
    import zarr

    # Without a limit, as many as by default.
    return int(zarr.config.get("async.concurrency") or 10)
