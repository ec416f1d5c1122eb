"""The plan: every window of a request, and what reading them will cost. Pure NumPy; no data are read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pipeline.arguments import check_choice
from pipeline.errors import BudgetError
from pipeline.formatting import MIB, count_of, format_size, html_table, text_table
from pipeline.matrix.keys import Keys
from pipeline.matrix.rows import count_touched
from pipeline.memory import budget, held_nbytes, parse_size
from pipeline.plan.columns import Part, Selection, select
from pipeline.plan.cost import writing_nbytes
from pipeline.plan.starts import check_starts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from pipeline.matrix.matrix import Matrix

Order = Literal["chunk", "request"]

BLOCK_NBYTES = 64 * MIB
"""A task's windows hold at most as many bytes, unless one window alone holds more."""
PLACED_NBYTES = 128 * MIB
"""The same where a task puts each window straight into its place, and holds none: Dask takes its time for each task."""
_LEAST_BLOCK_NBYTES = 4 * MIB
_FEWEST_TASKS = 16
"""As many tasks or more, where blocks do not become too small: what 2 to 8 threads share evenly. A task costs Dask a
millisecond or two, which is what reading a block of the least size takes."""
_TASKS_PER_THREAD = 2
GAP_NBYTES = 8 * 1024
"""Bytes between two windows that are read with them: less work than a call of its own."""
JOINED_NBYTES = 128 * 1024
"""Bytes between two ranges of one key that are read with them: what a store sends in the time of one more request.

Of 0 to 1 MiB the one that is never far from the best, for 1 to 30 ms a request, 100 to 500 MB/s, 10 or 40 at once.
"""
REQUEST_NBYTES = 2 * MIB
"""Bytes of one request at most: a task that reads long ranges has many in flight, and each takes longer than it waits.

Measured with 1 to 30 ms a request and 100 to 500 MB/s: 512 KiB costs up to 1.8 times as much, 16 MiB up to 3.2 times.
"""
SLAB_NBYTES = 2 * MIB
"""Bytes of spans that are read from local files before their windows are copied: they should stay in the cache."""
IN_FLIGHT_NBYTES = 32 * MIB
"""Bytes of the requests to a store that a task has in flight."""
_GET_USD = 0.4e-6
"""Public price of a GET request to S3, in us-east-1."""
_PAGE_NBYTES = 4096
"""What a disk reads at least of each row of which a part is read."""
_PIECE_NBYTES = 256
"""Memory that a reader takes for its notes on each part of a window that lies in one chunk."""
_PLANNED_NBYTES = 32
"""Memory that planning takes for each window, beside its start; 24 of them stay."""
_STRETCH = 2**20
"""Windows whose cost is counted at once: bounds the memory of planning."""


