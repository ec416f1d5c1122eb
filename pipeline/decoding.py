"""Windows out of chunks that must be decoded whole: each once a task, copied to every window that has its rows."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.arrays import read_present
from pipeline.decoders import chunk_decoder, fill_value
from pipeline.errors import IntegrityError
from pipeline.layout import Files
from pipeline.plan import GAP_NBYTES, READ_NBYTES
from pipeline.preads import Reading, announce, open_file, read_fully

if TYPE_CHECKING:
    from collections.abc import Iterator

    import zarr
    from numpy.typing import NDArray

    from pipeline.keys import Keys

_OPEN_FILES = 64
"""Files that one task holds open at once; many tasks share a limit of 1,024."""
_RUN_NBYTES = 2**20
"""Decoded bytes of adjacent chunks that are held before their windows are copied: they should stay in the cache."""
_CALL_NBYTES = 2**20
"""Encoded bytes of chunks that follow each other in a file, read in one call."""
_COPIED_NBYTES = 2**20
"""Bytes of windows that are copied in one call: they pass through a temporary that should stay in the cache."""
_FEW_COPIES = 8
"""Up to as many windows are copied one by one; more at once, which costs a second copy."""
_LARGE_NBYTES = 16 * 1024
"""Windows of as many bytes are copied one by one, too: a second copy of them costs more than a call."""


def decoding_reader(
    array: zarr.Array[Any], files: Files | Keys, chunk_rows: int, row_nbytes: int, *, row: int
) -> ChunkReader | ArrayReader:
    """Return the reader that decodes an array's chunks; reads the one of `row`, to see that it can."""
    whole_rows = all(chunk >= size for chunk, size in zip(array.chunks[1:], array.shape[1:], strict=True))
    known = array.shards is None or files.index is not None
    through_array = ArrayReader(array, chunk_rows, row_nbytes, files)
    if not isinstance(files, Files) or not known or not whole_rows or chunk_decoder(array) is None:
        return through_array
    reader = ChunkReader(array, files, chunk_rows, row_nbytes)
    # Decoding a chunk alone is no public part of zarr: before it is trusted with all windows, both ways must agree.
    sample = np.empty((2, 1, *array.shape[1:]), np.dtype(array.dtype).newbyteorder("="))
    both: tuple[ChunkReader | ArrayReader, ...] = (reader, through_array)
    for place, either in enumerate(both):
        either.read_windows(np.array([row]), 1, sample, np.array([place]))
    return reader if sample[0].tobytes() == sample[1].tobytes() else through_array


