"""Keys of a Zarr store: listed, looked up, and read whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.storage.locations import name_store, plain, store_error
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from zarr.abc.store import Store
    from zarr.storage import ObjectStore


_LISTINGS = 3
"""Times that a listing may break off, and go on after the last key that it told."""
_PAGE_KEYS = 1000
"""Keys that a request for a listing tells at most."""


class Found(NamedTuple):
    """What a store tells of a key that is there."""

    nbytes: int | None
    """None: it does not tell."""
    tag: str = ""
    """Another one as soon as its bytes change: its entity tag, or the time of its last change."""


async def ask_key(store: Store, key: str) -> Found | None:
    """Ask for what a store tells of a key, with one request; None: it is absent. It raises what it likes."""
    from zarr.storage import ObjectStore

    try:
        if isinstance(store, ObjectStore):
            import obstore

            return _found(await obstore.head_async(store.store, key))
        if _tells_sizes(store):
            return Found(await store.getsize(key))
        return Found(None) if await store.exists(key) else None
    except FileNotFoundError:
        return None


async def list_keys(store: Store, prefix: str) -> dict[str, Found]:
    """Return the keys under a prefix, which is empty or ends in a slash, with what a listing tells of them.

    Raises
    ------
    OpenError
        If the store cannot be listed.
    """
    from zarr.storage import ObjectStore

    try:
        if not isinstance(store, ObjectStore):
            return {key: Found(None) async for key in store.list_prefix(prefix)}
        return {each["path"]: _found(each) async for each in list_told(store, prefix)}
    except Exception as error:  # noqa: BLE001 (a store raises what it likes)
        raise store_error("a store can be listed", name_store(store), error) from plain(error)


async def list_told(store: ObjectStore[Any], prefix: str) -> AsyncIterator[Any]:
    """Yield what an object store itself tells of each key under a prefix, in their order; it raises what it likes."""
    import obstore

    if not store.supports_listing:
        raise NotImplementedError("it cannot be listed")
    last, broken = None, 0
    while True:
        try:
            async for page in obstore.list(store.store, prefix, offset=last, chunk_size=_PAGE_KEYS):
                for each in page:
                    yield each
                    last = each["path"]
        except Exception as error:
            broken += 1
            # Other failures obstore tries again by itself; not a page whose bytes end early.
            if broken == _LISTINGS or not is_cut(error):
                raise
        else:
            return


def is_cut(error: Exception) -> bool:
    """Whether the bytes of an answer ended early: of failures that may pass the one that obstore does not try again."""
    return "response body" in str(error)


def _tells_sizes(store: Store) -> bool:
    """Whether a store knows sizes; others read all of a key."""
    from zarr.abc.store import Store

    return type(store).getsize is not Store.getsize


def _found(told: Any) -> Found:
    """What an object store tells of a key."""
    # A listing may tell tags without quotes, and tells milliseconds where a request for one key tells seconds.
    return Found(told["size"], (told["e_tag"] or "").strip('"') or f"{told['last_modified']:%Y-%m-%dT%H:%M:%S}")


def hurried(store: Store) -> Store:
    """Return a store that gives up within seconds, where it can: who asks for the first time wants to know soon."""
    made: Store = getattr(store, "hurried", lambda: store)()
    return made


@pinned_config()
def read_key(store: Store, key: str) -> bytes | None:
    """Return the bytes under a key of a store; None where it is absent.

    Raises
    ------
    AccessError
        If the store refuses.
    OpenError
        If it fails.
    """
    from zarr.core.buffer import cpu
    from zarr.core.sync import sync

    try:
        buffer = sync(store.get(key, cpu.buffer_prototype))
    except Exception as error:  # noqa: BLE001 (a store raises what it likes)
        raise store_error("a store can be read", f"{name_store(store)}/{key}", error) from plain(error)
    return None if buffer is None else buffer.to_bytes()
