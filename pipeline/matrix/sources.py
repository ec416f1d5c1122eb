"""Sources that are read by rows: plain numbers in files, Zarr arrays, random numbers, and stacks of sources."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import IntegrityError, find_shortage
from pipeline.matrix.arrays import (
    local_folder,
    read_present,
)
from pipeline.matrix.attributes import array_labels
from pipeline.matrix.conventions import Labels, common_labels
from pipeline.storage.files import FileStamp, check_rows, read_runs
from pipeline.storage.locations import is_store_failure, name_store, plain, say_failure, store_error

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

RANDOM_ROWS = 1024
"""Rows that one key of the random generator serves; the values depend on it."""


class Source(Protocol):
    """Rows that a matrix is made from.

    Picklable; files are opened where rows are read, and any number of threads may read.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape), whatever the axis in the file."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """A number or boolean in native byte order."""

    @property
    def chunk_rows(self) -> int:
        """Rows that are decoded to read one row; 1 where single rows can be read."""

    @property
    def nbytes(self) -> int:
        """Stored size of the data."""

    @property
    def labels(self) -> Labels:
        """Attributes and names of the dimensions, the dimension of the rows first."""

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows [start, stop) as a new array, not always in C order.

        Raises
        ------
        IntegrityError
            If the data are not, or no longer, what they were when the source was opened.
        IndexError
            If not ``0 <= start <= stop <= rows``.
        """


@dataclass(frozen=True, slots=True)
class FileSource:
    """Plain numbers at one offset of a file: `.npy`, raw binary, a contiguous HDF5 data set."""

    stamp: FileStamp
    offset: int
    """Byte of the file at which the numbers begin."""
    stored_shape: tuple[int, ...]
    """Shape of the array in the file."""
    stored_dtype: np.dtype[Any]
    """In the byte order of the file."""
    fortran: bool
    """The first index varies fastest."""
    axis: int
    """Axis of `stored_shape` that holds the rows; not negative."""
    alone: bool
    """The file should end where the numbers do."""
    stored_labels: Labels | None = field(default=None, compare=False)
    """Attributes and names of the dimensions; None where the format has none."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape)."""
        return _put_first(self.stored_shape, self.axis)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Native byte order."""
        return self.stored_dtype.newbyteorder("=")

    @property
    def chunk_rows(self) -> int:
        """1: single rows can be read."""
        return 1

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize

    @property
    def labels(self) -> Labels:
        """Labels of the file; none for `.npy` and raw binary."""
        return _no_labels(self.shape) if self.stored_labels is None else self.stored_labels.first(self.axis)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows [start, stop); read, not mapped, so that a truncated file is an error and not SIGBUS."""
        check_rows(start, stop, self.shape[0])
        self.stamp.check()
        # A Fortran array is a C array with its axes reversed.
        axes = len(self.stored_shape)
        on_disk = list(reversed(self.stored_shape) if self.fortran else self.stored_shape)
        axis = axes - 1 - self.axis if self.fortran else self.axis
        row_bytes = math.prod(on_disk[axis + 1 :]) * self.stored_dtype.itemsize
        runs = np.empty((math.prod(on_disk[:axis]), (stop - start) * row_bytes), np.uint8)
        try:
            with self.stamp.path.open("rb", buffering=0) as file:
                read_runs(file, runs, self.offset + start * row_bytes, self.shape[0] * row_bytes)
        except OSError as error:
            raise IntegrityError(
                f"rows [{start}, {stop}) of {self.stamp.path} cannot be read: {error.strerror}; restore the file"
            ) from error
        on_disk[axis] = stop - start
        block = runs.reshape(-1).view(self.stored_dtype).reshape(on_disk)
        if not self.stored_dtype.isnative:
            block = block.byteswap(inplace=True).view(self.dtype)
        return np.moveaxis(block.T if self.fortran else block, self.axis, 0)


