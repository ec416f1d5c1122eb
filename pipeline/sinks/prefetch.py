"""Groups of batches read ahead: how far memory allows, each group as `gather` reads, handed out one batch at a time."""

from __future__ import annotations

import contextvars
import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import BudgetError
from pipeline.formatting import MIB
from pipeline.plan.plan import BLOCK_NBYTES, Task
from pipeline.runtime.placement import fill_array, new_array
from pipeline.runtime.preflight import survey_workers
from pipeline.runtime.report import watched
from pipeline.runtime.resources import active_client, closed_error, count_threads, fit_memory, is_in_task
from pipeline.runtime.retries import stopped_error
from pipeline.runtime.tasks import Work, check_apply_travels
from pipeline.storage.checksums import digest_array

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from numpy.typing import NDArray

    from pipeline.matrix.fingerprint import Fingerprint
    from pipeline.plan.plan import Plan
    from pipeline.runtime.preflight import Survey
    from pipeline.runtime.report import Watch
    from pipeline.runtime.tasks import Receipt
    from pipeline.sinks.epochs import Epochs

_GROUP_NBYTES = 64 * MIB
"""Bytes of the batches that are read together, unless one alone holds more."""
_GROUPS = 4
"""Groups under way beside the one that is handed out: some end while the others' tasks fill the threads. Measured on
two threads, warm, 64 MiB a batch, in one process: 0.75 of the rate of `gather` with 2, 0.78 with 3, 0.81 with 4; by
`pipeline bench` 0.69."""
_LEAST_TASK_NBYTES = MIB
_TASKS_PER_THREAD = 1
"""Of a group: there are several under way."""
_CHECK_SHARE = 50
"""Seconds of reading for each second that looking at the matrix's files took, before the next look."""
_CLOSE_SECONDS = 2
"""How long what is being read may take to end when a pass is left."""

type Group = dict[str, list[NDArray[Any]]]
"""Batches that were read together, the last one first, of each array by its name."""


@dataclass(slots=True)
class Position:
    """Where a run is; told while a pass goes on."""

    epoch: int
    batch: int = 0
    """Batches of the epoch that were handed out."""


