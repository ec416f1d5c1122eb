"""Tasks into batches: groups of them are read ahead, each as `gather` reads, and handed out one by one, in order."""

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
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from pipeline.capacity import active_client, closed_error, count_threads, fit_memory, is_in_task
from pipeline.cluster import check_client
from pipeline.epochs import Epochs
from pipeline.errors import BudgetError, InputError
from pipeline.failures import stopped_error
from pipeline.groupplan import GroupPlan, by_member, check_plan
from pipeline.intervals import check_whole
from pipeline.journal import Request, digest_array
from pipeline.placing import fill_array, new_array
from pipeline.plan import BLOCK_NBYTES, Task
from pipeline.report import watched
from pipeline.sights import matrix_sights
from pipeline.sizes import MIB, count_of
from pipeline.stamps import stamp_matrix
from pipeline.tasks import Apply, Work, check_apply_travels, prepare_work
from pipeline.workers import survey_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from types import TracebackType

    from numpy.typing import NDArray

    from pipeline.plan import Plan
    from pipeline.report import Watch
    from pipeline.stamps import Stamp
    from pipeline.tasks import Receipt
    from pipeline.workers import Survey

_GROUP_NBYTES = 64 * MIB
"""Bytes of the batches that are read together, unless one alone holds more."""
_GROUPS = 4
"""Groups under way beside the one that is handed out: some end while the others' tasks fill the threads. Measured on
two threads, warm, 64 MiB a batch: 0.75 of the rate of `gather` with 2, 0.78 with 3, 0.81 with 4."""
_LEAST_TASK_NBYTES = MIB
_TASKS_PER_THREAD = 1
"""Of a group: there are several under way."""
_CHECK_SHARE = 50
"""Seconds of reading for each second that looking at the matrix's files took, before the next look."""
_CLOSE_SECONDS = 2
"""How long what is being read may take to end when a pass is left."""
_VERSION = 1

type Group = dict[str, list[NDArray[Any]]]
"""Batches that were read together, the last one first, of each array by its name."""


