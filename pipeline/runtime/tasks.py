"""The plan as Dask tasks, and what a worker runs."""

from __future__ import annotations

import contextlib
import pickle
import sys
import threading
import time
import traceback
import uuid
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.arguments import check_choice, show
from pipeline.errors import BudgetError, InputError, IntegrityError, PipelineError
from pipeline.formatting import count_of
from pipeline.matrix.arrays import check_decodable
from pipeline.matrix.formats import is_numeric
from pipeline.plan.columns import find_lost
from pipeline.plan.group import GroupPlan, check_plan
from pipeline.readers.choose import DirectReader, choose_reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dask.delayed import Delayed
    from numpy.typing import NDArray

    from pipeline.plan.plan import Order, Plan, Task
    from pipeline.readers.choose import Reader
    from pipeline.storage.checksums import FileRecord

type Apply = Callable[[NDArray[Any]], NDArray[Any]]
"""A function of one block (k, length, *row_shape), read-only, that returns (k, ...), each window for itself, in memory
that it does not use again. Threads may call it side by side."""


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
    nonfinite: int = 0
    """Values that `apply` gave and that are NaN or infinite."""
    files: tuple[FileRecord, ...] = ()
    """What it wrote, read back."""

    def plus(self, other: Receipt) -> Receipt:
        """Add what another part of the same task did, but for what it wrote."""
        return replace(
            self,
            units=self.units + other.units,
            nbytes_read=self.nbytes_read + other.nbytes_read,
            read_seconds=self.read_seconds + other.read_seconds,
            decode_seconds=self.decode_seconds + other.decode_seconds,
            apply_seconds=self.apply_seconds + other.apply_seconds,
            write_seconds=self.write_seconds + other.write_seconds,
            nonfinite=self.nonfinite + other.nonfinite,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """What every task of a run shares: plain data, so that it travels to any worker."""

    reader: Reader
    length: int
    window_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    apply: Apply | None
    result: BlockShape

    def __reduce__(self) -> tuple[Any, ...]:
        apply = None if self.apply is None else _send(self.apply)
        return Work, (self.reader, self.length, self.window_shape, self.dtype, apply, self.result)


@dataclass(frozen=True, slots=True)
class SentApply:
    """An `apply` that came from another process, or through Dask: opened where it is called, not on the scheduler."""

    code: bytes
    """As cloudpickle gives it, which sends the code of modules that were registered for it: Dask would name a module
    that a worker elsewhere need not have."""

    def __call__(self, block: NDArray[Any]) -> NDArray[Any]:
        """Call the function, one object for all tasks of a process, so that what it remembers it remembers."""
        import cloudpickle

        function = _opened.get(self.code)
        if function is None:
            function = _remember(self.code, cloudpickle.loads(self.code))
        return function(block)


_opened: dict[bytes, Apply] = {}
"""Functions of the last few runs, by their code: in the process that sent them, the very ones."""
_MOST_OPENED = 4


def _send(apply: Apply) -> Apply:
    if isinstance(apply, SentApply):
        return apply
    import cloudpickle

    try:
        sent = SentApply(cloudpickle.dumps(apply))
    except Exception:  # noqa: BLE001 (what is pickled raises what it likes)
        # Within this process its name may do.
        return apply
    _remember(sent.code, apply)
    return sent


def _remember(code: bytes, apply: Apply) -> Apply:
    for other in list(_opened)[:-_MOST_OPENED]:
        _opened.pop(other, None)
    return _opened.setdefault(code, apply)


def prepare_work(plan: Plan, apply: Apply | None) -> Work:
    """Gather what tasks share; `apply` is probed on the first window, so that its result's shape is known."""
    if plan.matrix.array is not None and plan.matrix.layout.reader == "decoded":
        check_decodable(plan.matrix.array, plan.matrix.path)
    reader = choose_reader(plan.matrix, row=int(plan.starts[0]), selection=plan.selection)
    result = BlockShape(plan.window_shape, plan.dtype)
    work = Work(reader, plan.length, plan.window_shape, plan.dtype, None, result)
    if apply is None:
        return work
    if not callable(apply):
        raise InputError(f"apply is a function of one block; got {show(apply)}; give a callable")
    block = np.empty((1, *plan.window_shape), plan.dtype)
    reader.read_windows(plan.starts[:1], plan.length, block, np.zeros(1, np.int64))
    probed = call_apply(apply, block, int(plan.starts[0]), 0)
    if not is_numeric(probed.dtype) or not probed.size:
        raise IntegrityError(
            f"apply returns numbers of at most 64 bits a component; for the first window it gave {probed.dtype} of "
            f"shape {probed.shape[1:]}; convert them"
        )
    return replace(work, apply=apply, result=BlockShape(probed.shape[1:], probed.dtype.newbyteorder("=")))


def call_apply(apply: Apply, block: NDArray[Any], start: int, place: int) -> NDArray[Any]:
    """Call `apply` on a view of a block (k, ...), which is read-only from then on, and return the (k, ...) it gives.

    Parameters
    ----------
    start, place
        Of the block's first window, for messages.

    Raises
    ------
    IntegrityError
        If it raises, leaves by `sys.exit`, or returns anything but one plain entry a window.
    BudgetError
        If it runs out of memory.
    """
    windows = f"{count_of(len(block), 'window')}, the first at row {start} (place {place})"
    # A view of an array that can be written to could be unlocked.
    block.flags.writeable = False
    try:
        returned = apply(block.view())
        made = np.asarray(returned)
    except BaseException as error:
        if not isinstance(error, Exception | SystemExit) and threading.current_thread() is threading.main_thread():
            raise  # A signal; in any other thread only `apply` itself can have raised it.
        words = _words(error)
        if isinstance(error, MemoryError):
            raise BudgetError(f"apply fits the memory; on {windows}, it raised {words}; let it hold less") from error
        way_out = "let it copy what it changes" if "read-only" in words or "WRITEABLE" in words else "mend it"
        if isinstance(error, ModuleNotFoundError):
            # Of the working directory, only what is imported with the module itself is there.
            way_out = "import it where its module begins, outside of functions"
        raise IntegrityError(f"apply takes any block, read-only; on {windows}, it raised {words}; {way_out}") from error
    if isinstance(returned, np.ma.MaskedArray):
        raise IntegrityError(f"apply returns plain arrays; for {windows}, it gave a masked one; fill it")
    if made.ndim < 1 or len(made) != len(block):
        raise IntegrityError(
            f"apply returns one entry a window; for {windows}, it gave shape {made.shape}; keep the first axis"
        )
    return made


def cast_result(made: NDArray[Any], result: BlockShape, start: int, place: int) -> NDArray[Any]:
    """Give what `apply` made of a block the shape and dtype of the first window's result, or refuse it.

    The shape must be the same: nothing is broadcast. The dtype may differ by one of NumPy's `same_kind` casts in which
    no value is lost: whole numbers must lie in the range that the other dtype holds exactly, finite numbers must
    stay finite. Floats may be rounded.

    Raises
    ------
    IntegrityError
        Naming the two, and the value that would be lost.
    """
    rule = (
        f"apply returns the same shape and dtype for every block; the first window gave {result.shape} {result.dtype}, "
        f"windows from row {start} (place {place})"
    )
    if made.shape[1:] != result.shape or not np.can_cast(made.dtype, result.dtype, "same_kind"):
        raise IntegrityError(f"{rule} {made.shape[1:]} {made.dtype}; mend it")
    if made.dtype == result.dtype:
        return made
    with np.errstate(all="ignore"):
        cast = made.astype(result.dtype)
    if (lost := find_lost(made, cast)) is not None:
        raise IntegrityError(
            f"{rule} {made.dtype} with {made[lost][0]}, which {result.dtype} does not hold; convert them all"
        )
    return cast


def read_windows(work: Work, task: Task, out: NDArray[Any], places: NDArray[np.int64]) -> Receipt:
    """Read a task's windows as they are, each into `out[places[i]]`."""
    begin = time.perf_counter()
    try:
        reading = work.reader.read_windows(task.starts, work.length, out, places)
    except PipelineError as error:
        raise _name_task(error, task) from error.__cause__
    seconds = time.perf_counter() - begin
    return Receipt(task.number, len(places), reading.nbytes, seconds - reading.decode_seconds, reading.decode_seconds)


def read_slabs(work: Work, task: Task) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], Receipt]]:
    """Read a task's windows in parts, for who copies them on: each a block, good until the next, and their numbers.

    One part where that is not so cheap: chunks that are decoded may be touched by several, and a store should be asked
    for all at once.
    """
    if not isinstance(work.reader, DirectReader):
        block, receipt = make_block(work, task)
        yield block, np.arange(len(block)), receipt
        return
    slabs = work.reader.read_slabs(task.starts, work.length, work.window_shape[1:], work.dtype)
    while True:
        begin = time.perf_counter()
        try:
            slab = next(slabs, None)
        except PipelineError as error:
            raise _name_task(error, task) from error.__cause__
        if slab is None:
            return
        seconds = time.perf_counter() - begin
        yield slab.block, slab.numbers, Receipt(task.number, len(slab.numbers), slab.nbytes_read, seconds)


