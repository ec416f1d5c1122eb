"""Windows out of plain bytes: which runs of rows to read, and the pieces of them that lie in one extent each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.decoding import copy_runs
from pipeline.plan import is_dense, joins
from pipeline.preads import Reading

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pipeline.layout import Borders


type ReadRuns = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[Any]], int]
"""Reads matrix rows [first[i], first[i] + rows[i]), by ascending first, to row targets[i] of an array, counted through
its windows; returns the bytes that were read. Arguments: first, rows, targets, array."""


def read_by_runs(
    read_runs: ReadRuns,
    starts: NDArray[np.int64],
    length: int,
    out: NDArray[Any],
    places: NDArray[np.int64],
    *,
    row_nbytes: int,
) -> Reading:
    """Read windows with a function that reads runs of rows; see `Reader.read_windows`."""
    ascending = np.argsort(starts, kind="stable")
    starts, places = starts[ascending], places[ascending]
    joined = joins(starts, length, row_nbytes)
    if not is_dense(joined):
        return Reading(read_runs(starts, np.full(len(starts), length), places * length, out), 0.0)
    # Windows overlap or nearly touch: each row is read once, and windows are copied in memory.
    begins = np.flatnonzero(np.r_[True, ~joined])
    first, rows = starts[begins], starts[np.r_[begins[1:], len(starts)] - 1] + length - starts[begins]
    offsets = np.cumsum(rows) - rows
    scratch = np.empty((int(rows.sum()), *out.shape[2:]), out.dtype)
    nbytes_read = read_runs(first, rows, offsets, scratch)
    span = np.cumsum(np.r_[True, ~joined]) - 1
    copy_runs(scratch, starts - first[span] + offsets[span], length, out, places)
    return Reading(nbytes_read, 0.0)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Parts of runs of rows that lie in one extent each: five (p,) int64 arrays, files in ascending order."""

    file: NDArray[np.int64]
    extent: NDArray[np.int64]
    """Extent within its file."""
    offset: NDArray[np.int64]
    """First byte within its extent."""
    nbytes: NDArray[np.int64]
    target: NDArray[np.int64]
    """First byte in the destination."""

    def take(self, order: NDArray[np.int64]) -> Pieces:
        """Pieces in another order, or some of them."""
        return Pieces(*(getattr(self, name)[order] for name in self.__slots__))


def cut_pieces(
    extents: Borders,
    row_nbytes: int,
    starts: NDArray[np.int64],
    rows: NDArray[np.int64],
    targets: NDArray[np.int64],
) -> Pieces:
    """Cut runs of rows, by ascending start, at the borders of extents; see `ReadRuns`."""
    first = extents.find(starts)
    counts = extents.find(starts + (rows - 1)) - first + 1
    window = np.repeat(np.arange(len(starts)), counts)
    step = np.arange(len(window)) - np.repeat(np.cumsum(counts) - counts, counts)
    extent = first[window] + step
    first_row = extents.first_rows(extent)
    row = np.maximum(starts[window], first_row)
    stop = np.minimum((starts + rows)[window], extents.first_rows(extent + 1))
    pieces = Pieces(
        file=extent // extents.file_extents,
        extent=extent % extents.file_extents,
        offset=(row - first_row) * row_nbytes,
        nbytes=(stop - row) * row_nbytes,
        target=((targets - starts)[window] + row) * row_nbytes,
    )
    if (np.diff(pieces.file) < 0).any():
        # Windows that cross into the next file, followed by windows that begin in this one.
        pieces = pieces.take(np.argsort(pieces.file, kind="stable"))
    return pieces
