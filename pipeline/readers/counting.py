"""A Zarr store that counts the bytes it gives."""

from __future__ import annotations

from copy import copy
from threading import Lock
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store
from zarr.storage import StorePath, WrapperStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    import zarr
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype


class CountingStore(WrapperStore[Store]):
    """Another store, and the bytes that were read of it, by any thread; synchronous where the other is."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.nbytes = 0
        self._lock = Lock()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See `Store.get`."""
        return self._count(await self._store.get(key, prototype, byte_range))

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """See `SupportsGetSync.get_sync`."""
        return self._count(super().get_sync(key, prototype=prototype, byte_range=byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """See `Store.get_partial_values`."""
        return [self._count(value) for value in await self._store.get_partial_values(prototype, key_ranges)]

    def get_ranges(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], *, prototype: BufferPrototype, **limits: Any
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """See `Store.get_ranges`; through `get`, since the gaps between joined ranges count, too."""
        return Store.get_ranges(self, key, byte_ranges, prototype=prototype, **limits)

    def _count(self, value: Buffer | None) -> Buffer | None:
        if value is not None:
            with self._lock:
                self.nbytes += len(value)
        return value


def count_reads(array: zarr.Array[Any]) -> tuple[zarr.Array[Any], CountingStore]:
    """Return the same array over a store that counts; no metadata are read again."""
    store = CountingStore(array.store)
    twin = copy(array.async_array)
    object.__setattr__(twin, "store_path", StorePath(store, array.path))
    return type(array)(twin), store
