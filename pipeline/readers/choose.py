"""Windows into the rows of a destination buffer. The layout chooses the reader; their results are equal."""

from __future__ import annotations

import os
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.matrix.arrays import without_attributes
from pipeline.matrix.chunks import CHECKSUM_NBYTES
from pipeline.matrix.keys import Keys
from pipeline.matrix.layout import Extents, Files, PlainFiles
from pipeline.plan.plan import SLAB_NBYTES, find_part
from pipeline.readers.decoded import decoding_reader
from pipeline.readers.ranged import RangedReader
from pipeline.readers.runs import cut_pieces, read_by_runs, read_in_slabs
from pipeline.storage.preads import announce, open_file, read_fully

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pipeline.matrix.matrix import Matrix
    from pipeline.plan.columns import Part, Selection
    from pipeline.readers.runs import Pieces, Runs, Slab
    from pipeline.storage.preads import Reading

_OPEN_FILES = 64
"""Files that one task holds open at once; many tasks share a limit of 1,024."""
_IOVECS = 512
"""Buffers of one system call; Linux takes 1,024."""


class Reader(Protocol):
    """Reads windows of one matrix. Picklable, safe in many threads at once; holds no file open between calls."""

    def read_windows(
        self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]
    ) -> Reading:
        """Read window `starts[i]` into `out[places[i]]`.

        Parameters
        ----------
        starts
            (k,) matrix rows, in any order.
        length
            Rows of a window.
        out
            (n, length, *row_shape), of the dtype and the columns that are delivered, C-contiguous, writable; the
            caller's.
        places
            (k,) positions along the first axis of `out`, each at most once.

        Returns
        -------
        Reading
            Bytes read, and seconds of decoding.

        Raises
        ------
        IntegrityError
            If a chunk is absent, short or corrupt; if a cast would lose a value.
        """
        ...


def choose_reader(matrix: Matrix, *, row: int, selection: Selection | None = None) -> Reader:
    """Return the reader that serves the matrix's layout; it may read the chunk of `row`, to see that it can.

    Parameters
    ----------
    selection
        What it delivers of each row; None: all of it, as it is.
    """
    part = None if selection is None else find_part(matrix, selection)
    selection = None if selection is None else selection.within(part)
    layout, files = matrix.layout, matrix.layout.files
    if isinstance(files, Keys):
        files = replace(files, run=uuid.uuid4().hex, array=without_attributes(files.array))
    if isinstance(files, PlainFiles) or (layout.reader == "direct" and isinstance(files, Files)):
        return DirectReader(files, matrix.row_nbytes, CHECKSUM_NBYTES if layout.chunk_checksum else 0, part, selection)
    if layout.reader == "ranged" and isinstance(files, Keys):
        return RangedReader(files, matrix.row_nbytes, part, selection)
    assert matrix.array is not None
    array = files.array if isinstance(files, Keys) else without_attributes(matrix.array)
    return replace(decoding_reader(array, files, layout.chunk_rows, matrix.row_nbytes, row=row), selection=selection)


