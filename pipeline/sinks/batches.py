"""Tasks into batches: for epoch after epoch of a training, in order, on each rank, from where it was left."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, NoReturn, Self, overload

from pipeline.arguments import check_flag, check_mapping, check_whole, is_whole, show
from pipeline.errors import IncompleteError, InputError
from pipeline.formatting import count_of
from pipeline.matrix.fingerprint import fingerprint_matrix
from pipeline.outputs.journal import Request
from pipeline.plan.group import GroupPlan, by_member, check_plan
from pipeline.process import close_at_exit, is_ending
from pipeline.runtime.tasks import Apply, prepare_work
from pipeline.sinks.epochs import Epochs
from pipeline.sinks.prefetch import Member, Position, Reading

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from types import TracebackType

    from numpy.typing import NDArray

    from pipeline.plan.plan import Plan

_VERSION = 2
"""Of states. Those of version 1 shuffled no epoch 0: nobody can go on with them."""


class Batches[Batch]:
    """Batches of windows, epoch after epoch: an iterator and a context manager. Made by `iter_batches`.

    Each `iter()` begins the epoch that `set_epoch` has set, the same one again where it was not called since, and ends
    the pass before it; only after `load_state_dict` it begins at the batch after the one that was seen. `next()` goes
    on in the pass under way, or begins one. `len` is the number of batches of an epoch, the same on every rank.
    """

    def __init__(self, reading: Reading, *, epoch: int) -> None:
        self._reading = reading
        self._next = self._seen = Position(check_whole("epoch", epoch, least=0))
        self._under_way: _Pass | None = None

    def __len__(self) -> int:
        return len(self._reading.epochs)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._seen, self._next = Position(self._next.epoch, self._next.batch), Position(self._next.epoch)
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
            self._next = Position(int(epoch))
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
            If the state is none of `state_dict`, of a release that ordered windows otherwise, or that of another
            request: other starts or columns, a matrix of another shape or dtype, another batch size, seed or number of
            ranks. `apply` is not compared.
        """
        try:
            version, epoch, batch, facts = (
                check_mapping("state", state)[key] for key in ("version", "epoch", "batch", "request")
            )
        except KeyError:
            raise InputError(f"a state is what state_dict gave; got {show(state)}; load that") from None
        if not is_whole(version) or version != _VERSION:
            raise InputError(
                f"the state has version {show(version)}, this release reads {_VERSION}, whose order of windows may "
                "differ; begin without it"
            )
        if differing := Request(self._reading.facts()).differences(facts):
            raise InputError(
                f"a state is of the same request; this one differs in: {', '.join(differing)}; begin without it"
            )
        batch = check_whole("batch of a state", batch, least=0)
        if batch > len(self):
            raise InputError(f"a state is of the same request; batch {show(batch)} of {len(self)}; begin without it")
        self.close()
        self._next = Position(check_whole("epoch of a state", epoch, least=0), batch)
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
        Whether epochs are permuted: each, the first too, by a permutation that follows from (seed, epoch). Otherwise
        every epoch is in request order.
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
    [[22.0, 400.0], [14.0, 40.0], [18.0]]
    [[14.0, 22.0], [400.0, 18.0], [40.0]]
    """
    check_plan(plan)
    check_flag("shuffle", shuffle)
    epochs = Epochs(
        count=len(plan), batch_size=batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size
    )
    if prefetch is not None:
        prefetch = check_whole("prefetch", prefetch, least=0)
    epoch = check_whole("epoch", epoch, least=0)
    plans = plan.members if isinstance(plan, GroupPlan) else {"": plan}
    applies: dict[str, Any] = by_member(apply, plans, "apply") if isinstance(plan, GroupPlan) else {"": apply}
    members = {}
    for name, each in plans.items():
        fingerprint = fingerprint_matrix(each.matrix, each.sorted_starts, each.length)
        members[name] = Member(each, prepare_work(each, applies[name]), fingerprint)
    reading = Reading(members, epochs, shuffle, prefetch, isinstance(plan, GroupPlan))
    reading.fit(None)
    return Batches(reading, epoch=epoch)


class _Pass:
    """One pass: batches for one thread at a time of the process that began it; a failure is raised again."""

    def __init__(self, batches: Generator[Any, None, None]) -> None:
        self._batches = batches
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._home = os.getpid()
        close_at_exit(batches)

    def __reduce__(self) -> NoReturn:
        raise InputError(
            "a pass under way cannot be sent to another process; send the plan, or the batches before they are iterated"
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._home != os.getpid():
            raise InputError("a pass is read where it was begun; this process was forked from there; begin one here")
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if is_ending():
                # Not as if it had no more batches.
                raise IncompleteError(
                    "the main thread has ended, and every pass with it; let it wait for the thread that reads, by join"
                )
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
