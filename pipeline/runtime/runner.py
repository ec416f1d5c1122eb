"""Runs: tasks computed, results taken as they come, the lost run again; and which of them may still write."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from dask import config
from dask.base import compute
from dask.callbacks import Callback

from pipeline.errors import IncompleteError
from pipeline.process import after_fork, renewed
from pipeline.runtime.distributed import Flight, name_span
from pipeline.runtime.lost_workers import Unobserved
from pipeline.runtime.resources import active_client, count_threads, own_scheduler, shares_memory
from pipeline.runtime.retries import Retries, stopped_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from concurrent.futures import Executor

    from dask.delayed import Delayed

    from pipeline.runtime.lost_workers import Observer


_CLOSE_SECONDS = 4
"""How long workers of a run that failed may take to finish what they write."""
_HURRY_SECONDS = 1
"""The same where the user interrupts."""
_MOST_SUBMITTED = 2000
"""Tasks that the scheduler is told of at once: enough that none waits, and that its memory stays small."""
_MOST_HELD = 2000
"""Finished tasks that the scheduler is told to remember: its page of progress counts them, and each takes 13 KB."""
_TOGETHER = 16
"""Tasks, or four a thread, that a scheduler of Dask's own computes in one go: it gives their results when all are done,
so that a kill loses as many from the journal."""


_writers: Counter[str] = Counter()
_closed: set[str] = set()
_registry = renewed(threading.Condition())
# Those that wrote at a fork are threads of the parent.
after_fork(_writers.clear)


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


def run_tasks(
    tasks: Iterable[Delayed],
    *,
    at_once: int,
    results_travel: bool = False,
    waiting: int = 0,
    direct: bool = False,
    span: Sequence[str] = (),
    watch: Observer | None = None,
    pool: Executor | None = None,
    stopped: threading.Event | None = None,
) -> Iterator[Any]:
    """Compute tasks on the active client, or on Dask's own scheduler, and yield each result as it is there.

    Parameters
    ----------
    tasks
        Each is asked for when its turn comes, and forgotten when its result was taken.
    at_once
        Tasks that memory allows to be under way at once; their results, not yet taken, among them.
    results_travel
        Whether a result is a block, whose memory counts; otherwise it is a receipt.
    waiting
        Results that travel and may wait, beside those of two tasks a thread.
    direct
        Whether results come straight from workers; otherwise by way of the scheduler.
    span
        Names the run on the dashboard, from the general to the particular.
    watch
        Told of tasks that are run again, and of workers that are lost.
    pool
        Threads for Dask's threaded scheduler, which else starts some for each thread that asks, and keeps them.
    stopped
        Set from another thread, it ends the run soon, as IncompleteError; tasks that run are not waited for.

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
    client, watch = active_client(), watch or Unobserved()
    threads = count_threads(client)

    def window(threads: int) -> int:
        """Tasks to be submitted at once."""
        most = max(_MOST_SUBMITTED, 4 * threads)
        if results_travel:
            return min(at_once, 2 * threads + waiting, most)
        # Memory is bounded by the tasks that run where results are receipts: let Dask know of all, and show them.
        return at_once if at_once < threads else most

    if client is not None:
        flight = Flight(client, name_span(span), watch, threads=threads, direct=direct, stopped=stopped)
        yield from flight.run(iter(tasks), window=window, held=0 if results_travel else _MOST_HELD)
        return
    left = iter(tasks)
    # Dask's own threads do not take a number that was configured as text.
    told = at_once < threads or isinstance(config.get("num_workers", None), str)
    limited: dict[str, Any] = {"num_workers": min(at_once, threads)} if told else {}
    if pool is not None:
        limited = {"pool": pool}
    retries = Retries(watch.task_retried)
    while batch := list(islice(left, min(window(threads), max(_TOGETHER, 4 * threads)))):
        if stopped is not None and stopped.is_set():
            raise stopped_error()
        yield from _compute(batch, retries, limited, stopped or threading.Event())


def _compute(
    batch: list[Delayed], retries: Retries, limited: dict[str, Any], stopped: threading.Event
) -> Iterator[Any]:
    """Compute tasks on Dask's own scheduler, which gives up all others when one fails."""
    while batch:
        done: dict[Any, Any] = {}
        try:
            with Callback(posttask=lambda key, result, *_, done=done: done.update({key: result})):
                results = compute(*batch, optimize_graph=False, scheduler=own_scheduler(), **limited)
        except BaseException as failure:
            yield from [done[task.key] for task in batch if task.key in done]
            batch = [task for task in batch if task.key not in done]
            # Which of them it was is not told: the first that is left stands for it.
            if not batch or not retries.postpone(batch[0], failure):
                raise
            if stopped.wait(retries.pause() or 0):
                raise stopped_error() from failure
            retries.waiting.clear()
        else:
            yield from results
            return
