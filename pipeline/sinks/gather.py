"""Tasks into one array: each window is written to its place, so no inverse permutation exists to get wrong."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from pipeline.arguments import check_flag, check_path, show
from pipeline.errors import InputError, IntegrityError
from pipeline.matrix.fingerprint import fingerprint_matrix
from pipeline.memory import budget, held_nbytes
from pipeline.outputs.folder import check_destination, is_finished, is_result, stage_output
from pipeline.outputs.journal import Request
from pipeline.outputs.npy import create_npy, flush_npy, map_npy, mark_npy, reopen_npy
from pipeline.plan.group import GroupPlan, by_member, check_plan
from pipeline.runtime.identity import name_function
from pipeline.runtime.placement import file_array, fill_array, is_large, new_array, own_array
from pipeline.runtime.preflight import survey_workers
from pipeline.runtime.progress import shown
from pipeline.runtime.resources import active_client, count_threads, fit_memory
from pipeline.runtime.shared_memory import FileArray
from pipeline.runtime.tasks import Apply, BlockShape, Receipt, Work, check_apply_travels, prepare_work
from pipeline.storage.checksums import digest_array, record_entries
from pipeline.storage.filesystem import say_refusals
from pipeline.storage.locations import check_apart, locate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from pipeline.matrix.fingerprint import Fingerprint
    from pipeline.outputs.folder import Stage
    from pipeline.plan.plan import Cost, Plan
    from pipeline.runtime.preflight import Survey
    from pipeline.runtime.report import Watch
    from pipeline.runtime.resources import Footprint

_FLUSH_SHARE = 4
"""Seconds of work for each second that flushing an `.npy` took, before the next: its pages lie scattered."""


@overload
def gather(
    plan: Plan,
    *,
    apply: Apply | None = None,
    out: NDArray[Any] | str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> NDArray[Any]: ...


@overload
def gather(
    plan: GroupPlan,
    *,
    apply: Mapping[str, Apply] | None = None,
    out: Mapping[str, NDArray[Any]] | None = None,
    progress: bool | None = None,
) -> dict[str, NDArray[Any]]: ...


def gather(
    plan: Plan | GroupPlan,
    *,
    apply: Apply | Mapping[str, Apply] | None = None,
    out: NDArray[Any] | Mapping[str, NDArray[Any]] | str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """Read every window into one array, or one for each member of a group, in request order.

    Tasks run on the active `distributed.Client`, else on Dask's threaded scheduler. Workers on this host write straight
    into the array; others send their blocks, of which only a bounded number is held.

    Parameters
    ----------
    plan
        As `plan_windows` gives it.
    apply
        Function of one block (k, length, *row_shape) -> (k, ...), each window for itself; k is unspecified. It runs
        on the workers. Default: the windows as they are. Of a `GroupPlan`: a mapping of names to such functions; the
        windows of arrays that it does not name stay as they are.
    out
        An array to fill, of the result's shape and dtype and C-contiguous; or the path of an `.npy` file, which
        appears only when it is complete, and whose memory map is returned: what is written into that stays in memory.
        Default: a new array. Of a `GroupPlan`: a mapping of names to arrays to fill; others are new.
    resume
        Whether to go on where an interrupted run of the same request ended; nothing is done where it is finished.
    overwrite
        Whether an `.npy` that this package wrote may be replaced.
    progress
        Whether to show progress on stderr: a bar on a terminal and in a notebook, elsewhere a line every ten seconds.
        Default: the bar alone, where a run takes longer than half a second, unless the environment has
        `PIPELINE_PROGRESS=0`, or the logger "pipeline" a level above INFO.

    Returns
    -------
    ndarray
        (n, length, *row_shape), or (n, ...) as `apply` made it. Where other processes on this host filled it, a child
        that is forked writes into the same memory as its parent. Of a `GroupPlan` a dict of such arrays, by name.

    Raises
    ------
    BudgetError
        If the result, all arrays together, does not fit the memory budget; nothing is allocated.
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

    Of several arrays that share rows:

    >>> both = pipeline.open_matrix({"features": folder / "A.zarr", "means": folder / "A.npy"})
    >>> plan = pipeline.plan_windows(both, [200, 7], length=16)
    >>> {name: each.shape for name, each in pipeline.gather(plan, apply={"means": lambda x: x.mean(axis=1)}).items()}
    {'features': (2, 16, 2), 'means': (2, 2)}
    """
    gathering = prepare_gathering(plan, apply=apply, out=out, resume=resume, overwrite=overwrite)
    with shown("gather", "windows", progress=progress) as watch:
        return gathering.run(watch)


@dataclass(frozen=True, slots=True)
class Gathering:
    """A `gather` that was checked and may begin. Made by `prepare_gathering`."""

    plan: Plan
    work: Work
    fingerprint: Fingerprint
    """What the matrix was when it was checked."""
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
    def results(self) -> dict[str, BlockShape]:
        """What one window gives, by the name of its array."""
        return {"windows": self.work.result}

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return len(self.plan) * self.work.result.nbytes

    @property
    def cost(self) -> Cost:
        """What reading costs."""
        return self.plan.chunk

    def footprint(self, windows: int | None = None, survey: Survey | None = None) -> Footprint:
        """Memory of the run on this machine; BudgetError where it does not fit.

        Parameters
        ----------
        windows
            Of a task.
        survey
            Of the workers; None: those of this machine, before they were asked.
        """
        each = self.task_nbytes(windows, survey)
        held = self.nbytes if self.out is None else 0
        way_out = (
            "write it to disk with --out X.npy or X.zarr (out= of gather, or store)" if held else "raise the limit"
        )
        what = f"the array of {len(self.plan):,} windows" if held else "one task"
        return fit_memory(
            each,
            self.plan.memory,
            threads=count_threads(active_client()),
            held=held,
            touched=self.nbytes - held,
            what=what,
            way_out=way_out,
        )

    def task_nbytes(self, windows: int | None, survey: Survey | None) -> int:
        """Memory of one task on this machine; `windows` and `survey` as for `footprint`."""
        plan, work = self.plan, self.work
        windows = min(windows or plan.task_windows, len(plan))
        block, elsewhere = windows * work.result.nbytes, survey is not None and not survey.in_process
        each = 0
        if survey is None or survey.same_host:
            each = plan.reading_nbytes
            if work.apply is not None:
                each += windows * plan.window_nbytes + block
            elif elsewhere:
                # At most: a worker need not hold all windows of a task until they are written.
                each += block
        if survey is not None and elsewhere:
            placed = survey.shares and not isinstance(self.out, np.ndarray)
            if not (placed and is_large(self.shape, work.result.dtype)):
                # What the client copies to its place.
                each += block
        return each

    def request(self) -> Request:
        """What decides the bytes of the file."""
        facts = {
            "kind": "npy",
            "matrix": self.fingerprint.digest,
            "starts": digest_array(self.plan.starts),
            "length": str(self.plan.length),
            **self.plan.selection.facts(),
            "apply": name_function(self.work.apply),
            "result": f"{self.shape} {self.work.result.dtype.str}",
        }
        return Request(facts)

    def run(self, watch: Watch) -> NDArray[Any]:
        """Read the windows, telling `watch` of every task that is done."""
        plan = self.plan
        survey = survey_workers([self.fingerprint.sample()], say=watch.say, reach=True)
        footprint = self.footprint(survey=survey)
        if active_client() is not None or not survey.in_process:
            check_apply_travels(self.work, in_process=survey.in_process)
        windows = self.fit_tasks(survey)
        if not isinstance(self.out, Path):
            watch.begin(plan.count_tasks(windows), len(plan), plan.nbytes)
            out = self.fill(survey, watch, windows, footprint.fits, span="array")
            self.fingerprint.check()
            return out
        request = self.request()
        if not (self.resume and is_finished(self.place, request)):
            with stage_output(
                self.place, request, cut=windows, nbytes=self.nbytes, resume=self.resume, overwrite=self.overwrite
            ) as stage:
                self._write(stage, survey, watch, self.footprint(stage.cut, survey).fits)
                self.fingerprint.check()
                mark_npy(stage.output, request.digest)
        watch.lacking = say_refusals(self.place)
        return _load(self.place)

    def fit_tasks(self, survey: Survey) -> int:
        """Windows of a task."""
        placed = survey.in_process and self.work.apply is None
        return self.plan.fit_tasks(threads=count_threads(active_client()), placed=placed)

    def fill(self, survey: Survey, watch: Watch, windows: int, at_once: int, *, span: str) -> NDArray[Any]:
        """Fill an array in memory by tasks of so many windows; `span` names it on the dashboard."""
        if isinstance(self.out, np.ndarray):
            destination = own_array(self.out, survey, step=windows)
        else:
            destination = new_array(self.shape, self.work.result.dtype, survey, step=windows)
        cut = list(self.plan.tasks("chunk", windows=windows))
        try:
            watched = {"span": ("pipeline", "gather", span), "watch": watch}
            for receipt in fill_array(destination, self.work, cut, survey, at_once=at_once, **watched):
                watch.task_done(receipt)
        except BaseException:
            destination.abandon()
            raise
        destination.close()
        filled: NDArray[Any] = destination.array
        return filled

    def _write(self, stage: Stage, survey: Survey, watch: Watch, at_once: int) -> None:
        """Fill an `.npy` by the tasks that are not finished yet, each journaled once its windows are on the disk."""
        plan, dtype = self.plan, self.work.result.dtype
        if not (stage.done and reopen_npy(stage.output, dtype, self.shape)):
            stage.redo(list(stage.done))
            create_npy(stage.output, dtype, self.shape)
        array = map_npy(stage.output, "r+")
        destination = file_array(array, survey, step=stage.cut)
        cut = list(plan.tasks("chunk", windows=stage.cut))
        stage.redo([n for n, files in stage.done.items() if (record_entries(array, cut[n].places),) != files])
        stage.expect(len(cut))
        watch.begin(len(cut), len(plan), plan.nbytes)
        for task in cut:
            if task.number in stage.done:
                watch.task_kept(len(task.places))
        places = {task.number: task.places for task in cut if task.number not in stage.done}
        flushed: list[Receipt] = []
        due = 0.0
        try:
            todo = [task for task in cut if task.number in places]
            watched = {"span": ("pipeline", "gather", self.place.name), "watch": watch}
            for receipt in fill_array(destination, self.work, todo, survey, at_once=at_once, **watched):
                flushed.append(receipt)
                if time.monotonic() >= due:
                    begin = time.monotonic()
                    _flush(stage, array, flushed, places, watch)
                    due = time.monotonic() + _FLUSH_SHARE * (time.monotonic() - begin)
        except BaseException:
            destination.abandon()
            raise
        finally:
            _flush(stage, array, flushed, places, watch)
        destination.close()
        stage.check_complete()


def _load(path: Path) -> NDArray[Any]:
    """Give what a finished `.npy` holds: mapped, else loaded where it fits the memory, else read entry by entry."""
    mapped: Any = map_npy(path, "c")
    if isinstance(mapped, FileArray) and mapped.nbytes + held_nbytes() <= budget().nbytes:
        mapped = np.load(path, allow_pickle=False)
    result: NDArray[Any] = mapped
    return result


def _flush(
    stage: Stage, array: Any, receipts: list[Receipt], places: dict[int, NDArray[np.int64]], watch: Watch
) -> None:
    """Flush the windows of finished tasks to the disk, read them back, and note the tasks."""
    if not receipts:
        return
    flush_npy(array, stage.output)
    written = map_npy(stage.output, "c")
    for receipt in receipts:
        if (record_entries(written, places[receipt.number]),) != receipt.files:
            raise IntegrityError(
                f"windows read back as they were written; those of task {receipt.number} do not: check the disk"
            )
    stage.finish(*((receipt.number, receipt.files) for receipt in receipts))
    finished = receipts.copy()
    receipts.clear()
    for receipt in finished:
        watch.task_done(receipt)


@dataclass(frozen=True, slots=True)
class GroupGathering:
    """A `gather` of several arrays that was checked and may begin. Made by `prepare_gathering`."""

    plan: GroupPlan
    members: dict[str, Gathering]

    @property
    def out(self) -> None:
        """Results are arrays in memory."""
        return

    @property
    def results(self) -> dict[str, BlockShape]:
        """What one window gives, by the name of its array."""
        return {name: each.work.result for name, each in self.members.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the results."""
        return sum(each.nbytes for each in self.members.values())

    @property
    def cost(self) -> Cost:
        """What reading costs."""
        return self.plan.chunk

    def footprint(self, survey: Survey | None = None) -> Footprint:
        """Memory of the run on this machine, as if all tasks were of the array whose tasks take most.

        Raises
        ------
        BudgetError
            Where the results do not fit together.
        """
        each = max(member.task_nbytes(None, survey) for member in self.members.values())
        held = sum(member.nbytes for member in self.members.values() if member.out is None)
        what = f"{len(self.members)} arrays of {len(self.plan):,} windows" if held else "one task"
        way_out = "write them to disk with --out X.zarr (store)" if held else "raise the limit"
        return fit_memory(
            each,
            self.plan.memory,
            threads=count_threads(active_client()),
            held=held,
            touched=self.nbytes - held,
            what=what,
            way_out=way_out,
        )

    def run(self, watch: Watch) -> dict[str, NDArray[Any]]:
        """Read the windows of one array after the other, telling `watch` of every task that is done."""
        members = self.members.values()
        survey = survey_workers([member.fingerprint.sample() for member in members], say=watch.say, reach=True)
        at_once = self.footprint(survey).fits
        if active_client() is not None or not survey.in_process:
            for member in members:
                check_apply_travels(member.work, in_process=survey.in_process)
        cuts = {name: member.fit_tasks(survey) for name, member in self.members.items()}
        tasks = sum(member.plan.count_tasks(cuts[name]) for name, member in self.members.items())
        watch.begin(tasks, len(self.plan) * len(self.members), self.plan.nbytes)
        made = {
            name: member.fill(survey, watch, cuts[name], at_once, span=name) for name, member in self.members.items()
        }
        for member in members:
            member.fingerprint.check()
        return made


