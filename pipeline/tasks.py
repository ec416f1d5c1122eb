"""The plan as Dask tasks, what a worker runs, and the loop that feeds them to whichever scheduler is there."""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from dask import config as dask_config
from dask import delayed, local, threaded
from dask.base import compute, get_scheduler

from pipeline.errors import BudgetError, IncompleteError, InputError, IntegrityError, PipelineError
from pipeline.memory import budget, held_nbytes
from pipeline.readers import choose_reader
from pipeline.sizes import MIB, format_size
from pipeline.sources import is_numeric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dask.delayed import Delayed
    from numpy.typing import NDArray

    from pipeline.plan import Order, Plan, Task
    from pipeline.readers import Reader

type Apply = Callable[[NDArray[Any]], NDArray[Any]]
"""A function of one block (k, length, *row_shape), read-only, that returns (k, ...), each window for itself."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What `apply` makes of one window, or the window itself."""

    shape: tuple[int, ...]
    """Without the leading axis of windows."""
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of one window's result; at least 1, so that it can divide."""
        return max(1, int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a task did, sent back in place of its block where the block itself need not travel."""

    number: int
    units: int
    """Windows, or rows of a matrix that is being created."""
    nbytes_read: int
    read_seconds: float
    decode_seconds: float = 0.0
    apply_seconds: float = 0.0
    write_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """What every task of a run shares: plain data, so that it travels to any worker."""

    reader: Reader
    length: int
    window_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    apply: Apply | None
    result: BlockShape


def prepare_work(plan: Plan, apply: Apply | None) -> Work:
    """Gather what tasks share; `apply` is probed on the first window, so that its result's shape is known."""
    reader = choose_reader(plan.matrix, row=int(plan.starts[0]))
    result = BlockShape(plan.window_shape, plan.matrix.dtype)
    work = Work(reader, plan.length, plan.window_shape, plan.matrix.dtype, None, result)
    if apply is None:
        return work
    if not callable(apply):
        raise InputError(f"apply is a function of one block; got {apply!r}; give a callable")
    block = np.empty((1, *plan.window_shape), plan.matrix.dtype)
    reader.read_windows(plan.starts[:1], plan.length, block, np.zeros(1, np.int64))
    probed = call_apply(apply, block, int(plan.starts[0]))
    if not is_numeric(probed.dtype) or not probed.size:
        raise IntegrityError(
            f"apply returns numbers of at most 64 bits a component; for the first window it gave {probed.dtype} of "
            f"shape {probed.shape[1:]}; convert them"
        )
    result = BlockShape(probed.shape[1:], probed.dtype)
    return Work(reader, plan.length, plan.window_shape, plan.matrix.dtype, apply, result)


def call_apply(apply: Apply, block: NDArray[Any], start: int) -> NDArray[Any]:
    """Call `apply` on a read-only view of a block (k, ...); IntegrityError unless it returns (k, ...)."""
    view = block.view()
    view.flags.writeable = False
    try:
        returned = apply(view)
        made = np.asarray(returned)
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:300]
        raise IntegrityError(
            f"apply takes any block; on {len(block)} windows, the first at row {start}, it raised "
            f"{type(error).__name__}: {reason}; mend it"
        ) from error
    if isinstance(returned, np.ma.MaskedArray):
        raise IntegrityError(f"apply returns plain arrays; windows from row {start} gave a masked one; fill it")
    if made.ndim < 1 or len(made) != len(block):
        raise IntegrityError(
            f"apply returns one entry a window; for a block of {len(block)} windows, the first at row {start}, it gave "
            f"shape {made.shape}; keep the first axis"
        )
    return made


def read_windows(work: Work, task: Task, out: NDArray[Any], places: NDArray[np.int64]) -> Receipt:
    """Read a task's windows as they are, each into `out[places[i]]`."""
    begin = time.perf_counter()
    try:
        reading = work.reader.read_windows(task.starts, work.length, out, places)
    except PipelineError as error:
        raise _name_task(error, task) from error.__cause__
    seconds = time.perf_counter() - begin
    return Receipt(task.number, len(places), reading.nbytes, seconds - reading.decode_seconds, reading.decode_seconds)


