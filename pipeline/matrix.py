"""The matrix: rows in a Zarr array, or in files read in place, and what is known of it without reading its data."""

from __future__ import annotations

import html
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.arrays import locate_array, open_array, open_stored, reading_config
from pipeline.errors import InputError, OpenError
from pipeline.hdf5 import Hdf5Source
from pipeline.layout import Layout, PlainFiles, read_layout
from pipeline.locations import Url, locate, name_store
from pipeline.record import ATTRIBUTE
from pipeline.sizes import count_of, format_size
from pipeline.sources import (
    FILE_SUFFIXES,
    FileSource,
    StackedSource,
    ZarrSource,
    is_numeric,
    open_source,
    refuse_options,
    split_name,
)

if TYPE_CHECKING:
    import zarr
    from numpy.typing import DTypeLike, NDArray
    from zarr.abc.store import Store

    from pipeline.sources import Source

MissingChunks = Literal["error", "fill"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Matrix:
    """A matrix on disk: numbers, and what holds them. Picklable; opening it reads no data."""

    path: str
    """Where it lies, as the user named it."""
    shape: tuple[int, ...]
    """(rows, *row_shape)."""
    dtype: np.dtype[Any]
    """Of the values as delivered: native byte order."""
    layout: Layout
    parts: NDArray[np.int64] | None
    """(m, 2), [first, stop) rows of each source that was stacked; None where there was one."""
    array: zarr.Array[Any] | None
    """None where files are read in place."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.shape[1:]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row in memory."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix in memory."""
        return self.rows * self.row_nbytes

    @property
    def chunk_rows(self) -> int:
        """Rows of one chunk, or of one inner chunk where there are shards."""
        return self.layout.chunk_rows

    def check_length(self, length: int) -> int:
        """Return `length` as an int, or raise InputError where no window of it fits."""
        if isinstance(length, bool) or not isinstance(length, int | np.integer):
            raise InputError(f"length is a whole number of rows; got {length!r}; give 1 to {self.rows}")
        if not 1 <= length <= self.rows:
            raise InputError(f"a window lies inside the matrix; got length {length}; give 1 to {self.rows} rows")
        return int(length)

    def inputs(self) -> list[Path | Url]:
        """Files, folders and URLs that reading depends on: no output may touch them."""
        if isinstance(self.layout.files, PlainFiles):
            return [stamp.path for stamp in self.layout.files.stamps]
        assert self.array is not None
        place = locate_array(self.array)
        return [] if place is None else [place]

    def count_files(self) -> tuple[int, int, int]:
        """Files of the matrix that are there, those there should be, and the bytes that the former take."""
        return self.layout.files.count()

    def facts(self) -> dict[str, str]:
        """What a person wants to know, as words."""
        layout = self.layout
        unit = f"{layout.chunk_rows:,} rows ({format_size(layout.chunk_rows * self.row_nbytes)})"
        facts = {
            "shape": f"({', '.join(f'{size:,}' for size in self.shape)})",
            "dtype": f"{self.dtype.name}, {layout.byteorder}-endian on disk",
            "size": format_size(self.nbytes),
            "row": format_size(self.row_nbytes),
            "chunks": unit,
        }
        if layout.shard_rows:
            shards = -(-self.rows // layout.shard_rows)
            facts["chunks"] = f"{unit} in {count_of(shards, 'shard')} of {layout.shard_rows:,} rows"
        if isinstance(layout.files, PlainFiles):
            facts["chunks"] = f"none: {count_of(len(layout.files.stamps), 'file')} read in place"
        facts["codecs"] = " + ".join(layout.codecs) or "none"
        facts["reader"] = layout.reader
        if self.parts is not None:
            facts["parts"] = f"{len(self.parts)}"
        return facts

    def __repr__(self) -> str:
        facts = self.facts()
        return f"Matrix({self.path!r}: " + "; ".join(f"{key} {value}" for key, value in facts.items()) + ")"

    def _repr_html_(self) -> str:
        return html_table(f"Matrix {self.path}", self.facts())


def html_table(title: str, facts: dict[str, str]) -> str:
    """Two columns of words for a notebook, every text escaped."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(key)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for key, value in facts.items()
    )
    caption = f"<caption style='text-align:left; font-weight:bold; padding:4px'>{html.escape(title)}</caption>"
    return f"<table>{caption}{cells}</table>"


def open_matrix(
    source: str | Path | Url | zarr.Array[Any] | Store | Sequence[str | Path],
    *,
    storage_options: Mapping[str, Any] | None = None,
    check_reads: bool = False,
    missing_chunks: MissingChunks = "error",
    dtype: DTypeLike | None = None,
    row_shape: Sequence[int] | None = None,
    dataset: str | None = None,
) -> Matrix:
    """Open a matrix, reading its metadata only.

    Parameters
    ----------
    source
        Path or URL (`s3://`, `gs://`, `az://`, `https://`, and what fsspec knows) of a Zarr array, v2 or v3, of at
        least one dimension and numeric dtype; or an open `zarr.Array`; or an open Zarr store with such an array at its
        root, such as that of an Icechunk session. Or a file that is read in place, since its rows lie as plain bytes:
        `.npy`, raw binary, HDF5 with a contiguous data set (`file.h5::dataset`). Several such files are stacked by
        rows, and their borders kept as `matrix.parts`.
    storage_options
        Of a URL, for the library that reads it (obstore, or fsspec): region, endpoint, credentials. They go to the
        workers. What is not given is taken from the environment, and for S3 from `~/.aws`, by each worker for itself.
    check_reads
        Whether to read every chunk that a window touches whole, or inner chunk of a shard, and check it against its
        checksum: a damaged one is then an error, never a wrong value.
    missing_chunks
        `"fill"`: chunks that a Zarr array lacks read as its fill value. Default: they are an error.
    dtype, row_shape
        Of raw binary, and of nothing else.
    dataset
        Name of the HDF5 data set, of each file; not needed where a file holds only one.

    Raises
    ------
    NotFoundError
        If nothing lies at the path; nothing is created there.
    OpenError
        If it is a Zarr group, or cannot be parsed, or is truncated; if it is a file whose rows cannot be read in place:
        in Fortran order, of another byte order, compressed or chunked.
    InputError
        If the array has no rows or no numbers, an argument does not fit the source, or parts do not agree; if reads
        cannot be checked, for want of checksums.

    Examples
    --------
    >>> import numpy, pipeline
    >>> folder = getfixture("tmp_path")
    >>> numpy.save(folder / "A.npy", numpy.arange(6.0).reshape(3, 2))
    >>> pipeline.open_matrix(folder / "A.npy").shape
    (3, 2)
    >>> matrix = pipeline.create_matrix(folder / "A.npy", folder / "A.zarr")
    >>> pipeline.open_matrix(folder / "A.zarr").shape
    (3, 2)
    """
    if missing_chunks not in ("error", "fill"):
        raise InputError(f"missing_chunks is error or fill; got {missing_chunks!r}; choose one")
    fills = missing_chunks == "fill"
    options = {"dtype": dtype, "row_shape": row_shape, "dataset": dataset}
    matrix = _open(source, storage_options, fills=fills, **options)
    if fills and matrix.array is None:
        raise InputError(f"missing chunks are those of a Zarr array; {matrix.path} is read in place; drop it")
    if check_reads and not matrix.layout.checksums:
        raise InputError(
            f"reads are checked against checksums; {matrix.path} has none; record them with: pipeline verify "
            f"--write-manifest, or make a matrix that has them with: pipeline create"
        )
    return replace(matrix, layout=matrix.layout.decode(fills=fills)) if check_reads or fills else matrix


def _open(source: Any, storage_options: Mapping[str, Any] | None, *, fills: bool, **options: Any) -> Matrix:
    if isinstance(source, str | Path | Url):
        place = locate(source, storage_options)
        if isinstance(place, Url):
            return _open_url(place, fills=fills, **options)
        path, name = split_name(str(place))
        if name is not None or (os.path.lexists(path) and not path.is_dir()):
            return _open_in_place(str(place) if "://" in str(source) else str(source), **options)
        matrix = _open_zarr(open_array(path), str(source), fills=fills)
    else:
        if storage_options:
            raise InputError("storage_options are for URLs; what is open already has its own; drop them")
        if isinstance(source, Sequence):
            return _open_in_place(source, **options)
        name = name_store(getattr(source, "store_path", source))
        matrix = _open_zarr(open_stored(source, name) if _is_store(source) else source, name, fills=fills)
    refuse_options(matrix.path, "a Zarr array, which has its own", **options)
    return matrix


def _open_url(url: Url, *, fills: bool, **options: Any) -> Matrix:
    from pipeline.stores import open_store

    given = [name for name, value in options.items() if value is not None]
    if given or url.suffix.lower() in FILE_SUFFIXES or "::" in url.name:
        raise OpenError(
            f"a file is read in place on a local disk; {url} is none; copy it to one, or make a matrix of the copy "
            "with: pipeline create"
        )
    return _open_zarr(open_stored(open_store(url, read_only=True), str(url)), str(url), fills=fills)


def _is_store(source: Any) -> bool:
    from zarr.abc.store import Store

    return isinstance(source, Store)


def _open_zarr(array: zarr.Array[Any], path: str, *, fills: bool) -> Matrix:
    import zarr

    if not isinstance(array, zarr.Array):
        raise InputError(
            f"a matrix is a path, several, or a zarr.Array; got {type(array).__name__}; save it with numpy.save"
        )
    array = reading_config(array, fills=fills)
    dtype = np.dtype(array.dtype)
    check_numeric(dtype, path)
    if not array.shape or 0 in array.shape:
        raise InputError(f"a matrix has rows, and rows have values; {path} has shape {array.shape}; give another array")
    try:
        layout = read_layout(array)
    except NotImplementedError as error:
        raise InputError(f"a matrix has chunks of one size; those of {path} vary; make one of it first") from error
    return Matrix(path, array.shape, dtype.newbyteorder("="), layout, _parts(array, path), array)


def _open_in_place(source: str | Path | Sequence[str | Path], **options: Any) -> Matrix:
    opened = open_source(source, **options)
    names = [str(each) for each in ([source] if isinstance(source, str | Path) else source)]
    files: list[FileSource] = []
    for name, each in zip(names, opened.sources if isinstance(opened, StackedSource) else [opened], strict=True):
        hindrance = _hindrance(each)
        if hindrance or not isinstance(each, FileSource):
            raise OpenError(
                f"what is read in place is a file of plain rows, in C order and this machine's byte order; "
                f"{name} {hindrance}; make a matrix of it with: pipeline create"
            )
        files.append(each)
    dtype = opened.dtype
    plain = PlainFiles(
        stamps=tuple(each.stamp for each in files),
        offsets=tuple(each.offset for each in files),
        borders=np.cumsum([0, *(each.shape[0] for each in files)], dtype=np.int64),
        row_nbytes=math.prod(opened.shape[1:]) * dtype.itemsize,
    )
    layout = Layout(
        reader="direct",
        chunk_rows=opened.shape[0],
        shard_rows=None,
        chunk_checksum=False,
        byteorder=sys.byteorder,
        codecs=(),
        checksums=False,
        files=plain,
    )
    parts = opened.parts if isinstance(opened, StackedSource) else None
    return Matrix(", ".join(names), opened.shape, dtype, layout, parts, None)


def _hindrance(source: Source) -> str | None:
    """Say why rows cannot be read where they lie; None if they can."""
    if isinstance(source, Hdf5Source):
        return "is an HDF5 data set in chunks" if source.data.chunks else "is an HDF5 data set that only h5py can read"
    if not isinstance(source, FileSource):
        return "is a Zarr array" if isinstance(source, ZarrSource) else "is no file"
    if source.fortran and sum(size > 1 for size in source.stored_shape) > 1:
        return "is in Fortran order"
    if not source.stored_dtype.isnative:
        return f"holds {source.stored_dtype.str}"
    end = source.offset + source.nbytes
    if source.alone and source.stamp.size != end:
        return f"has {source.stamp.size} bytes, {source.stamp.size - end} more than its header says"
    return None


def check_numeric(dtype: np.dtype[Any], path: str) -> None:
    """Raise InputError where values are no numbers that a matrix can hold."""
    if not is_numeric(dtype):
        raise InputError(
            f"a matrix holds numbers of at most 64 bits a component; {path} holds {dtype}; convert it first"
        )


def _parts(array: zarr.Array[Any], path: str) -> NDArray[np.int64] | None:
    ours = array.attrs.get(ATTRIBUTE)
    recorded = ours.get("parts") if isinstance(ours, dict) else None
    if recorded is None:
        return None
    try:
        parts = np.array(recorded, dtype=np.int64).reshape(-1, 2)
    except (ValueError, TypeError, OverflowError):
        parts = np.empty((0, 2), dtype=np.int64)
    borders = [0, *parts[:, 1].tolist()]
    if borders[:-1] != parts[:, 0].tolist() or borders[-1] != array.shape[0] or (parts[:, 0] >= parts[:, 1]).any():
        raise OpenError(
            f"parts follow one another from the first row to the last; those of {path} do not: {recorded!r}"
        )
    return parts