def prepare_gathering(
    plan: Plan | GroupPlan,
    *,
    apply: Apply | Mapping[str, Apply] | None,
    out: NDArray[Any] | Mapping[str, NDArray[Any]] | str | Path | None,
    resume: bool,
    overwrite: bool,
) -> Gathering | GroupGathering:
    """Check everything that `gather` needs before it begins: files, `apply`, destination, memory."""
    check_plan(plan)
    resume, overwrite = check_flag("resume", resume), check_flag("overwrite", overwrite)
    if isinstance(plan, GroupPlan):
        return _prepare_group(plan, apply, out, resume=resume)
    given: Any = {"apply": apply, "out": out}
    gathering = _prepare_single(plan, **given, resume=resume, overwrite=overwrite)
    gathering.footprint()
    return gathering


def _prepare_group(plan: GroupPlan, apply: Any, out: Any, *, resume: bool) -> GroupGathering:
    if isinstance(out, str | os.PathLike):
        raise InputError(f"several arrays go into a Zarr group; got {out}; name it X.zarr and use store")
    applies, outs = by_member(apply, plan.members, "apply"), by_member(out, plan.members, "out")
    for name, array in outs.items():
        if not isinstance(array, np.ndarray | None):
            raise InputError(f"out is a mapping of names to arrays; got {show(array)} for {name}; give a NumPy array")
    for (name, first), (other, second) in combinations(outs.items(), 2):
        if first is not None and second is not None and np.may_share_memory(first, second):
            raise InputError(f"each array is filled alone; those for {name} and {other} share memory; give two")
    members = {
        name: _prepare_single(each, apply=applies[name], out=outs[name], resume=resume, overwrite=False)
        for name, each in plan.members.items()
    }
    gathering = GroupGathering(plan, members)
    gathering.footprint()
    return gathering