@dataclass(frozen=True, slots=True, eq=False)
class ZarrSource:
    """Rows of a Zarr array."""

    array: zarr.Array[Any]
    axis: int
    """Axis of the array that holds the rows; not negative."""
    chunk_rows: int
    """Rows of what zarr reads and decodes in one go: an inner chunk of a shard, else a chunk."""
    nbytes: int
    """Bytes in the store."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape)."""
        return _put_first(self.array.shape, self.axis)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Native byte order."""
        return np.dtype(self.array.dtype).newbyteorder("=")

    @property
    def labels(self) -> Labels:
        """Labels of the array."""
        return array_labels(self.array).first(self.axis)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows [start, stop); a missing chunk is an error, not zeros."""
        check_rows(start, stop, self.shape[0])
        try:
            block = read_present(self.array, (slice(None),) * self.axis + (slice(start, stop),))
        except (MemoryError, IntegrityError):
            raise
        except Exception as error:  # noqa: BLE001 (a codec raises what it likes)
            name = name_store(self.array.store_path)
            if local_folder(self.array) is None and is_store_failure(error):
                raise store_error("a source can be read", f"rows [{start}, {stop}) of {name}", error) from plain(error)
            raise find_shortage(error) or IntegrityError(
                f"rows [{start}, {stop}) of {name} cannot be read ({say_failure(error)}); restore the array, or write "
                "it again with write_empty_chunks=True"
            ) from plain(error)
        rows: NDArray[Any] = np.moveaxis(block, self.axis, 0).astype(self.dtype, copy=False)
        return rows


@dataclass(frozen=True, slots=True)
class RandomSource:
    """Uniform numbers in [0, 1) that depend on seed and position only, not on how they are read.

    Examples
    --------
    >>> source = RandomSource((5000, 3), np.dtype("f8"), seed=7)
    >>> bool((source.read_rows(0, 5000)[1020:1030] == source.read_rows(1020, 1030)).all())
    True
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    seed: int

    @property
    def chunk_rows(self) -> int:
        """1: single rows can be drawn."""
        return 1

    @property
    def nbytes(self) -> int:
        """0: nothing is stored."""
        return 0

    @property
    def labels(self) -> Labels:
        """Always empty."""
        return _no_labels(self.shape)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Draw rows [start, stop)."""
        check_rows(start, stop, self.shape[0])
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        dtype: type[np.float32 | np.float64] = np.float32 if self.dtype == np.float32 else np.float64
        # One step of Philox's counter makes 32 bytes.
        numbers = 32 // self.dtype.itemsize
        for block in range(start // RANDOM_ROWS, -(-stop // RANDOM_ROWS)):
            first, last = max(start, block * RANDOM_ROWS), min(stop, (block + 1) * RANDOM_ROWS)
            skipped = (first - block * RANDOM_ROWS) * math.prod(self.shape[1:])
            bits = np.random.Philox(key=np.array([self.seed, block], np.uint64))
            bits.advance(skipped // numbers)
            generator = np.random.Generator(bits)
            generator.random(skipped % numbers, dtype=dtype)
            generator.random(out=out[first - start : last - start], dtype=dtype)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class StackedSource:
    """Sources of one row shape and dtype, concatenated along the rows."""

    sources: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows of all parts, *row_shape)."""
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Native byte order."""
        return self.sources[0].dtype

    @property
    def chunk_rows(self) -> int:
        """The largest of all parts."""
        return max(source.chunk_rows for source in self.sources)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(source.nbytes for source in self.sources)

    @property
    def labels(self) -> Labels:
        """Labels that all parts share."""
        return common_labels([source.labels for source in self.sources])

    @property
    def parts(self) -> NDArray[np.int64]:
        """(m, 2) rows [first, stop) of each part."""
        stops = np.cumsum([source.shape[0] for source in self.sources], dtype=np.int64)
        return np.stack([np.concatenate([[0], stops[:-1]]), stops], axis=1)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows [start, stop) from the parts that hold them."""
        check_rows(start, stop, self.shape[0])
        parts = self.parts
        touched: list[int] = np.flatnonzero((parts[:, 0] < stop) & (parts[:, 1] > start)).tolist()
        if len(touched) == 1:
            first = int(parts[touched[0], 0])
            return self.sources[touched[0]].read_rows(start - first, stop - first)
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for i in touched:
            first, last = (int(row) for row in np.clip(parts[i], start, stop))
            offset = int(parts[i, 0])
            out[first - start : last - start] = self.sources[i].read_rows(first - offset, last - offset)
        return out


def _no_labels(shape: tuple[int, ...]) -> Labels:
    return Labels({}, (None,) * len(shape))


def _put_first(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (shape[axis], *shape[:axis], *shape[axis + 1 :])
