"""Windows out of chunks that must be decoded whole: each once a task, copied to every window that has its rows."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import IntegrityError, PipelineError, find_shortage
from pipeline.matrix.arrays import may_lack_chunks, read_present
from pipeline.matrix.layout import Files
from pipeline.matrix.rows import asked_rows, touched_units
from pipeline.plan.plan import GAP_NBYTES, IN_FLIGHT_NBYTES, JOINED_NBYTES, READ_NBYTES, REQUEST_NBYTES
from pipeline.readers.codecs import chunk_decoder, fill_value
from pipeline.storage.concurrency import in_flight, in_order
from pipeline.storage.locations import is_store_failure, plain, say_failure, store_error
from pipeline.storage.preads import Reading, announce, open_file, read_fully

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    import zarr
    from numpy.typing import NDArray

    from pipeline.matrix.keys import Keys
    from pipeline.plan.columns import Selection
    from pipeline.storage.concurrency import Sized

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
    # A shard that is wider than the rows has more inner chunks beside each of theirs.
    one_beside = array.shards is None or array.shards[1:] == array.chunks[1:]
    whole_rows = one_beside and all(
        chunk >= size for chunk, size in zip(array.chunks[1:], array.shape[1:], strict=True)
    )
    known = array.shards is None or files.index is not None
    through_array = ArrayReader(array, chunk_rows, row_nbytes, files)
    if not known or not whole_rows or chunk_decoder(array) is None:
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
    """Chunks of whole rows, read by their bytes, decoded in the calling thread.

    Zarr's own way to an array goes through one event-loop thread, and through one call for each run of adjacent
    chunks. Here every thread of Dask decodes for itself, and the kernel knows all ranges of the task beforehand; of a
    store, many are asked for at once.
    """

    array: zarr.Array[Any] = field(repr=False)
    files: Files | Keys
    chunk_rows: int
    row_nbytes: int
    selection: Selection | None = None
    """What is made of decoded rows; None: nothing."""

    def read_windows(
        self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]
    ) -> Reading:
        """Read windows; see `Reader.read_windows`."""
        windows = SortedWindows(starts, length, out, places, self.selection)
        touched = windows.touched(self.chunk_rows)
        decode = chunk_decoder(self.array)
        assert decode is not None
        rows, fill = self.array.shape[0], fill_value(self.array)
        inside = tuple(slice(size) for size in self.array.shape[1:])
        runs = _cut_runs(touched, max(1, _RUN_NBYTES // (self.chunk_rows * self.row_nbytes)))
        first_rows = np.array([run[0] for run in runs]) * self.chunk_rows
        bounds = windows.bounds(first_rows, np.array([run[-1] + 1 for run in runs]) * self.chunk_rows)
        most = max(map(len, runs))
        scratch = np.empty((most, *self.array.chunks), np.dtype(self.array.dtype).newbyteorder("="))
        nbytes_read, decode_seconds = 0, 0.0
        chunks = (
            self._read_files(touched, self.files) if isinstance(self.files, Files) else self._fetch(touched, self.files)
        )
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

    def _read_files(self, touched: NDArray[np.int64], files: Files) -> Iterator[_Encoded]:
        """Yield each chunk's encoded bytes, which hold until the next one; bytes read for it; its number and file.

        None stands for the bytes of a chunk that reads as the fill value.
        """
        chunks_per_file = files.file_extents
        numbers = touched // chunks_per_file
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(touched)]
        buffer = np.empty(0, np.uint8)
        spent = 0
        for group in range(0, len(edges) - 1, _OPEN_FILES):
            stops = edges[group : group + _OPEN_FILES + 1]
            with ExitStack() as opened:
                found = []
                for begin, end in pairwise(stops):
                    number = int(numbers[begin])
                    path = files.path(number)
                    name = files.name(path, number)
                    chunks = touched[begin:end]
                    if files.fills and files.is_absent(path):
                        found.append((-1, name, _join_ranges(chunks.tolist(), [_ABSENT] * len(chunks))))
                        continue
                    fd = open_file(path, name)
                    opened.callback(os.close, fd)
                    if files.index is None:
                        ranges = [(0, os.fstat(fd).st_size)]
                    else:
                        ranges = self._ranges(files.index.read(fd, name), chunks, name)
                        spent += files.index.nbytes
                    calls = _join_ranges(chunks.tolist(), ranges)
                    announce(fd, ((offset, nbytes) for offset, nbytes, _ in calls if nbytes >= 0))
                    found.append((fd, name, calls))
                for fd, name, calls in found:
                    for offset, nbytes, parts in calls:
                        if nbytes < 0:
                            yield None, spent, parts[0][0], name
                            spent = 0
                            continue
                        if nbytes > len(buffer):
                            buffer = np.empty(nbytes, np.uint8)
                        read_fully(fd, [memoryview(buffer[:nbytes])], offset, nbytes, name)
                        spent += nbytes
                        for chunk, begin, end in parts:
                            yield buffer[begin:end], spent, chunk, name
                            spent = 0

    def _fetch(self, touched: NDArray[np.int64], keys: Keys) -> Iterator[_Encoded]:
        """Yield each chunk of a store as `_read_files` does; requests for those to come are under way."""
        spent = 0
        with closing(in_order(self._requests(touched, keys), most_nbytes=IN_FLIGHT_NBYTES)) as results:
            for (read, nbytes), name, parts in results:
                spent += nbytes
                for chunk, begin, end in parts:
                    yield None if read is None else read[begin:end], spent, chunk, name
                    spent = 0

    def _requests(self, touched: NDArray[np.int64], keys: Keys) -> Iterator[Sized[_Fetched]]:
        """Yield the requests for chunks; where they lie in shards, the indexes of these are read ahead."""
        numbers = touched // keys.file_extents
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(touched)]
        parts = [(int(numbers[begin]), touched[begin:end]) for begin, end in pairwise(edges)]
        if keys.index is None:
            decoded_nbytes = self.chunk_rows * self.row_nbytes
            for number, [chunk] in parts:
                yield decoded_nbytes, partial(_fetch_file, keys, number, int(chunk))
            return
        sized = ((keys.index.nbytes, partial(keys.fetch_index, keys.path(number), number)) for number, _ in parts)
        with closing(in_order(sized, most_nbytes=IN_FLIGHT_NBYTES)) as indexes:
            for (number, chunks), (index, index_nbytes) in zip(parts, indexes, strict=True):
                name = keys.name(keys.path(number), number)
                ranges = self._ranges(index, chunks, name)
                calls = _join_ranges(chunks.tolist(), ranges, gap=JOINED_NBYTES, most=REQUEST_NBYTES)
                for place, call in enumerate(calls):
                    spent = 0 if place else index_nbytes
                    yield max(0, call[1]), partial(_fetch_range, keys, number, call, name, spent)

    def _ranges(self, index: NDArray[np.int64], chunks: NDArray[np.int64], name: str) -> list[tuple[int, int]]:
        """Offset and size of chunks within their shard, or `_ABSENT`."""
        entries = index[chunks % self.files.file_extents]
        absent = np.flatnonzero(entries[:, 1] < 0)
        if len(absent) and not self.files.fills:
            chunk = int(chunks[absent[0]])
            raise IntegrityError(f"every chunk is there; {self._name(name, chunk)} is absent; restore the shard")
        return [(offset, nbytes) for offset, nbytes in entries.tolist()]

    def _name(self, name: str, chunk: int) -> str:
        if self.files.index is None:
            return name
        first = chunk * self.chunk_rows
        return f"the inner chunk of rows {first} to {first + self.chunk_rows - 1} in {name}"


_ABSENT = (-1, -1)
"""Range of a chunk that is not there, as the index of a shard gives it."""

type _Parts = list[tuple[int, int, int]]
"""The number of each chunk with its first byte within those that are read together, and its end."""

type _Call = tuple[int, int, _Parts]
"""Offset in the file, and bytes in all."""

type _Encoded = tuple[NDArray[np.uint8] | None, int, int, str]
"""A chunk's bytes, or None where it reads as the fill value; bytes read for it; its number and file."""

