"""Tasks into Zarr: each task owns whole shards of the result, so no two tasks ever write one."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from pipeline.capacity import active_client, count_threads, fit_memory, shares_memory
from pipeline.errors import InputError
from pipeline.identity import name_function
from pipeline.journal import Request, digest_array
from pipeline.outputs import find_output
from pipeline.report import Watch
from pipeline.runs import open_run, run_tasks, writing
from pipeline.shards import SHARD_NBYTES, cut_results
from pipeline.sights import matrix_sights
from pipeline.sizes import MIB
from pipeline.stamps import stamp_matrix
from pipeline.tasks import check_apply_travels, check_order, make_block, name_tasks, prepare_work
from pipeline.workers import survey_workers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import zarr
    from numpy.typing import NDArray

    from pipeline.capacity import Footprint
    from pipeline.locations import Location
    from pipeline.outputs import Output, Stage, Writer
    from pipeline.plan import Cost, Order, Plan, Task
    from pipeline.record import FileRecord
    from pipeline.stamps import Stamp
    from pipeline.tasks import Apply, Receipt, Work

_ENOUGH_NBYTES = 1024 * MIB
"""More memory than this is only taken where the user allows it, however many threads there are."""


def write_block(work: Work, task: Task, writer: Writer, first: int, run: str) -> Receipt:
    """Read a task's windows and write them to entries [first, first + k) of the result: whole shards."""
    block, receipt = make_block(work, task)
    begin = time.perf_counter()
    with writing(run):
        files = _write_values(writer, first, block, task.number)
    return replace(receipt, write_seconds=time.perf_counter() - begin, files=tuple(files))


def _write_values(writer: Writer, first: int, values: NDArray[Any], task: int | None) -> list[FileRecord]:
    """Write entries [first, first + len(values)), whole files."""
    return writer.write(first, first + len(values), lambda start, stop: values[start - first : stop - first], task)


