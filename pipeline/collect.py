"""Tasks into one array: each window is written to its place, so no inverse permutation exists to get wrong."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.cluster import check_client
from pipeline.errors import InputError
from pipeline.readers import check_files
from pipeline.report import Watch
from pipeline.runs import (
    active_client,
    close_run,
    count_threads,
    fit_memory,
    open_run,
    run_tasks,
    shares_memory,
    writing,
)
from pipeline.staging import check_apart, check_destination, stage_file
from pipeline.tasks import Apply, Receipt, Work, make_block, name_tasks, prepare_work, read_windows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.plan import Cost, Plan, Task
    from pipeline.runs import Footprint


_destinations: dict[str, NDArray[Any]] = {}
"""Arrays that tasks of this process write into, by the id of their run."""
# A child that is forked during a run has a copy of the array, and would write into that.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_destinations.clear)


def place_block(work: Work, task: Task, run: str) -> tuple[NDArray[np.int64], NDArray[Any], Receipt] | Receipt:
    """Put a task's windows into their places in the run's array where this process holds it; else return them."""
    if work.apply is None and run in _destinations:
        with writing(run):
            return read_windows(work, task, _destinations[run], task.places)
    # The run waits for its writers when it ends: `apply`, which may take long, is none of them.
    block, receipt = make_block(work, task)
    if run not in _destinations:
        return task.places, block, receipt
    with writing(run):
        _destinations[run][task.places] = block
    return receipt


def gather(
    plan: Plan,
    *,
    apply: Apply | None = None,
    out: NDArray[Any] | str | Path | None = None,
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
        appears only when it is complete, and whose memory map is returned. Default: a new array.
    overwrite
        Whether an `.npy` that exists may be replaced.

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
    return prepare_gathering(plan, apply=apply, out=out, overwrite=overwrite).run(Watch())


@dataclass(frozen=True, slots=True)
class Gathering:
    """A `gather` that was checked and may begin. Made by `prepare_gathering`."""

    plan: Plan
    work: Work
    out: NDArray[Any] | Path | None
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

    def footprint(self) -> Footprint:
        """Memory of the run; BudgetError where it does not fit."""
        plan, work, client = self.plan, self.work, active_client()
        if client is not None:
            check_client(client)
        block = plan.task_windows * work.result.nbytes
        each = plan.reading_nbytes
        if work.apply is not None:
            each += plan.block_nbytes + block
        if not shares_memory(client):
            each += block
        held = self.nbytes if self.out is None else 0
        way_out = (
            "write it to disk with --out X.npy or X.zarr (out= of gather, or store)" if held else "raise the limit"
        )
        what = f"the array of {len(plan):,} windows" if held else "one task"
        return fit_memory(each, plan.memory, threads=count_threads(client), held=held, what=what, way_out=way_out)

    def run(self, watch: Watch) -> NDArray[Any]:
        """Read the windows, telling `watch` of every task that is done."""
        footprint = self.footprint()
        out, dtype = self.out, self.work.result.dtype
        if isinstance(out, Path):
            with stage_file(out, dtype, self.shape, overwrite=self.overwrite) as array:
                self._fill(array, watch, footprint.at_once)
            written: NDArray[Any] = np.load(out, mmap_mode="r+", allow_pickle=False)
            return written
        if out is None:
            out = np.empty(self.shape, dtype)
        self._fill(out, watch, footprint.at_once)
        return out

    def _fill(self, out: NDArray[Any], watch: Watch, at_once: int) -> None:
        client = active_client()
        with open_run() as run:
            _destinations[run] = out
            try:
                placed = shares_memory(client) and self.work.apply is None
                windows = self.plan.fit_tasks(threads=count_threads(client), placed=placed)
                cut = self.plan.tasks("chunk", windows=windows)
                tasks = name_tasks("read", place_block, ((self.work, task, run) for task in cut))
                watch.begin(len(tasks), len(self.plan), out.nbytes)
                for result in run_tasks(tasks, at_once=at_once, results_travel=not shares_memory(client)):
                    if isinstance(result, Receipt):
                        watch.task_done(result)
                    else:
                        places, block, receipt = result
                        out[places] = block
                        watch.task_done(receipt)
            finally:
                close_run(run)
                _destinations.pop(run, None)


def prepare_gathering(
    plan: Plan, *, apply: Apply | None, out: NDArray[Any] | str | Path | None, overwrite: bool
) -> Gathering:
    """Check everything that `gather` needs before it begins: files, `apply`, destination, memory."""
    if isinstance(out, str | Path):
        out = Path(out)
        if out.suffix != ".npy":
            raise InputError(f"out is an array or the path of an .npy file; got {out}; name it .npy, or use store")
        check_destination(out, nbytes=0, overwrite=overwrite)
        check_apart(out, plan.matrix.inputs())
    check_files(plan.matrix, plan.sorted_starts, plan.length)
    gathering = Gathering(plan, prepare_work(plan, apply), out, overwrite)
    shape, dtype = gathering.shape, gathering.work.result.dtype
    if isinstance(out, np.ndarray) and not (
        out.shape == shape and out.dtype == dtype and out.flags.c_contiguous and out.flags.writeable
    ):
        raise InputError(
            f"out is a writable C-contiguous array of shape {shape}, {dtype}; got shape {out.shape}, {out.dtype}, "
            f"strides {out.strides}, {'' if out.flags.writeable else 'not '}writable; allocate it with numpy.empty"
        )
    if isinstance(out, Path):
        check_destination(out, nbytes=gathering.nbytes, overwrite=overwrite, dtype=dtype, shape=shape)
    gathering.footprint()
    return gathering
