"""Tasks into Zarr: each task owns whole shards of the result, so no two tasks ever write one."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.encoding import writing_nbytes
from pipeline.errors import InputError
from pipeline.matrix import ATTRIBUTE
from pipeline.readers import check_files
from pipeline.report import Watch
from pipeline.runs import active_client, count_threads, fit_memory, open_run, run_tasks, writing
from pipeline.shards import create_array, cut_results, write_entries
from pipeline.sizes import MIB
from pipeline.staging import check_apart, check_destination, stage_folder
from pipeline.tasks import check_order, make_block, name_tasks, prepare_work

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

    from pipeline.plan import Cost, Order, Plan, Task
    from pipeline.runs import Footprint
    from pipeline.tasks import Apply, Receipt, Work

_ENOUGH_NBYTES = 1024 * MIB
"""More memory than this is only taken where the user allows it, however many threads there are."""


def write_block(work: Work, task: Task, array: zarr.Array[Any], first: int, run: str) -> Receipt:
    """Read a task's windows and write them to entries [first, first + k) of the result: whole shards."""
    block, receipt = make_block(work, task)
    begin = time.perf_counter()
    with writing(run):
        _write_values(array, first, block)
    return replace(receipt, write_seconds=time.perf_counter() - begin)


def _write_values(array: zarr.Array[Any], first: int, values: NDArray[Any]) -> None:
    """Write entries [first, first + len(values)): whole files."""
    write_entries(array, first, first + len(values), lambda start, stop: values[start - first : stop - first])


def store(
    plan: Plan,
    path: str | Path,
    *,
    apply: Apply | None = None,
    order: Order = "request",
    overwrite: bool = False,
) -> zarr.Group:
    """Read every window and write it to a Zarr group on disk, which appears only when it is complete.

    Tasks run on the active `distributed.Client`, else on Dask's threaded scheduler; the workers write.

    Parameters
    ----------
    plan
        As `plan_windows` gives it.
    path
        Folder to make; it ends in `.zarr`.
    apply
        Function of one block (k, length, *row_shape) -> (k, ...), each window for itself; k is unspecified. It runs
        on the workers. Default: the windows as they are.
    order
        `request`: `windows[i]` starts at `starts[i]` of the request. `chunk`: windows and starts are sorted by start,
        and `places[i]` is the position in the request of the i-th: reads each chunk once, which matters where chunks
        are decoded whole.
    overwrite
        Whether a Zarr that this package wrote may be replaced.

    Returns
    -------
    zarr.Group
        Opened for reading: `windows` (n, length, *row_shape), or (n, ...) as `apply` made it; `starts` (n,) int64;
        with order `chunk` also `places` (n,) int64.

    Raises
    ------
    OutputExistsError
        If something is at `path` already.
    DiskSpaceError
        If the disk has no room for the result.
    IntegrityError
        If a chunk is absent, short or corrupt, or `apply` breaks its contract.

    Examples
    --------
    >>> import numpy, pipeline
    >>> folder = getfixture("tmp_path")
    >>> numpy.save(folder / "A.npy", numpy.arange(600.0).reshape(300, 2))
    >>> matrix = pipeline.create_matrix(folder / "A.npy", folder / "A.zarr")
    >>> plan = pipeline.plan_windows(matrix, [200, 7], length=16)
    >>> result = pipeline.store(plan, folder / "windows.zarr")
    >>> result["windows"].shape, result["windows"][1, 0].tolist()
    ((2, 16, 2), [14.0, 15.0])
    """
    return prepare_storing(plan, path, apply=apply, order=order, overwrite=overwrite).run(Watch())


