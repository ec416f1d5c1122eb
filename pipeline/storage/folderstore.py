"""Zarr's store of a folder that is written: also where files cannot be linked or renamed, which Zarr's own needs."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

from zarr.storage import LocalStore

from pipeline.storage.filesystem import move_file

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer


class FolderStore(LocalStore):
    """A folder that one run writes: no key is written twice at once."""

    async def set(self, key: str, value: Buffer) -> None:
        """See `Store.set`."""
        await asyncio.to_thread(self.set_sync, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """See `Store.set_if_not_exists`."""
        if not (self.root / key).exists():
            await self.set(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """See `LocalStore.set_sync`."""
        self._ensure_open_sync()
        self._check_writable()
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            partial.write_bytes(value.as_buffer_like())
            move_file(partial, path)
        finally:
            partial.unlink(missing_ok=True)
