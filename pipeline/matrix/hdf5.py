"""Rows of HDF5 data sets, decoded on all cores where the one lock of libhdf5 allows it.

h5py takes a global lock around everything, decompression included. Three ways to read, by what the file says:

- A contiguous data set is plain bytes at an offset of the file: `describe` reports the offset and h5py is not needed.
- Chunks with well-known filters: only the compressed bytes are fetched under the lock; they are decoded outside of it.
- h5py reads anything else under its lock: other filters (plug-ins too), virtual data sets, external links, chunks that
  were never written, chunks at the edge that skip the filters. Worker processes (`connect(workers=4)`) have one each.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import InputError, IntegrityError, NotFoundError, OpenError, PipelineError
from pipeline.formatting import list_some
from pipeline.matrix.decompress import ExcessError
from pipeline.matrix.hdf5_filters import (
    FAILURES,
    absent_filters,
    can_decode,
    check_filters,
    filter_error,
    filters_edges,
    load_plugins,
    read_stored,
    refuse_excess,
    undo_filter,
)
from pipeline.matrix.hdf5_references import Reference, find_references, hold, open_hdf5
from pipeline.matrix.netcdf import read_labels
from pipeline.storage.files import FileStamp, check_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.matrix.conventions import Labels

_PIECE_BYTES = 4 << 20
"""Bytes that h5py reads in one call: other threads wait for its lock only so long."""


@dataclass(frozen=True, slots=True)
class Hdf5Dataset:
    """What a file says of one data set."""

    stamp: FileStamp
    """The file."""
    references: tuple[Reference, ...]
    """Other files that values come from, such as those of a virtual data set."""
    name: str
    """Path of the data set in the file."""
    shape: tuple[int, ...]
    """As in the file."""
    dtype: np.dtype[Any]
    """As in the file, either byte order."""
    offset: int | None
    """Byte of the file at which a contiguous data set begins; None for every other."""
    chunks: tuple[int, ...] | None
    """Shape of a chunk; None if the data set has no chunks of its own."""
    filters: tuple[tuple[int, int], ...] | None
    """(identifier, first parameter) in the order of writing; None if only h5py can read the data set."""
    edges_filtered: bool
    """Whether chunks that reach past the edge are known to be filtered like all others."""
    nbytes: int
    """Bytes that the data take in the file."""
    labels: Labels = field(compare=False)


@dataclass(frozen=True, slots=True)
class Hdf5Source:
    """Rows of a data set that is chunked, or that only h5py can read."""

    data: Hdf5Dataset
    axis: int
    """Axis of the data set that holds the rows; not negative."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape)."""
        shape = self.data.shape
        return (shape[self.axis], *shape[: self.axis], *shape[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Native byte order."""
        return self.data.dtype.newbyteorder("=")

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        return min(self.data.chunks[self.axis], self.shape[0]) if self.data.chunks else 1

    @property
    def nbytes(self) -> int:
        """Bytes that the data take in the file."""
        return self.data.nbytes

    @property
    def labels(self) -> Labels:
        """What the file says beside the values; the name of the rows is the first."""
        return self.data.labels.first(self.axis)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop); each chunk is read and decoded once.

        Raises
        ------
        IntegrityError
            If the file changed since it was opened, or a chunk cannot be read or decoded.
        OpenError
            If a filter of HDF5 is not available in this process.
        IndexError
            If not ``0 <= start <= stop <= rows``.
        """
        check_rows(start, stop, self.shape[0])
        self.data.stamp.check()
        if self.data.filters is not None:
            return self._decode_rows(start, stop)
        data = self.data
        with open_hdf5(data.stamp.path) as file, hold(file, data.name, data.references, self.axis, start, stop):
            return self._ask_rows(file, start, stop)

    def _ask_rows(self, file: Any, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop), by h5py alone."""
        axis = self.axis
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        row_nbytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        # Cut where chunks end, so that none is decoded twice.
        step = self.chunk_rows * max(1, _PIECE_BYTES // (row_nbytes * self.chunk_rows))
        cuts = [start, *range(start // step * step + step, stop, step), stop]
        dataset = file[self.data.name]
        for first, last in itertools.pairwise(cuts):
            where = [slice(0, size) for size in self.data.shape]
            where[axis] = slice(first, last)
            block = self._ask(file, dataset, tuple(where), f"rows [{start}, {stop})")
            out[first - start : last - start] = np.moveaxis(block, axis, 0)
        return out

    def _decode_rows(self, start: int, stop: int) -> NDArray[Any]:
        data, axis = self.data, self.axis
        assert data.chunks is not None
        shape = list(data.shape)
        shape[axis] = stop - start
        out = np.empty(shape, self.dtype)
        grid = [range(0, size, chunk) for size, chunk in zip(data.shape, data.chunks, strict=True)]
        chunk_rows = data.chunks[axis]
        grid[axis] = range(start // chunk_rows * chunk_rows, stop, chunk_rows)
        with open_hdf5(data.stamp.path) as file:
            dataset = file[self.data.name]
            for corner in itertools.product(*grid):
                # In a frame of the data set: where the chunk lies, and the part of it that was asked for.
                stops = [min(c + n, size) for c, n, size in zip(corner, data.chunks, data.shape, strict=True)]
                first, last = max(corner[axis], start), min(stops[axis], stop)
                target = [slice(c, s) for c, s in zip(corner, stops, strict=True)]
                target[axis] = slice(first - start, last - start)
                part = [slice(0, s - c) for c, s in zip(corner, stops, strict=True)]
                part[axis] = slice(first - corner[axis], last - corner[axis])
                out[tuple(target)] = self._read_part(file, dataset, corner, part)
        return np.moveaxis(out, axis, 0)

    def _read_part(self, file: Any, dataset: Any, corner: tuple[int, ...], part: Sequence[slice]) -> NDArray[Any]:
        """Return a part of a chunk: decoded here, or by h5py where the chunk is absent or is stored in another way."""
        data = self.data
        assert data.chunks is not None
        what = f"the chunk at {corner}"
        failure: Exception | None = None
        if data.edges_filtered or all(
            c + n <= size for c, n, size in zip(corner, data.chunks, data.shape, strict=True)
        ):
            try:
                chunk = self._read_chunk(dataset, corner)
            except IntegrityError:
                raise
            except ExcessError as error:
                raise self._broken(what, error) from error
            except FAILURES as error:
                failure = error
            else:
                if chunk is not None:
                    return chunk[tuple(part)]
        where = tuple(slice(c + p.start, c + p.stop) for c, p in zip(corner, part, strict=True))
        try:
            return self._ask(file, dataset, where, what)
        except PipelineError:
            if failure is None:
                raise
            raise self._broken(what, failure) from failure

    def _ask(self, file: Any, dataset: Any, where: tuple[slice, ...], what: str) -> NDArray[Any]:
        """Read a part of the data set by h5py, under its lock."""
        load_plugins(dataset)
        try:
            refuse_excess(file, self.data.name, where)
            values: NDArray[Any] = dataset[where]
        except ExcessError as error:
            raise self._broken(what, error) from error
        except FAILURES as error:
            # Either a filter is not available, or the file is damaged.
            absent = absent_filters(file, self.data.name)
            if absent:
                raise filter_error(file, self.data.name, absent) from error
            raise self._broken(what, error) from error
        return values

    def _read_chunk(self, dataset: Any, corner: tuple[int, ...]) -> NDArray[Any] | None:
        """Return a whole decoded chunk, or None where its bytes cannot be fetched, as of one that was never written."""
        data = self.data
        assert data.filters is not None
        assert data.chunks is not None
        size = math.prod(data.chunks) * data.dtype.itemsize
        try:
            mask, raw = read_stored(dataset, corner, size)
        except (OSError, RuntimeError):
            return None
        for position, (identifier, parameter) in reversed(tuple(enumerate(data.filters))):
            if not mask >> position & 1:
                raw = undo_filter(identifier, parameter, raw, size)
        # libhdf5 would also read on, behind a chunk that is too short, and pass over what is too much.
        chunk: NDArray[Any] = np.frombuffer(raw, np.uint8)
        if chunk.nbytes != size:
            raise self._broken(f"the chunk at {corner}", f"it holds {chunk.nbytes} bytes instead of {size}")
        return chunk.view(data.dtype).reshape(data.chunks)

    def _broken(self, what: str, error: Exception | str) -> IntegrityError:
        text = " ".join(str(error).split())
        return IntegrityError(
            f"{what} of {self.data.stamp.path}::{self.data.name} cannot be read ({text}); restore the file"
        )


def describe(path: Path, name: str | None, *, outside_files: bool = False) -> Hdf5Dataset:
    """Read what a file says of one data set; no data are read.

    Parameters
    ----------
    path
        The file.
    name
        Path of the data set in it; None takes the only one.
    outside_files
        As of `find_references`.

    Raises
    ------
    NotFoundError
        If the file has no data set of that name.
    OpenError
        If h5py is not installed, or the file cannot be opened.
    InputError
        If `name` is None and the file does not hold exactly one data set of at least one dimension.
    """
    stamp = FileStamp.take(path)
    with open_hdf5(path) as file:
        import h5py

        try:
            if name is None:
                name = _find_only(file)
            references = find_references(file, name, outside_files=outside_files)
            dataset = file.get(name)
        except PipelineError:
            raise
        except (KeyError, OSError, RuntimeError) as error:
            raise OpenError(f"a data set must be readable; {path}::{name}: {error}; restore the file") from error
        if not isinstance(dataset, h5py.Dataset):
            raise NotFoundError(f"{path} has no data set {name!r}; {_list_names(_find_datasets(file))}")
        if dataset.shape is None:
            raise OpenError(f"a data set must hold values; {path}::{dataset.name} is empty; name another")
        plain = (
            not references and not dataset.is_virtual and h5py.h5t.py_create(dataset.dtype).equal(dataset.id.get_type())
        )
        properties = dataset.id.get_create_plist()
        offset = dataset.id.get_offset() if plain else None
        filters = [properties.get_filter(i) for i in range(properties.get_nfilters())]
        nbytes = dataset.id.get_storage_size()
        if not nbytes and not dataset.is_virtual and properties.fill_value_defined() == h5py.h5d.FILL_VALUE_UNDEFINED:
            raise OpenError(f"{path}::{name} was never written, and has no fill value; name another data set")
        # Where no chunk was ever written, h5py takes the size of one from memory that nobody has set.
        known = plain and dataset.chunks is not None and nbytes > 0 and can_decode(filters)
        if not known:
            check_filters(file, name, dataset)
        return Hdf5Dataset(
            stamp=stamp,
            references=references,
            name=name,
            shape=dataset.shape,
            # h5py hangs what it knows of enums, strings and references on the dtype.
            dtype=np.dtype(dataset.dtype.str) if dataset.dtype.kind in "biufc" else dataset.dtype,
            offset=offset,
            chunks=dataset.chunks,
            filters=tuple((f[0], f[2][0] if f[2] else 0) for f in filters) if known else None,
            edges_filtered=known and filters_edges(properties),
            nbytes=nbytes,
            labels=read_labels(dataset),
        )


def _find_only(file: Any) -> str:
    found = _find_datasets(file)
    if len(found) != 1:
        raise InputError(
            f"{file.filename} does not hold exactly one data set: {_list_names(found)}; write {file.filename}::NAME, "
            "or use --dataset NAME"
        )
    return f"/{found[0]}"


def _find_datasets(file: Any) -> list[str]:
    import h5py

    found: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim >= 1:
            found.append(name)

    file.visititems(visit)
    return found


def _list_names(names: Sequence[str]) -> str:
    if not names:
        return "it holds none"
    return f"it holds {list_some(names)}"