def store(
    plan: Plan,
    path: str | Path,
    *,
    apply: Apply | None = None,
    order: Order = "request",
    resume: bool = False,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> zarr.Group:
    """Read every window and write it to a Zarr group, which appears only when it is complete.

    Tasks run on the active `distributed.Client`, else on Dask's threaded scheduler; the workers write.

    Parameters
    ----------
    plan
        As `plan_windows` gives it.
    path
        Folder to make, or URL of a place on an object store (`s3://`, `gs://`, `az://`); it ends in `.zarr`.
    apply
        Function of one block (k, length, *row_shape) -> (k, ...), each window for itself; k is unspecified. It runs
        on the workers. Default: the windows as they are.
    order
        `request`: `windows[i]` starts at `starts[i]` of the request. `chunk`: windows and starts are sorted by start,
        and `places[i]` is the position in the request of the i-th: reads each chunk once, which matters where chunks
        are decoded whole.
    resume
        Whether to go on where an interrupted run of the same request ended; nothing is done where it is finished.
    overwrite
        Whether a Zarr that this package wrote may be replaced.
    storage_options
        Of a URL, for the library that writes there (obstore): region, endpoint, credentials. They go to the workers.
        What is not given, each worker takes from its environment.

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
    given: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "storage_options": storage_options}
    return prepare_storing(plan, path, apply=apply, order=order, **given).run(Watch())


@dataclass(frozen=True, slots=True)
class Storing:
    """A `store` that was checked and may begin. Made by `prepare_storing`."""

    plan: Plan
    work: Work
    stamp: Stamp
    """What the matrix was when it was checked."""
    output: Output
    order: Order
    resume: bool
    overwrite: bool

    @property
    def out(self) -> Location:
        """Where the result goes, as it was named."""
        return self.output.location

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
        writing = self.output.writing_nbytes(file_nbytes, cut.chunk * entry.nbytes, plain=not cut.inner)
        each = plan.reading_nbytes + file_nbytes + writing
        if self.work.apply is not None:
            each += windows * plan.window_nbytes
        threads = count_threads(active_client())
        return fit_memory(each, plan.memory, threads=threads, what="one task of store", enough=_ENOUGH_NBYTES)

    def request(self) -> Request:
        """What decides the bytes of the result."""
        plan, entry = self.plan, self.work.result
        facts = {
            "kind": "windows",
            "matrix": self.stamp.digest,
            "starts": digest_array(plan.starts),
            "length": str(plan.length),
            "order": self.order,
            "apply": name_function(self.work.apply),
            "result": f"{self.shape} {entry.dtype.str}",
            "layout": f"{cut_results(len(plan), entry.nbytes, plan.task_windows, entry.shape)}",
        }
        return Request(facts)

    def run(self, watch: Watch) -> zarr.Group:
        """Read and write the windows, telling `watch` of every task that is done."""
        plan, footprint, given = self.plan, self.footprint(), {"resume": self.resume, "overwrite": self.overwrite}
        if not shares_memory(active_client()):
            check_apply_travels(self.work)
        request = self.request()
        if not (self.resume and self.output.is_finished(request)):
            with self.output.stage(request, cut=plan.task_windows, nbytes=self.nbytes, **given) as stage:
                beside = self._write(stage, watch, footprint.fits)
                self.stamp.check()
                ours = {"kind": "windows", "matrix": plan.matrix.path, "length": plan.length, "order": self.order}
                files = [*beside, *chain.from_iterable(stage.done.values())]
                stage.seal(files, ours | {"request": request.facts})
        return self.output.open_group()

    def _write(self, stage: Stage, watch: Watch, at_once: int) -> list[FileRecord]:
        """Run the tasks that are not finished yet, and return what was written beside them."""
        plan = self.plan
        writer, beside = _create_group(stage, plan, self.work, self.order)
        count = plan.count_tasks(stage.cut)
        watch.begin(count, len(plan), plan.nbytes)
        for task in plan.tasks(self.order, windows=stage.cut):
            if task.number in stage.done:
                watch.task_kept(len(task.starts))
        sights = (*matrix_sights(plan.matrix), *writer.sights())
        survey = survey_workers(sights, say=watch.say)
        with open_run() as run:
            arguments = (
                (self.work, task, writer, task.number * stage.cut, run)
                for task in plan.tasks(self.order, windows=stage.cut)
                if task.number not in stage.done
            )
            tasks = name_tasks("write", survey.guard(write_block), arguments)
            span = ("pipeline", "store", self.out.name)
            for receipt in run_tasks(tasks, at_once=survey.bound(at_once), span=span, retried=watch.task_retried):
                stage.finish((receipt.number, receipt.files))
                watch.task_done(receipt)
        stage.check_complete(count)
        return beside


def prepare_storing(
    plan: Plan,
    path: str | Path,
    *,
    apply: Apply | None,
    order: Order,
    resume: bool,
    overwrite: bool,
    storage_options: Mapping[str, Any] | None = None,
) -> Storing:
    """Check everything that `store` needs before it begins: files, `apply`, destination, memory."""
    output = find_output(path, storage_options)
    if output.location.suffix != ".zarr":
        raise InputError(f"a result is a Zarr group in a folder; got {output.location}; name it .zarr")
    check_order(order)
    if not resume:
        # Before `apply` is probed, and files are looked for.
        output.check(nbytes=0, overwrite=overwrite)
    output.check_apart(plan.matrix.inputs())
    stamp = stamp_matrix(plan.matrix, plan.sorted_starts, plan.length)
    storing = Storing(plan, prepare_work(plan, apply), stamp, output, order, resume, overwrite)
    if not (resume and output.is_result(storing.request())):
        output.check(nbytes=storing.nbytes, resume=resume, overwrite=overwrite)
    storing.footprint()
    return storing


def _create_group(stage: Stage, plan: Plan, work: Work, order: Order) -> tuple[Writer, list[FileRecord]]:
    """Lay out the result, with the starts written already: what fills the windows, and what was written."""
    stage.create_group()
    one_dimensional = {"starts": plan.starts if order == "request" else plan.sorted_starts}
    if order == "chunk":
        one_dimensional["places"] = plan.sorted_places
    beside = []
    for name, values in one_dimensional.items():
        writer = stage.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            cut=cut_results(len(values), values.itemsize, SHARD_NBYTES // values.itemsize, ()),
            compress=None,
            dimension_names=["window"],
            attributes={},
        )
        beside += _write_values(writer, 0, values, None)
    shape = work.result.shape
    names = ["window", "row", *(f"column_{axis}" for axis in range(len(shape) - 1))]
    if shape != plan.window_shape:
        names = ["window", *(f"result_{axis}" for axis in range(len(shape)))]
    windows = stage.create_array(
        "windows",
        shape=(len(plan), *shape),
        dtype=work.result.dtype,
        cut=cut_results(len(plan), work.result.nbytes, plan.task_windows, shape),
        compress=None,
        dimension_names=names,
        attributes={},
    )
    return windows, beside