@dataclass(frozen=True, slots=True)
class Task:
    """A run of windows that one worker serves in one go."""

    number: int
    starts: NDArray[np.int64]
    """(k,) matrix rows."""
    places: NDArray[np.int64]
    """(k,) each window's position in the request, or in what is filled."""
    asked: NDArray[np.int64] | None = None
    """(k,) positions in the request, where `places` are others."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What reading every window costs in one order."""

    order: Order
    tasks: int
    chunks: int
    """Chunks read, counted again where several tasks touch one."""
    nbytes_read: int
    """Bytes read: of storage where rows are read as they lie, gaps that are read with them included, checksums between
    them left aside; decoded ones where chunks are decoded."""
    amplification: float
    """Bytes read divided by bytes that were asked for, as they are delivered: less than 1 where windows overlap and
    each row is read once."""
    scratch_nbytes: int
    """Bytes of spans of rows that a task holds while it copies its windows; 0: windows are read alone."""
    requests: int
    """What a store is asked for, about: ranges of rows, and a shard's index once a task; chunks where they are decoded.
    0 where the files are local."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Plan:
    """Every window of a request, and what reading them will cost. Frozen; made by `plan_windows`."""

    matrix: Matrix
    starts: NDArray[np.int64]
    """(n,) in request order, read-only."""
    length: int
    """Rows of a window."""
    memory: int | None
    """Limit in bytes that the user set; None where the machine's own limits hold alone."""
    task_windows: int
    """Windows of each task; the last one may have fewer."""
    sorted_starts: NDArray[np.int64]
    """(n,) ascending, read-only: order `chunk`."""
    sorted_places: NDArray[np.int64]
    """(n,) place of each of `sorted_starts`; equal starts keep the order of the request."""
    chunk: Cost
    """Cost of order `chunk`."""
    request: Cost
    """Cost of order `request`."""
    selection: Selection
    """What is delivered of each row, and as which dtype."""

    def __len__(self) -> int:
        return len(self.starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        mine, others = (
            (each.matrix.path, each.matrix.shape, each.length, each.memory, each.task_windows, each.selection)
            for each in (self, other)
        )
        return mine == others and np.array_equal(self.starts, other.starts)

    __hash__ = None  # type: ignore[assignment]

    @property
    def window_shape(self) -> tuple[int, ...]:
        """(length, *row_shape), of the columns that were chosen."""
        return (self.length, *self.selection.row_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the windows as delivered."""
        return self.selection.dtype

    @property
    def columns(self) -> slice | NDArray[np.int64] | None:
        """Of the first axis of a row, in the order of the request: a slice, or numbers; None: all of them."""
        return self.selection.columns

    @property
    def window_nbytes(self) -> int:
        """Bytes of one window as delivered."""
        return self.length * self.selection.row_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes that were asked for: of all windows."""
        return len(self) * self.window_nbytes

    @property
    def block_nbytes(self) -> int:
        """Bytes of one task's windows."""
        return min(self.task_windows, len(self)) * self.window_nbytes

    @property
    def reading_nbytes(self) -> int:
        """Memory that reading takes beside the windows themselves, a task: spans, ranges in flight, chunks decoded."""
        layout, length = self.matrix.layout, self.length
        part, left = self._reading()
        holds = left is not None and layout.reader == "ranged"
        most_nbytes = BLOCK_NBYTES if holds else PLACED_NBYTES
        most = cut_windows(len(self), _cut_nbytes(self.matrix, self.selection, length), most_nbytes=most_nbytes)
        pieces = most * (length if part is not None else 2 + length // layout.chunk_rows)
        bookkeeping = MIB + _PIECE_NBYTES * pieces + (IN_FLIGHT_NBYTES if isinstance(layout.files, Keys) else 0)
        if left is not None and layout.reader != "decoded":
            # Rows as they are read, those of them that are chosen, and their cast.
            stored_nbytes = length * (self.matrix.row_nbytes if part is None else part.nbytes)
            held = most * stored_nbytes if holds else max(SLAB_NBYTES, stored_nbytes)
            bookkeeping += held + 2 * held * max(stored_nbytes, self.window_nbytes) // stored_nbytes
        if layout.reader != "decoded":
            return bookkeeping + max(self.chunk.scratch_nbytes, self.request.scratch_nbytes)
        # A chunk is decoded whole, the part of it that lies beyond the matrix, too.
        rows = max(layout.chunk_rows, min(self.matrix.rows, layout.chunk_rows + length))
        touched = rows * self.matrix.row_nbytes
        # Encoded bytes, what the codecs make of them on the way, and the rows.
        wanted = min(self.task_windows, len(self)) * length * self.matrix.row_nbytes
        return bookkeeping + (4 if left is None else 6) * max(touched, min(READ_NBYTES, wanted))

    def _reading(self) -> tuple[Part | None, Selection | None]:
        """Which part of each row is read alone, and what is made of what was read."""
        part = find_part(self.matrix, self.selection)
        return part, self.selection.within(part)

    def fit_tasks(self, *, threads: int, placed: bool) -> int:
        """Windows of a task where no shard binds them.

        Parameters
        ----------
        threads
            Tasks that run at once: shorter tasks than planned where these are too few for so many.
        placed
            Whether tasks put each window straight into its place: longer ones, then, unless they hold large spans.
        """
        holds = self._reading()[1] is not None and self.matrix.layout.reader == "ranged"
        short = holds or self.chunk.scratch_nbytes >= BLOCK_NBYTES // 8
        most = PLACED_NBYTES if placed and not short else BLOCK_NBYTES
        nbytes = _cut_nbytes(self.matrix, self.selection, self.length)
        return cut_windows(len(self), nbytes, fewest=_TASKS_PER_THREAD * threads, most_nbytes=most)

    def cost(self, order: Order) -> Cost:
        """Cost of one order."""
        return self.chunk if check_choice("order", order, ("chunk", "request")) == "chunk" else self.request

    def count_tasks(self, windows: int) -> int:
        """How many tasks of so many windows `tasks` yields."""
        return -(-len(self) // windows)

    def tasks(self, order: Order, *, windows: int | None = None) -> Iterator[Task]:
        """Cut the plan: consecutive windows of the order, every window in exactly one task.

        Each task is a view of the plan's arrays, made when it is asked for.

        Parameters
        ----------
        windows
            Of each task. Default: as planned.
        """
        windows = windows or self.task_windows
        for number, first in enumerate(range(0, len(self), windows)):
            stop = min(first + windows, len(self))
            if order == "chunk":
                yield Task(number, self.sorted_starts[first:stop], self.sorted_places[first:stop])
            else:
                yield Task(number, self.starts[first:stop], np.arange(first, stop))

    def crossings(self) -> int:
        """How many windows cross the border of two parts of the matrix."""
        if self.matrix.parts is None:
            return 0
        part = np.searchsorted(self.matrix.parts[:, 1], self.starts, side="right")
        return int((self.starts + self.length > self.matrix.parts[part, 1]).sum())

    def facts(self) -> dict[str, str]:
        """What a person wants to know, as words."""
        facts = {
            "matrix": self.matrix.path,
            "windows": f"{len(self):,} of {self.length:,} rows, {format_size(self.window_nbytes)} each",
            "wanted": format_size(self.nbytes),
        }
        if self.columns is not None:
            how = "whole rows" if find_part(self.matrix, self.selection) is None else "them alone"
            facts["columns"] = f"{self.selection.say()}; reads {how}"
        if self.matrix.scaling:
            facts["scaling"] = self.matrix.scaling
        if self.selection.casts:
            facts["dtype"] = f"{self.dtype}, cast from {self.matrix.dtype}"
        verb = "decodes" if self.matrix.layout.reader == "decoded" else "reads"
        for sink, cost in (("gather (order chunk)", self.chunk), ("store (order request)", self.request)):
            facts[sink] = (
                f"{count_of(cost.tasks, 'task')}, {count_of(cost.chunks, 'chunk')}, "
                f"{verb} {format_size(cost.nbytes_read)}{' in spans' if cost.scratch_nbytes else ''}, "
                f"amplification {cost.amplification:.2f}"
            )
        if self.request.nbytes_read > 2 * self.chunk.nbytes_read:
            facts["store (order chunk)"] = "as gather, with places beside the sorted windows: far less"
        facts["memory of gather"] = (
            f"{format_size(self.nbytes)} for the result + {format_size(self.reading_nbytes)} a thread"
        )
        writing = writing_nbytes(self.block_nbytes, self.window_nbytes, plain=self.window_nbytes <= BLOCK_NBYTES)
        facts["memory of store"] = f"{format_size(self.block_nbytes + writing + self.reading_nbytes)} a thread"
        if self.chunk.requests:
            prices = (f"{each.requests:,} ({each.requests * _GET_USD:.2f} USD)" for each in (self.chunk, self.request))
            facts["requests"] = f"about {' as gather, '.join(prices)} as store, at the price of a GET of S3"
        crossings = self.crossings()
        if crossings:
            facts["crossings"] = say_crossings(crossings)
        return facts

    def spread(self, bins: int = 100) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Tell how the windows are spread over the matrix, and what reading them in order `chunk` costs there.

        Parameters
        ----------
        bins
            Into so many runs of rows the matrix is cut, or fewer: a chunk that is decoded is in one.

        Returns
        -------
        tuple of ndarray
            (b + 1,) rows, the edges of the runs; (b,) bytes of the windows that start in each; (b,) bytes that are
            read for them, as if each run were read alone, in proportion: `chunk.nbytes_read` in all.
        """
        rows, layout = self.matrix.rows, self.matrix.layout
        step = -(-rows // max(1, min(bins, rows)))
        if layout.reader == "decoded":
            step = -(-step // layout.chunk_rows) * layout.chunk_rows
        edges = np.append(np.arange(0, rows, step), rows)
        ends = np.searchsorted(self.sorted_starts, edges)
        read = np.zeros(len(edges) - 1)
        for number, (first, stop) in enumerate(pairwise(ends.tolist())):
            if first < stop:
                starts, windows = self.sorted_starts[first:stop], min(self.task_windows, stop - first)
                read[number] = _cost(self.matrix, self.selection, "chunk", starts, self.length, windows).nbytes_read
        return edges, np.diff(ends) * self.window_nbytes, read * (self.chunk.nbytes_read / read.sum())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw where the windows lie in the matrix, and the bytes that they ask for and `gather` reads.

        Parameters
        ----------
        ax
            Axes of matplotlib. Default: of a new figure.

        Raises
        ------
        InputError
            If matplotlib is not installed.
        """
        from pipeline.plan.plots import draw_spread

        words = f"{count_of(len(self), 'window')} of {count_of(self.length, 'row')}"
        factor = f"amplification {self.chunk.amplification:.2f}"
        chunks = count_of(-(-self.matrix.rows // self.matrix.chunk_rows), "chunk")
        how = "read in place" if self.matrix.array is None else f"{chunks} of {count_of(self.matrix.chunk_rows, 'row')}"
        return draw_spread(*self.spread(), title=f"{words}, {factor}", xlabel=f"row of the matrix ({how})", ax=ax)

    def __repr__(self) -> str:
        return text_table("Plan", self.facts())

    def _repr_html_(self) -> str:
        return html_table("Plan", self.facts(), cost_bars(self.nbytes, self.chunk, self.request))


def say_crossings(crossings: int) -> str:
    """Say how many windows cross the border of two parts, and how to draw none that do."""
    cross = "window crosses" if crossings == 1 else "windows cross"
    return (
        f"{crossings:,} {cross} the border of two parts; --within parts (within=matrix.parts) draws none; "
        f"of starts of your own, leave these out"
    )


def cost_bars(nbytes: int, chunk: Cost, request: Cost) -> dict[str, dict[str, float]]:
    """Bars of the bytes that are asked for, and of those that each order reads, by the names of a plan's facts."""
    return {
        "wanted": {"asked": nbytes},
        "gather (order chunk)": {"read": chunk.nbytes_read},
        "store (order request)": {"read": request.nbytes_read},
    }


READ_NBYTES = 32 * MIB
"""Decoded bytes of adjacent chunks that are read in one call; one chunk alone may hold more."""


class Ordered(NamedTuple):
    """Starts that were checked, and the same sorted: members of a group share them."""

    starts: NDArray[np.int64]
    sorted_starts: NDArray[np.int64]
    sorted_places: NDArray[np.int64]


def order_starts(starts: ArrayLike, *, rows: int, length: int) -> Ordered:
    """Check starts, and sort them; the errors of `plan_windows`."""
    checked = check_starts(starts, rows=rows, length=length)
    _check_fits(len(checked))
    return Ordered(checked, *_sort(checked, rows))


def plan_single(
    matrix: Matrix,
    ordered: Ordered,
    *,
    length: int,
    memory: int | str | None = None,
    columns: slice | ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Plan:
    """Plan the windows of one matrix; see `plan_windows`, which checks `length`."""
    starts, sorted_starts, places = ordered
    selection = select(matrix.row_shape, matrix.dtype, columns=columns, dtype=dtype)
    task_windows = cut_windows(len(starts), _cut_nbytes(matrix, selection, length))
    chunk = _cost(matrix, selection, "chunk", sorted_starts, length, task_windows)
    request = _cost(matrix, selection, "request", starts, length, task_windows)
    limit = None if memory is None else parse_size(memory)
    return Plan(matrix, starts, length, limit, task_windows, sorted_starts, places, chunk, request, selection)


def find_part(matrix: Matrix, selection: Selection) -> Part | None:
    """Return the bytes of each row that are read alone; None where whole rows are read, since that is less work.

    So it is where the gap between two rows' parts is no longer than what is read with them anyway.
    """
    part, layout = selection.part, matrix.layout
    if part is None or layout.reader == "decoded":
        return None
    gap = JOINED_NBYTES if isinstance(layout.files, Keys) else GAP_NBYTES
    return part if matrix.row_nbytes - part.nbytes > gap else None


def _cut_nbytes(matrix: Matrix, selection: Selection, length: int) -> int:
    """Bytes of a window that bound a task: delivered, or read, whichever are more."""
    part = find_part(matrix, selection)
    read = matrix.row_nbytes if part is None else max(_PAGE_NBYTES, part.nbytes)
    return length * max(read, selection.row_nbytes)


def _check_fits(count: int) -> None:
    allowed, needed = budget(), count * _PLANNED_NBYTES
    if needed > allowed.nbytes - held_nbytes():
        raise BudgetError(
            f"a plan fits in memory; that of {count:,} windows takes {format_size(needed)}, {allowed}"
            f"; plan and run them in parts, each with starts and an output of its own"
        )


def cut_windows(count: int, window_nbytes: int, *, fewest: int = 1, most_nbytes: int | None = None) -> int:
    """Windows of a task, by default from the request's shape alone, so that every machine cuts alike."""
    most = max(1, (most_nbytes or BLOCK_NBYTES) // window_nbytes)
    least = min(most, max(1, _LEAST_BLOCK_NBYTES // window_nbytes))
    return min(most, max(least, -(-count // max(fewest, _FEWEST_TASKS))))


def _sort(starts: NDArray[np.int64], rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort starts and carry their places: one sort of a joint key, which takes half the time of argsort."""
    bits = max(1, (len(starts) - 1).bit_length())
    if (rows - 1).bit_length() + bits <= 63:
        key = (starts << bits) | np.arange(len(starts))
        key.sort()
        ordered, places = key >> bits, key & ((1 << bits) - 1)
    else:
        places = np.argsort(starts, kind="stable")
        ordered = starts[places]
    ordered.flags.writeable = places.flags.writeable = False
    return ordered, places


def joins(ascending: NDArray[np.int64], length: int, row_nbytes: int) -> NDArray[np.bool_]:
    """Whether each window (..., k), sorted by start, is so near the one before that reading on costs less than anew."""
    gap = GAP_NBYTES // row_nbytes
    return np.asarray(ascending[..., 1:] - ascending[..., :-1] <= length + gap)


def is_dense(joined: NDArray[np.bool_]) -> Any:
    """Whether a task reads whole spans of rows and copies windows in memory: four or more to a span, on average."""
    windows = joined.shape[-1] + 1
    return 4 * (windows - np.count_nonzero(joined, axis=-1)) <= windows


def _count_rows(ascending: NDArray[np.int64], length: int, row_nbytes: int) -> tuple[int, int]:
    """Count the rows that tasks (t, k) read directly, and the most that one of them holds besides its windows."""
    joined = joins(ascending, length, row_nbytes)
    spanned = np.where(joined, np.diff(ascending, axis=1), length).sum(axis=1) + length
    dense = is_dense(joined)
    total = np.where(dense, spanned, ascending.shape[1] * length).sum()
    return int(total), int(np.where(dense, spanned, 0).max())


def _count_ranged(ascending: NDArray[np.int64], length: int, row_nbytes: int, file_rows: int) -> tuple[int, int]:
    """Count the rows of the ranges that tasks (t, k) ask a store for, each once a task, with gaps within one key.

    Also the requests that they take: ranges end with their key, and long ones are cut.
    """
    gap = JOINED_NBYTES // row_nbytes
    steps = np.diff(ascending, axis=1)
    within = (ascending[:, :-1] + (length - 1)) // file_rows == ascending[:, 1:] // file_rows
    near = joins(ascending, length, row_nbytes)
    spans = near & is_dense(near)[:, None]
    joined = spans | (steps <= length) | (within & (steps <= length + gap))
    edge = np.ones((len(ascending), 1), bool)
    first = ascending[np.concatenate([edge, ~joined], axis=1)]
    last = ascending[np.concatenate([~joined, edge], axis=1)] + (length - 1)
    ends = np.minimum(last, (first // file_rows + 1) * file_rows - 1)
    between = last // file_rows - first // file_rows
    # Up to the end of the first key, whole keys, and what lies in the last one.
    requests = _count_cuts(ends - first + 1, row_nbytes).sum()
    requests += (np.maximum(between - 1, 0) * _count_cuts(file_rows, row_nbytes)).sum()
    requests += (np.minimum(between, 1) * _count_cuts(last % file_rows + 1, row_nbytes)).sum()
    return int(np.where(joined, steps, length).sum()) + len(ascending) * length, int(requests)


def _count_cuts(rows: Any, row_nbytes: int) -> Any:
    """How many requests a range of so many rows of one key is cut into."""
    return -(-rows * row_nbytes // REQUEST_NBYTES)


def _cost(
    matrix: Matrix, selection: Selection, order: Order, ordered: NDArray[np.int64], length: int, task_windows: int
) -> Cost:
    layout, row_nbytes = matrix.layout, matrix.row_nbytes
    part = find_part(matrix, selection)
    part_nbytes = row_nbytes if part is None else part.nbytes
    held_nbytes = part_nbytes + (0 if selection.within(part) is None else selection.row_nbytes)
    chunks = nbytes = scratch = requests = 0
    for tasks in _stretches(ordered, task_windows):
        ascending = tasks if order == "chunk" else np.sort(tasks, axis=1)
        touched = count_touched(ascending, length, layout.chunk_rows)
        chunks += touched
        if layout.reader == "decoded":
            nbytes += touched * layout.chunk_rows * row_nbytes
            requests += touched
            continue
        rows, held = _count_rows(ascending, length, row_nbytes)
        if layout.reader == "ranged":
            rows, asked = _count_ranged(ascending, length, row_nbytes, layout.file_rows)
            requests += asked if part is None else rows * _count_cuts(1, part_nbytes)
        else:
            held = min(held, SLAB_NBYTES // row_nbytes + 2 * length)
        nbytes += rows * part_nbytes
        scratch = max(scratch, held * held_nbytes)
        if layout.files.index is not None:
            files = count_touched(ascending, length, layout.file_rows)
            nbytes += files * layout.files.index.nbytes
            requests += files
    wanted = len(ordered) * length * selection.row_nbytes
    if not isinstance(layout.files, Keys):
        requests = 0
    return Cost(order, -(-len(ordered) // task_windows), chunks, nbytes, nbytes / wanted, scratch, requests)


def _stretches(ordered: NDArray[np.int64], task_windows: int) -> Iterator[NDArray[np.int64]]:
    """Yield tasks as the rows of (t, task_windows) arrays, the shorter last one alone."""
    stretch = max(1, _STRETCH // task_windows) * task_windows
    for begin in range(0, len(ordered), stretch):
        starts = ordered[begin : begin + stretch]
        whole = len(starts) // task_windows * task_windows
        if whole:
            yield starts[:whole].reshape(-1, task_windows)
        if whole < len(starts):
            yield starts[whole:].reshape(1, -1)