@dataclass(frozen=True, slots=True)
class DirectReader:
    """Rows that lie as plain bytes in local files: a window within one is one `preadv` straight into its place.

    The kernel is told all ranges of the task before the first is read, so that many requests are in flight whatever
    the number of threads; its read-ahead is off. Checksums between chunks are skipped within the same call.
    """

    files: Extents
    row_nbytes: int
    """As stored."""
    checksum_nbytes: int
    part: Part | None = None
    """What is read of each row; None: all of it."""
    selection: Selection | None = None
    """What is made of what was read; None: nothing."""

    def read_windows(
        self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]
    ) -> Reading:
        """Read windows; see `Reader.read_windows`."""
        return read_by_runs(
            self._read_runs,
            starts,
            length,
            out,
            places,
            row_nbytes=self.row_nbytes,
            slab_nbytes=SLAB_NBYTES,
            selection=self.selection,
        )

    def read_slabs(
        self, starts: NDArray[np.int64], length: int, row_shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> Iterator[Slab]:
        """Read windows, some at a time; see `read_in_slabs`."""
        return read_in_slabs(
            self._read_runs,
            starts,
            length,
            row_shape,
            dtype,
            row_nbytes=self.row_nbytes,
            slab_nbytes=SLAB_NBYTES,
            selection=self.selection,
        )

    def _read_runs(self, runs: Runs, out: NDArray[Any]) -> Iterator[int]:
        """Read runs of rows; see `ReadRuns`."""
        target = memoryview(out.reshape(-1).view(np.uint8))
        pieces = cut_pieces(self.files, self.row_nbytes, runs, self.part)
        slab = nbytes_read = 0
        borders = np.flatnonzero(np.diff(pieces.file)) + 1
        edges = [0, *borders.tolist(), len(pieces.file)]
        for group in range(0, len(edges) - 1, _OPEN_FILES):
            spans = list(pairwise(edges[group : group + _OPEN_FILES + 1]))
            with ExitStack() as opened:
                for fd, name, index_nbytes, calls in self._open_files(pieces, spans, target, opened):
                    nbytes_read += index_nbytes
                    for offset, nbytes, number, buffers in calls:
                        if number != slab:
                            yield nbytes_read
                            slab, nbytes_read = number, 0
                        read_fully(fd, buffers, offset, nbytes, name)
                        nbytes_read += nbytes
        yield nbytes_read

    def _open_files(
        self, pieces: Pieces, spans: list[tuple[int, int]], target: memoryview, opened: ExitStack
    ) -> list[tuple[int, str, int, list[_Call]]]:
        """Open files, and tell the kernel all that is read of them: descriptor, name, bytes of the index, calls."""
        files = []
        for begin, end in spans:
            number = int(pieces.file[begin])
            path = self.files.path(number)
            name = self.files.name(path, number)
            fd = open_file(path, name)
            opened.callback(os.close, fd)
            bases, index_nbytes = self.files.locate(fd, number, pieces.extent[begin:end])
            files.append((fd, name, index_nbytes, self._join(bases, pieces, slice(begin, end), target)))
        for fd, _, _, calls in files:
            announce(fd, ((offset, nbytes) for offset, nbytes, _, _ in calls))
        return files

    def _join(self, bases: NDArray[np.int64], pieces: Pieces, part: slice, target: memoryview) -> list[_Call]:
        """Join pieces of one file that follow each other, there and in the destination, into one call each."""
        offsets, nbytes, targets = bases + pieces.offset[part], pieces.nbytes[part], pieces.target[part]
        slabs = pieces.slab[part]
        gaps = offsets[1:] - offsets[:-1] - nbytes[:-1]
        follows = (targets[1:] == targets[:-1] + nbytes[:-1]) & (slabs[1:] == slabs[:-1])
        joined = [False, *(follows & ((gaps == 0) | (gaps == self.checksum_nbytes))).tolist()]
        skipped = memoryview(bytearray(CHECKSUM_NBYTES))
        calls: list[_Call] = []
        buffers: list[memoryview] = []
        end = 0
        columns = (offsets.tolist(), nbytes.tolist(), targets.tolist(), slabs.tolist(), joined)
        for offset, size, where, slab, join in zip(*columns, strict=True):
            if join and len(buffers) < _IOVECS:
                if offset > end:
                    buffers.append(skipped)
                buffers.append(target[where : where + size])
                start = calls[-1][0]
                calls[-1] = (start, offset + size - start, slab, buffers)
            else:
                buffers = [target[where : where + size]]
                calls.append((offset, size, slab, buffers))
            end = offset + size
        return calls


type _Call = tuple[int, int, int, list[memoryview]]
"""Offset in the file, bytes in all, their slab, and the buffers that they go to, one after the other."""
