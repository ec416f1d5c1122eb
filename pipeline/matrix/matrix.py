"""The matrix: rows in a Zarr array, or in files read in place, and what is known of it without reading its data."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pipeline.arguments import check_choice, check_flag, check_mapping, is_whole, show
from pipeline.errors import InputError, OpenError
from pipeline.formatting import count_of, format_size, html_table, list_some, text_line
from pipeline.matrix.arrays import locate_array, open_folder, open_root, reading_config, refuse_group
from pipeline.matrix.attributes import array_labels
from pipeline.matrix.conventions import ATTRIBUTE, say_scaling
from pipeline.matrix.formats import FILE_SUFFIXES, is_numeric, open_source, referred_files, refuse_options, split_name
from pipeline.matrix.hdf5 import Hdf5Source
from pipeline.matrix.layout import Layout, PlainFiles, read_layout
from pipeline.matrix.sources import FileSource, StackedSource, ZarrSource
from pipeline.storage.locations import Url, locate, name_store

if TYPE_CHECKING:
    import zarr
    from numpy.typing import DTypeLike, NDArray

    from pipeline.matrix.conventions import Labels
    from pipeline.matrix.sources import Source

_MOST_NAMED = 4
"""Files of one matrix that it names."""

_MOST_LOOKED_FOR = 1_000_000
"""Files, along the rows, among which the first that is not right is looked for."""

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
    labels: Labels
    """What is said of it beside its values; the name of the rows is the first."""

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

    @property
    def scaling(self) -> str:
        """Attributes of the CF conventions that would change the values, and are not applied; empty: there are none."""
        return say_scaling(self.labels.attributes, self.dtype)

    def check_length(self, length: int) -> int:
        """Return `length` as an int, or raise InputError where no window of it fits."""
        if not is_whole(length) or not 1 <= length <= self.rows:
            raise InputError(f"a window lies inside the matrix; got length {show(length)}; give 1 to {self.rows} rows")
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

    def find_problem(self) -> str:
        """Say which file is the first that is absent, or of a wrong size; empty where none is found."""
        files = self.layout.files
        if isinstance(files, PlainFiles):
            return ""
        problem = files.find_problem(np.arange(min(files.grid[0], _MOST_LOOKED_FOR)))
        return "" if problem is None else f"{problem.name} {problem.words}"

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
        if self.scaling:
            facts["scaling"] = self.scaling
        return facts

    def __repr__(self) -> str:
        return text_line(f"Matrix({self.path!r})", self.facts())

    def _repr_html_(self) -> str:
        return html_table(f"Matrix {self.path}", self.facts())


class FoundGroup(NamedTuple):
    """A Zarr group that was found where a matrix was looked for."""

    group: zarr.Group
    name: str
    """As the user named it."""
    place: str | Url | None
    """Folder or URL; None where the user had opened it."""


def open_single(source: Any, **options: Any) -> Matrix:
    """Open one matrix; `source` and `options` as for `open_matrix`, and OpenError where there is a group of arrays."""
    found = open_found(source, **options)
    return found if isinstance(found, Matrix) else refuse_group(found.group, found.name)


def open_found(
    source: Any,
    *,
    storage_options: Mapping[str, Any] | None = None,
    check_reads: bool = False,
    missing_chunks: MissingChunks = "error",
    dtype: DTypeLike | None = None,
    row_shape: Sequence[int] | None = None,
    dataset: str | None = None,
) -> Matrix | FoundGroup:
    """Open what is there: one matrix, or a group; see `open_matrix`."""
    check_choice("missing_chunks", missing_chunks, ("error", "fill"))
    check_flag("check_reads", check_reads)
    fills = missing_chunks == "fill"
    options = {"dtype": dtype, "row_shape": row_shape, "dataset": dataset}
    matrix = _open(source, storage_options, fills=fills, **options)
    if isinstance(matrix, FoundGroup):
        return matrix
    if fills and matrix.array is None:
        raise InputError(f"missing chunks are those of a Zarr array; {matrix.path} is read in place; drop it")
    if check_reads and not matrix.layout.checksums:
        raise InputError(
            f"reads are checked against checksums; {matrix.path} has none; record them with: pipeline verify "
            f"--write-manifest, or make a matrix that has them with: pipeline create SOURCE DEST"
        )
    return replace(matrix, layout=matrix.layout.decode(fills=fills)) if check_reads or fills else matrix


def _open(
    source: Any, storage_options: Mapping[str, Any] | None, *, fills: bool, **options: Any
) -> Matrix | FoundGroup:
    node: Any
    place: str | Url | None = None
    if isinstance(source, str | Path | Url):
        location = locate(source, storage_options)
        if isinstance(location, Url):
            node, name, place = _open_url(location, **options), str(location), location
        else:
            path, part = split_name(str(location))
            if part is not None or (os.path.lexists(path) and not path.is_dir()):
                return _open_in_place(str(location) if "://" in str(source) else str(source), **options)
            node, name, place = open_folder(path), str(source), str(path)
    else:
        if storage_options is not None and check_mapping("storage_options", storage_options):
            raise InputError("storage_options are for URLs; what is open already has its own; drop them")
        if isinstance(source, Sequence):
            return _open_in_place(source, **options)
        if not _is_store(source) and not hasattr(source, "store_path"):
            raise _no_matrix(source)
        name = name_store(getattr(source, "store_path", source))
        node = open_root(source, name) if _is_store(source) else source
    if _is_group(node):
        return FoundGroup(node, name, place)
    matrix = _open_zarr(node, name, fills=fills)
    refuse_options(matrix.path, "a Zarr array, which has its own", **options)
    return matrix


def _open_url(url: Url, **options: Any) -> zarr.Array[Any] | zarr.Group:
    from pipeline.storage.stores import open_store

    given = [name for name, value in options.items() if value is not None]
    if given or url.suffix.lower() in FILE_SUFFIXES or "::" in url.name:
        raise OpenError(
            f"a file is read in place on a local disk; {url} is none; copy it to one, or make a matrix of the copy "
            "with: pipeline create SOURCE DEST"
        )
    return open_root(open_store(url, read_only=True), str(url))


def _is_group(node: Any) -> bool:
    import zarr

    return isinstance(node, zarr.Group)


def _is_store(source: Any) -> bool:
    from zarr.abc.store import Store

    return isinstance(source, Store)


def _no_matrix(source: object) -> InputError:
    return InputError(
        f"a matrix is a path, several, or a zarr.Array; got {type(source).__name__}; save it with numpy.save"
    )


def _open_zarr(array: zarr.Array[Any], path: str, *, fills: bool) -> Matrix:
    import zarr

    if not isinstance(array, zarr.Array):
        raise _no_matrix(array)
    array = reading_config(array, fills=fills)
    dtype = np.dtype(array.dtype)
    check_numeric(dtype, path)
    if not array.shape or 0 in array.shape:
        raise InputError(f"a matrix has rows, and rows have values; {path} has shape {array.shape}; give another array")
    try:
        layout = read_layout(array)
    except NotImplementedError as error:
        raise InputError(f"a matrix has chunks of one size; those of {path} vary; make one of it first") from error
    parts = _parts(array, path)
    return Matrix(path, array.shape, dtype.newbyteorder("="), layout, parts, array, array_labels(array))


def _open_in_place(source: str | Path | Sequence[str | Path], **options: Any) -> Matrix:
    opened = open_source(source, **options)
    names = [str(each) for each in ([source] if isinstance(source, str | Path) else source)]
    files: list[FileSource] = []
    for name, each in zip(names, opened.sources if isinstance(opened, StackedSource) else [opened], strict=True):
        hindrance = _hindrance(each)
        if hindrance or not isinstance(each, FileSource):
            raise OpenError(
                f"what is read in place is a file of plain rows, in C order and this machine's byte order; "
                f"{name} {hindrance}; make a matrix of it with: pipeline create SOURCE DEST"
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
    return Matrix(_shorten(names), opened.shape, dtype, layout, parts, None, opened.labels)


def _shorten(names: list[str]) -> str:
    """Names of files in a row, those in the middle left out of many."""
    return ", ".join(names) if len(names) <= _MOST_NAMED else f"{names[0]} ... {names[-1]} ({len(names):,} files)"


def _hindrance(source: Source) -> str | None:
    """Say why rows cannot be read where they lie; None if they can."""
    if isinstance(source, Hdf5Source):
        if referred := referred_files(source):
            return f"takes values from other files ({list_some(referred)})"
        return "is an HDF5 data set in chunks" if source.data.chunks else "is an HDF5 data set that only h5py can read"
    if not isinstance(source, FileSource):
        return "is a Zarr array" if isinstance(source, ZarrSource) else "is no file"
    if source.fortran and sum(size > 1 for size in source.stored_shape) > 1:
        return "is in Fortran order"
    if not source.stored_dtype.isnative:
        return f"holds {source.stored_dtype.str}"
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