def make_block(work: Work, task: Task) -> tuple[NDArray[Any], Receipt]:
    """Read a task's windows into a block of their own, and apply: (k, *work.result.shape) of `work.result.dtype`."""
    block = np.empty((len(task.starts), *work.window_shape), work.dtype)
    receipt = read_windows(work, task, block, np.arange(len(block)))
    if work.apply is None:
        return block, receipt
    begin = time.perf_counter()
    start, place = int(task.starts[0]), int((task.places if task.asked is None else task.asked)[0])
    try:
        made = cast_result(call_apply(work.apply, block, start, place), work.result, start, place)
    except PipelineError as error:
        raise _name_task(error, task) from error.__cause__
    nonfinite = made.size - int(np.count_nonzero(np.isfinite(made))) if made.dtype.kind in "fc" else 0
    return made, replace(receipt, apply_seconds=time.perf_counter() - begin, nonfinite=nonfinite)


def check_apply_travels(work: Work, *, in_process: bool) -> None:
    """Raise InputError where `apply` cannot be sent to workers, by its name to those of this process at least."""
    import cloudpickle

    if in_process:
        with contextlib.suppress(Exception):
            pickle.dumps(work.apply)
            return
    try:
        cloudpickle.dumps(work.apply)
    except Exception as error:  # what is pickled raises what it likes
        where, way_out = ("worker processes", "set processes: false")
        if in_process:
            where, way_out = ("workers", "run without a client")
        raise InputError(
            f"apply is sent to {where}; it cannot be pickled: {_words(error)}; make what it needs inside of it, or "
            f"{way_out}"
        ) from error