class Batches[Batch]:
    """Batches of windows, epoch after epoch: an iterator and a context manager. Made by `iter_batches`.

    Each `iter()` begins the epoch that `set_epoch` has set, the same one again where it was not called since, and ends
    the pass before it; only after `load_state_dict` it begins at the batch after the one that was seen. `next()` goes
    on in the pass under way, or begins one. `len` is the number of batches of an epoch, the same on every rank.
    """

    def __init__(self, reading: _Reading, *, epoch: int) -> None:
        self._reading = reading
        self._next = self._seen = _Place(check_whole("epoch", epoch, least=0))
        self._under_way: _Pass | None = None

    def __len__(self) -> int:
        return len(self._reading.epochs)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._seen, self._next = _Place(self._next.epoch, self._next.batch), _Place(self._next.epoch)
        self._under_way = _Pass(self._reading.read(self._seen))
        return self._under_way

    def __next__(self) -> Batch:
        if self._under_way is None:
            iter(self)
        assert self._under_way is not None
        batch: Batch = next(self._under_way)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def epoch(self) -> int:
        """Epoch that the next `iter()` begins, or goes on with."""
        return self._next.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next `iter()` begins.

        The one that `load_state_dict` has set goes on where it was.
        """
        if check_whole("epoch", epoch, least=0) != self._next.epoch:
            self._next = _Place(int(epoch))
            # Of a pass under way `state_dict` goes on to tell.
            if self._under_way is None or self._seen.batch == len(self):
                self._seen = self._next

    def state_dict(self) -> dict[str, Any]:
        """Tell how far the run is: plain values for JSON. Any rank's state holds for all."""
        facts = self._reading.facts()
        return {"version": _VERSION, "epoch": self._seen.epoch, "batch": self._seen.batch, "request": facts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, at the next `iter()`, with the batch after the last one that `state_dict` knew of.

        After the last batch of an epoch that pass is empty.

        Raises
        ------
        InputError
            If the state is none of `state_dict`, or that of another request: other starts or columns, a matrix of
            another shape or dtype, another batch size, seed or number of ranks. `apply` is not compared.
        """
        try:
            version, epoch, batch, facts = (state[key] for key in ("version", "epoch", "batch", "request"))
        except (TypeError, KeyError):
            raise InputError(f"a state is what state_dict gave; got {str(state)[:200]}; load that") from None
        differing = Request(self._reading.facts()).differences(facts)
        if version != _VERSION or differing:
            words = ", ".join(differing) if version == _VERSION else f"version {version!r}"
            raise InputError(f"a state is of the same request; this one differs in: {words}; begin without it")
        batch = check_whole("batch of a state", batch, least=0)
        if batch > len(self):
            raise InputError(f"a state is of the same request; batch {batch} of {len(self)}; begin without it")
        self.close()
        self._next = _Place(check_whole("epoch of a state", epoch, least=0), batch)
        self._seen = self._next

    def close(self) -> None:
        """End the pass under way: what is being read is stopped, and its memory let go of."""
        if self._under_way is not None:
            self._under_way.close()
        self._under_way = None

    def __repr__(self) -> str:
        each = count_of(self._reading.epochs.batch_size, "window")
        return f"Batches({len(self):,} of {each}, epoch {self._seen.epoch}, {self._seen.batch:,} handed out)"


@overload
def iter_batches(
    plan: Plan,
    batch_size: int,
    *,
    apply: Apply | None = ...,
    shuffle: bool = ...,
    seed: int = ...,
    epoch: int = ...,
    drop_last: bool = ...,
    rank: int = ...,
    world_size: int = ...,
    prefetch: int | None = ...,
) -> Batches[NDArray[Any]]: ...
@overload
def iter_batches(
    plan: GroupPlan,
    batch_size: int,
    *,
    apply: Mapping[str, Apply] | None = ...,
    shuffle: bool = ...,
    seed: int = ...,
    epoch: int = ...,
    drop_last: bool = ...,
    rank: int = ...,
    world_size: int = ...,
    prefetch: int | None = ...,
) -> Batches[dict[str, NDArray[Any]]]: ...
def iter_batches(
    plan: Plan | GroupPlan,
    batch_size: int,
    *,
    apply: Apply | Mapping[str, Apply] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    prefetch: int | None = None,
) -> Batches[Any]:
    """Read windows in batches, ahead of who takes them, as for a training.

    Tasks run as those of `gather`. Batches that are read ahead are read together, sorted by start, so that reads stay
    local while the order stays as random as it is; where chunks must be decoded whole and an epoch is shuffled, most
    are decoded once for each such group: `ChunkBatchSampler` does better there. The order is the same on any cluster.

    Parameters
    ----------
    plan
        As `plan_windows` gives it.
    batch_size
        Windows of a batch, of each rank; the last one of an epoch may have fewer.
    apply
        Function of one block (k, length, *row_shape) -> (k, ...), as `gather` takes it; it runs on the workers. Of a
        `GroupPlan` a mapping of names to such functions.
    shuffle
        Whether epochs are permuted. Epoch 0 is in request order, whose starts are random as `draw_starts` gives them;
        epoch e > 0 is a permutation that follows from (seed, e). Begin with `epoch=1` where the starts are in order,
        as those of a grid.
    seed
        Of the permutations: 0 or more.
    epoch
        The first one; `set_epoch` chooses another.
    drop_last
        Whether windows are left out that fill no whole batch on every rank. Otherwise the epoch's order is padded from
        its own beginning until every rank has as many, as torch's `DistributedSampler` does.
    rank, world_size
        Of a distributed training: rank r takes every `world_size`-th window of the epoch's order, beginning with the
        r-th, so that every rank has the same number of batches.
    prefetch
        Batches that are read ahead; 0: each is read when it is asked for. Default: as many as 64 MiB hold, four times,
        at least one, or fewer where memory is short.

    Returns
    -------
    Batches
        Each batch (batch_size, length, *row_shape), or (batch_size, ...) as `apply` made it: C-contiguous, writable
        memory of its own, the caller's; it is kept as long as the caller keeps it, and nothing else with it. Of a
        `GroupPlan`, a dict of them.

    Raises
    ------
    InputError
        If an argument cannot be used.
    BudgetError
        If what is read ahead does not fit the memory budget.
    IntegrityError
        At the batch concerned or before: if a chunk is absent, short or corrupt, or `apply` breaks its contract. If
        the matrix changes under a pass: before its last batches; those given until then may hold changed rows.

    Notes
    -----
    One pass at a time: a second `iter()` ends the first. Whoever leaves a pass early calls `close`, or has it in a
    `with` statement.

    Examples
    --------
    >>> import numpy, pipeline
    >>> folder = getfixture("tmp_path")
    >>> numpy.save(folder / "A.npy", numpy.arange(600.0).reshape(300, 2))
    >>> plan = pipeline.plan_windows(pipeline.open_matrix(folder / "A.npy"), [200, 7, 20, 9, 11], length=16)
    >>> with pipeline.iter_batches(plan, 2, shuffle=True, seed=1) as batches:
    ...     for epoch in range(2):
    ...         batches.set_epoch(epoch)
    ...         print([batch[:, 0, 0].tolist() for batch in batches])
    [[400.0, 14.0], [40.0, 18.0], [22.0]]
    [[14.0, 22.0], [400.0, 18.0], [40.0]]
    """
    check_plan(plan)
    if not isinstance(shuffle, bool | np.bool_) or not isinstance(drop_last, bool | np.bool_):
        raise InputError(f"shuffle and drop_last are True or False; got {shuffle!r} and {drop_last!r}; choose")
    epochs = Epochs(
        count=len(plan), batch_size=batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size
    )
    if prefetch is not None:
        check_whole("prefetch", prefetch, least=0)
    check_whole("epoch", epoch, least=0)
    plans = plan.members if isinstance(plan, GroupPlan) else {"": plan}
    applies: dict[str, Any] = by_member(apply, plans, "apply") if isinstance(plan, GroupPlan) else {"": apply}
    members = {}
    for name, each in plans.items():
        stamp = stamp_matrix(each.matrix, each.sorted_starts, each.length)
        members[name] = _Member(each, prepare_work(each, applies[name]), stamp)
    reading = _Reading(members, epochs, shuffle, prefetch, isinstance(plan, GroupPlan))
    reading.fit(None)
    return Batches(reading, epoch=epoch)


class _Pass:
    """One pass: batches for one thread at a time of the process that began it; a failure is raised again."""

    def __init__(self, batches: Generator[Any, None, None]) -> None:
        self._batches = batches
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._home = os.getpid()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._home != os.getpid():
            raise InputError("a pass is read where it was begun; this process was forked from there; begin one here")
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                return next(self._batches)
            except StopIteration:
                raise
            except Exception as error:
                self._failure = error
                raise

    def close(self) -> None:
        """End it, once a thread that waits for a batch has it; nothing is done to that of a parent process."""
        if self._home == os.getpid():
            with self._lock:
                self._batches.close()


@dataclass(slots=True)
class _Place:
    """Where a run is; told while a pass goes on."""

    epoch: int
    batch: int = 0
    """Batches of the epoch that were handed out."""


@dataclass(frozen=True, slots=True)
class _Member:
    """One array of the batches."""

    plan: Plan
    work: Work
    stamp: Stamp
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
class _Reading:
    """What all passes share."""

    members: dict[str, _Member]
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
        shuffled = self.shuffle and epoch > 0
        order = epochs.permuted(epoch) if shuffled else np.arange(epochs.count)
        return epochs.even(order)[epochs.rank :: epochs.world_size]

    def fit(self, survey: Survey | None) -> _Ahead:
        """Choose how far to read ahead; BudgetError where that does not fit."""
        if (client := active_client()) is not None:
            check_client(client)
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

    def _task_nbytes(self, member: _Member, windows: int, survey: Survey | None) -> int:
        """Memory of one task on this machine, beside the batches themselves."""
        plan, work = member.plan, member.work
        elsewhere = survey is not None and not survey.in_process
        if survey is not None and not survey.same_host:
            return windows * work.result.nbytes
        windows = _cut_windows(windows, work.result.nbytes, count_threads(active_client()))
        block = windows * work.result.nbytes
        each = plan.reading_nbytes + 2 * block * elsewhere
        return each if work.apply is None else each + windows * plan.window_nbytes + block

    def read(self, seen: _Place) -> Generator[Any, None, None]:
        """Yield the batches of a pass, counting them in `seen`."""
        first, total = seen.batch, len(self.epochs)
        if first == total:
            return
        with watched("iter_batches", pulled=True) as watch:
            yield from self._read(seen, watch, first=first, total=total)

    def _read(self, seen: _Place, watch: Watch, *, first: int, total: int) -> Iterator[Any]:
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
                given = {"at_once": ahead.at_once, "pool": pool, "retried": watch.task_retried}
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
                        member.stamp.check()
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
        sights = [sight for member in self.members.values() for sight in matrix_sights(member.plan.matrix)]
        survey = survey_workers(sights, say=watch.say, reach=True)
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