def make_block(work: Work, task: Task) -> tuple[NDArray[Any], Receipt]:
    """Read a task's windows into a block of their own, and apply: (k, *work.result.shape) of `work.result.dtype`."""
    block = np.empty((len(task.starts), *work.window_shape), work.dtype)
    receipt = read_windows(work, task, block, np.arange(len(block)))
    if work.apply is None:
        return block, receipt
    begin = time.perf_counter()
    try:
        made = call_apply(work.apply, block, int(task.starts[0]))
        # Only a cast that keeps every value: the first window's dtype is that of the whole result.
        if made.shape[1:] != work.result.shape or not np.can_cast(made.dtype, work.result.dtype, "safe"):
            raise IntegrityError(
                f"apply returns the same shape and dtype for every block; the first window gave {work.result.shape} "
                f"{work.result.dtype}, windows from row {task.starts[0]} {made.shape[1:]} {made.dtype}; mend it"
            )
    except PipelineError as error:
        raise _name_task(error, task) from error.__cause__
    made = made.astype(work.result.dtype, copy=False)
    return made, replace(receipt, apply_seconds=time.perf_counter() - begin)


def _name_task(error: PipelineError, task: Task) -> PipelineError:
    rows = f"rows {task.starts.min()} to {task.starts.max()}"
    error.add_note(f"task {task.number}: {len(task.starts)} windows that start at {rows}")
    return error


def return_block(work: Work, task: Task) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Do the task of `build_tasks`."""
    return task.places, make_block(work, task)[0]


def build_tasks(plan: Plan, *, apply: Apply | None = None, order: Order = "chunk") -> list[Delayed]:
    """Build the plan's Dask tasks, to be computed by the caller.

    Parameters
    ----------
    plan
        As `plan_windows` gives it.
    apply
        Function of one block (k, length, *row_shape) -> (k, ...), each window for itself.
    order
        `chunk`: sorted by start, each chunk read by one task or two. `request`: in the order of the request.

    Returns
    -------
    list of Delayed
        Each computes `(places, block)`: (k,) int64 positions in the request, and (k, ...) windows.

    Examples
    --------
    >>> import dask, numpy, pipeline
    >>> folder = getfixture("tmp_path")
    >>> numpy.save(folder / "A.npy", numpy.arange(600.0).reshape(300, 2))
    >>> matrix = pipeline.create_matrix(folder / "A.npy", folder / "A.zarr")
    >>> tasks = pipeline.build_tasks(pipeline.plan_windows(matrix, [200, 7], length=16))
    >>> [(places, block)] = dask.compute(*tasks)
    >>> places, block.shape
    (array([1, 0]), (2, 16, 2))
    """
    work = prepare_work(plan, apply)
    return name_tasks("windows", return_block, ((work, task) for task in plan.tasks(check_order(order))))


def check_order(order: str) -> Order:
    """Return `order`, or raise InputError."""
    if order == "chunk":
        return "chunk"
    if order == "request":
        return "request"
    raise InputError(f"order is chunk or request; got {order!r}; choose one")


def name_tasks(stage: str, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Delayed]:
    """Make a Delayed for each tuple of arguments; their keys put them in one row of the dashboard, named by stage."""
    run = uuid.uuid4().hex[:8]
    call = delayed(function, pure=False, traverse=False)
    return [call(*each, dask_key_name=(f"{stage}-{run}", number)) for number, each in enumerate(arguments)]


def active_client() -> Any:
    """Return the active `distributed.Client`, or None where tasks run on a scheduler of Dask's own."""
    if "distributed" not in sys.modules:
        return None
    from distributed import Client, get_worker

    with suppress(ValueError):
        # Inside of a task the cluster's threads may all be waiting, this one among them: use Dask's own scheduler.
        get_worker()
        return None
    if dask_config.get("scheduler", None) not in (None, "dask.distributed", "distributed"):
        return None
    try:
        client = Client.current()
    except ValueError:
        return None
    if client.asynchronous:
        raise InputError("tasks run on a synchronous client; got an asynchronous one; call this from a plain thread")
    return client


def shares_memory(client: Any) -> bool:
    """Whether tasks run in this process, so that they can write straight into an array of it."""
    if client is None:
        return get_scheduler() in (None, threaded.get, local.get_sync)
    addresses = list(client.scheduler_info(n_workers=-1)["workers"])
    return bool(addresses) and all(address.startswith("inproc://") for address in addresses)


