"""Windows out of chunks that must be decoded whole: each once a task, copied to every window that has its rows."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import IntegrityError
from pipeline.plan import READ_NBYTES
from pipeline.preads import Reading, announce, open_file, read_fully
from pipeline.sources import read_present

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import zarr
    from numpy.typing import NDArray

    from pipeline.layout import Files

_OPEN_FILES = 64
"""Files that one task holds open at once; many tasks share a limit of 1,024."""
_COPIED_NBYTES = 2**20
"""Bytes of windows that are copied in one call: they pass through a temporary that should stay in the cache."""
_FEW_COPIES = 8
"""Up to as many windows are copied one by one; more at once, which costs a second copy."""


def decoding_reader(
    array: zarr.Array[Any], files: Files | None, chunk_rows: int, row_nbytes: int, *, row: int
) -> ChunkReader | ArrayReader:
    """Return the reader that decodes an array's chunks; reads the one of `row`, to see that it can."""
    whole_rows = all(chunk >= size for chunk, size in zip(array.chunks[1:], array.shape[1:], strict=True))
    known = files is not None and (array.shards is None or files.index is not None)
    through_array = ArrayReader(array, chunk_rows, row_nbytes, files)
    if files is None or not known or not whole_rows or chunk_decoder(array) is None:
        return through_array
    reader = ChunkReader(array, files, chunk_rows, row_nbytes)
    # Decoding a chunk alone is no public part of zarr: before it is trusted with all windows, both ways must agree.
    sample = np.empty((2, 1, *array.shape[1:]), np.dtype(array.dtype).newbyteorder("="))
    both: tuple[ChunkReader | ArrayReader, ...] = (reader, through_array)
    for place, either in enumerate(both):
        either.read_windows(np.array([row]), 1, sample, np.array([place]))
    return reader if sample[0].tobytes() == sample[1].tobytes() else through_array


