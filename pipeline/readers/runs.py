"""Windows out of plain bytes: which runs of rows to read, and the pieces of them that lie in one extent each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.matrix.rows import asked_rows, window_rows
from pipeline.plan.plan import is_dense, joins
from pipeline.readers.decoded import copy_runs
from pipeline.storage.preads import Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from pipeline.matrix.layout import Borders
    from pipeline.plan.columns import Part, Selection


_DENSE_SLABS = 8
"""Slabs of windows that overlap, or nearly touch, whose rows are read together: those at their borders twice."""


class Runs(NamedTuple):
    """Runs of matrix rows to be read: (r,) int64 arrays, by ascending first row."""

    first: NDArray[np.int64]
    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    """Row of the destination to which each goes, counted through its windows."""
    slabs: NDArray[np.int64]
    """Slab of each run, ascending from 0: where the runs of one were read, they are copied before those of the next."""


type ReadRuns = Callable[[Runs, NDArray[Any]], Iterator[int]]
"""Reads runs into an array, and yields the bytes that it read each time that a slab is complete."""


def read_by_runs(
    read_runs: ReadRuns,
    starts: NDArray[np.int64],
    length: int,
    out: NDArray[Any],
    places: NDArray[np.int64],
    *,
    row_nbytes: int,
    slab_nbytes: int | None = None,
    selection: Selection | None = None,
) -> Reading:
    """Read windows with a function that reads runs of rows; see `Reader.read_windows`.

    Parameters
    ----------
    slab_nbytes
        Bytes of rows that are held at once, but for one window; None: all those of the task.
    selection
        What is made of the rows that are read; None: nothing, so that windows that lie apart go straight to `out`.
    """
    ascending = np.argsort(starts, kind="stable")
    starts, places = starts[ascending], places[ascending]
    joined = joins(starts, length, row_nbytes)
    most = _most_windows(slab_nbytes, length * row_nbytes, len(starts))
    # Windows that overlap lie in one slab: many of them are read by spans.
    if not is_dense(joined) and (selection is None or _most_overlapping(starts, length) <= most):
        if selection is not None:
            nbytes_read = 0
            row_shape, dtype = selection.stored_shape, selection.stored_dtype
            for numbers, block, nbytes in _read_apart(read_runs, starts, length, row_shape, dtype, most=most):
                nbytes_read += nbytes
                out[places[numbers]] = selection.take(block, partial(window_rows, starts[numbers], length))
            return Reading(nbytes_read, 0.0)
        straight = Runs(starts, np.full(len(starts), length), places * length, np.zeros(len(starts), np.int64))
        return Reading(sum(read_runs(straight, out)), 0.0)
    # Windows overlap or nearly touch: each row is read once, and windows are copied in memory. The spans, one after the
    # other, are cut into slabs, and before each lie the rows that a window may need of the slab before it.
    begins = np.flatnonzero(np.r_[True, ~joined])
    first, rows = starts[begins], starts[np.r_[begins[1:], len(starts)] - 1] + length - starts[begins]
    offsets = np.cumsum(rows) - rows
    total, before = int(rows.sum()), length - 1
    slab = total if slab_nbytes is None else min(total, max(length, slab_nbytes // row_nbytes))
    tops = starts + np.repeat(offsets - first, np.diff(np.r_[begins, len(starts)]))
    ends = np.searchsorted((tops + before) // slab, np.arange(-(-total // slab) + 1)).tolist()
    scratch = read = np.empty((before + slab, *out.shape[2:]), out.dtype)
    if selection is not None:
        read = np.empty((before + slab, *selection.stored_shape), selection.stored_dtype)
    nbytes_read = 0
    for number, nbytes in enumerate(read_runs(_cut_slabs(first, rows, offsets, slab, before), read)):
        nbytes_read += nbytes
        if selection is not None:
            held = slice(before, before + min(slab, total - number * slab))
            begin = number * slab - before
            scratch[held] = selection.take(read[held], partial(_span_rows, starts, length, first, offsets, held, begin))
        within = slice(ends[number], ends[number + 1])
        copy_runs(scratch, tops[within] - number * slab + before, length, out, places[within])
        scratch[:before] = scratch[slab:]
    return Reading(nbytes_read, 0.0)


def _span_rows(
    starts: NDArray[np.int64],
    length: int,
    first: NDArray[np.int64],
    offsets: NDArray[np.int64],
    held: slice,
    begin: int,
) -> NDArray[np.int64]:
    """Matrix row of each of the rows that a slab holds, those that no window has as -1.

    Parameters
    ----------
    first, offsets
        (s,) first row of each span, and its offset where they follow one another.
    begin
        Offset of what would be row 0 of the slab.
    """
    offset = np.arange(held.start, held.stop) + begin
    span = np.searchsorted(offsets, offset, side="right") - 1
    return asked_rows(starts, length, first[span] + offset - offsets[span])


class Slab(NamedTuple):
    """Some of the windows of a task, read."""

    block: NDArray[Any]
    """(m, length, *row_shape), good until the next."""
    numbers: NDArray[np.int64]
    """(m,) which of the windows."""
    nbytes_read: int


def read_in_slabs(
    read_runs: ReadRuns,
    starts: NDArray[np.int64],
    length: int,
    row_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    row_nbytes: int,
    slab_nbytes: int,
    selection: Selection | None = None,
) -> Iterator[Slab]:
    """Read windows with a function that reads runs of rows, about `slab_nbytes` of them at a time, by ascending start.

    For who copies them on: what was just read is in the cache still.

    Parameters
    ----------
    row_shape, dtype
        As delivered.
    """
    ascending = np.argsort(starts, kind="stable")
    starts = starts[ascending]
    most = _most_windows(slab_nbytes, length * row_nbytes, len(starts))
    if is_dense(joins(starts, length, row_nbytes)) or _most_overlapping(starts, length) > _DENSE_SLABS * most:
        # By spans of rows: those that windows of two parts share are read for each.
        most *= _DENSE_SLABS
        block = np.empty((min(most, len(starts)), length, *row_shape), dtype)
        for first in range(0, len(starts), most):
            part = starts[first : first + most]
            block = block[: len(part)]
            places = np.arange(len(part))
            reading = read_by_runs(
                read_runs,
                part,
                length,
                block,
                places,
                row_nbytes=row_nbytes,
                slab_nbytes=slab_nbytes,
                selection=selection,
            )
            yield Slab(block, ascending[first : first + most], reading.nbytes)
        return
    if selection is not None:
        row_shape, dtype = selection.stored_shape, selection.stored_dtype
    for numbers, read, nbytes in _read_apart(read_runs, starts, length, row_shape, dtype, most=most):
        taken = read if selection is None else selection.take(read, partial(window_rows, starts[numbers], length))
        yield Slab(taken, ascending[numbers], nbytes)


def _most_overlapping(starts: NDArray[np.int64], length: int) -> int:
    """Windows, sorted by start, of the longest run in which each overlaps the next."""
    begins = np.flatnonzero(np.r_[True, np.diff(starts) >= length])
    return int(np.diff(np.r_[begins, len(starts)]).max())


def _most_windows(slab_nbytes: int | None, window_nbytes: int, count: int) -> int:
    """Windows of a slab."""
    return count if slab_nbytes is None else max(1, slab_nbytes // window_nbytes)


def _read_apart(
    read_runs: ReadRuns,
    starts: NDArray[np.int64],
    length: int,
    row_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    most: int,
) -> Iterator[tuple[slice, NDArray[Any], int]]:
    """Read windows one by one, by ascending start, about `most` at a time, and yield which they are.

    Each comes with its block, which is good until the next, and the bytes that were read.
    """
    begins = np.flatnonzero(np.r_[True, np.diff(starts) >= length])
    # Windows that overlap lie in one slab: else the second would begin before the first has ended, perhaps in a file
    # that is closed by then.
    cluster = np.repeat(begins, np.diff(np.r_[begins, len(starts)]))
    edges = np.r_[np.flatnonzero(np.r_[True, np.diff(cluster // most) != 0]), len(starts)]
    slabs = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    within = np.arange(len(starts)) - edges[slabs]
    block = np.empty((int(np.diff(edges).max()), length, *row_shape), dtype)
    runs = Runs(starts, np.full(len(starts), length), within * length, slabs)
    for number, nbytes in enumerate(read_runs(runs, block)):
        first, stop = int(edges[number]), int(edges[number + 1])
        yield slice(first, stop), block[: stop - first], nbytes


def _cut_slabs(
    first: NDArray[np.int64], rows: NDArray[np.int64], offsets: NDArray[np.int64], slab: int, before: int
) -> Runs:
    """Cut spans, which follow each other at `offsets`, at multiples of `slab` rows; `before`: rows before each slab."""
    low = offsets // slab
    counts = (offsets + rows - 1) // slab - low + 1
    span = np.repeat(np.arange(len(first)), counts)
    number = low[span] + np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.maximum(offsets[span], number * slab)
    stop = np.minimum((offsets + rows)[span], (number + 1) * slab)
    return Runs((first - offsets)[span] + begin, stop - begin, begin - number * slab + before, number)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Parts of runs of rows that lie in one extent each: six (p,) int64 arrays, files in ascending order."""

    file: NDArray[np.int64]
    extent: NDArray[np.int64]
    """Extent within its file."""
    offset: NDArray[np.int64]
    """First byte within its extent."""
    nbytes: NDArray[np.int64]
    target: NDArray[np.int64]
    """First byte in the destination."""
    slab: NDArray[np.int64]
    """As that of the run."""

    def take(self, order: NDArray[np.int64]) -> Pieces:
        """Pieces in another order, or some of them."""
        return Pieces(*(getattr(self, name)[order] for name in self.__slots__))


