"""Windows to their places in one array: by workers of this process or of this host, else by the client."""

from __future__ import annotations

import errno
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import BudgetError, DiskSpaceError, IncompleteError, OpenError, PipelineError
from pipeline.formatting import MIB
from pipeline.process import after_fork
from pipeline.runtime.runner import close_run, open_run, run_tasks, writing
from pipeline.runtime.shared_memory import PAGE, FileArray, is_memory, open_handle, share_file, share_memory
from pipeline.runtime.tasks import Receipt, make_block, name_tasks, read_slabs, read_windows
from pipeline.storage.checksums import FileRecord, extend_crc32, record_entries

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from pipeline.plan.plan import Task
    from pipeline.runtime.preflight import Survey
    from pipeline.runtime.shared_memory import Handle, Shared, Writer
    from pipeline.runtime.tasks import Work

_CLOSE_SECONDS = 1
"""How long a worker that did not answer when the run ended may take to finish what it writes."""
_WAITING_NBYTES = 256 * MIB
"""Of results that wait until the client takes them, beyond two a thread: a cluster that adapts must see more tasks than
it has threads, or it never grows."""
_LARGE_NBYTES = 16 * 1024
"""Bytes of a window that a worker of another process writes to its place alone. Of smaller ones it writes a task's in
one go, and the client copies them: a call costs a microsecond."""


class Target(NamedTuple):
    """Where the windows of a task go. Plain data, sent with it."""

    run: str
    handle: Handle | None
    """Memory, or a file, that processes of the client's host write into; None where there is none."""
    placed: bool
    """It is the array itself; else the task's own block, which the client copies."""
    recorded: bool
    """Whether receipts tell what was written."""
    travels: bool
    """Whether the block may be returned where that cannot be reached; else the task is declined."""


class Unplaced(NamedTuple):
    """Windows that the client puts into their places."""

    receipt: Receipt
    block: NDArray[Any] | None
    """None: it lies in memory that they share."""


class Declined(NamedTuple):
    """The worker does not reach the client's memory, and was not to return the windows."""

    number: int


_arrays: dict[str, NDArray[Any] | FileArray] = {}
"""Arrays that tasks of this process write into, by the id of their run."""
# A child that is forked during a run has a copy of the array, and would write into that.
after_fork(_arrays.clear)


def place_block(work: Work, task: Task, target: Target) -> Receipt | Unplaced | Declined:
    """Put a task's windows where the run's client finds them: into their places if this process reaches those."""
    # The run waits for its writers when it ends: `apply`, which may take long, is none of them.
    made = None if work.apply is None else make_block(work, task)
    array = _arrays.get(target.run)
    if array is not None:
        with writing(target.run):
            if isinstance(array, FileArray):
                return _write_slabs(work, task, target, made, array)
            if made is None:
                receipt = read_windows(work, task, array, task.places)
            else:
                array[task.places], receipt = made
            return _with_record(receipt, array, task.places) if target.recorded else receipt
    if target.handle is not None:
        with writing(target.run), open_handle(target.handle) as writer:
            if writer is not None:
                receipt = _write_slabs(work, task, target, made, writer)
                return receipt if target.placed else Unplaced(receipt, None)
    if not target.travels:
        return Declined(task.number)
    block, receipt = made or make_block(work, task)
    return Unplaced(receipt, block)


def _write_slabs(
    work: Work, task: Task, target: Target, made: tuple[NDArray[Any], Receipt] | None, writer: Writer
) -> Receipt:
    """Write what was made of a task's windows, or the windows, a few at a time, where another process finds them."""
    places = task.places if target.placed else np.arange(len(task.places))
    slabs = read_slabs(work, task) if made is None else iter([(made[0], np.arange(len(places)), made[1])])
    receipt, checksum = Receipt(task.number, 0, 0, 0.0), 0
    for entries, numbers, part in slabs:
        begin = time.perf_counter()
        block = np.ascontiguousarray(entries)
        try:
            writer.write(block, places[numbers])
        except OSError as error:
            raise _write_error(error, writer.name) from error
        if target.recorded:
            # The windows of a task are sorted by start, so that each slab follows on the one before.
            checksum = extend_crc32(checksum, block.reshape(-1).view(np.uint8))
        receipt = receipt.plus(replace(part, write_seconds=time.perf_counter() - begin))
    files = (FileRecord("", len(places) * work.result.nbytes, checksum),) if target.recorded and target.placed else ()
    return replace(receipt, files=files)


def _write_error(error: OSError, name: str) -> PipelineError:
    if not is_memory(name):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskSpaceError(f"an output fits its disk; {name}: {error.strerror}; free some")
        return OpenError(f"an output can be written; {name}: {error.strerror}; check the disk")
    if error.errno == errno.EPERM:
        return IncompleteError("a run that has ended writes no more; that of this task has; see its own error")
    return BudgetError(f"a result fits the memory; writing into it: {error.strerror}; ask for less at once")


def _with_record(receipt: Receipt, array: NDArray[Any], places: NDArray[np.int64]) -> Receipt:
    """Add to a receipt what its windows hold now."""
    return replace(receipt, files=(record_entries(array, places),))


