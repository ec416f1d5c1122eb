"""Windows into the rows of a destination buffer. The layout chooses the reader; their results are equal."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import IntegrityError, OpenError
from pipeline.layout import CHECKSUM_NBYTES, Files
from pipeline.plan import READ_NBYTES

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

    from pipeline.matrix import Matrix

_OPEN_FILES = 64
"""Files that one task holds open at once; many tasks share a limit of 1,024."""
_IOVECS = 512
"""Buffers of one system call; Linux takes 1,024."""


class Reader(Protocol):
    """Reads windows of one matrix. Picklable, safe in many threads at once; holds no file open between calls."""

    def read_windows(self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]) -> int:
        """Read window `starts[i]` into `out[places[i]]`.

        Parameters
        ----------
        starts
            (k,) matrix rows, in any order.
        length
            Rows of a window.
        out
            (n, length, *row_shape), of the matrix's dtype, C-contiguous, writable; the caller's.
        places
            (k,) positions along the first axis of `out`, each at most once.

        Returns
        -------
        int
            Bytes read, as `Cost.nbytes_read` counts them.

        Raises
        ------
        IntegrityError
            If a chunk is absent, short or corrupt.
        """
        ...


def choose_reader(matrix: Matrix) -> Reader:
    """Return the reader that serves the matrix's layout."""
    layout = matrix.layout
    if layout.reader == "direct" and layout.files is not None:
        checksum_nbytes = CHECKSUM_NBYTES if layout.chunk_checksum else 0
        return DirectReader(layout.files, layout.chunk_rows, matrix.row_nbytes, checksum_nbytes)
    return DecodedReader(matrix.array, layout.chunk_rows, matrix.row_nbytes, layout.files)


@dataclass(frozen=True, slots=True)
class DirectReader:
    """Rows that lie as plain bytes in local files: each window is one `preadv` straight into its place.

    The kernel is told all ranges of the task before the first is read, so that many requests are in flight whatever
    the number of threads; its read-ahead is off. Checksums between chunks are skipped within the same call.
    """

    files: Files
    chunk_rows: int
    row_nbytes: int
    checksum_nbytes: int

    def read_windows(self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]) -> int:
        """Read windows; see `Reader.read_windows`."""
        target = memoryview(out.reshape(-1).view(np.uint8))
        pieces = self._pieces(starts, length, places)
        nbytes_read = 0
        borders = np.flatnonzero(np.diff(pieces.file)) + 1
        edges = [0, *borders.tolist(), len(pieces.file)]
        for group in range(0, len(edges) - 1, _OPEN_FILES):
            spans = list(pairwise(edges[group : group + _OPEN_FILES + 1]))
            nbytes_read += self._read_files(pieces, spans, target)
        return nbytes_read

    def _pieces(self, starts: NDArray[np.int64], length: int, places: NDArray[np.int64]) -> _Pieces:
        """Cut windows at the borders of chunks, sorted by where they lie."""
        ascending = np.argsort(starts, kind="stable")
        starts, places = starts[ascending], places[ascending]
        first = starts // self.chunk_rows
        counts = (starts + (length - 1)) // self.chunk_rows - first + 1
        window = np.repeat(np.arange(len(starts)), counts)
        step = np.arange(len(window)) - np.repeat(np.cumsum(counts) - counts, counts)
        chunk = first[window] + step
        row = np.maximum(starts[window], chunk * self.chunk_rows)
        stop = np.minimum(starts[window] + length, (chunk + 1) * self.chunk_rows)
        chunks_per_file = self.files.file_rows // self.chunk_rows
        pieces = _Pieces(
            file=chunk // chunks_per_file,
            chunk=chunk % chunks_per_file,
            offset=(row - chunk * self.chunk_rows) * self.row_nbytes,
            nbytes=(stop - row) * self.row_nbytes,
            target=(places[window] * length + row - starts[window]) * self.row_nbytes,
        )
        if (np.diff(pieces.file) < 0).any():
            # Windows that cross into the next file, followed by windows that begin in this one.
            pieces = pieces.take(np.argsort(pieces.file, kind="stable"))
        return pieces

    def _read_files(self, pieces: _Pieces, spans: list[tuple[int, int]], target: memoryview) -> int:
        nbytes_read = 0
        with ExitStack() as opened:
            requests = []
            for begin, end in spans:
                number = int(pieces.file[begin])
                path = self.files.path(number)
                fd = self._open(path, number)
                opened.callback(os.close, fd)
                offsets = pieces.offset[begin:end]
                if self.files.index is not None:
                    index = self.files.index.read(fd, self.files.name(path, number))
                    self._check_chunks(index, pieces.chunk[begin:end], number, path)
                    offsets = offsets + index[pieces.chunk[begin:end], 0]
                    nbytes_read += self.files.index.nbytes
                calls = self._join(offsets, pieces.nbytes[begin:end], pieces.target[begin:end], target)
                requests.append((fd, path, number, calls))
            for fd, _, _, calls in requests:
                _announce(fd, calls)
            for fd, path, number, calls in requests:
                for offset, nbytes, buffers in calls:
                    _read_fully(fd, buffers, offset, nbytes, path, number * self.files.file_rows)
                    nbytes_read += nbytes
        return nbytes_read

    def _open(self, path: str, number: int) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            name = self.files.name(path, number)
            raise IntegrityError(f"every chunk is there; {name} is not; restore it") from error
        except OSError as error:
            raise OpenError(f"a chunk can be read; {path} cannot: {error.strerror}; check its permissions") from error

    def _check_chunks(self, index: NDArray[np.int64], chunks: NDArray[np.int64], number: int, path: str) -> None:
        expected = self.chunk_rows * self.row_nbytes + self.checksum_nbytes
        wrong = np.flatnonzero(index[chunks, 1] != expected)
        if len(wrong):
            chunk = int(chunks[wrong[0]])
            first = number * self.files.file_rows + chunk * self.chunk_rows
            state = "is absent" if index[chunk, 1] < 0 else f"has {index[chunk, 1]} bytes instead of {expected}"
            raise IntegrityError(
                f"every chunk is there, whole; inner chunk {chunk} of {path} (rows {first} to "
                f"{first + self.chunk_rows - 1}) {state}; restore the shard"
            )

    def _join(
        self, offsets: NDArray[np.int64], nbytes: NDArray[np.int64], targets: NDArray[np.int64], target: memoryview
    ) -> list[_Call]:
        """Join pieces that follow each other, in the file and in the destination, into one call each."""
        gaps = offsets[1:] - offsets[:-1] - nbytes[:-1]
        follows = targets[1:] == targets[:-1] + nbytes[:-1]
        joined = [False, *(follows & ((gaps == 0) | (gaps == self.checksum_nbytes))).tolist()]
        skipped = memoryview(bytearray(CHECKSUM_NBYTES))
        calls: list[_Call] = []
        buffers: list[memoryview] = []
        end = 0
        for offset, size, where, join in zip(offsets.tolist(), nbytes.tolist(), targets.tolist(), joined, strict=True):
            if join and len(buffers) < _IOVECS:
                if offset > end:
                    buffers.append(skipped)
                buffers.append(target[where : where + size])
                start = calls[-1][0]
                calls[-1] = (start, offset + size - start, buffers)
            else:
                buffers = [target[where : where + size]]
                calls.append((offset, size, buffers))
            end = offset + size
        return calls


