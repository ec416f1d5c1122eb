"""Tasks on a client of distributed: submitted, taken as they end, and run again where they were lost, or may pass."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from contextlib import suppress
from itertools import chain, islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from dask.base import annotate, get_annotations

from pipeline.formatting import count_of
from pipeline.runtime.lost_workers import Losses
from pipeline.runtime.retries import Retries, Watchdog, killed_error, stopped_error, task_error

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from dask.delayed import Delayed

    from pipeline.runtime.lost_workers import Observer

_CLOSE_SECONDS = 4
_STOPPED_SECONDS = 0.2
"""How often a run looks whether it was stopped."""
_COUNT_SECONDS = 2
_MOST_LOST = 16
"""Tasks, or four a thread, that may be lost in a row before the others are held back."""
_MOST_KILLERS = 4
"""The same where each task had its worker for itself."""
_SUBMITTED_TOGETHER = 8
"""Tasks of one graph: a fifth less work for Dask than one each."""

type _Ended = tuple[Any, Any, BaseException | None]
"""A future, and its result or what it raised."""


class Flight:
    """Tasks of one run on a client.

    Parameters
    ----------
    annotations
        Of the tasks, for Dask.
    watch
        Told of tasks that are run again, and of workers that are lost.
    threads
        Tasks that run at once.
    direct
        Whether results come straight from workers; otherwise as the client is configured.
    stopped
        Set from another thread, it ends the run.
    """

    def __init__(
        self,
        client: Any,
        annotations: dict[str, Any],
        watch: Observer,
        *,
        threads: int,
        direct: bool,
        stopped: threading.Event | None = None,
    ) -> None:
        self._stopped = stopped
        self._client = client
        self._annotations = annotations
        self._watch = watch
        self._retries = Retries(watch.task_retried)
        self._threads = threads
        self._counted = time.monotonic()
        self._began = time.time()
        self._direct = direct or None
        self._watchdog = Watchdog(client)
        self._ended: SimpleQueue[_Ended | None] = SimpleQueue()
        """None: something else is to be looked after."""
        self._under_way: set[Any] = set()
        self._finished: deque[Any] = deque()
        """Those that were lost, too: until it is let go of, the same key would give the same loss again."""
        self._left: dict[Any, Delayed] = {}
        """Submitted and not done, by key."""
        self._killed: list[Any] = []
        self._done = 0
        self._is_hurt = False
        """A worker was lost, of which nobody was told yet."""

    def run(self, tasks: Iterator[Delayed], *, window: Callable[[int], int], held: int) -> Iterator[Any]:
        """Run tasks, and yield their results; those that were lost run again, alone, so that one that kills is known.

        Parameters
        ----------
        window
            Gives, of the threads that there are, how many tasks are submitted at once, their results, not yet taken,
            among them.
        held
            Finished tasks that the scheduler need not forget.
        """
        self._losses = Losses(self._client, self._left.__contains__, self._wake)
        try:
            yield from self._take_results(tasks, window=window, held=held, patience=max(_MOST_LOST, 4 * self._threads))
            if self._left:
                # A task takes along those beside it, which are not to blame; nor is one that has room when it is alone.
                again = chain(list(self._left.values()), tasks)
                yield from self._take_results(again, window=lambda _: 1, held=held, patience=_MOST_KILLERS)
            self._tell_losses(wait=True)
        except Exception:
            self._tell_losses(wait=True)
            raise
        finally:
            self._losses.close()
        if self._left:
            undone = len(self._left) + sum(1 for _ in tasks)
            words = f"not done: {undone:,} of {count_of(self._done + undone, 'task')}"
            raise killed_error(self._client, self._killed, words, since=self._began) from self._killed[-1]

    def _take_results(
        self, tasks: Iterator[Delayed], *, window: Callable[[int], int], held: int, patience: int
    ) -> Generator[Any, None, None]:
        """Keep a window of tasks submitted, and yield their results.

        Parameters
        ----------
        patience
            Tasks in a row that may be lost with their workers before the rest is left undone.
        """
        from distributed.scheduler import KilledWorker

        # What the pass before had under way still comes to its queue.
        self._ended = SimpleQueue()
        self._killed = []
        in_a_row = 0
        try:
            while in_a_row < patience and self._fill(tasks, window(self._threads)):
                self._recount()
                self._tell_losses()
                ended = self._next_ended()
                if ended is None:
                    continue
                future, result, failure = ended
                if failure is None:
                    yield result
                    del ended, result, self._left[future.key]
                    self._done += 1
                    in_a_row = 0
                elif isinstance(failure, KilledWorker):
                    self._killed.append(failure)
                    in_a_row += 1
                elif self._retries.postpone(self._left[future.key], failure):
                    # Forgotten before the same key is submitted again, which would be its failure still.
                    self._under_way.discard(future)
                    self._let_go([future])
                    continue
                else:
                    yield from self._arrived()
                    raise task_error(self._client, future.key, failure)
                self._under_way.discard(future)
                self._finished.append(future)
                if len(self._finished) > held:
                    self._finished.popleft().release()
        finally:
            self._release()

    def _fill(self, tasks: Iterator[Delayed], window: int) -> bool:
        """Submit tasks where there is room; False where nothing is left to wait for."""
        # Two a thread are under way while room for as many as go together comes free.
        together = max(1, min(_SUBMITTED_TOGETHER, window - 2 * self._threads))
        while True:
            part = self._retries.due()
            room = window - len(self._under_way) - len(part)
            if room >= together:
                # Made inside the caller's own span alone they would keep to that.
                with annotate(**self._annotations):
                    part += islice(tasks, min(_SUBMITTED_TOGETHER, room))
            self._submit(part)
            # What there is to take is taken while the window fills.
            if not part or not self._ended.empty():
                return bool(self._under_way or self._retries.waiting)

    def _wake(self) -> None:
        """Let the run look after a worker that was lost; called from another thread."""
        self._is_hurt = True
        self._ended.put(None)

    def _tell_losses(self, *, wait: bool = False) -> None:
        """Tell of workers that were lost; `wait` for how the last ones ended.

        The scheduler computes lost results again; results that were already received are released first.
        """
        if self._is_hurt:
            self._is_hurt = False
            self._let_go(self._finished)
            self._finished.clear()
        for loss in self._losses.take(wait=wait):
            self._watch.worker_lost(loss)

    def _recount(self) -> None:
        """Learn, now and then, how many threads there are: clusters grow and shrink. The answer is not waited for."""
        now = time.monotonic()
        if now - self._counted < _COUNT_SECONDS:
            return
        self._counted = now

        async def count() -> None:
            with suppress(Exception):
                known = await self._client.scheduler.identity(n_workers=0)
                self._threads = known["total_threads"] or self._threads

        self._client.loop.add_callback(count)

    def _next_ended(self) -> _Ended | None:
        """Return what ended next; None where nothing has, and it is time to look after something else."""
        if self._stopped is not None and self._stopped.is_set():
            raise stopped_error()
        pause = self._retries.pause()
        most = math.inf if self._stopped is None else _STOPPED_SECONDS
        try:
            ended = self._ended.get(timeout=min(self._watchdog.pause(), math.inf if pause is None else pause, most))
        except Empty:
            self._watchdog.look()
            return None
        self._watchdog.heard()
        return ended

    def _arrived(self) -> Iterator[Any]:
        """Yield the results that are there already."""
        with suppress(Empty):
            while True:
                ended = self._ended.get_nowait()
                if ended is not None and ended[2] is None:
                    yield ended[1]

    def _submit(self, tasks: Iterable[Delayed]) -> None:
        """Submit tasks; each comes to `_ended` when it is done.

        Not by `distributed.as_completed`, which in a thread may miss a task that ends as it looks, for 0.1 s.
        """
        client, queue, direct = self._client, self._ended, self._direct

        async def deliver(future: Any) -> None:
            try:
                [result] = await client.gather([future], direct=direct, asynchronous=True)
                queue.put((future, result, None))
            except BaseException as error:  # noqa: BLE001 (it is raised where the results are taken)
                queue.put((future, None, error))

        by_key = {task.key: task for task in tasks}
        if not by_key:
            return
        self._left.update(by_key)
        with annotate(**self._annotations):
            futures: list[Any] = client.compute(list(by_key.values()), optimize_graph=False)
        self._under_way.update(futures)
        for future in futures:
            client.loop.add_callback(deliver, future)

    def _release(self) -> None:
        """Let go of all futures.

        Finished ones, too: a task whose worker is lost from now on must not run again. Not by `Client.cancel`, whose
        echo of the scheduler would cancel a task that was submitted once more.
        """
        self._retries.waiting.clear()
        self._let_go(chain(self._under_way, self._finished))
        self._under_way.clear()
        self._finished.clear()

    def _let_go(self, futures: Iterable[Any]) -> None:
        """Release futures, and wait until the client has told the scheduler so."""
        with suppress(Exception):
            for future in futures:
                future.release()
            if self._client.status == "running":
                self._client.sync(asyncio.sleep, 0, callback_timeout=_CLOSE_SECONDS)


def name_span(tags: Sequence[str]) -> dict[str, Any]:
    """Annotations that gather a run's tasks in one span, below the caller's own where there is one."""
    if not tags:
        return {}
    from distributed import span

    with span(*tags):
        return {"span": get_annotations()["span"]}