@dataclass(slots=True)
class Destination:
    """An array to be filled, and how workers reach it. Made by `new_array`, `own_array` and `file_array`."""

    array: Any
    """An array, or a `FileArray`."""
    shared: Shared | None = None
    """What workers of this host write into."""
    part_nbytes: int = 0
    """Bytes of the part of that which each task has; 0: it is the array itself."""
    recorded: bool = False
    """Whether receipts tell what was written."""

    def target(self, task: Task, run: str, *, travels: bool) -> Target:
        """Tell a task where its windows go."""
        handle = None if self.shared is None else self.shared.handle
        if handle is not None and self.part_nbytes:
            shape = (len(task.places), *self.array.shape[1:])
            handle = handle.part(task.number * self.part_nbytes, shape, self.array.dtype)
        return Target(run, handle, placed=not self.part_nbytes, recorded=self.recorded, travels=travels)

    def take(self, result: Receipt | Unplaced, places: NDArray[np.int64]) -> Receipt:
        """Put the windows of a task into their places, unless its worker did."""
        if isinstance(result, Receipt):
            return result
        receipt, block = result
        if block is None:
            self._copy_part(receipt.number, places)
        else:
            self.array[places] = block
        return _with_record(receipt, self.array, places) if self.recorded else receipt

    def _copy_part(self, number: int, places: NDArray[np.int64]) -> None:
        """Copy a task's windows out of its part of the shared memory, which is freed."""
        assert self.shared is not None
        entry, offset = self.array[:1], number * self.part_nbytes
        if is_large(self.array.shape, self.array.dtype):
            for at, place in enumerate(places.tolist()):
                self.shared.read(self.array[place], offset + at * entry.nbytes)
        else:
            block = np.empty((len(places), *entry.shape[1:]), entry.dtype)
            self.shared.read(block, offset)
            self.array[places] = block
        self.shared.give_back(offset, self.part_nbytes)

    def close(self) -> None:
        """Bar workers from writing into the array, which is the caller's from now on.

        Raises
        ------
        IncompleteError
            If one hangs that may still write.
        """
        if self.shared is None or self.shared.close(0 if self.part_nbytes else _CLOSE_SECONDS) or self.part_nbytes:
            return
        raise IncompleteError(
            f"workers let go of an output when its tasks are done; one that hangs holds {self.shared.handle.name} "
            "open; end it, and run again, with --resume where there is an output"
        )

    def abandon(self) -> None:
        """Bar workers from opening the array; the run has failed."""
        if self.shared is not None:
            self.shared.close(0)


def new_array(shape: tuple[int, ...], dtype: np.dtype[Any], survey: Survey, *, step: int) -> Destination:
    """Allocate the array of a run.

    Parameters
    ----------
    step
        Windows of a task.
    """
    if survey.in_process or not survey.shares or not is_large(shape, dtype):
        return own_array(np.empty(shape, dtype), survey, step=step)
    shared = share_memory(shape, dtype)
    return own_array(np.empty(shape, dtype), survey, step=step) if shared is None else Destination(shared.array, shared)


def own_array(out: NDArray[Any] | FileArray, survey: Survey, *, step: int) -> Destination:
    """Fill an array of the caller's, which no other process can write into: through memory into which each can."""
    if survey.in_process or not survey.shares:
        return Destination(out)
    # Whole pages, so that the memory of each task can be freed alone.
    part_nbytes = -(-step * out[:1].nbytes // PAGE) * PAGE
    area = share_memory((-(-len(out) // step) * part_nbytes,), np.dtype("u1"))
    return Destination(out, area, part_nbytes if area is not None else 0)


def file_array(array: np.memmap[Any, Any] | FileArray, survey: Survey, *, step: int) -> Destination:
    """Fill an array of `map_npy`; receipts tell what was written."""
    if survey.in_process or not survey.shares or not is_large(array.shape, array.dtype):
        return replace(own_array(array, survey, step=step), recorded=True)
    return Destination(array, share_file(array), recorded=True)


def is_large(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether the entries of an array are so large that a worker writes each to its place."""
    return math.prod(shape[1:]) * dtype.itemsize >= _LARGE_NBYTES


def fill_array(
    destination: Destination, work: Work, tasks: Iterable[Task], survey: Survey, *, at_once: int, **running: Any
) -> Iterator[Receipt]:
    """Run tasks, and yield the receipt of each once its windows are in their places.

    Parameters
    ----------
    at_once
        Tasks that memory allows to be under way at once.
    running
        What else `run_tasks` takes.
    """
    # Tasks that put windows into their places need no bound, as long as none returns them instead: a worker that does
    # not reach the array declines, and such tasks are run again, a few at once.
    reached = survey.in_process or destination.shared is not None
    waiting = {task.number: task for task in tasks}
    nbytes = work.result.nbytes * max((len(task.places) for task in waiting.values()), default=1)
    with open_run() as run:
        _arrays[run] = destination.array
        try:
            for travels in (False, True) if reached else (True,):
                arguments = (
                    (work, task, destination.target(task, run, travels=travels)) for task in list(waiting.values())
                )
                named = name_tasks("read", survey.guard(place_block), arguments)
                held = travels or destination.part_nbytes > 0
                running |= {"results_travel": held, "waiting": _WAITING_NBYTES // nbytes, "direct": survey.reached}
                for result in run_tasks(named, at_once=at_once, **running) if waiting else ():
                    if not isinstance(result, Declined):
                        receipt = result if isinstance(result, Receipt) else result.receipt
                        yield destination.take(result, waiting.pop(receipt.number).places)
        finally:
            close_run(run)
            _arrays.pop(run, None)
