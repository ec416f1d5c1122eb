"""Tasks into one array: each window is written to its place, so no inverse permutation exists to get wrong."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.capacity import active_client, count_threads, fit_memory, shares_memory
from pipeline.cluster import check_client
from pipeline.errors import InputError, IntegrityError
from pipeline.identity import name_function
from pipeline.journal import Request, digest_array
from pipeline.npy import create_npy, map_npy, mark_npy, reopen_npy
from pipeline.readers import check_files
from pipeline.record import record_entries
from pipeline.report import Watch
from pipeline.runs import close_run, open_run, run_tasks, writing
from pipeline.staging import check_apart, check_destination, is_finished, is_result, stage_output
from pipeline.stamps import stamp_matrix
from pipeline.tasks import Apply, Receipt, Work, check_apply_travels, make_block, name_tasks, prepare_work, read_windows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pipeline.capacity import Footprint
    from pipeline.plan import Cost, Plan, Task
    from pipeline.staging import Stage
    from pipeline.stamps import Stamp

_FLUSH_SHARE = 4
"""Seconds of work for each second that flushing an `.npy` took, before the next: its pages lie scattered."""


@dataclass(frozen=True, slots=True)
class Destination:
    """An array that tasks of this process write into."""

    array: NDArray[Any]
    recorded: bool
    """Whether receipts tell what was written."""


_destinations: dict[str, Destination] = {}
"""By the id of their run."""
# A child that is forked during a run has a copy of the array, and would write into that.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_destinations.clear)


def place_block(work: Work, task: Task, run: str) -> tuple[NDArray[np.int64], NDArray[Any], Receipt] | Receipt:
    """Put a task's windows into their places in the run's array where this process holds it; else return them."""
    destination = _destinations.get(run)
    if work.apply is None and destination is not None:
        with writing(run):
            receipt = read_windows(work, task, destination.array, task.places)
            return _with_record(receipt, destination, task.places)
    # The run waits for its writers when it ends: `apply`, which may take long, is none of them.
    block, receipt = make_block(work, task)
    if destination is None:
        return task.places, block, receipt
    with writing(run):
        destination.array[task.places] = block
        return _with_record(receipt, destination, task.places)


def _with_record(receipt: Receipt, destination: Destination, places: NDArray[np.int64]) -> Receipt:
    """Add to a receipt what its windows hold now."""
    return replace(receipt, files=(record_entries(destination.array, places),)) if destination.recorded else receipt


def gather(
    plan: Plan,
    *,
    apply: Apply | None = None,
    out: NDArray[Any] | str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> NDArray[Any]:
    """Read every window into one array, in request order.

    Tasks run on the active `distributed.Client`, else on Dask's threaded scheduler. Workers in this process write
    straight into the array; others send their blocks, of which only a bounded number is held.

    Parameters
    ----------
    plan
        As `plan_windows` gives it.
    apply
        Function of one block (k, length, *row_shape) -> (k, ...), each window for itself; k is unspecified. It runs
        on the workers. Default: the windows as they are.
    out
        An array to fill, of the result's shape and dtype and C-contiguous; or the path of an `.npy` file, which
        appears only when it is complete, and whose memory map is returned: what is written into that stays in memory.
        Default: a new array.
    resume
        Whether to go on where an interrupted run of the same request ended; nothing is done where it is finished.
    overwrite
        Whether an `.npy` that this package wrote may be replaced.

    Returns
    -------
    ndarray
        (n, length, *row_shape), or (n, ...) as `apply` made it.

    Raises
    ------
    BudgetError
        If the result does not fit the memory budget; nothing is allocated.
    IntegrityError
        If a chunk is absent, short or corrupt, or `apply` breaks its contract.
    OutputExistsError
        If the `.npy` is there already.

    Examples
    --------
    >>> import numpy, pipeline
    >>> folder = getfixture("tmp_path")
    >>> numpy.save(folder / "A.npy", numpy.arange(600.0).reshape(300, 2))
    >>> matrix = pipeline.create_matrix(folder / "A.npy", folder / "A.zarr")
    >>> plan = pipeline.plan_windows(matrix, [200, 7], length=16)
    >>> pipeline.gather(plan).shape
    (2, 16, 2)
    >>> pipeline.gather(plan, apply=lambda block: block.mean(axis=(1, 2)))
    array([415.5,  29.5])
    """
    return prepare_gathering(plan, apply=apply, out=out, resume=resume, overwrite=overwrite).run(Watch())


@dataclass(frozen=True, slots=True)
class Gathering:
    """A `gather` that was checked and may begin. Made by `prepare_gathering`."""

    plan: Plan
    work: Work
    out: NDArray[Any] | Path | None
    place: Path
    """Where the file goes, whatever the working directory becomes."""
    resume: bool
    overwrite: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return (len(self.plan), *self.work.result.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return len(self.plan) * self.work.result.nbytes

    @property
    def cost(self) -> Cost:
        """What reading costs."""
        return self.plan.chunk

    def footprint(self, windows: int | None = None) -> Footprint:
        """Memory of the run, with so many windows a task; BudgetError where it does not fit."""
        plan, work, client = self.plan, self.work, active_client()
        if client is not None:
            check_client(client)
        windows = min(windows or plan.task_windows, len(plan))
        block = windows * work.result.nbytes
        each = plan.reading_nbytes
        if work.apply is not None:
            each += windows * plan.window_nbytes + block
        if not shares_memory(client):
            each += block
        held = self.nbytes if self.out is None else 0
        way_out = (
            "write it to disk with --out X.npy or X.zarr (out= of gather, or store)" if held else "raise the limit"
        )
        what = f"the array of {len(plan):,} windows" if held else "one task"
        return fit_memory(each, plan.memory, threads=count_threads(client), held=held, what=what, way_out=way_out)

    def request(self, stamp: Stamp) -> Request:
        """What decides the bytes of the file."""
        facts = {
            "kind": "npy",
            "matrix": stamp.digest,
            "starts": digest_array(self.plan.starts),
            "length": str(self.plan.length),
            "apply": name_function(self.work.apply),
            "result": f"{self.shape} {self.work.result.dtype.str}",
        }
        return Request(facts)

    def run(self, watch: Watch) -> NDArray[Any]:
        """Read the windows, telling `watch` of every task that is done."""
        plan, footprint, dtype = self.plan, self.footprint(), self.work.result.dtype
        client = active_client()
        if not shares_memory(client):
            check_apply_travels(self.work)
        placed = shares_memory(client) and self.work.apply is None
        windows = plan.fit_tasks(threads=count_threads(client), placed=placed)
        stamp = stamp_matrix(plan.matrix, plan.sorted_starts, plan.length)
        if not isinstance(self.out, Path):
            out = np.empty(self.shape, dtype) if self.out is None else self.out
            cut = list(plan.tasks("chunk", windows=windows))
            watch.begin(len(cut), len(plan), out.nbytes)
            for receipt in self._fill(out, cut, footprint.at_once, recorded=False):
                watch.task_done(receipt)
            stamp.check()
            return out
        request = self.request(stamp)
        if not (self.resume and is_finished(self.place, request)):
            with stage_output(
                self.place, request, cut=windows, nbytes=self.nbytes, resume=self.resume, overwrite=self.overwrite
            ) as stage:
                self._write(stage, watch, self.footprint(stage.cut).at_once)
                stamp.check()
                mark_npy(stage.output, request.digest)
        return map_npy(self.place, "c")

    def _write(self, stage: Stage, watch: Watch, at_once: int) -> None:
        """Fill an `.npy` by the tasks that are not finished yet, each journaled once its windows are on the disk."""
        plan, dtype = self.plan, self.work.result.dtype
        if not (stage.done and reopen_npy(stage.output, dtype, self.shape)):
            stage.redo(list(stage.done))
            create_npy(stage.output, dtype, self.shape)
        array = map_npy(stage.output, "r+")
        cut = list(plan.tasks("chunk", windows=stage.cut))
        stage.redo([n for n, files in stage.done.items() if (record_entries(array, cut[n].places),) != files])
        watch.begin(len(cut), len(plan), self.nbytes)
        for task in cut:
            if task.number in stage.done:
                watch.task_kept(len(task.places))
        places = {task.number: task.places for task in cut if task.number not in stage.done}
        flushed: list[Receipt] = []
        due = 0.0
        try:
            todo = [task for task in cut if task.number in places]
            for receipt in self._fill(array, todo, at_once, recorded=True):
                flushed.append(receipt)
                if time.monotonic() >= due:
                    begin = time.monotonic()
                    _flush(stage, array, flushed, places, watch)
                    due = time.monotonic() + _FLUSH_SHARE * (time.monotonic() - begin)
        finally:
            _flush(stage, array, flushed, places, watch)
        stage.check_complete(len(cut))

    def _fill(self, out: NDArray[Any], cut: list[Task], at_once: int, *, recorded: bool) -> Iterator[Receipt]:
        """Run tasks, and yield the receipt of each once its windows are in their places."""
        destination = Destination(out, recorded)
        travel = not shares_memory(active_client())
        with open_run() as run:
            _destinations[run] = destination
            try:
                tasks = name_tasks("read", place_block, ((self.work, task, run) for task in cut))
                for result in run_tasks(tasks, at_once=at_once, results_travel=travel):
                    if isinstance(result, Receipt):
                        yield result
                    else:
                        places, block, receipt = result
                        out[places] = block
                        yield _with_record(receipt, destination, places)
            finally:
                close_run(run)
                _destinations.pop(run, None)


def _flush(
    stage: Stage, array: NDArray[Any], receipts: list[Receipt], places: dict[int, NDArray[np.int64]], watch: Watch
) -> None:
    """Flush the windows of finished tasks to the disk, read them back, and note the tasks."""
    if not receipts:
        return
    assert isinstance(array, np.memmap)
    array.flush()
    for receipt in receipts:
        if (record_entries(map_npy(stage.output, "c"), places[receipt.number]),) != receipt.files:
            raise IntegrityError(
                f"windows read back as they were written; those of task {receipt.number} do not: check the disk"
            )
    stage.finish(*((receipt.number, receipt.files) for receipt in receipts))
    finished = receipts.copy()
    receipts.clear()
    for receipt in finished:
        watch.task_done(receipt)


def prepare_gathering(
    plan: Plan, *, apply: Apply | None, out: NDArray[Any] | str | Path | None, resume: bool, overwrite: bool
) -> Gathering:
    """Check everything that `gather` needs before it begins: files, `apply`, destination, memory."""
    place = Path()
    if isinstance(out, str | Path):
        out = Path(out)
        place = out.absolute()
        if out.suffix != ".npy":
            raise InputError(f"out is an array or the path of an .npy file; got {out}; name it .npy, or use store")
        if not resume:
            # Before `apply` is probed, and files are looked for.
            check_destination(out, nbytes=0, overwrite=overwrite)
        check_apart(out, plan.matrix.inputs())
    elif resume:
        raise InputError("a run that resumes has a file to go on with; an array in memory has none; drop it")
    check_files(plan.matrix, plan.sorted_starts, plan.length)
    gathering = Gathering(plan, prepare_work(plan, apply), out, place, resume, overwrite)
    shape, dtype = gathering.shape, gathering.work.result.dtype
    if isinstance(out, np.ndarray) and not (
        out.shape == shape and out.dtype == dtype and out.flags.c_contiguous and out.flags.writeable
    ):
        raise InputError(
            f"out is a writable C-contiguous array of shape {shape}, {dtype}; got shape {out.shape}, {out.dtype}, "
            f"strides {out.strides}, {'' if out.flags.writeable else 'not '}writable; allocate it with numpy.empty"
        )
    if isinstance(out, Path):
        stamp = stamp_matrix(plan.matrix, plan.sorted_starts, plan.length)
        if not (resume and is_result(place, gathering.request(stamp))):
            check_destination(place, nbytes=gathering.nbytes, resume=resume, overwrite=overwrite)
    gathering.footprint()
    return gathering