type _Call = tuple[int, int, list[memoryview]]
"""Offset in the file, bytes in all, and the buffers that they go to, one after the other."""


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Parts of windows that lie in one chunk each: five (p,) int64 arrays."""

    file: NDArray[np.int64]
    chunk: NDArray[np.int64]
    """Chunk within its file."""
    offset: NDArray[np.int64]
    """First byte within its chunk."""
    nbytes: NDArray[np.int64]
    target: NDArray[np.int64]
    """First byte in the destination."""

    def take(self, order: NDArray[np.int64]) -> _Pieces:
        return _Pieces(*(getattr(self, name)[order] for name in self.__slots__))


def _announce(fd: int, calls: list[_Call]) -> None:
    """Tell the kernel all ranges, so that the disk works on many at once, and that nothing around them is wanted."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for offset, nbytes, _ in calls:
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


def _read_fully(fd: int, buffers: list[memoryview], offset: int, nbytes: int, path: str, first_row: int) -> None:
    """Fill the buffers, however few bytes one call gives."""
    done = 0
    try:
        while done < nbytes:
            got = os.preadv(fd, buffers, offset + done)
            if not got:
                raise IntegrityError(
                    f"every chunk is whole; {path} (from row {first_row}) ends within the bytes at {offset}; restore it"
                )
            done += got
            if done < nbytes:
                buffers = _after(buffers, got)
    except OSError as error:
        raise IntegrityError(
            f"a chunk can be read; {path} at byte {offset}: {error.strerror}; check the disk"
        ) from error


def _after(buffers: list[memoryview], nbytes: int) -> list[memoryview]:
    """Return the buffers that are left when the first `nbytes` are filled."""
    for number, buffer in enumerate(buffers):
        if nbytes < len(buffer):
            return [buffer[nbytes:], *buffers[number + 1 :]]
        nbytes -= len(buffer)
    return []