def cut_pieces(extents: Borders, row_nbytes: int, runs: Runs, part: Part | None = None) -> Pieces:
    """Cut runs of rows at the borders of extents.

    Parameters
    ----------
    part
        What is read of each row, which is then a piece of its own; None: all of it.
    """
    pieces = _whole_pieces(extents, row_nbytes, runs) if part is None else _row_pieces(extents, row_nbytes, runs, part)
    if (np.diff(pieces.file) < 0).any():
        # Windows that cross into the next file, followed by windows that begin in this one.
        pieces = pieces.take(np.argsort(pieces.file, kind="stable"))
    return pieces


def _row_pieces(extents: Borders, row_nbytes: int, runs: Runs, part: Part) -> Pieces:
    run = np.repeat(np.arange(len(runs.first)), runs.rows)
    step = np.arange(len(run)) - np.repeat(np.cumsum(runs.rows) - runs.rows, runs.rows)
    row = runs.first[run] + step
    extent = extents.find(row)
    return Pieces(
        file=extent // extents.file_extents,
        extent=extent % extents.file_extents,
        offset=(row - extents.first_rows(extent)) * row_nbytes + part.first,
        nbytes=np.full(len(row), part.nbytes),
        target=(runs.targets[run] + step) * part.nbytes,
        slab=runs.slabs[run],
    )


def _whole_pieces(extents: Borders, row_nbytes: int, runs: Runs) -> Pieces:
    starts, rows, targets, slabs = runs
    first = extents.find(starts)
    counts = extents.find(starts + (rows - 1)) - first + 1
    window = np.repeat(np.arange(len(starts)), counts)
    step = np.arange(len(window)) - np.repeat(np.cumsum(counts) - counts, counts)
    extent = first[window] + step
    first_row = extents.first_rows(extent)
    row = np.maximum(starts[window], first_row)
    stop = np.minimum((starts + rows)[window], extents.first_rows(extent + 1))
    return Pieces(
        file=extent // extents.file_extents,
        extent=extent % extents.file_extents,
        offset=(row - first_row) * row_nbytes,
        nbytes=(stop - row) * row_nbytes,
        target=((targets - starts)[window] + row) * row_nbytes,
        slab=slabs[window],
    )