def _prepare_single(
    plan: Plan, *, apply: Apply | None, out: NDArray[Any] | str | Path | None, resume: bool, overwrite: bool
) -> Gathering:
    """Check all but the memory."""
    place = Path()
    if out is not None and not isinstance(out, np.ndarray):
        location = locate(check_path("out", out))
        if not isinstance(location, Path):
            raise InputError(
                f"an .npy is written in place, which object stores cannot do; got {location}; name it X.zarr and use "
                f"store, or name a path"
            )
        out = location
        place = out.absolute()
        if out.suffix != ".npy":
            raise InputError(f"out is an array or the path of an .npy file; got {out}; name it .npy, or use store")
        if not resume:
            # Before `apply` is probed, and files are looked for.
            check_destination(out, nbytes=0, overwrite=overwrite)
        check_apart(out, plan.matrix.inputs())
    elif resume:
        raise InputError("a run that resumes has a file to go on with; an array in memory has none; drop it")
    fingerprint = fingerprint_matrix(plan.matrix, plan.sorted_starts, plan.length)
    gathering = Gathering(plan, prepare_work(plan, apply), fingerprint, out, place, resume, overwrite)
    shape, dtype = gathering.shape, gathering.work.result.dtype
    if isinstance(out, np.ndarray) and not (
        out.shape == shape and out.dtype == dtype and out.flags.c_contiguous and out.flags.writeable
    ):
        raise InputError(
            f"out is a writable C-contiguous array of shape {shape}, {dtype}; got shape {out.shape}, {out.dtype}, "
            f"strides {out.strides}, {'' if out.flags.writeable else 'not '}writable; allocate it with numpy.empty"
        )
    if isinstance(out, Path) and not (resume and is_result(place, gathering.request())):
        check_destination(place, nbytes=gathering.nbytes, resume=resume, overwrite=overwrite)
    return gathering