@dataclass(frozen=True, slots=True)
class DecodedReader:
    """Chunks that must be decoded whole, through zarr: each once a call, copied to every window that has its rows."""

    array: zarr.Array[Any]
    chunk_rows: int
    row_nbytes: int
    files: Files | None

    def read_windows(self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]) -> int:
        """Read windows; see `Reader.read_windows`."""
        ascending = np.argsort(starts, kind="stable")
        starts, places = starts[ascending], places[ascending]
        touched = _touched(starts // self.chunk_rows, (starts + (length - 1)) // self.chunk_rows)
        self._check_inner_chunks(touched)
        most = max(1, READ_NBYTES // (self.chunk_rows * self.row_nbytes))
        breaks = np.flatnonzero(np.diff(touched) != 1) + 1
        nbytes_read = 0
        for run in np.split(touched, breaks):
            for begin in range(0, len(run), most):
                first = int(run[begin]) * self.chunk_rows
                stop = (int(run[min(begin + most, len(run)) - 1]) + 1) * self.chunk_rows
                nbytes_read += (stop - first) * self.row_nbytes
                rows = self._decode(first, min(stop, self.array.shape[0]))
                _scatter(rows, first, starts, length, out, places)
        return nbytes_read

    def _decode(self, first: int, stop: int) -> NDArray[Any]:
        try:
            return np.asarray(self.array[first:stop])
        except MemoryError:
            raise
        except Exception as error:  # a codec raises what it likes
            if stop - first > self.chunk_rows:
                # One of several chunks: find it, and name it alone.
                for row in range(first, stop, self.chunk_rows):
                    self._decode(row, min(row + self.chunk_rows, stop))
            name = f"{self.array.store_path} (rows {first} to {stop - 1})"
            if self.files is not None:
                name = self.files.name(self.files.path(first // self.files.file_rows), first // self.files.file_rows)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise IntegrityError(f"every chunk is there and can be decoded; {name}: {reason}; restore it") from error

    def _check_inner_chunks(self, touched: NDArray[np.int64]) -> None:
        """Refuse inner chunks that a shard lacks: zarr would give the fill value for them."""
        if self.files is None or self.files.index is None:
            return
        assert self.array.shards is not None
        chunks_per_file = self.files.file_rows // self.chunk_rows
        grid = [shard // chunk for shard, chunk in zip(self.array.shards, self.array.chunks, strict=True)]
        for number in np.unique(touched // chunks_per_file).tolist():
            here = touched[touched // chunks_per_file == number] % chunks_per_file
            for columns in self.files.columns():
                path = self.files.path(number, columns)
                absent = (_read_index(self.files, path, number)[:, 1] < 0).reshape(grid)[here]
                for axis, column in enumerate(columns, start=1):
                    # Inner chunks beyond the array's edge need not be there.
                    inside = -(-(self.array.shape[axis] - column * self.array.shards[axis]) // self.array.chunks[axis])
                    absent = absent.take(range(min(inside, grid[axis])), axis=axis)
                missing = np.flatnonzero(absent.reshape(len(here), -1).any(axis=1))
                if len(missing):
                    first = number * self.files.file_rows + int(here[missing[0]]) * self.chunk_rows
                    raise IntegrityError(
                        f"every chunk is there; an inner chunk of {path} (rows {first} to "
                        f"{first + self.chunk_rows - 1}) is absent; restore the shard"
                    )


def _read_index(files: Files, path: str, number: int) -> NDArray[np.int64]:
    assert files.index is not None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return files.index.read(fd, files.name(path, number))
    finally:
        os.close(fd)


def _touched(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each number in any of the ranges [first[i], last[i]], ascending, once."""
    counts = last - first + 1
    steps = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.unique(np.repeat(first, counts) + steps)


def _scatter(
    rows: NDArray[Any],
    first: int,
    starts: NDArray[np.int64],
    length: int,
    out: NDArray[Any],
    places: NDArray[np.int64],
) -> None:
    """Copy matrix rows [first, first + len(rows)) to each window, of sorted starts, that has any of them."""
    stop = first + len(rows)
    low, high = np.searchsorted(starts, [first - length + 1, stop])
    for start, place in zip(starts[low:high].tolist(), places[low:high].tolist(), strict=True):
        begin, end = max(start, first), min(start + length, stop)
        out[place, begin - start : end - start] = rows[begin - first : end - first]


def check_files(matrix: Matrix, starts: NDArray[np.int64], length: int) -> None:
    """Check, a stat each, that every file that the windows touch is there with its size.

    Parameters
    ----------
    starts
        (n,) ascending.

    Raises
    ------
    IntegrityError
        Naming the first file that is not, and its rows.
    """
    files = matrix.layout.files
    if files is None:
        return
    first, last = starts // files.file_rows, (starts + (length - 1)) // files.file_rows
    for number in _touched(*_distinct(first, last)).tolist():
        files.check(number)


def _distinct(first: NDArray[np.int64], last: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Drop repeated ranges, so that many windows in few files cost little."""
    changed = np.r_[True, (np.diff(first) != 0) | (np.diff(last) != 0)]
    return first[changed], last[changed]