type _Fetched = tuple[tuple[NDArray[np.uint8] | None, int], str, _Parts]
"""What was read, and its bytes, those of an index among them; of which file; and its chunks."""


async def _fetch_file(keys: Keys, number: int, chunk: int) -> _Fetched:
    read = await keys.fetch_file(number)
    nbytes = 0 if read is None else len(read)
    return (read, nbytes), keys.name(keys.path(number), number), [(chunk, 0, nbytes)]


async def _fetch_range(keys: Keys, number: int, call: _Call, name: str, index_nbytes: int) -> _Fetched:
    offset, nbytes, parts = call
    if nbytes < 0:
        return (None, index_nbytes), name, parts
    # Codecs may make nothing of nothing.
    read = await keys.fetch(number, offset, nbytes) if nbytes else np.empty(0, np.uint8)
    return (read, nbytes + index_nbytes), name, parts


def _join_ranges(
    chunks: list[int], ranges: list[tuple[int, int]], *, gap: int = GAP_NBYTES, most: int = _CALL_NBYTES
) -> list[_Call]:
    """Join chunks that follow each other in a file, or nearly, into one call each; those that are absent stay alone."""
    calls: list[_Call] = []
    for chunk, (offset, nbytes) in zip(chunks, ranges, strict=True):
        if calls and nbytes >= 0 and calls[-1][1] >= 0:
            start, total, joined = calls[-1]
            if 0 <= offset - start - total <= gap and offset + nbytes - start <= most:
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

    array: zarr.Array[Any] = field(repr=False)
    chunk_rows: int
    row_nbytes: int
    files: Files | Keys
    selection: Selection | None = None
    """What is made of decoded rows; None: nothing."""

    def read_windows(
        self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]
    ) -> Reading:
        """Read windows; see `Reader.read_windows`."""
        from pipeline.readers.counting import count_reads

        windows = SortedWindows(starts, length, out, places, self.selection)
        touched = windows.touched(self.chunk_rows)
        self._check_files(touched)
        index_nbytes = self._check_inner_chunks(touched)
        array, store = count_reads(self.array)
        decode_seconds, began = 0.0, time.perf_counter()
        with closing(self._read_parts(array, _cut_parts(touched, self.chunk_rows, self._part_rows()))) as parts:
            for first, stop, rows in parts:
                decode_seconds += time.perf_counter() - began
                [bound] = windows.bounds(np.array([first]), np.array([stop]))
                windows.copy(rows, first, bound)
                began = time.perf_counter()
        return Reading(index_nbytes + store.nbytes, decode_seconds)

    def _part_rows(self) -> int:
        """Rows that are decoded in one call, of whole chunks; of a store, parts of the task are under way at once."""
        nbytes = READ_NBYTES if isinstance(self.files, Files) else REQUEST_NBYTES
        return self.chunk_rows * max(1, nbytes // (self.chunk_rows * self.row_nbytes))

    def _read_parts(
        self, array: zarr.Array[Any], parts: list[tuple[int, int]]
    ) -> Generator[tuple[int, int, NDArray[Any]]]:
        """Decode runs of rows [first, stop), and yield them with their rows, in any order."""
        if not self._whole or _is_here(self.array):
            for first, stop in parts:
                yield first, stop, self._decode(array, first, min(stop, array.shape[0]))
            return
        sized = (
            ((stop - first) * self.row_nbytes, partial(_decode_apart, array, first, stop)) for first, stop in parts
        )
        with closing(in_flight(sized, most_nbytes=READ_NBYTES)) as results:
            for first, stop, rows in results:
                if isinstance(rows, Exception):
                    if is_store_failure(rows):
                        raise self._failure(first, rows) from plain(rows)
                    # Read again, to find the chunk.
                    rows = self._decode(array, first, min(stop, array.shape[0]))  # noqa: PLW2901
                yield first, stop, rows

    @property
    def _whole(self) -> bool:
        """Whether no chunk that is absent reads as the fill value, unless that is meant."""
        return self.files.fills or self.files.index is not None or not may_lack_chunks(self.array)

    def _decode(self, array: zarr.Array[Any], first: int, stop: int) -> NDArray[Any]:
        try:
            return read_present(array, (slice(first, stop),), checked=self._whole)
        except IntegrityError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (a codec raises what it likes)
            if stop - first > self.chunk_rows:
                # One of several chunks: find it, and name it alone.
                for row in range(first, stop, self.chunk_rows):
                    self._decode(array, row, min(row + self.chunk_rows, stop))
            raise self._failure(first, error) from plain(error)

    def _failure(self, first: int, error: Exception) -> PipelineError:
        number = first // self.files.file_rows
        name = self.files.name(self.files.path(number), number)
        if not isinstance(self.files, Files) and (is_store_failure(error) or isinstance(error, PipelineError)):
            return store_error("a chunk can be read", name, error)
        return find_shortage(error) or IntegrityError(
            f"every chunk is there and can be decoded; {name}: {say_failure(error)}; restore it"
        )

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


def _cut_parts(touched: NDArray[np.int64], chunk_rows: int, most_rows: int) -> list[tuple[int, int]]:
    """Cut ascending chunks into runs [first, stop) of rows, of `most_rows` at most."""
    runs = _cut_runs(touched, most_rows // chunk_rows)
    return [(int(run[0]) * chunk_rows, (int(run[-1]) + 1) * chunk_rows) for run in runs]


async def _decode_apart(array: zarr.Array[Any], first: int, stop: int) -> tuple[int, int, NDArray[Any] | Exception]:
    """Decode a run of rows on Zarr's event loop; in their place, why that fails."""
    try:
        rows = await array.async_array.getitem((slice(first, min(stop, array.shape[0])),))
    except Exception as error:  # noqa: BLE001 (a codec raises what it likes)
        return first, stop, error
    return first, stop, np.asarray(rows)


def _is_here(array: zarr.Array[Any]) -> bool:
    """Whether a store answers at once, in the thread that asks."""
    from zarr.storage import LocalStore, MemoryStore

    return isinstance(array.store, LocalStore | MemoryStore)


class SortedWindows:
    """Windows by start, to which runs of matrix rows are copied: a view of a request, made once a task."""

    def __init__(
        self,
        starts: NDArray[np.int64],
        length: int,
        out: NDArray[Any],
        places: NDArray[np.int64],
        selection: Selection | None,
    ) -> None:
        ascending = np.argsort(starts, kind="stable")
        self._starts, self._places = starts[ascending], places[ascending]
        self._start_list, self._place_list = self._starts.tolist(), self._places.tolist()
        self._length, self._out, self._selection = length, out, selection

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
        if self._selection is not None:
            numbers = partial(self._asked, first, first + len(rows))
            rows = np.ascontiguousarray(self._selection.take(rows, numbers))
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

    def _asked(self, first: int, stop: int) -> NDArray[np.int64]:
        return asked_rows(self._starts, self._length, np.arange(first, stop))


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
