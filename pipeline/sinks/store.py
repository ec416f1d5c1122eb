"""Tasks into Zarr: each task owns whole shards of the result, so no two tasks ever write one."""

from __future__ import annotations

import json
import time
import unicodedata
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

from pipeline.arguments import check_flag
from pipeline.errors import InputError
from pipeline.formatting import MIB
from pipeline.matrix.attributes import ARRAY_NAME, NOTHING, Description, describe
from pipeline.matrix.conventions import Labels, cast_attributes
from pipeline.matrix.fingerprint import fingerprint_matrix
from pipeline.matrix.rows import window_rows
from pipeline.outputs.journal import Request
from pipeline.outputs.output import find_output
from pipeline.outputs.shards import SHARD_NBYTES, cut_results
from pipeline.plan.group import GroupPlan, by_member, plans_of
from pipeline.runtime.identity import name_function
from pipeline.runtime.preflight import survey_workers
from pipeline.runtime.progress import shown
from pipeline.runtime.resources import active_client, count_threads, fit_memory, shares_memory
from pipeline.runtime.runner import open_run, run_tasks, writing
from pipeline.runtime.tasks import check_apply_travels, check_order, make_block, name_tasks, prepare_work
from pipeline.storage.checksums import digest_array
from pipeline.storage.filesystem import say_refusals

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    import zarr
    from numpy.typing import NDArray

    from pipeline.matrix.fingerprint import Fingerprint
    from pipeline.outputs.output import Output, Stage, Writer
    from pipeline.outputs.shards import Cut
    from pipeline.plan.plan import Cost, Order, Plan, Task
    from pipeline.runtime.report import Watch
    from pipeline.runtime.resources import Footprint
    from pipeline.runtime.tasks import Apply, BlockShape, Receipt, Work
    from pipeline.storage.checksums import FileRecord
    from pipeline.storage.locations import Location

ALONE = "windows"
"""Name of the array of a result that has one."""
_BESIDE = ("starts", "places")
_MOST_NAME = 200
"""Bytes of the name of an array, which is a folder's."""
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
    plan: Plan | GroupPlan,
    path: str | Path,
    *,
    apply: Apply | Mapping[str, Apply] | None = None,
    order: Order = "request",
    resume: bool = False,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
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
        on the workers. Default: the windows as they are. Of a `GroupPlan`: a mapping of names to such functions; the
        windows of arrays that it does not name stay as they are.
    order
        `request`: `windows[i]` starts at `starts[i]` of the request. `chunk`: windows and starts are sorted by start,
        and `places[i]` is the position in the request of the i-th: reads each chunk once, which matters where chunks
        are decoded whole.
    resume
        Whether to go on where an interrupted run of the same request ended; nothing is done where it is finished.
    overwrite
        Whether a local Zarr that this package wrote may be replaced. On an object store an output is written once.
    storage_options
        Of a URL, for the library that writes there (obstore): region, endpoint, credentials. They go to the workers.
        What is not given, each worker takes from its environment.
    progress
        As of `gather`.

    Returns
    -------
    zarr.Group
        Opened for reading: `windows` (n, length, *row_shape), or (n, ...) as `apply` made it; `starts` (n,) int64;
        with order `chunk` also `places` (n,) int64. Of a `GroupPlan` there is an array for each of its members, by
        its name, in place of `windows`.

        Attributes of the matrix travel with it, and the names of its columns' dimensions; `_FillValue` and
        `missing_value` are cast as values are, so that xarray masks in windows what it masks in rows. Of a matrix in a
        Zarr group so do its coordinates, arrays of numbers beside it that are named as one of its dimensions: that of
        the rows as (n, length), those of columns as they were chosen. Absent chunks of a coordinate are its fill value
        where it is then strictly monotonic, or one value; a `Report` names it. Not so the coordinates and names of
        several matrices, whose own would clash.

    Raises
    ------
    InputError
        If a member of a group has a name that an array beside it cannot have.
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
    storing = prepare_storing(plan, path, apply=apply, order=order, **given)
    repetition = storing.cost.nbytes_read / plan.chunk.nbytes_read
    with shown("store", "windows", progress=progress, repetition=repetition) as watch:
        return storing.run(watch)


