"""The plan as Dask tasks, and what a worker runs."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from dask import delayed

from pipeline.errors import InputError, IntegrityError, PipelineError
from pipeline.readers import choose_reader
from pipeline.sources import is_numeric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
    # Dask looks through the arguments of a call for what it should compute first, and takes dataclasses apart for it,
    # a millisecond each: bound to the function beforehand they stay whole.
    return [
        delayed(partial(function, *each), name=f"{stage}-call-{run}-{number}", pure=False, traverse=False)(
            dask_key_name=(f"{stage}-{run}", number)
        )
        for number, each in enumerate(arguments)
    ]
