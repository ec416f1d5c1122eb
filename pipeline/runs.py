"""Runs: tasks computed, results taken as they come, the lost run again; and which of them may still write."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from dask.base import compute
from dask.callbacks import Callback

from pipeline.capacity import active_client, count_threads, shares_memory
from pipeline.errors import BudgetError, IncompleteError, PipelineError
from pipeline.sizes import count_of, format_size

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from dask.delayed import Delayed


_CLOSE_SECONDS = 4
"""How long workers of a run that failed may take to finish what they write."""
_HURRY_SECONDS = 1
"""The same where the user interrupts."""
_MOST_LOST = 16
"""Tasks, or four a thread, that may be lost in a row before the others are held back."""
_MOST_KILLERS = 4
"""The same where each task had its worker for itself."""
_MOST_SUBMITTED = 2000
"""Tasks that the scheduler is told of at once: enough that none waits, and that its memory stays small."""
_TOGETHER = 16
"""Tasks, or four a thread, that a scheduler of Dask's own computes in one go: it gives their results when all are done,
so that a kill loses as many from the journal."""
_SUBMITTED_TOGETHER = 8
"""Tasks of one graph."""


_writers: Counter[str] = Counter()
_closed: set[str] = set()
_registry = threading.Condition()


def _forget_runs() -> None:
    """Start anew in a child that was forked, perhaps while another thread held the lock."""
    global _registry  # noqa: PLW0603 (a lock cannot be cleared)
    _registry = threading.Condition()
    _writers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_runs)


@contextmanager
def open_run() -> Iterator[str]:
    """Yield the id of a run; when its block ends, wait for tasks that still write, on every worker, and bar others.

    A task that runs cannot be stopped, and Dask runs one again whose worker is lost: without this it would write into
    what is being removed, or is complete.
    """
    run = uuid.uuid4().hex
    client = active_client()
    elsewhere = client is not None and not shares_memory(client)
    seconds = _HURRY_SECONDS
    try:
        yield run
        seconds = _CLOSE_SECONDS
    except Exception:
        seconds = _CLOSE_SECONDS
        raise
    finally:
        if elsewhere and client.status == "running":
            # A failure that brought us here counts, not that of the workers, which may be gone.
            with suppress(Exception):
                client.sync(client._run, close_run, run, on_error="ignore", callback_timeout=seconds)  # noqa: SLF001 (`Client.run` has no timeout)
        close_run(run)


def close_run(run: str) -> None:
    """Bar tasks of a run from writing in this process, once those that do have ended."""
    with _registry:
        _closed.add(run)
        _registry.wait_for(lambda: not _writers[run])
        del _writers[run]


@contextmanager
def writing(run: str) -> Iterator[None]:
    """Hold a run open while its block writes; IncompleteError where it was closed."""
    with _registry:
        if run in _closed:
            raise IncompleteError(f"a run that has ended writes no more; run {run} has; see its own error")
        _writers[run] += 1
    try:
        yield
    finally:
        with _registry:
            _writers[run] -= 1
            _registry.notify_all()


def run_tasks(tasks: list[Delayed], *, at_once: int, results_travel: bool = False) -> Iterator[Any]:
    """Compute tasks on the active client, or on Dask's own scheduler, and yield each result as it is there.

    Parameters
    ----------
    at_once
        Tasks that memory allows to be under way at once; their results, not yet taken, among them.
    results_travel
        Whether a result is a block, whose memory counts; otherwise it is a receipt.

    Raises
    ------
    Exception
        What the first task that failed raised, once the results that are there were yielded; tasks not yet begun are
        cancelled.
    BudgetError
        If a task has more memory than its worker may, or raises MemoryError.
    IncompleteError
        If tasks end the workers that run them, once all others are done; if no worker is left, or no scheduler.
    """
    client = active_client()
    threads = count_threads(client)
    # Memory is bounded by the tasks that run where results are receipts: let Dask know of all, and show them.
    window = at_once if results_travel or at_once < threads else _MOST_SUBMITTED
    if client is not None:
        yield from _run_on(client, tasks, window=window, threads=threads, release=results_travel)
        return
    waiting = iter(tasks)
    limited = {"num_workers": at_once} if at_once < threads else {}
    while batch := list(islice(waiting, min(window, max(_TOGETHER, 4 * threads)))):
        done: dict[Any, Any] = {}
        try:
            with Callback(posttask=lambda key, result, *_, done=done: done.update({key: result})):
                results = compute(*batch, optimize_graph=False, **limited)
        except BaseException:
            yield from [done[task.key] for task in batch if task.key in done]
            raise
        yield from results


def _run_on(
    client: Any, tasks: list[Delayed], *, window: int, threads: int, release: bool
) -> Generator[Any, None, None]:
    """Run tasks on a client; those that were lost with their workers again, alone, so that one that kills is known."""
    patience = max(_MOST_LOST, 4 * threads)
    left, killed = yield from _take_results(client, tasks, window=window, patience=patience, release=release)
    if left:
        # A task takes along those beside it, which are not to blame; nor is one that has room when it is alone.
        left, killed = yield from _take_results(client, left, window=1, patience=_MOST_KILLERS, release=release)
    if left:
        undone = f"not done: {len(left):,} of {count_of(len(tasks), 'task')}"
        raise _killed_error(client, killed, undone) from killed[-1]


def _take_results(
    client: Any, tasks: list[Delayed], *, window: int, patience: int, release: bool
) -> Generator[Any, None, tuple[list[Delayed], list[Any]]]:
    """Keep `window` tasks submitted to a client, and yield their results.

    Parameters
    ----------
    patience
        Tasks in a row that may be lost with their workers before the rest is left undone.
    release
        Whether to let go of each result once it was taken.

    Returns
    -------
    tuple
        Tasks that are not done, and a `KilledWorker` for each that was lost.
    """
    from distributed.scheduler import KilledWorker

    ended: SimpleQueue[_Ended] = SimpleQueue()
    held: set[Any] = set()
    left = {task.key: task for task in tasks}
    waiting = iter(tasks)
    killed: list[Any] = []
    in_a_row = 0
    try:
        held.update(_submit(client, waiting, window, ended))
        under_way = len(held)
        while under_way and in_a_row < patience:
            future, result, failure = ended.get()
            if failure is None:
                yield result
                del left[future.key]
                in_a_row = 0
                if release:
                    held.discard(future)
                    future.release()
            elif isinstance(failure, KilledWorker):
                killed.append(failure)
                in_a_row += 1
            else:
                yield from [result for _, result, failed in _arrived(ended) if failed is None]
                raise _task_error(client, future.key, failure)
            following = set(_submit(client, waiting, 1, ended))
            held |= following
            under_way += len(following) - 1
    finally:
        # Finished ones, too: a task whose worker is lost from now on must not run again. Not by `Client.cancel`, whose
        # echo of the scheduler would cancel a task that was submitted once more.
        with suppress(Exception):
            for future in held:
                future.release()
            if client.status == "running":
                client.sync(asyncio.sleep, 0, callback_timeout=_CLOSE_SECONDS)
    return list(left.values()), killed


def _task_error(client: Any, key: Any, failure: BaseException) -> BaseException:
    """Return what a task raised, or, where Dask gave it up, our word for that."""
    from distributed.client import FutureCancelledError
    from distributed.scheduler import NoValidWorkerError, NoWorkerError

    error: PipelineError
    match failure:
        case NoWorkerError() | NoValidWorkerError():
            error = IncompleteError(
                f"a task finds a worker; {_name(key)} waited {failure.timeout:g} s for one; start workers, and look at "
                f"the logs of those that ended"
            )
        case PipelineError():
            return failure
        case MemoryError():
            error = BudgetError(
                f"a task fits its worker's memory; {_name(key)} found none: {failure or 'it ran out'}; give workers "
                f"more, or have it hold less"
            )
        case _ if isinstance(failure, FutureCancelledError) or client.status != "running":
            reason = getattr(failure, "reason", None) or type(failure).__name__
            error = IncompleteError(
                f"the scheduler stays until every task is done; {_name(key)} was cancelled: {reason}; look at the "
                f"scheduler's log, and start it anew"
            )
        case _:
            return failure
    error.__cause__ = failure
    return error


def _killed_error(client: Any, killed: list[Any], undone: str) -> PipelineError:
    """Name tasks, each of which was alone on the last workers that it lost, and tell whether they lacked memory."""
    names = ", ".join(_name(error.task) for error in killed)
    times = killed[-1].allowed_failures + 1
    stopped: Any = ()
    with suppress(Exception):
        stopped = client.sync(client.scheduler.events, topic="worker-restart-memory", callback_timeout=_CLOSE_SECONDS)
    held = {event["worker"]: event["rss"] for _, event in stopped}
    for worker in (error.last_worker for error in killed):
        if worker.address in held:
            return BudgetError(
                f"a task fits its worker's memory; {names} held {format_size(held[worker.address])} and more, its "
                f"memory_limit is {format_size(worker.memory_limit)}, {undone}; raise memory_limit in "
                f"cluster.yaml, or have it hold less"
            )
    return IncompleteError(
        f"every task is done; {undone}, and {names} ended {times} workers each, where no other task ran; look at what "
        f"it calls, and at the workers' and the kernel's logs"
    )


def _name(key: Any) -> str:
    """Stage and number of a task."""
    stage, number = key if isinstance(key, tuple) else (key, "")
    return f"{stage.rpartition('-')[0]} {number}" if number != "" else str(stage)


type _Ended = tuple[Any, Any, BaseException | None]
"""A future, and its result or what it raised."""


def _arrived(ended: SimpleQueue[_Ended]) -> Iterator[_Ended]:
    """Yield what is there already."""
    with suppress(Empty):
        while True:
            yield ended.get_nowait()


def _submit(client: Any, waiting: Iterator[Delayed], count: int, ended: SimpleQueue[_Ended]) -> Iterator[Any]:
    """Submit `count` tasks and yield their futures; each comes to `ended` when it is done.

    Not by `distributed.as_completed`, which in a thread may miss a task that ends as it looks, for 0.1 s.
    """

    async def deliver(future: Any) -> None:
        try:
            ended.put((future, await future, None))
        except BaseException as error:  # noqa: BLE001 (it is raised where the results are taken)
            ended.put((future, None, error))

    # In parts: Dask warns of a graph that holds many megabytes.
    while part := list(islice(waiting, min(count, _SUBMITTED_TOGETHER))):
        count -= len(part)
        for future in client.compute(part, optimize_graph=False):
            client.loop.add_callback(deliver, future)
            yield future