def count_threads(client: Any) -> int:
    """Tasks that run at once."""
    if client is not None:
        threads: dict[str, int] = client.nthreads()
        return sum(threads.values()) or 1
    from dask.system import CPU_COUNT

    return int(dask_config.get("num_workers", None) or CPU_COUNT)


_CLOSE_SECONDS = 4
"""How long workers of a run that failed may take to finish what they write."""
_MOST_SUBMITTED = 2000
"""Tasks that the scheduler is told of at once: enough that none waits, and that its memory stays small."""
_SUBMITTED_TOGETHER = 8
"""Tasks of one graph."""
_OWN_NBYTES = 64 * MIB
"""What the interpreter grows by while it runs: a cluster's threads, buffers, the code of what is imported late."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """How much of a run is under way at once, and the memory that this takes."""

    at_once: int
    """Tasks that are under way, or whose results are not yet taken."""
    peak_nbytes: int
    """Memory of all processes of this run on this machine, at its peak."""


def fit_memory(
    task_nbytes: int, limit: int | None, *, threads: int, what: str, held: int = 0, way_out: str = "raise the limit"
) -> Footprint:
    """Choose how many tasks are under way at once: two a thread, so that none waits, or as many as memory allows.

    Parameters
    ----------
    task_nbytes
        Memory of one task.
    limit
        Bytes that the user allows, None for the machine's own limits alone.
    threads
        Tasks that run at once.
    what
        Names the request in the error.
    held
        Bytes that are held all the while: the result.
    way_out
        Ends the error.

    Raises
    ------
    BudgetError
        If not even one task fits beside what is held.
    """
    allowed = budget(limit)
    needed = held_nbytes() + _OWN_NBYTES + held + task_nbytes
    if needed > allowed.nbytes:
        raise BudgetError(
            f"a run fits its memory; {what} needs {format_size(needed)}, {allowed.source} allows "
            f"{format_size(allowed.nbytes)}; {way_out}"
        )
    at_once = min(2 * threads, 1 + (allowed.nbytes - needed) // max(1, task_nbytes))
    return Footprint(at_once, needed + (min(at_once, threads) - 1) * task_nbytes)


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
    try:
        yield run
    finally:
        client = active_client()
        if client is not None and not shares_memory(client):
            # A failure that brought us here counts, not that of the workers, which may be gone.
            with suppress(Exception):
                client.sync(client._run, close_run, run, on_error="ignore", callback_timeout=_CLOSE_SECONDS)  # noqa: SLF001 (`Client.run` has no timeout)
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
        What the first task that failed raised; tasks not yet begun are cancelled.
    """
    client = active_client()
    waiting = iter(tasks)
    threads = count_threads(client)
    # Memory is bounded by the tasks that run where results are receipts: let Dask know of all, and show them.
    window = at_once if results_travel or at_once < threads else _MOST_SUBMITTED
    if client is None:
        limited = {"num_workers": at_once} if at_once < threads else {}
        while batch := list(islice(waiting, window)):
            yield from compute(*batch, optimize_graph=False, **limited)
        return
    from distributed import as_completed
    from distributed.client import FutureCancelledError
    from distributed.scheduler import KilledWorker, NoValidWorkerError

    def submit(count: int) -> list[Any]:
        # In parts: Dask warns of a graph that holds many megabytes.
        parts = iter(lambda: list(islice(waiting, min(count, _SUBMITTED_TOGETHER))), [])
        return [
            future
            for part in islice(parts, -(-count // _SUBMITTED_TOGETHER))
            for future in client.compute(part, optimize_graph=False)
        ]

    held = set(submit(window))
    try:
        queue = as_completed(held, loop=client.loop)
        for future in queue:
            yield future.result()
            if results_travel:
                held.discard(future)
                future.release()
            following = submit(1)
            held.update(following)
            queue.update(following)
    except (KilledWorker, NoValidWorkerError, FutureCancelledError) as error:
        reason = " ".join(str(error).split())[:300]
        raise IncompleteError(f"every task is done; one is not: {reason}; look at the workers' logs") from error
    finally:
        # Finished ones, too: a task whose worker is lost from now on must not run again.
        if held:
            client.cancel(list(held), force=True)
