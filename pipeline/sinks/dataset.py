"""Windows by their place, read in the process that asks for them: what loaders of machine learning take as it is."""

from __future__ import annotations

import math
import operator
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from itertools import batched
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from pipeline.arguments import check_numbers, is_whole, show
from pipeline.errors import InputError
from pipeline.formatting import MIB, count_of
from pipeline.matrix.fingerprint import fingerprint_matrix
from pipeline.matrix.keys import Keys
from pipeline.memory import parse_size
from pipeline.plan.group import GroupPlan, by_member, check_plan
from pipeline.readers.decoded import ArrayReader, ChunkReader, SortedWindows
from pipeline.runtime.tasks import call_apply, cast_result, prepare_work

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pipeline.matrix.fingerprint import Fingerprint
    from pipeline.plan.plan import Plan
    from pipeline.runtime.tasks import Apply, Work

_KEPT_NBYTES = 128 * MIB
_TOGETHER_NBYTES = 2 * MIB
"""Decoded bytes of chunks that are read in one call."""


class WindowDataset:
    """Windows by their place in the request, map-style: for torch's `DataLoader`, or plain loops.

    `dataset[i]` is one window, an array (length, *row_shape); `dataset[[3, 1, 2]]` is a batch of them (k, ...), out of
    one read; `dataset.__getitems__([3, 1, 2])` the same as a list, which loaders ask for. Arrays are writable,
    in native byte order and the caller's own. Of a `GroupPlan`, dicts of them.

    It reads in the process that asks, without Dask, and without importing torch. It can be pickled, and read by
    processes that a loader forks or spawns; each looks first whether the files are what they were when this was made.
    What is elsewhere, in an object store, cannot be read in a forked process: spawn them. Threads may share it.

    Parameters
    ----------
    plan
        As `plan_windows` gives it.
    apply
        Function of one block (k, length, *row_shape) -> (k, ...), each window for itself; it runs where the windows
        are read. Of a `GroupPlan` a mapping of names to such functions.
    keep
        Memory for the chunks that were decoded last, in each process and for each array: bytes, or text such as
        "128MiB", the default; 0: none. Chunks that need not be decoded are not kept. `ChunkBatchSampler` asks for
        windows in an order for which it pays.

    Raises
    ------
    InputError
        If an argument cannot be used, or, when it is read, in a forked process, see above.
    IntegrityError
        If a chunk is absent, short or corrupt, the matrix has changed, or `apply` breaks its contract.

    Examples
    --------
    >>> import numpy, pipeline
    >>> folder = getfixture("tmp_path")
    >>> numpy.save(folder / "A.npy", numpy.arange(600.0).reshape(300, 2))
    >>> plan = pipeline.plan_windows(pipeline.open_matrix(folder / "A.npy"), [200, 7, 20], length=16)
    >>> dataset = pipeline.WindowDataset(plan)
    >>> len(dataset), dataset[0].shape, dataset[[2, 0]][:, 0, 0]
    (3, (16, 2), array([ 40., 400.]))

    With torch, a whole batch is one read in a worker, and one tensor:

    >>> loader = DataLoader(  # doctest: +SKIP
    ...     dataset, batch_size=None, sampler=pipeline.ChunkBatchSampler(plan, 256), num_workers=2
    ... )
    """

    def __init__(
        self,
        plan: Plan | GroupPlan,
        *,
        apply: Apply | Mapping[str, Apply] | None = None,
        keep: int | str | None = None,
    ) -> None:
        check_plan(plan)
        self._named = isinstance(plan, GroupPlan)
        kept = _KEPT_NBYTES if keep is None else 0 if is_whole(keep) and keep == 0 else parse_size(keep)
        plans = plan.members if isinstance(plan, GroupPlan) else {"": plan}
        applies: dict[str, Any] = by_member(apply, plans, "apply") if isinstance(plan, GroupPlan) else {"": apply}
        self._members = {name: _Member.of(each, applies[name], kept) for name, each in plans.items()}
        self._count = len(plan)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"WindowDataset({count_of(self._count, 'window')})"

    def __getitem__(self, place: SupportsIndex | slice | Sequence[int] | NDArray[np.int64]) -> Any:
        """Read the window at a place, negative ones from the end; or a batch of several.

        Raises
        ------
        IndexError
            If there is no such place.
        """
        number = _as_number(place)
        if number is not None:
            batch = self._read([number])
            return {name: each[0] for name, each in batch.items()} if self._named else batch[""][0]
        several: Any = place
        if isinstance(place, slice):
            try:
                several = range(*place.indices(self._count))
            except (TypeError, ValueError) as error:
                raise InputError(f"places are a slice of whole numbers; got {show(place)}: {error}") from error
        batch = self._read(several)
        return batch if self._named else batch[""]

    def __getitems__(self, places: Sequence[int]) -> list[Any]:
        """Read windows in one go, each once for every time that it is named: views of one array."""
        batch = self._read(places)
        if not self._named:
            return list(batch[""])
        return [dict(zip(batch, each, strict=True)) for each in zip(*batch.values(), strict=True)]

    def _read(self, places: Sequence[int] | NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Read windows of each array, (k, ...)."""
        found = check_numbers("places", places, "whole numbers")
        if found.ndim != 1:
            raise InputError(f"places are a whole number, or a list of them; got {show(places)}; correct it")
        if not found.size:
            found = found.astype(np.int64)
        outside = found[(found < -self._count) | (found >= self._count)]
        if len(outside):
            raise IndexError(f"a place is at least 0 and less than {self._count:,}; got {outside[0]}")
        found = found.astype(np.int64)
        found[found < 0] += self._count
        return {name: member.read(found) for name, member in self._members.items()}


@dataclass(slots=True, eq=False)
class _Member:
    """One array of a data set, and what this process knows of it."""

    starts: NDArray[np.int64]
    """(n,) in request order."""
    shape: tuple[int, ...]
    """Of the matrix."""
    dtype: np.dtype[Any]
    """Of the matrix."""
    work: Work
    fingerprint: Fingerprint
    """What the matrix was when the data set was made."""
    forks: bool
    """Whether a forked process may read it, too."""
    chunk_rows: int
    """0: no chunk is kept."""
    most_nbytes: int
    """Of chunks that are kept."""
    home: int = field(default_factory=os.getpid)
    """Process that it was made in, or for."""
    looked: int | None = None
    """Process that has looked whether the matrix is what it was."""
    kept: OrderedDict[int, NDArray[Any]] = field(default_factory=OrderedDict)
    """Rows of decoded chunks by number, those used last at the end."""
    lock: Any = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, plan: Plan, apply: Apply | None, most_nbytes: int) -> _Member:
        """Check what is to be read."""
        layout = plan.matrix.layout
        fingerprint = fingerprint_matrix(plan.matrix, plan.sorted_starts, plan.length)
        chunk_rows = layout.chunk_rows if layout.reader == "decoded" and most_nbytes else 0
        forks = not isinstance(layout.files, Keys) or _is_in_memory(layout.files)
        work = prepare_work(plan, apply)
        return cls(plan.starts, plan.matrix.shape, plan.matrix.dtype, work, fingerprint, forks, chunk_rows, most_nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        facts = (self.starts, self.shape, self.dtype, self.work, self.fingerprint)
        return _Member, (*facts, self.forks, self.chunk_rows, self.most_nbytes)

    def read(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """Read windows (k, ...)."""
        self._look()
        work, starts = self.work, self.starts[places]
        block = np.empty((len(places), *work.window_shape), work.dtype)
        if not len(places):
            return np.empty((0, *work.result.shape), work.result.dtype)
        if self.chunk_rows:
            with self.lock:
                self._copy_chunks(starts, block)
        else:
            work.reader.read_windows(starts, work.length, block, np.arange(len(places)))
        if work.apply is None:
            return block
        start, place = int(starts[0]), int(places[0])
        made = cast_result(call_apply(work.apply, block, start, place), work.result, start, place)
        # What is a view of the block can be read alone.
        return made if made.flags.writeable and made.flags.c_contiguous else made.copy()

    def _look(self) -> None:
        """Look once, in each process, whether the matrix is what it was."""
        process = os.getpid()
        if self.looked == process:
            return
        if process != self.home:
            if not self.forks:
                raise InputError(
                    "a forked process cannot use its parent's connections to a store; this one was forked; give the "
                    "loader multiprocessing_context='spawn'"
                )
            # Its parent may have held it in another thread.
            self.lock, self.home = threading.Lock(), process
        self.fingerprint.check()
        self.looked = process

    def _copy_chunks(self, starts: NDArray[np.int64], block: NDArray[Any]) -> None:
        """Copy windows out of chunks, which are kept."""
        # Of rows that no window has, columns may hold what a cast would refuse: it comes last.
        assert isinstance(self.work.reader, ChunkReader | ArrayReader)
        selection = self.work.reader.selection
        windows = SortedWindows(starts, self.work.length, block, np.arange(len(starts)), selection)
        touched = windows.touched(self.chunk_rows)
        first = touched * self.chunk_rows
        bounds = windows.bounds(first, np.minimum(first + self.chunk_rows, self.shape[0]))
        bound_of = dict(zip(touched.tolist(), bounds, strict=True))
        for number in [number for number in bound_of if number in self.kept]:
            self.kept.move_to_end(number)
            windows.copy(self.kept[number], number * self.chunk_rows, bound_of.pop(number))
        for number, rows in self._decode(list(bound_of)):
            windows.copy(rows, number * self.chunk_rows, bound_of[number])
            self.kept[number] = rows
            while self.kept and len(self.kept) * self._chunk_nbytes > self.most_nbytes:
                self.kept.popitem(last=False)

    @property
    def _chunk_nbytes(self) -> int:
        return max(1, math.prod((self.chunk_rows, *self.shape[1:])) * self.dtype.itemsize)

    def _decode(self, numbers: list[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Read whole chunks: their numbers, and the rows that the matrix has of them, in memory of their own."""
        assert isinstance(self.work.reader, ChunkReader | ArrayReader)
        reader, whole = replace(self.work.reader, selection=None), self.shape[0] // self.chunk_rows
        together = max(1, _TOGETHER_NBYTES // self._chunk_nbytes)
        # The last one may have fewer rows.
        last = [(number,) for number in numbers if number >= whole]
        for part in [*batched([number for number in numbers if number < whole], together), *last]:
            length = min(self.chunk_rows, self.shape[0] - part[0] * self.chunk_rows)
            chunks = np.empty((len(part), length, *self.shape[1:]), self.dtype)
            reader.read_windows(np.array(part) * self.chunk_rows, length, chunks, np.arange(len(part)))
            for number, rows in zip(part, chunks, strict=True):
                yield number, rows if len(part) == 1 else rows.copy()


def _as_number(place: Any) -> int | None:
    """Return a whole number of any kind, a scalar of torch among them, as an int; None where it is none."""
    if isinstance(place, bool | np.bool_):
        raise InputError(f"a place is a whole number, or a list of them; got {place}; give places")
    if getattr(place, "ndim", 0):
        return None
    try:
        return operator.index(place)
    except Exception:  # noqa: BLE001 (what is no number raises what it likes)
        return None


def _is_in_memory(files: Keys) -> bool:
    from zarr.storage import MemoryStore

    return isinstance(files.array.store, MemoryStore)