@dataclass(frozen=True, slots=True)
class Member:
    """One array of a result: the windows of one matrix, as its own plan cuts them."""

    name: str
    plan: Plan
    work: Work
    fingerprint: Fingerprint
    """What the matrix was when it was checked."""
    description: Description = NOTHING
    """What travels with its values."""

    @classmethod
    def prepare(cls, name: str, plan: Plan, apply: Apply | None, *, alone: bool) -> Self:
        """Look at the matrix's files and at what lies beside them, and probe `apply`."""
        fingerprint = fingerprint_matrix(plan.matrix, plan.sorted_starts, plan.length)
        labels, selection = plan.matrix.labels, plan.selection
        if selection.casts:
            cast = cast_attributes(labels.attributes, selection.stored_dtype, selection.dtype)
            labels = labels._replace(attributes=cast)
        if apply is not None:
            # Of values that are others, what is known of the rows is left.
            labels = Labels({}, labels.names[:1])
        if alone:
            found = describe(labels, plan.matrix.array, columns=plan.columns, memory=plan.memory)
        else:
            # Arrays of a group would each have coordinates of their own, of the same names.
            found = Description(labels.attributes, ())
        return cls(name, plan, prepare_work(plan, apply), fingerprint, found)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (len(self.plan), *self.work.result.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array, and of the coordinates beside it."""
        rows, beside = self.description.rows, sum(each.values.nbytes for each in self.description.columns)
        beside += 0 if rows is None else len(self.plan) * self.plan.length * rows.values.itemsize
        return len(self.plan) * self.work.result.nbytes + beside

    @property
    def cut(self) -> Cut:
        """How the array is cut into files, a task's windows each: fixed by the request, so resumed runs cut alike."""
        return cut_results(len(self.plan), self.work.result.nbytes, self.plan.task_windows, self.work.result.shape)

    def task_nbytes(self, output: Output) -> int:
        """Memory of one task: its windows, their result, what writing a shard takes."""
        plan, entry, cut = self.plan, self.work.result, self.cut
        windows = min(plan.task_windows, len(plan))
        file_nbytes = windows * entry.nbytes
        writing = output.writing_nbytes(file_nbytes, cut.chunk * entry.nbytes, plain=not cut.inner)
        each = plan.reading_nbytes + file_nbytes + writing
        return each if self.work.apply is None else each + windows * plan.window_nbytes

    def facts(self) -> dict[str, str]:
        """What decides the bytes of the array, beside the starts."""
        return {
            "matrix": self.fingerprint.digest,
            "apply": name_function(self.work.apply),
            "result": f"{self.shape} {self.work.result.dtype.str}",
            "layout": f"{self.cut}",
            **self.plan.selection.facts(),
            **self.description.facts(),
        }


@dataclass(frozen=True, slots=True)
class Storing:
    """A `store` that was checked and may begin. Made by `prepare_storing`."""

    plan: Plan | GroupPlan
    members: tuple[Member, ...]
    """Arrays of windows that the result has: one called `windows`, or those of a group."""
    output: Output
    order: Order
    resume: bool
    overwrite: bool

    @property
    def out(self) -> Location:
        """Where the result goes, as it was named."""
        return self.output.location

    @property
    def results(self) -> dict[str, BlockShape]:
        """What is written of one window, by the name of its array."""
        return {each.name: each.work.result for each in self.members}

    @property
    def nbytes(self) -> int:
        """Bytes of the result, starts and places among them."""
        return sum(each.nbytes for each in self.members) + len(self.plan) * (16 if self.order == "chunk" else 8)

    @property
    def cost(self) -> Cost:
        """What reading costs."""
        return self.plan.cost(self.order)

    def footprint(self) -> Footprint:
        """Memory of the run, as if its tasks were all of the array whose tasks take most; BudgetError if too much."""
        each = max(member.task_nbytes(self.output) for member in self.members)
        threads = count_threads(active_client())
        held = sum(member.description.nbytes for member in self.members)
        what = "coordinates" if held else "one task of store"
        return fit_memory(each, self.plan.memory, threads=threads, what=what, held=held, enough=_ENOUGH_NBYTES)

    def request(self) -> Request:
        """What decides the bytes of the result."""
        facts = {
            "kind": "windows",
            "starts": digest_array(self.plan.starts),
            "length": str(self.plan.length),
            "order": self.order,
        }
        if isinstance(self.plan, GroupPlan):
            facts["arrays"] = json.dumps([each.name for each in self.members])
            for member in self.members:
                facts |= {f"{fact} of {member.name}": value for fact, value in member.facts().items()}
        else:
            facts |= self.members[0].facts()
            if beside := self.members[0].description.names_beside:
                facts["arrays"] = json.dumps(beside)
        return Request(facts)

    def run(self, watch: Watch) -> zarr.Group:
        """Read and write the windows, telling `watch` of every task that is done."""
        plan, footprint, given = self.plan, self.footprint(), {"resume": self.resume, "overwrite": self.overwrite}
        in_process = shares_memory(active_client())
        if active_client() is not None or not in_process:
            for member in self.members:
                check_apply_travels(member.work, in_process=in_process)
        request = self.request()
        watch.filled = [each.name for member in self.members for each in member.description.coordinates if each.filled]
        if not (self.resume and self.output.is_finished(request)):
            cut = self.members[0].plan.task_windows
            with self.output.stage(request, cut=cut, nbytes=self.nbytes, **given) as stage:
                beside = self._write(stage, watch, footprint.fits)
                for member in self.members:
                    member.fingerprint.check()
                ours = {"kind": "windows", "matrix": plan.matrix.path, "length": plan.length, "order": self.order}
                if isinstance(plan, GroupPlan):
                    ours["members"] = {member.name: member.plan.matrix.path for member in self.members}
                files = [*beside, *chain.from_iterable(stage.done.values())]
                stage.seal(files, ours | {"request": request.facts})
        watch.lacking = say_refusals(self.output.place)
        return self.output.open_group()

    def _write(self, stage: Stage, watch: Watch, at_once: int) -> list[FileRecord]:
        """Run the tasks that are not finished yet, and return what was written beside them."""
        writers, beside = _create_group(stage, self.plan, self.members, self.order)
        count = sum(each.plan.count_tasks(each.plan.task_windows) for each in self.members)
        stage.expect(count)
        watch.begin(count, len(self.plan) * len(self.members), self.plan.nbytes)
        for _, task, _ in self._tasks():
            if task.number in stage.done:
                watch.task_kept(len(task.starts))
        sights = chain.from_iterable(
            (member.fingerprint.sample(), *writer.sights())
            for member, writer in zip(self.members, writers, strict=True)
        )
        survey = survey_workers(sights, say=watch.say)
        with open_run() as run:
            arguments = (
                (self.members[number].work, task, writers[number], first, run)
                for number, task, first in self._tasks()
                if task.number not in stage.done
            )
            tasks = name_tasks("write", survey.guard(write_block), arguments)
            span = ("pipeline", "store", self.out.name)
            for receipt in run_tasks(tasks, at_once=survey.bound(at_once), span=span, watch=watch):
                stage.finish((receipt.number, receipt.files))
                watch.task_done(receipt)
        stage.check_complete()
        return beside

    def _tasks(self) -> Iterator[tuple[int, Task, int]]:
        """Yield every task of every member, numbered through, with the member's number and its own first entry."""
        before = 0
        for number, member in enumerate(self.members):
            windows = member.plan.task_windows
            for task in member.plan.tasks(self.order, windows=windows):
                yield number, replace(task, number=before + task.number), task.number * windows
            before += member.plan.count_tasks(windows)


def prepare_storing(
    plan: Plan | GroupPlan,
    path: str | Path,
    *,
    apply: Apply | Mapping[str, Apply] | None,
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
    check_flag("resume", resume)
    check_flag("overwrite", overwrite)
    plans = plans_of(plan, ALONE)
    if isinstance(plan, GroupPlan):
        check_names(plans)
    applies: dict[str, Any] = by_member(apply, plans, "apply") if isinstance(plan, GroupPlan) else {ALONE: apply}
    output.check_apart(plan.matrix.inputs())
    if not resume:
        # Before `apply` is probed, and files are looked for.
        output.check(nbytes=0, overwrite=overwrite)
    alone = not isinstance(plan, GroupPlan)
    members = tuple(Member.prepare(name, each, applies[name], alone=alone) for name, each in plans.items())
    storing = Storing(plan, members, output, order, resume, overwrite)
    if not (resume and output.is_result(storing.request())):
        output.check(nbytes=storing.nbytes, resume=resume, overwrite=overwrite)
    storing.footprint()
    return storing


def check_names(names: Iterable[str]) -> None:
    """Raise InputError where a result cannot have arrays of these names: they are folders, and keys of objects."""
    alike: dict[str, str] = {}
    for name in names:
        if name in (*_BESIDE, "window", "row"):
            raise InputError(
                f"a result keeps {' and '.join(_BESIDE)} beside its windows, and has dimensions window and row; an "
                f"array is called {name!r}, too; give it another name in a mapping of names to paths"
            )
        # Some disks take names for one that differ in case, or in how a letter is composed.
        other = alike.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name or not ARRAY_NAME.fullmatch(name) or len(name.encode()) > _MOST_NAME:
            raise InputError(
                f"arrays of a result have names that Zarr and the usual disks can have, each its own; got "
                f"{name!r}; give it another, without slashes and dots before it, in a mapping of names to paths"
            )


def _create_group(
    stage: Stage, plan: Plan | GroupPlan, members: tuple[Member, ...], order: Order
) -> tuple[list[Writer], list[FileRecord]]:
    """Lay out the result, with the starts written already: what fills each member, and what was written."""
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
    for member in members:
        beside += _write_coordinates(stage, member, one_dimensional["starts"])
    # Arrays of one group share the dimensions whose names they share.
    own = "{}_" if isinstance(plan, GroupPlan) else ""
    return [_create_member(stage, member, own.format(member.name)) for member in members], beside


def _create_member(stage: Stage, member: Member, own: str) -> Writer:
    """Lay out an array of windows; `own` begins the names of the dimensions that it shares with no other."""
    shape = member.work.result.shape
    names = ["window", "row", *(f"{own}column_{axis}" for axis in range(len(shape) - 1))]
    told = member.description
    if shape != member.plan.window_shape:
        names = ["window", *(f"{own}result_{axis}" for axis in range(len(shape)))]
    elif told.names:
        names[2:] = [given or name for given, name in zip(told.names, names[2:], strict=True)]
    # By this name xarray knows what belongs to the values, and is none of its own.
    attributes = told.attributes | ({"coordinates": told.rows.name} if told.rows is not None else {})
    return stage.create_array(
        member.name,
        shape=member.shape,
        dtype=member.work.result.dtype,
        cut=member.cut,
        compress=None,
        dimension_names=names,
        attributes=attributes,
    )


def _write_coordinates(stage: Stage, member: Member, starts: NDArray[np.int64]) -> list[FileRecord]:
    """Write what is known of the rows of each window, (n, length), and of the columns, as they were chosen."""
    beside, length = [], member.plan.length
    if (rows := member.description.rows) is not None:
        values, nbytes = rows.values, length * rows.values.itemsize
        writer = stage.create_array(
            rows.name,
            shape=(len(starts), length),
            dtype=values.dtype,
            cut=cut_results(len(starts), nbytes, max(1, SHARD_NBYTES // nbytes), (length,)),
            compress=None,
            dimension_names=["window", "row"],
            attributes=rows.attributes,
        )
        beside += writer.write(
            0,
            len(starts),
            lambda first, stop: values[window_rows(starts[first:stop], length)].reshape(-1, length),
            None,
        )
    for columns in member.description.columns:
        values = columns.values
        writer = stage.create_array(
            columns.name,
            shape=values.shape,
            dtype=values.dtype,
            cut=cut_results(len(values), values.itemsize, SHARD_NBYTES // values.itemsize, ()),
            compress=None,
            dimension_names=[columns.name],
            attributes=columns.attributes,
        )
        beside += _write_values(writer, 0, values, None)
    return beside
