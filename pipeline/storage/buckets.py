"""Objects of a store, put under conditions: where there is none, or in the place of one that is known.

Nothing else of a store makes one of two writers lose: there are no locks, and nothing can be renamed.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from pipeline.errors import InputError, NotFoundError, OpenError
from pipeline.process import renewed
from pipeline.storage.checksums import extend_crc32
from pipeline.storage.concurrency import run
from pipeline.storage.listing import is_cut, list_told
from pipeline.storage.locations import BUCKETS, MEMORY, WEB, plain, say_failure, store_error

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from numpy.typing import NDArray

    from pipeline.storage.locations import Url
    from pipeline.storage.stores import MemoryUrlStore, UrlStore

type Content = bytes | NDArray[np.uint8]
"""Bytes of an object; an array of one axis."""

_AT_ONCE = 32
"""Small requests of one call that are in flight at once."""
_DOCUMENT_NBYTES = 256 * 2**20
"""Of a small object that is read whole: metadata with the checksums of a million files are smaller."""
_PART_NBYTES = 4 * 2**20
_ATTEMPTS = 3
"""Of a put under a condition: a store's library does not repeat one of which it has heard nothing."""
_FIRST_WAIT_SECONDS = 0.2


class TakenError(Exception):
    """A put whose condition does not hold."""


class Held(NamedTuple):
    """An object as it is now."""

    nbytes: int
    tag: str
    """Its entity tag, without quotes: another as soon as its bytes change; empty where the store tells none. Where it
    is the MD5 of the bytes, it proves what the store holds."""
    version: str = ""
    """What some stores go by instead."""


class Bucket(Protocol):
    """Objects below a URL, by keys relative to it. Picklable.

    Each method raises OpenError where the store fails, and NotFoundError where the bucket itself is not there.
    """

    @property
    def url(self) -> Url:
        """What keys are relative to."""

    def hurried(self) -> Bucket:
        """The same, to be read from, which gives up within seconds: a store that is not there is soon known."""

    def list_keys(self, prefix: str) -> dict[str, Held]:
        """Every object whose key begins with a prefix that ends in a slash: a request for 1,000 of them."""

    def find(self, prefix: str) -> str | None:
        """Key of one such object, by one request."""

    def get(self, keys: Sequence[str]) -> list[tuple[bytes, Held] | None]:
        """Read small objects whole, some at once; None for one that is absent."""

    def compare(self, key: str, content: Content) -> tuple[Held, bool] | None:
        """Read an object, and tell whether it holds these bytes; None where it is absent."""

    def checksum(self, key: str) -> tuple[int, int] | None:
        """Read an object, and tell its size and crc32; None where it is absent."""

    def put(self, key: str, content: Content) -> Held:
        """Put an object in the place of whatever is there."""

    def put_if(self, key: str, content: Content, held: Held | None) -> Held:
        """Put an object where `held` is: None, nothing. TakenError where something else is."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; one that is absent is none the worse."""


def open_bucket(url: Url) -> Bucket:
    """Open what lies below a URL for writing; nothing is asked of it yet.

    Raises
    ------
    InputError
        If nothing can be written there, or not under conditions.
    OpenError
        If the library for it is missing, or finds no credentials.
    """
    from pipeline.storage.stores import MemoryUrlStore, UrlStore, open_store

    if url.scheme not in (MEMORY, *BUCKETS.values(), *WEB):
        raise InputError(
            f"an output goes to a store that can refuse to replace; {url.scheme}:// cannot; write to s3://, gs://, "
            f"az:// or a path"
        )
    store = open_store(url, read_only=False)
    if isinstance(store, MemoryUrlStore):
        return MemoryBucket(store)
    assert isinstance(store, UrlStore)
    return UrlBucket(store)


def put_once(bucket: Bucket, key: str, content: Content, held: Held | None) -> Held:
    """Put an object as `Bucket.put_if` does; one that holds these very bytes already is as good.

    An answer may be lost after the store has done what was asked: then it is our own that is found.
    """
    try:
        return bucket.put_if(key, content, held)
    except TakenError:
        found = bucket.compare(key, content)
        if found is None or not found[1]:
            raise
        return found[0]