@dataclass(frozen=True, slots=True)
class Member:
    """One array of the batches."""

    plan: Plan
    work: Work
    fingerprint: Fingerprint
    """What the matrix was when it was checked."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """How far a pass reads ahead."""

    batches: int
    """Of a group, at most."""
    groups: int
    """Under way, or waiting to be handed out; 0: read when the first batch is asked for."""
    at_once: int
    """Tasks that memory allows to be under way."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What all passes share."""

    members: dict[str, Member]
    epochs: Epochs
    shuffle: bool
    prefetch: int | None
    named: bool
    """Whether batches are dicts."""

    def facts(self) -> dict[str, str]:
        """What decides which windows a batch holds."""
        epochs, first = self.epochs, next(iter(self.members.values())).plan
        facts = {
            "starts": digest_array(first.starts),
            "length": str(first.length),
            "batch_size": str(epochs.batch_size),
            "shuffle": str(bool(self.shuffle)),
            "seed": str(epochs.seed) if self.shuffle else "any",
            "drop_last": str(bool(epochs.drop_last)),
            "world_size": str(epochs.world_size),
        }
        for name, member in self.members.items():
            matrix = member.plan.matrix
            facts[f"matrix {name}".strip()] = f"{matrix.shape} {matrix.dtype.str}"
            facts[f"window {name}".strip()] = f"{member.plan.window_shape} {member.plan.dtype.str}"
            facts |= {f"{fact} {name}".strip(): value for fact, value in member.plan.selection.facts().items()}
        return facts

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Places of this rank's windows in an epoch."""
        epochs = self.epochs
        order = epochs.permuted(epoch) if self.shuffle else np.arange(epochs.count)
        return epochs.take(order, epochs.rank, epochs.world_size)

    def fit(self, survey: Survey | None) -> _Ahead:
        """Choose how far to read ahead; BudgetError where that does not fit."""
        client = active_client()
        batch = min(self.epochs.batch_size, self.epochs.share)
        batch_nbytes = batch * sum(each.work.result.nbytes for each in self.members.values())
        if self.prefetch is None:
            most = min(max(1, _GROUP_NBYTES // batch_nbytes), len(self.epochs))
            choices = [(most >> halved, _GROUPS) for halved in range(most.bit_length())] + [(1, 1), (1, 0)]
        else:
            groups = min(self.prefetch, _GROUPS)
            choices = [(max(1, -(-self.prefetch // max(1, groups))), groups)]
        for number, (batches, groups) in enumerate(choices):
            # Batches of a group are copied apart by those who read it; the one before is the caller's still.
            copies = (batches > 1) * max(1, groups)
            held = (batches * (1 + groups + copies) + 1) * batch_nbytes
            try:
                each = max(self._task_nbytes(member, batches * batch, survey) for member in self.members.values())
                fits = fit_memory(
                    each,
                    next(iter(self.members.values())).plan.memory,
                    threads=count_threads(client),
                    held=held,
                    what=f"reading ahead batches of {batch:,} windows",
                    way_out="take a smaller batch_size" if self.prefetch is None else "take a smaller prefetch",
                ).fits
            except BudgetError:
                if number + 1 == len(choices):
                    raise
            else:
                if client is None:
                    return _Ahead(batches, groups, fits)
                # Each group under way runs tasks of its own.
                if fits >= groups or number + 1 == len(choices):
                    return _Ahead(batches, groups, max(1, fits // max(1, groups)))
        raise AssertionError

    def _task_nbytes(self, member: Member, windows: int, survey: Survey | None) -> int:
        """Memory of one task on this machine, beside the batches themselves."""
        plan, work = member.plan, member.work
        elsewhere = survey is not None and not survey.in_process
        if survey is not None and not survey.same_host:
            return windows * work.result.nbytes
        windows = _cut_windows(windows, work.result.nbytes, count_threads(active_client()))
        block = windows * work.result.nbytes
        each = plan.reading_nbytes + 2 * block * elsewhere
        return each if work.apply is None else each + windows * plan.window_nbytes + block

    def read(self, seen: Position) -> Generator[Any, None, None]:
        """Yield the batches of a pass, counting them in `seen`."""
        first, total = seen.batch, len(self.epochs)
        if first == total:
            return
        with watched("iter_batches", pulled=True) as watch:
            yield from self._read(seen, watch, first=first, total=total)

    def _read(self, seen: Position, watch: Watch, *, first: int, total: int) -> Iterator[Any]:
        """Yield the batches that are left, telling `watch` of every task that is done."""
        survey, client = self._survey(watch), active_client()
        ahead = self.fit(survey)
        size = self.epochs.batch_size
        order = self.order(seen.epoch)[first * size :]
        cut = [order[begin * size : stop * size] for begin, stop in _cut_groups(total - first, ahead.batches)]
        threads, inside, stopped = count_threads(active_client()), is_in_task(), threading.Event()
        watch.begin(*self._amount(cut, threads))
        groups = iter(cut)
        due, left = time.monotonic(), total - first
        with ExitStack() as stack:
            pool = None
            if survey.in_process and active_client() is None:
                # One for all groups: Dask would start threads for each of ours, and keep them when those have ended.
                pool = ThreadPoolExecutor(min(threads, ahead.at_once), "batches-task")
            runner = _Runner(stack, stopped, 0 if inside else ahead.groups, pool)

            def read_group(places: NDArray[np.int64]) -> tuple[Group, list[Receipt]]:
                _check_running(client)
                given = {"at_once": ahead.at_once, "pool": pool, "watch": watch}
                return self._read_group(places, survey, stopped, threads, **given)

            waiting = deque(runner.submit(read_group, places) for places in islice(groups, max(1, ahead.groups)))
            while waiting:
                group, receipts = _result_of(waiting.popleft(), client)
                for receipt in receipts:
                    watch.task_done(receipt)
                if ahead.groups:
                    waiting.extend(runner.submit(read_group, places) for places in islice(groups, 1))
                left -= len(next(iter(group.values())))
                # The last look comes after the last read, and before the last batches are given away.
                if not left or time.monotonic() >= due:
                    begin = time.monotonic()
                    for member in self.members.values():
                        member.fingerprint.check()
                    due = time.monotonic() + _CHECK_SHARE * (time.monotonic() - begin)
                while next(iter(group.values())):
                    seen.batch += 1
                    # Nothing here may keep a batch that was handed out.
                    yield {name: each.pop() for name, each in group.items()} if self.named else group[""].pop()
                if not ahead.groups:
                    waiting.extend(runner.submit(read_group, places) for places in islice(groups, 1))

    def _amount(self, groups: list[NDArray[np.int64]], threads: int) -> tuple[int, int, int]:
        """Count the tasks, the windows and the bytes of a pass."""
        windows = sum(map(len, groups))
        tasks = nbytes = 0
        for member in self.members.values():
            nbytes += windows * member.plan.window_nbytes
            for group in groups:
                tasks += -(-len(group) // _cut_windows(len(group), member.work.result.nbytes, threads))
        return tasks, windows * len(self.members), nbytes

    def _survey(self, watch: Watch) -> Survey:
        """Ask the workers what they see; each `apply` can travel to them where it has to."""
        sources = [member.fingerprint.sample() for member in self.members.values()]
        survey = survey_workers(sources, say=watch.say, reach=True)
        if active_client() is not None or not survey.in_process:
            for member in self.members.values():
                check_apply_travels(member.work, in_process=survey.in_process)
        return survey

    def _read_group(
        self, places: NDArray[np.int64], survey: Survey, stopped: threading.Event, threads: int, **running: Any
    ) -> tuple[Group, list[Receipt]]:
        """Read the windows of several batches, sorted by start, and take them apart."""
        size = self.epochs.batch_size
        receipts: list[Receipt] = []
        group: Group = {}
        for name, member in self.members.items():
            if stopped.is_set():
                raise stopped_error()
            result = member.work.result
            starts = member.plan.starts[places]
            windows = _cut_windows(len(places), result.nbytes, threads)
            ascending = np.argsort(starts, kind="stable")
            parts = [ascending[begin : begin + windows] for begin in range(0, len(places), windows)]
            tasks = [Task(number, starts[part], part, places[part]) for number, part in enumerate(parts)]
            destination = new_array((len(places), *result.shape), result.dtype, survey, step=windows)
            try:
                given: dict[str, Any] = {"span": ("pipeline", "batches"), "stopped": stopped} | running
                receipts.extend(fill_array(destination, member.work, tasks, survey, **given))
            except BaseException:
                destination.abandon()
                raise
            destination.close()
            array = destination.array
            if len(array) <= size:
                group[name] = [array]
            else:
                # Copies: one that is kept must not keep all others of its group.
                group[name] = [array[begin : begin + size].copy() for begin in range(0, len(array), size)][::-1]
        return group, receipts


class _Runner:
    """Calls functions in threads of its own, in the caller's context, or when their result is asked for.

    When its stack ends, calls that have not begun never do, and the others end soon: what they fill is nobody's yet,
    and a function that does not return is not waited for.
    """

    def __init__(
        self, stack: ExitStack, stopped: threading.Event, threads: int, pool: ThreadPoolExecutor | None
    ) -> None:
        self._pool = pool
        self._home = os.getpid()
        self._context = contextvars.copy_context()
        self._executor = ThreadPoolExecutor(threads, "batches") if threads else None
        self._futures: deque[Future[Any]] = deque(maxlen=2 * _GROUPS)
        stack.callback(self._close, stopped)

    def submit[T, A](self, function: Callable[[A], T], argument: A) -> Future[T] | _Later[T, A]:
        if self._executor is None:
            return _Later(function, argument)
        # Each has the client that is active where the batches are taken; a context is entered by one at a time.
        future = self._executor.submit(self._context.copy().run, function, argument)
        self._futures.append(future)
        return future

    def _close(self, stopped: threading.Event) -> None:
        if self._home != os.getpid():
            # Forked: its threads are the parent's.
            return
        stopped.set()
        executors = [each for each in (self._executor, self._pool) if each is not None]
        for executor in executors:
            executor.shutdown(wait=False, cancel_futures=True)
        # Those that were cancelled nobody runs, and nobody calls done.
        _, undone = wait([each for each in self._futures if not each.cancelled()], timeout=_CLOSE_SECONDS)
        for executor in executors:
            executor.shutdown(wait=not undone)


@dataclass(frozen=True, slots=True)
class _Later[T, A]:
    """A call that is made when its result is asked for."""

    function: Callable[[A], T]
    argument: A

    def result(self) -> T:
        return self.function(self.argument)


def _result_of(future: Any, client: Any) -> tuple[Group, list[Receipt]]:
    """Return what a call gave; where its client was closed meanwhile that is what is wrong."""
    try:
        group, receipts = future.result()
    except Exception as error:
        if client is not None and client.status != "running":
            raise closed_error(client) from error
        raise
    return group, receipts


def _check_running(client: Any) -> None:
    """Raise IncompleteError where a client was closed: it is the active one no more, and tasks would run elsewhere."""
    if client is not None and client.status != "running":
        raise closed_error(client)


def _cut_groups(batches: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut batches into groups [begin, stop): the first is one, so that it comes at once, each other twice as many."""
    begin, together = 0, 1
    while begin < batches:
        stop = min(begin + together, batches)
        yield begin, stop
        begin, together = stop, min(2 * together, most)


def _cut_windows(count: int, nbytes: int, threads: int) -> int:
    """Windows of a task, of so many in a group."""
    even = -(-count // (_TASKS_PER_THREAD * threads))
    return min(max(even, _LEAST_TASK_NBYTES // nbytes, 1), max(1, BLOCK_NBYTES // nbytes))