type Decode = Callable[[bytearray], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ChunkReader:
    """Chunks of whole rows in local files: read by their bytes, decoded by zarr's codecs in the calling thread.

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
        rows = self.array.shape[0]
        inside = tuple(slice(size) for size in self.array.shape[1:])
        bounds = windows.bounds(touched * self.chunk_rows, (touched + 1) * self.chunk_rows)
        decode_seconds = 0.0
        for bound, (chunk, encoded, name) in zip(bounds, self._read_chunks(touched), strict=True):
            first = chunk * self.chunk_rows
            begin = time.perf_counter()
            try:
                decoded = decode(encoded)[: rows - first, *inside]
            except MemoryError:
                raise
            except Exception as error:  # a codec raises what it likes
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise IntegrityError(f"every chunk can be decoded; {name}: {reason}; restore it") from error
            decode_seconds += time.perf_counter() - begin
            windows.copy(decoded, first, bound)
        return Reading(len(touched) * self.chunk_rows * self.row_nbytes, decode_seconds)

    def _read_chunks(self, touched: NDArray[np.int64]) -> Iterator[tuple[int, bytearray, str]]:
        """Yield the number, the encoded bytes and the name of each chunk, some files at a time."""
        chunks_per_file = self.files.file_rows // self.chunk_rows
        numbers = touched // chunks_per_file
        borders = np.flatnonzero(np.diff(numbers)) + 1
        edges = [0, *borders.tolist(), len(touched)]
        for group in range(0, len(edges) - 1, _OPEN_FILES):
            stops = edges[group : group + _OPEN_FILES + 1]
            with ExitStack() as opened:
                found = []
                for begin, end in pairwise(stops):
                    number = int(numbers[begin])
                    path = self.files.path(number)
                    name = self.files.name(path, number)
                    fd = open_file(path, name)
                    opened.callback(os.close, fd)
                    ranges = self._ranges(fd, touched[begin:end] - number * chunks_per_file, number, name)
                    announce(fd, ranges)
                    found.append((fd, name, touched[begin:end].tolist(), ranges))
                for fd, name, chunks, ranges in found:
                    for chunk, (offset, nbytes) in zip(chunks, ranges, strict=True):
                        encoded = bytearray(nbytes)
                        read_fully(fd, [memoryview(encoded)], offset, nbytes, name)
                        yield chunk, encoded, self._name(name, chunk)

    def _ranges(self, fd: int, chunks: NDArray[np.int64], number: int, name: str) -> list[tuple[int, int]]:
        """Offset and size of chunks within their file."""
        if self.files.index is None:
            return [(0, os.fstat(fd).st_size)]
        index = self.files.index.read(fd, name)[chunks]
        absent = np.flatnonzero(index[:, 1] < 0)
        if len(absent):
            chunk = number * (self.files.file_rows // self.chunk_rows) + int(chunks[absent[0]])
            raise IntegrityError(f"every chunk is there; {self._name(name, chunk)} is absent; restore the shard")
        return [(offset, nbytes) for offset, nbytes in index.tolist()]

    def _name(self, name: str, chunk: int) -> str:
        if self.files.index is None:
            return name
        first = chunk * self.chunk_rows
        return f"the inner chunk of rows {first} to {first + self.chunk_rows - 1} in {name}"


@dataclass(frozen=True, slots=True)
class ArrayReader:
    """Everything else, as zarr reads it: chunks of columns, other stores, codecs that only run asynchronously."""

    array: zarr.Array[Any]
    chunk_rows: int
    row_nbytes: int
    files: Files | None

    def read_windows(
        self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]
    ) -> Reading:
        """Read windows; see `Reader.read_windows`."""
        windows = SortedWindows(starts, length, out, places)
        touched = windows.touched(self.chunk_rows)
        self._check_inner_chunks(touched)
        most = max(1, READ_NBYTES // (self.chunk_rows * self.row_nbytes))
        breaks = np.flatnonzero(np.diff(touched) != 1) + 1
        nbytes_read, decode_seconds = 0, 0.0
        for run in np.split(touched, breaks):
            for begin in range(0, len(run), most):
                first = int(run[begin]) * self.chunk_rows
                stop = (int(run[min(begin + most, len(run)) - 1]) + 1) * self.chunk_rows
                nbytes_read += (stop - first) * self.row_nbytes
                began = time.perf_counter()
                rows = self._decode(first, min(stop, self.array.shape[0]))
                decode_seconds += time.perf_counter() - began
                [bound] = windows.bounds(np.array([first]), np.array([stop]))
                windows.copy(rows, first, bound)
        return Reading(nbytes_read, decode_seconds)

    def _decode(self, first: int, stop: int) -> NDArray[Any]:
        try:
            checked = self.files is not None and self.files.index is not None
            return read_present(self.array, (slice(first, stop),), checked=checked)
        except IntegrityError:
            raise
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


def chunk_decoder(array: zarr.Array[Any]) -> Decode | None:
    """Return a function from a chunk's encoded bytes to its values (chunk_rows, ...), with zarr's own codecs.

    For an array in shards: of an inner chunk. None where zarr cannot decode a chunk without its event loop.
    """
    from zarr.codecs import ShardingCodec
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.codec_pipeline import FusedCodecPipeline
    from zarr.core.metadata.v2 import ArrayV2Metadata

    if isinstance(array.metadata, ArrayV2Metadata) and array.metadata.order != "C":
        return None
    prototype = default_buffer_prototype()
    spec = ArraySpec(array.chunks, array.metadata.dtype, array.fill_value, array.config, prototype)
    pipeline = array.async_array.codec_pipeline
    if array.shards is not None:
        [sharding] = array.metadata.codecs if hasattr(array.metadata, "codecs") else [None]
        if not isinstance(sharding, ShardingCodec):
            return None
        pipeline = FusedCodecPipeline.from_codecs(sharding.codecs).evolve_from_array_spec(spec)
    transform = getattr(pipeline, "sync_transform", None)
    if transform is None or array.order != "C":
        return None

    def decode(encoded: bytearray) -> NDArray[Any]:
        buffer = prototype.buffer.from_array_like(np.frombuffer(encoded, np.uint8))
        return np.asarray(transform.decode_chunk(buffer, spec).as_numpy_array()).reshape(array.chunks)

    return decode


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
        if end - begin > _FEW_COPIES and rows.dtype == out.dtype:
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
    counts = last - first + 1
    steps = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.unique(np.repeat(first, counts) + steps)


def _read_index(files: Files, path: str, number: int) -> NDArray[np.int64]:
    assert files.index is not None
    fd = open_file(path, files.name(path, number))
    try:
        return files.index.read(fd, files.name(path, number))
    finally:
        os.close(fd)