def digest_content(content: Content) -> str:
    """MD5, hexadecimal: what most stores give as the tag of an object that was put in one go."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class UrlBucket:
    """An object store, through obstore. Coroutines run on Zarr's event loop: a signal ends the wait for them."""

    store: UrlStore

    @property
    def url(self) -> Url:
        """See `Bucket.url`."""
        return self.store.url

    def hurried(self) -> UrlBucket:
        """See `Bucket.hurried`."""
        return UrlBucket(self.store.hurried())

    def list_keys(self, prefix: str) -> dict[str, Held]:
        """See `Bucket.list_keys`."""

        async def collect() -> dict[str, Held]:
            # What a server tells of other keys is not to be trusted.
            told = list_told(self.store, prefix)
            return {each["path"]: _held(each) async for each in told if each["path"].startswith(prefix)}

        return self._call(collect())

    def find(self, prefix: str) -> str | None:
        """See `Bucket.find`."""

        async def first() -> str | None:
            async for each in list_told(self.store, prefix):
                return str(each["path"])
            return None

        return self._call(first())

    def get(self, keys: Sequence[str]) -> list[tuple[bytes, Held] | None]:
        """See `Bucket.get`."""
        import obstore

        async def one(key: str) -> tuple[bytes, Held] | None:
            try:
                got = await obstore.get_async(self.store.store, key)
                if got.meta["size"] > _DOCUMENT_NBYTES:
                    raise OpenError(
                        f"{self.url}/{key} has {got.meta['size']:,} bytes, too many for a document; remove it, "
                        f"or choose another name"
                    )
                return bytes(await got.bytes_async()), _held(got.meta)
            except FileNotFoundError as error:
                _check_bucket(error)
                return None

        return self._call(_some_at_once(_again(partial(one, key)) for key in keys))

    def compare(self, key: str, content: Content) -> tuple[Held, bool] | None:
        """See `Bucket.compare`."""
        import obstore

        expected = np.frombuffer(content, np.uint8)

        async def compare() -> tuple[Held, bool] | None:
            try:
                got = await obstore.get_async(self.store.store, key)
            except FileNotFoundError as error:
                _check_bucket(error)
                return None
            held, read = _held(got.meta), 0
            if held.nbytes != len(expected):
                return held, False
            async for part in got.stream(min_chunk_size=_PART_NBYTES):
                found = np.frombuffer(part, np.uint8)
                if not np.array_equal(found, expected[read : read + len(found)]):
                    return held, False
                read += len(found)
            return held, read == len(expected)

        return self._call(_again(compare))

    def checksum(self, key: str) -> tuple[int, int] | None:
        """See `Bucket.checksum`."""
        import obstore

        async def read() -> tuple[int, int] | None:
            try:
                got = await obstore.get_async(self.store.store, key)
            except FileNotFoundError as error:
                _check_bucket(error)
                return None
            nbytes = crc32 = 0
            async for part in got.stream(min_chunk_size=_PART_NBYTES):
                nbytes, crc32 = nbytes + len(part), extend_crc32(crc32, part)
            return nbytes, crc32

        return self._call(_again(read))

    def put(self, key: str, content: Content) -> Held:
        """See `Bucket.put`."""
        return self._put(key, content, "overwrite")

    def put_if(self, key: str, content: Content, held: Held | None) -> Held:
        """See `Bucket.put_if`."""
        mode: Any = "create"
        if held is not None:
            known = {"e_tag": f'"{held.tag}"' if held.tag else "", "version": held.version}
            mode = {name: value for name, value in known.items() if value}
        for attempt in range(_ATTEMPTS):
            try:
                return self._put(key, content, mode)
            except OpenError as error:
                # What was put all the same is found by the next attempt to be there.
                if attempt == _ATTEMPTS - 1 or not _may_pass(error):
                    raise
                time.sleep(_FIRST_WAIT_SECONDS * 2**attempt)
        raise AssertionError

    def delete(self, keys: Iterable[str]) -> None:
        """See `Bucket.delete`."""
        import obstore

        async def delete() -> None:
            doomed = list(keys)
            try:
                await obstore.delete_async(self.store.store, doomed)
            except FileNotFoundError:
                # Some stores mind: one by one, then.
                for key in doomed:
                    with suppress(FileNotFoundError):
                        await obstore.delete_async(self.store.store, key)

        self._call(delete())

    def _put(self, key: str, content: Content, mode: Any) -> Held:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        async def put() -> Held:
            try:
                # In one go: parts cannot be put under a condition.
                made = await obstore.put_async(self.store.store, key, content, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError) as error:
                raise TakenError(key) from plain(error)
            return _held({"size": len(content), "e_tag": made["e_tag"], "version": made["version"]})

        return self._call(put())

    def _call[T](self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return run(coroutine)
        except (TakenError, OpenError):
            raise
        except FileNotFoundError as error:
            raise NotFoundError(
                f"a bucket is there before it is written to; {self.url}: {say_failure(error)}; make it first"
            ) from plain(error)
        except Exception as error:  # noqa: BLE001 (a store raises what it likes)
            raise store_error("a store can be written to", str(self.url), error) from plain(error)


def _held(told: Any) -> Held:
    return Held(told["size"], (told["e_tag"] or "").strip('"'), told["version"] or "")


def _check_bucket(error: FileNotFoundError) -> None:
    """Raise what says that an object is absent if it says that about the bucket."""
    if "NoSuchBucket" in str(error):
        raise error


def _may_pass(error: OpenError) -> bool:
    """Whether what a store failed with may be over by the next time: a server's own failure, a line that broke."""
    return str(error.__cause__).startswith("GenericError")


async def _again[T](read: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Await what reads an object, and once more where its bytes end early."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return await read()
        except Exception as error:
            if not is_cut(error):
                raise
    return await read()


async def _some_at_once[T](coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await many in their order, a bounded number at once; the others of a batch end before one's failure is raised."""
    waiting, made = iter(coroutines), []
    while batch := list(islice(waiting, _AT_ONCE)):
        results = await asyncio.gather(*batch, return_exceptions=True)
        for each in results:
            if isinstance(each, BaseException):
                raise each
            made.append(each)
    return made


@dataclass(frozen=True, slots=True)
class MemoryBucket:
    """Keys in this process's memory, for tests."""

    store: MemoryUrlStore

    @property
    def url(self) -> Url:
        """See `Bucket.url`."""
        return self.store.url

    def hurried(self) -> MemoryBucket:
        """See `Bucket.hurried`."""
        return self

    def list_keys(self, prefix: str) -> dict[str, Held]:
        """See `Bucket.list_keys`."""

        async def collect() -> list[str]:
            return [key async for key in self.store.list_prefix(prefix)]

        with _memory:
            found = {key: self._get(key) for key in run(collect())}
        return {key: _describe(content) for key, content in sorted(found.items()) if content is not None}

    def find(self, prefix: str) -> str | None:
        """See `Bucket.find`."""
        return next(iter(self.list_keys(prefix)), None)

    def get(self, keys: Sequence[str]) -> list[tuple[bytes, Held] | None]:
        """See `Bucket.get`."""
        found = [self._get(key) for key in keys]
        return [None if content is None else (content, _describe(content)) for content in found]

    def compare(self, key: str, content: Content) -> tuple[Held, bool] | None:
        """See `Bucket.compare`."""
        found = self._get(key)
        return None if found is None else (_describe(found), found == bytes(content))

    def checksum(self, key: str) -> tuple[int, int] | None:
        """See `Bucket.checksum`."""
        found = self._get(key)
        return None if found is None else (len(found), extend_crc32(0, found))

    def put(self, key: str, content: Content) -> Held:
        """See `Bucket.put`."""
        with _memory:
            return self._put(key, content)

    def put_if(self, key: str, content: Content, held: Held | None) -> Held:
        """See `Bucket.put_if`."""
        with _memory:
            found = self._get(key)
            if held != (None if found is None else _describe(found)):
                raise TakenError(key)
            return self._put(key, content)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Bucket.delete`."""
        for key in keys:
            run(self.store.delete(key))

    def _get(self, key: str) -> bytes | None:
        from zarr.core.buffer import cpu

        buffer = run(self.store.get(key, cpu.buffer_prototype))
        return None if buffer is None else buffer.to_bytes()

    def _put(self, key: str, content: Content) -> Held:
        from zarr.core.buffer import cpu

        kept = bytes(content)
        run(self.store.set(key, cpu.Buffer.from_bytes(kept)))
        return _describe(kept)


_memory = renewed(threading.RLock())


def _describe(content: bytes) -> Held:
    return Held(len(content), digest_content(content))
