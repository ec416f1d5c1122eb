"""Requests of a task to a store: many of them are under way at once, on Zarr's event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from pipeline.storage.zarrconfig import pinned_config, user_setting

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterable
    from concurrent.futures import Future

type Sized[T] = tuple[int, Callable[[], Coroutine[Any, Any, T]]]
"""Bytes that a coroutine holds, and a function that makes it."""


_AT_ONCE = 32
"""Requests of a task that are in flight at once, unless Zarr is configured: its own default is for whole chunks.

Measured with 30 ms a request and two threads: windows of 256 KB take half the time that they take with 10; 64 give no
more.
"""


def concurrency() -> int:
    """Requests of a task that are in flight at once: `async.concurrency` where it is not Zarr's default."""
    return user_setting("async.concurrency") or _AT_ONCE


def gather[T](*coroutines: Coroutine[Any, Any, T]) -> list[T]:
    """Run coroutines, all at once, and return their results."""

    async def together() -> list[T]:
        return await asyncio.gather(*coroutines)

    return run(together())


@pinned_config()
def run[T](coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on Zarr's event loop, under our settings, and return its result."""
    from zarr.core.sync import sync

    return sync(coroutine)


@pinned_config()
def _begin[T](coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> Future[T]:
    return asyncio.run_coroutine_threadsafe(coroutine, loop)


def in_flight[T](sized: Iterable[Sized[T]], *, most_nbytes: int) -> Generator[T]:
    """Run coroutines, and yield their results as they come, in any order.

    Parameters
    ----------
    most_nbytes
        Bytes that are in flight at once; one coroutine alone may hold more.
    """
    done: SimpleQueue[Future[T]] = SimpleQueue()
    pending: dict[Future[T], int] = {}

    def take() -> T:
        future = done.get()
        del pending[future]
        return future.result()

    loop, most = _running_loop(), concurrency()
    try:
        for nbytes, start in sized:
            while pending and (len(pending) >= most or sum(pending.values()) + nbytes > most_nbytes):
                yield take()
            future = _begin(start(), loop)
            pending[future] = nbytes
            future.add_done_callback(done.put)
        while pending:
            yield take()
    finally:
        for future in pending:
            future.cancel()


def in_order[T](sized: Iterable[Sized[T]], *, most_nbytes: int) -> Generator[T]:
    """Run coroutines as `in_flight` does, and yield their results in their order."""
    pending: deque[tuple[int, Future[T]]] = deque()
    loop, most = _running_loop(), concurrency()
    held = 0
    try:
        for nbytes, start in sized:
            while pending and (len(pending) >= most or held + nbytes > most_nbytes):
                freed, future = pending.popleft()
                yield future.result()
                held -= freed
            pending.append((nbytes, _begin(start(), loop)))
            held += nbytes
        while pending:
            yield pending.popleft()[1].result()
    finally:
        for _, future in pending:
            future.cancel()


def _running_loop() -> asyncio.AbstractEventLoop:
    async def running() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    return run(running())