@dataclass(frozen=True, slots=True)
class Storing:
    """A `store` that was checked and may begin. Made by `prepare_storing`."""

    plan: Plan
    work: Work
    out: Path
    order: Order
    overwrite: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `windows`."""
        return (len(self.plan), *self.work.result.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the result, starts and places among them."""
        return len(self.plan) * (self.work.result.nbytes + (16 if self.order == "chunk" else 8))

    @property
    def cost(self) -> Cost:
        """What reading costs."""
        return self.plan.cost(self.order)

    def footprint(self) -> Footprint:
        """Memory of the run: a task's windows, their result, what writing a shard takes; BudgetError if too much."""
        plan, entry = self.plan, self.work.result
        windows = min(plan.task_windows, len(plan))
        cut = cut_results(len(plan), entry.nbytes, plan.task_windows, entry.shape)
        file_nbytes = windows * entry.nbytes
        writing = writing_nbytes(file_nbytes, cut.chunk * entry.nbytes, plain=not cut.inner)
        each = plan.reading_nbytes + file_nbytes + writing
        if self.work.apply is not None:
            each += windows * plan.window_nbytes
        threads = count_threads(active_client())
        return fit_memory(each, plan.memory, threads=threads, what="one task of store", enough=_ENOUGH_NBYTES)

    def run(self, watch: Watch) -> zarr.Group:
        """Read and write the windows, telling `watch` of every task that is done."""
        import zarr

        plan, footprint = self.plan, self.footprint()
        with stage_folder(self.out, nbytes=self.nbytes, overwrite=self.overwrite) as partial:
            array = _create_group(partial, plan, self.work, self.order)
            with open_run() as run:
                arguments = (
                    (self.work, task, array, task.number * plan.task_windows, run) for task in plan.tasks(self.order)
                )
                tasks = name_tasks("write", write_block, arguments)
                watch.begin(len(tasks), len(plan), self.nbytes)
                for receipt in run_tasks(tasks, at_once=footprint.at_once):
                    watch.task_done(receipt)
        return zarr.open_group(str(self.out), mode="r")


def prepare_storing(plan: Plan, path: str | Path, *, apply: Apply | None, order: Order, overwrite: bool) -> Storing:
    """Check everything that `store` needs before it begins: files, `apply`, destination, memory."""
    path = Path(path)
    if path.suffix != ".zarr":
        raise InputError(f"a result is a Zarr group in a folder; got {path}; name it .zarr")
    check_order(order)
    check_destination(path, nbytes=0, overwrite=overwrite)
    check_apart(path, plan.matrix.inputs())
    check_files(plan.matrix, plan.sorted_starts, plan.length)
    storing = Storing(plan, prepare_work(plan, apply), path, order, overwrite)
    check_destination(path, nbytes=storing.nbytes, overwrite=overwrite)
    storing.footprint()
    return storing


def _create_group(partial: Path, plan: Plan, work: Work, order: Order) -> zarr.Array[Any]:
    """Lay out the result, with the starts written already, and return the array of windows, still empty."""
    import zarr

    ours = {"kind": "windows", "matrix": plan.matrix.path, "length": plan.length, "order": order}
    zarr.create_group(str(partial), attributes={ATTRIBUTE: ours})
    one_dimensional = {"starts": plan.starts if order == "request" else plan.sorted_starts}
    if order == "chunk":
        one_dimensional["places"] = plan.sorted_places
    for name, values in one_dimensional.items():
        cut = cut_results(len(values), 8, len(values), ())
        array = create_array(
            partial / name,
            shape=values.shape,
            dtype=values.dtype,
            cut=cut,
            compress=None,
            dimension_names=["window"],
            attributes={},
        )
        _write_values(array, 0, values)
    shape = work.result.shape
    names = ["window", "row", *(f"column_{axis}" for axis in range(len(shape) - 1))]
    if shape != plan.window_shape:
        names = ["window", *(f"result_{axis}" for axis in range(len(shape)))]
    return create_array(
        partial / "windows",
        shape=(len(plan), *shape),
        dtype=work.result.dtype,
        cut=cut_results(len(plan), work.result.nbytes, plan.task_windows, shape),
        compress=None,
        dimension_names=names,
        attributes={},
    )