@dataclass(frozen=True, slots=True)
class ChunkReader:
    """Chunks of whole rows in local files: read by their bytes, decoded in the calling thread.

    Zarr's own way to an array goes through one event-loop thread, and through one call for each run of adjacent
    chunks. Here every thread of Dask decodes for itself, and the kernel knows all ranges of the task beforehand.
    """

    array: zarr.Array[Any]
    files: Files
    chunk_rows: int
    row_nbytes: int

    def read_windows(
        self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]
    ) -> Reading:
        """Read windows; see `Reader.read_windows`."""
        windows = SortedWindows(starts, length, out, places)
        touched = windows.touched(self.chunk_rows)
        decode = chunk_decoder(self.array)
        assert decode is not None
        rows, fill = self.array.shape[0], fill_value(self.array)
        inside = tuple(slice(size) for size in self.array.shape[1:])
        runs = _cut_runs(touched, max(1, _RUN_NBYTES // (self.chunk_rows * self.row_nbytes)))
        first_rows = np.array([run[0] for run in runs]) * self.chunk_rows
        bounds = windows.bounds(first_rows, np.array([run[-1] + 1 for run in runs]) * self.chunk_rows)
        most = max(map(len, runs))
        scratch = np.empty((most, *self.array.chunks), out.dtype)
        nbytes_read, decode_seconds = 0, 0.0
        chunks = self._read_chunks(touched)
        for run, bound in zip(runs, bounds, strict=True):
            for decoded, (encoded, spent, chunk, name) in zip(scratch, islice(chunks, len(run)), strict=False):
                nbytes_read += spent
                begin = time.perf_counter()
                if encoded is None:
                    decoded[...] = fill
                    continue
                try:
                    decode(encoded, decoded)
                except MemoryError:
                    raise
                except Exception as error:  # a codec raises what it likes
                    reason = " ".join(str(error).split())[:300] or type(error).__name__
                    raise IntegrityError(
                        f"every chunk can be decoded; {self._name(name, chunk)}: {reason}; restore it"
                    ) from error
                decode_seconds += time.perf_counter() - begin
            first = int(run[0]) * self.chunk_rows
            decoded_rows = scratch[: len(run)].reshape(-1, *self.array.chunks[1:])
            windows.copy(decoded_rows[: rows - first, *inside], first, bound)
        return Reading(nbytes_read, decode_seconds)

    def _read_chunks(self, touched: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.uint8] | None, int, int, str]]:
        """Yield each chunk's encoded bytes, which hold until the next one; bytes read for it; its number and file.

        None stands for the bytes of a chunk that reads as the fill value.
        """
        chunks_per_file = self.files.file_rows // self.chunk_rows
        numbers = touched // chunks_per_file
        borders = np.flatnonzero(np.diff(numbers)) + 1
        edges = [0, *borders.tolist(), len(touched)]
        buffer = np.empty(0, np.uint8)
        spent = 0
        for group in range(0, len(edges) - 1, _OPEN_FILES):
            stops = edges[group : group + _OPEN_FILES + 1]
            with ExitStack() as opened:
                found = []
                for begin, end in pairwise(stops):
                    number = int(numbers[begin])
                    path = self.files.path(number)
                    name = self.files.name(path, number)
                    if self.files.fills and self.files.is_absent(path):
                        found.append((-1, name, _join_ranges(touched[begin:end].tolist(), [_ABSENT] * (end - begin))))
                        continue
                    fd = open_file(path, name)
                    opened.callback(os.close, fd)
                    ranges, index_nbytes = self._ranges(fd, touched[begin:end] - number * chunks_per_file, number, name)
                    spent += index_nbytes
                    calls = _join_ranges(touched[begin:end].tolist(), ranges)
                    announce(fd, ((offset, nbytes) for offset, nbytes, _ in calls if nbytes >= 0))
                    found.append((fd, name, calls))
                for fd, name, calls in found:
                    for offset, nbytes, chunks in calls:
                        if nbytes < 0:
                            yield None, spent, chunks[0][0], name
                            spent = 0
                            continue
                        if nbytes > len(buffer):
                            buffer = np.empty(nbytes, np.uint8)
                        read_fully(fd, [memoryview(buffer[:nbytes])], offset, nbytes, name)
                        spent += nbytes
                        for chunk, begin, end in chunks:
                            yield buffer[begin:end], spent, chunk, name
                            spent = 0

    def _ranges(self, fd: int, chunks: NDArray[np.int64], number: int, name: str) -> tuple[list[tuple[int, int]], int]:
        """Offset and size of chunks within their file, or `_ABSENT`, and the bytes that were read to know them."""
        if self.files.index is None:
            return [(0, os.fstat(fd).st_size)], 0
        index = self.files.index.read(fd, name)[chunks]
        absent = np.flatnonzero(index[:, 1] < 0)
        if len(absent) and not self.files.fills:
            chunk = number * (self.files.file_rows // self.chunk_rows) + int(chunks[absent[0]])
            raise IntegrityError(f"every chunk is there; {self._name(name, chunk)} is absent; restore the shard")
        return [(offset, nbytes) for offset, nbytes in index.tolist()], self.files.index.nbytes

    def _name(self, name: str, chunk: int) -> str:
        if self.files.index is None:
            return name
        first = chunk * self.chunk_rows
        return f"the inner chunk of rows {first} to {first + self.chunk_rows - 1} in {name}"


_ABSENT = (-1, -1)
"""Range of a chunk that is not there, as the index of a shard gives it."""

type _Call = tuple[int, int, list[tuple[int, int, int]]]
"""Offset in the file, bytes in all, and the number of each chunk with its first byte within them and its end."""


def _join_ranges(chunks: list[int], ranges: list[tuple[int, int]]) -> list[_Call]:
    """Join chunks that follow each other in a file, or nearly, into one call each; those that are absent stay alone."""
    calls: list[_Call] = []
    for chunk, (offset, nbytes) in zip(chunks, ranges, strict=True):
        if calls and nbytes >= 0 and calls[-1][1] >= 0:
            start, total, joined = calls[-1]
            if 0 <= offset - start - total <= GAP_NBYTES and offset + nbytes - start <= _CALL_NBYTES:
                joined.append((chunk, offset - start, offset - start + nbytes))
                calls[-1] = (start, offset + nbytes - start, joined)
                continue
        calls.append((offset, nbytes, [(chunk, 0, nbytes)]))
    return calls


def _cut_runs(touched: NDArray[np.int64], most: int) -> list[NDArray[np.int64]]:
    """Cut ascending numbers into runs of adjacent ones, of `most` at most."""
    begins = np.flatnonzero(np.r_[True, np.diff(touched) != 1])
    within = np.arange(len(touched)) - np.repeat(begins, np.diff(np.r_[begins, len(touched)]))
    return np.split(touched, np.flatnonzero(within % most == 0)[1:])


@dataclass(frozen=True, slots=True)
class ArrayReader:
    """Everything else, as zarr reads it: chunks of columns, other stores, codecs that only run asynchronously."""

    array: zarr.Array[Any]
    chunk_rows: int
    row_nbytes: int
    files: Files | Keys

    def read_windows(
        self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]
    ) -> Reading:
        """Read windows; see `Reader.read_windows`."""
        from pipeline.counting import count_reads

        windows = SortedWindows(starts, length, out, places)
        touched = windows.touched(self.chunk_rows)
        self._check_files(touched)
        index_nbytes = self._check_inner_chunks(touched)
        array, store = count_reads(self.array)
        most = max(1, READ_NBYTES // (self.chunk_rows * self.row_nbytes))
        breaks = np.flatnonzero(np.diff(touched) != 1) + 1
        decode_seconds = 0.0
        for run in np.split(touched, breaks):
            for begin in range(0, len(run), most):
                first = int(run[begin]) * self.chunk_rows
                stop = (int(run[min(begin + most, len(run)) - 1]) + 1) * self.chunk_rows
                began = time.perf_counter()
                rows = self._decode(array, first, min(stop, array.shape[0]))
                decode_seconds += time.perf_counter() - began
                [bound] = windows.bounds(np.array([first]), np.array([stop]))
                windows.copy(rows, first, bound)
        return Reading(index_nbytes + store.nbytes, decode_seconds)

    def _decode(self, array: zarr.Array[Any], first: int, stop: int) -> NDArray[Any]:
        checked = self.files.fills or self.files.index is not None
        try:
            return read_present(array, (slice(first, stop),), checked=checked)
        except IntegrityError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # a codec raises what it likes
            if stop - first > self.chunk_rows:
                # One of several chunks: find it, and name it alone.
                for row in range(first, stop, self.chunk_rows):
                    self._decode(array, row, min(row + self.chunk_rows, stop))
            name = self.files.name(self.files.path(first // self.files.file_rows), first // self.files.file_rows)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise IntegrityError(f"every chunk is there and can be decoded; {name}: {reason}; restore it") from error

    def _check_files(self, touched: NDArray[np.int64]) -> None:
        """Refuse what zarr would take for an absent file, such as a folder, or would wait for, such as a pipe."""
        if isinstance(self.files, Files):
            problem = self.files.find_problem(np.unique(touched // (self.files.file_rows // self.chunk_rows)))
            if problem is not None:
                raise IntegrityError(f"every chunk is there, whole; {problem.name} {problem.words}; restore it")

    def _check_inner_chunks(self, touched: NDArray[np.int64]) -> int:
        """Refuse inner chunks that a shard lacks: zarr would give the fill value for them. Return the bytes read."""
        if self.files.index is None or self.files.fills:
            return 0
        assert self.array.shards is not None
        chunks_per_file = self.files.file_rows // self.chunk_rows
        grid = [shard // chunk for shard, chunk in zip(self.array.shards, self.array.chunks, strict=True)]
        numbers = np.unique(touched // chunks_per_file).tolist()
        positions = [(number, columns) for number in numbers for columns in self.files.columns()]
        shards = [(self.files.path(number, columns), number) for number, columns in positions]
        for (number, columns), (path, _), index in zip(positions, shards, self.files.read_indexes(shards), strict=True):
            here = touched[touched // chunks_per_file == number] % chunks_per_file
            absent = (index[:, 1] < 0).reshape(grid)[here]
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
        return len(shards) * self.files.index.nbytes


class SortedWindows:
    """Windows by start, to which runs of matrix rows are copied: a view of a request, made once a task."""

    def __init__(self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]) -> None:
        ascending = np.argsort(starts, kind="stable")
        self._starts, self._places = starts[ascending], places[ascending]
        self._start_list, self._place_list = self._starts.tolist(), self._places.tolist()
        self._length, self._out = length, out

    def touched(self, unit_rows: int) -> NDArray[np.int64]:
        """Numbers of the units of `unit_rows` rows that any window touches, ascending, once each."""
        return touched_units(self._starts // unit_rows, (self._starts + (self._length - 1)) // unit_rows)

    def bounds(self, first: NDArray[np.int64], stop: NDArray[np.int64]) -> list[list[int]]:
        """For each run of rows [first, stop), which windows it serves.

        They are [low, high); those in [begin, end) lie wholly in the run: `[low, begin, end, high]`.
        """
        shorter = self._length - 1
        edges = np.stack([first - shorter, first, np.maximum(stop - shorter, first), stop], axis=1)
        found: list[list[int]] = np.searchsorted(self._starts, edges).tolist()
        return found

    def copy(self, rows: NDArray[Any], first: int, bound: list[int]) -> None:
        """Copy matrix rows [first, first + len(rows)) to the windows that `bounds` found for them."""
        low, begin, end, high = bound
        out, length, stop = self._out, self._length, first + len(rows)
        small = end > begin and out[0].nbytes < _LARGE_NBYTES
        if small and end - begin > _FEW_COPIES and rows.dtype == out.dtype:
            tops = self._starts[begin:end] - first
            copy_runs(np.ascontiguousarray(rows), tops, length, out, self._places[begin:end])
        else:
            for i in range(begin, end):
                top = self._start_list[i] - first
                out[self._place_list[i]] = rows[top : top + length]
        for i in (*range(low, begin), *range(end, high)):
            start = self._start_list[i]
            top, bottom = max(start, first), min(start + length, stop)
            out[self._place_list[i], top - start : bottom - start] = rows[top - first : bottom - first]


def copy_runs(
    rows: NDArray[Any], tops: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]
) -> None:
    """Copy `rows[tops[i]:tops[i] + length]` to `out[places[i]]`; all C-contiguous, of one dtype."""
    row_nbytes = rows.nbytes // len(rows)
    # One item a window, each a row further on: a copy of many windows is one call, one memcpy each.
    window = np.dtype((np.void, length * row_nbytes))
    sliding: NDArray[Any] = np.ndarray((len(rows) - length + 1,), window, rows, strides=(row_nbytes,))
    targets = out.reshape(len(out), -1).view(window)[:, 0]
    step = max(1, _COPIED_NBYTES // window.itemsize)
    for begin in range(0, len(tops), step):
        targets[places[begin : begin + step]] = sliding[tops[begin : begin + step]]


def touched_units(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each number in any of the ranges [first[i], last[i]], ascending, once."""
    # Many windows in few units are many equal ranges, one after the other.
    changed = np.r_[True, (np.diff(first) != 0) | (np.diff(last) != 0)]
    first, last = first[changed], last[changed]
    counts = last - first + 1
    steps = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.unique(np.repeat(first, counts) + steps)
