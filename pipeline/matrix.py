"""The matrix: a Zarr array `(rows, *row_shape)` and what is known of it without reading its data."""

from __future__ import annotations

import html
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import InputError, NotFoundError, OpenError
from pipeline.layout import Layout, read_layout
from pipeline.sizes import count_of, format_size

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

ATTRIBUTE = "random-windows"
"""Key of our own attributes in what we write: says what it is, and its parts."""
FUSED_PIPELINE = "zarr.core.codec_pipeline.FusedCodecPipeline"
"""The codec pipeline of zarr that works in the calling thread; about 1.7 times as fast here as its default."""
_LISTED = 10
"""Names that an error lists at most."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Matrix:
    """A matrix on disk: numbers, and the Zarr array that holds them. Picklable; opening it reads no data."""

    path: str
    """Where it lies, as the user named it."""
    shape: tuple[int, ...]
    """(rows, *row_shape)."""
    dtype: np.dtype[Any]
    """Of the values as delivered: native byte order."""
    layout: Layout
    parts: NDArray[np.int64] | None
    """(m, 2), [first, stop) rows of each source that `create_matrix` stacked; None where there was one."""
    array: zarr.Array[Any]

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

    def inputs(self) -> list[Path]:
        """Folders that reading depends on: no output may touch them."""
        folder = local_folder(self.array)
        return [] if folder is None else [folder]

    def count_files(self) -> tuple[int, int, int]:
        """Chunk or shard files that are there, those there should be, and the bytes that the former take."""
        if self.layout.files is None:
            return self.array.nchunks_initialized, self.array.nchunks, self.array.nbytes_stored()
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


def open_matrix(source: str | Path | zarr.Array[Any]) -> Matrix:
    """Open a matrix, reading its metadata only.

    Parameters
    ----------
    source
        Path of a Zarr array, v2 or v3, of at least one dimension and numeric dtype; or an open `zarr.Array`.

    Raises
    ------
    NotFoundError
        If nothing lies at the path; nothing is created there.
    OpenError
        If it is a Zarr group, no Zarr, or a Zarr that cannot be parsed.
    InputError
        If the array has no rows or no numbers.

    Examples
    --------
    >>> import numpy, pipeline
    >>> folder = getfixture("tmp_path")
    >>> numpy.save(folder / "A.npy", numpy.arange(6.0).reshape(3, 2))
    >>> matrix = pipeline.create_matrix(folder / "A.npy", folder / "A.zarr")
    >>> pipeline.open_matrix(folder / "A.zarr").shape
    (3, 2)
    """
    array = reading_config(open_array(Path(source)) if isinstance(source, str | Path) else source)
    path = str(source) if isinstance(source, str | Path) else str(array.store_path)
    dtype = np.dtype(array.dtype)
    check_numeric(dtype, path)
    if not array.shape or 0 in array.shape:
        raise InputError(f"a matrix has rows, and rows have values; {path} has shape {array.shape}; give another array")
    layout = read_layout(array)
    return Matrix(path, array.shape, dtype.newbyteorder("="), layout, _parts(array, path), array)


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Whether values are numbers that a matrix can hold: Zarr has no name for floats of more than 64 bits."""
    return dtype.kind in "biufc" and dtype.itemsize <= (16 if dtype.kind == "c" else 8)


def check_numeric(dtype: np.dtype[Any], path: str) -> None:
    """Raise InputError where values are no numbers that a matrix can hold."""
    if not is_numeric(dtype):
        raise InputError(
            f"a matrix holds numbers of at most 64 bits a component; {path} holds {dtype}; convert it first"
        )


def open_array(path: Path) -> zarr.Array[Any]:
    """Open the Zarr array in a folder, for reading; the errors of `open_matrix`."""
    import zarr

    if not os.path.lexists(path):
        raise NotFoundError(f"a Zarr array is there before it is opened; nothing is at {path}; check the path")
    if not path.is_dir():
        raise OpenError(f"a matrix is a Zarr array in a folder; {path} is a file; make one of it with: pipeline create")
    if not any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup")):
        raise OpenError(f"a Zarr array has a zarr.json or .zarray; {path} has neither; name a folder that has")
    try:
        node = zarr.open(store=path.absolute(), mode="r")
    except Exception as error:  # zarr raises what its parsers raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OpenError(f"Zarr metadata are readable; {path}: {reason}; restore them") from error
    if isinstance(node, zarr.Array):
        return node
    names = sorted(name for name, member in node.members(max_depth=None) if isinstance(member, zarr.Array))
    held = f"with the arrays {', '.join(names[:_LISTED])}" if names else "without arrays"
    held += f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    way_out = f"write {path / names[0]}" if names else "name another folder"
    raise OpenError(f"a matrix is one Zarr array; {path} is a group {held}; {way_out}")


def local_folder(array: zarr.Array[Any]) -> Path | None:
    """Folder that an array lies in; None where its store is not on a local disk."""
    from zarr.storage import LocalStore

    store = array.store_path.store
    return Path(store.root, array.path) if isinstance(store, LocalStore) else None


def reading_config(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Let an array decode without an event loop, and raise where a chunk is absent instead of giving the fill value."""
    import zarr

    # An array takes its codec pipeline from the configuration in force when it is made, and keeps it when pickled.
    with zarr.config.set({"codec_pipeline.path": FUSED_PIPELINE}):
        return array.with_config({"read_missing_chunks": False})


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