def _words(error: BaseException) -> str:
    """Name and words of what somebody else's code raised, on one line; even `str` of it may fail."""
    return " ".join("".join(traceback.format_exception_only(error)).split())[:300]


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
    check_plan(plan)
    if isinstance(plan, GroupPlan):
        names = ", ".join(plan.members)
        raise InputError(f"tasks are of one array; the plan has {names}; build those of each of plan.members")
    work = prepare_work(plan, apply)
    return list(name_tasks("windows", return_block, ((work, task) for task in plan.tasks(check_order(order)))))


def check_order(order: str) -> Order:
    """Return `order`, or raise InputError."""
    return "chunk" if check_choice("order", order, ("chunk", "request")) == "chunk" else "request"


def call_task[**P, T](function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Call a task's function, and cut off causes of its failure that cannot be pickled.

    With them Dask would deliver a bare `Exception` in place of the failure, which then has lost its exit code.
    """
    try:
        made = function(*arguments, **keywords)
    except PipelineError as error:
        if not _causes_travel(error):
            error.__cause__ = error.__context__ = None
        raise
    _meter_stages(made)
    return made


def _meter_stages(made: Any) -> None:
    """Tell Dask's fine performance metrics how long a task took for each of its stages."""
    parts = made if isinstance(made, tuple) else (made, getattr(made, "receipt", None))
    receipt = next((each for each in parts if isinstance(each, Receipt)), None)
    if receipt is None or "distributed" not in sys.modules:
        return
    from distributed.metrics import context_meter

    for stage in ("read", "decode", "apply", "write"):
        if seconds := getattr(receipt, f"{stage}_seconds"):
            context_meter.digest_metric(stage, seconds, "seconds")


def _causes_travel(error: BaseException) -> bool:
    """Whether every exception that led to this one can be pickled, and be made of that again."""
    import cloudpickle

    waiting, seen = [error.__cause__, error.__context__], [error]
    while waiting:
        cause = waiting.pop()
        if cause is None or any(cause is each for each in seen):
            continue
        seen.append(cause)
        waiting += [cause.__cause__, cause.__context__]
        try:
            cloudpickle.loads(cloudpickle.dumps(cause))
        except Exception:  # noqa: BLE001 (what is pickled raises what it likes)
            return False
    return True


def name_tasks(stage: str, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Delayed]:
    """Make a Delayed of each tuple of arguments when it is asked for.

    Their keys put them in one row of the dashboard, named by stage.
    """
    # Who reads without Dask, such as a loader's worker, need not wait for it.
    from dask import delayed

    run = uuid.uuid4().hex[:8]
    for number, each in enumerate(arguments):
        # Dask looks through the arguments of a call for what it should compute first, and takes dataclasses apart for
        # it, a millisecond each: bound to the function beforehand they stay whole.
        call = partial(call_task, function, *each)
        made = delayed(call, name=f"{stage}-call-{run}-{number}", pure=False, traverse=False)
        yield made(dask_key_name=(f"{stage}-{run}", number))
