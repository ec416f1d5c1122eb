"""How a matrix lies in storage: its files or keys, their rows, what can be read without reading its neighbours."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from pipeline.chunks import CHECKSUM_NBYTES, Chunks, ShardIndex
from pipeline.keys import Keys
from pipeline.preads import open_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import zarr
    from numpy.typing import NDArray

    from pipeline.files import FileStamp


class Borders(Protocol):
    """Rows of the extents of a matrix. Extents are numbered in the order of their rows, and so are files."""

    @property
    def file_extents(self) -> int:
        """Extents of one file or key."""

    def find(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Extent that holds each row."""

    def first_rows(self, extents: NDArray[np.int64]) -> NDArray[np.int64]:
        """First row of each extent, which is the one after the last row of the extent before."""


class Extents(Borders, Protocol):
    """Files of which each holds the rows of one extent, or of several, as plain bytes. Picklable."""

    def path(self, number: int) -> str:
        """Path of a file."""

    def name(self, path: str, number: int) -> str:
        """Path and rows of a file, for messages."""

    def locate(self, fd: int, number: int, extents: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Find extents in a file that is open.

        Parameters
        ----------
        fd
            Descriptor of file `number`.
        extents
            (k,) numbers within the file.

        Returns
        -------
        tuple
            (k,) byte at which each extent begins, and the bytes that were read to know it.

        Raises
        ------
        IntegrityError
            If the file is not what it was when the matrix was opened, or lacks an extent.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Files(Chunks):
    """Chunks or shards in a local folder."""

    root: str
    prefix: str
    separator: str

    def path(self, number: int, columns: tuple[int, ...] | None = None) -> str:
        """Path of a file; see `Chunks.path`."""
        rest = (0,) * (len(self.grid) - 1) if columns is None else columns
        return f"{self.root}/{self.prefix}{self.separator.join(map(str, (number, *rest)))}"

    def locate(self, fd: int, number: int, extents: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Byte at which chunks begin; see `Extents.locate`."""
        if self.index is None:
            return np.zeros(len(extents), np.int64), 0
        index = self.index.read(fd, self.name(self.path(number), number))
        return self.offsets(index, number, extents), self.index.nbytes

    def read_indexes(self, files: Iterable[tuple[str, int]]) -> Iterator[NDArray[np.int64]]:
        """Yield the index of each shard, of its path and number; see `ShardIndex.parse`."""
        assert self.index is not None
        for path, number in files:
            fd = open_file(path, self.name(path, number))
            try:
                yield self.index.read(fd, self.name(path, number))
            finally:
                os.close(fd)

    def count(self) -> tuple[int, int, int]:
        """Files that are there, those there should be, and the bytes that the former take: a stat each."""
        present = nbytes = 0
        for number in range(self.grid[0]):
            for path in self.paths(number):
                with contextlib.suppress(OSError):
                    nbytes += Path(path).stat().st_size
                    present += 1
        return present, math.prod(self.grid), nbytes

    def check(self, numbers: NDArray[np.int64]) -> None:
        """Check that the files of these rows are there, with the size that their codecs fix.

        Raises
        ------
        IntegrityError
            Naming the file and its rows.
        """
        for number in numbers.tolist():
            for path in self.paths(number):
                self.refuse(path, number, self._problem(path))

    def _problem(self, path: str) -> str:
        try:
            # A Path would take three times as long as the call itself, and files are many.
            status = os.stat(path)  # noqa: PTH116
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return self.size_problem(status.st_size) if stat.S_ISREG(status.st_mode) else "is no file"


@dataclass(frozen=True, slots=True, eq=False)
class PlainFiles:
    """Files read in place, of one extent each: `.npy`, raw binary, HDF5 with a contiguous data set."""

    stamps: tuple[FileStamp, ...]
    """(m,) each file as it was when the matrix was opened."""
    offsets: tuple[int, ...]
    """(m,) byte at which the rows of each file begin."""
    borders: NDArray[np.int64]
    """(m + 1,) first row of each file, and the number of rows."""
    row_nbytes: int
    index: ClassVar[None] = None

    @property
    def file_rows(self) -> int:
        """All rows: `check` answers for the matrix as a whole, since a file that changed makes it another one."""
        return int(self.borders[-1])

    @property
    def file_extents(self) -> int:
        """1."""
        return 1

    def find(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """File that holds each row."""
        return np.searchsorted(self.borders, rows, side="right") - 1

    def first_rows(self, extents: NDArray[np.int64]) -> NDArray[np.int64]:
        """First row of each file."""
        return self.borders[extents]

    def path(self, number: int) -> str:
        """Path of a file."""
        return str(self.stamps[number].path)

    def paths(self, number: int) -> Iterator[str]:
        """Paths of all files; `number` is 0, as for `check`."""
        assert number == 0
        for stamp in self.stamps:
            yield str(stamp.path)

    def name(self, path: str, number: int) -> str:
        """Path and rows of a file, for messages."""
        return f"{path} (rows {self.borders[number]} to {self.borders[number + 1] - 1})"

    def locate(self, fd: int, number: int, extents: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:  # noqa: ARG002
        """Byte at which the rows of a file begin; see `Extents.locate`."""
        # Once the file is open: what took its name before is found, what takes it from now on is not read.
        self.stamps[number].check()
        return np.full(len(extents), self.offsets[number]), 0

    def count(self) -> tuple[int, int, int]:
        """Files that are there, those there should be, and the bytes that the rows of the former take."""
        there = np.array([stamp.path.is_file() for stamp in self.stamps])
        rows = int(np.diff(self.borders)[there].sum())
        return int(there.sum()), len(there), rows * self.row_nbytes

    def check(self, numbers: NDArray[np.int64]) -> None:
        """Raise IntegrityError unless every file is as it was when the matrix was opened: a stat each."""
        assert not numbers.any()
        for stamp in self.stamps:
            stamp.check()


@dataclass(frozen=True, slots=True)
class Layout:
    """What one read must touch, and which reader serves it."""

    reader: Literal["direct", "ranged", "decoded"]
    """`direct`: any run of rows lies as plain bytes in local files. `ranged`: the same under keys of any other store.
    `decoded`: chunks are decoded whole, by zarr."""
    chunk_rows: int
    """Rows of one chunk, or inner chunk of a shard: what has one checksum or is decoded together; all rows of a matrix
    that is read in place."""
    shard_rows: int | None
    """Rows of one shard."""
    chunk_checksum: bool
    """Four bytes of crc32c follow each chunk (not `decoded`)."""
    byteorder: Literal["little", "big"]
    """As stored; values are delivered in native order."""
    codecs: tuple[str, ...]
    """Names, in the order of encoding, inner ones for shards."""
    files: Files | Keys | PlainFiles

    @property
    def file_rows(self) -> int:
        """Rows of one file or key."""
        return self.shard_rows or self.chunk_rows


def read_layout(array: zarr.Array[Any]) -> Layout:
    """Tell a Zarr array's layout from its metadata, without reading any of its data."""
    inner, outer = array.chunks, array.shards or array.chunks
    names, byteorder, plain, checksum, index = _codecs(array)
    whole_rows = inner[1:] == array.shape[1:] and outer[1:] == array.shape[1:]
    chunk_nbytes = int(np.prod(inner, dtype=object)) * array.dtype.itemsize + CHECKSUM_NBYTES * checksum
    nbytes = None
    if plain:
        nbytes = chunk_nbytes * (index.chunks if index else 1) + (index.nbytes if index else 0)
    files = _files(array, outer, nbytes, chunk_nbytes if plain else None, index)
    in_rows: Literal["direct", "ranged"] = "direct" if isinstance(files, Files) else "ranged"
    return Layout(
        reader=in_rows if plain and whole_rows and byteorder == "little" else "decoded",
        chunk_rows=inner[0],
        shard_rows=array.shards[0] if array.shards else None,
        chunk_checksum=checksum,
        byteorder=byteorder,
        codecs=names,
        files=files,
    )


def _codecs(
    array: zarr.Array[Any],
) -> tuple[tuple[str, ...], Literal["little", "big"], bool, bool, ShardIndex | None]:
    """Names of the codecs, stored byte order, whether chunks are plain bytes and have a crc32c, the shard index."""
    from zarr.core.metadata.v2 import ArrayV2Metadata

    if isinstance(array.metadata, ArrayV2Metadata):
        codecs = [*(array.metadata.filters or ()), *([array.metadata.compressor] if array.metadata.compressor else [])]
        dtype = np.dtype(array.metadata.dtype.to_native_dtype())
        big = dtype.byteorder == ">"
        names = tuple(str(getattr(codec, "codec_id", type(codec).__name__)) for codec in codecs)
        return names, "big" if big else "little", not codecs and array.order == "C", False, None
    described: list[Any] = [codec.to_dict() for codec in array.metadata.codecs]
    index = None
    if len(described) == 1 and described[0]["name"] == "sharding_indexed":
        index = _index(array, described[0]["configuration"])
        described = list(described[0]["configuration"]["codecs"])
        if any(codec["name"] == "sharding_indexed" for codec in described):
            # Shards within shards: the outer index does not tell which of the innermost chunks are there.
            index = None
    names = tuple(codec["name"] for codec in described)
    endian = next((c.get("configuration", {}).get("endian") for c in described if c["name"] == "bytes"), None)
    plain = names in {("bytes",), ("bytes", "crc32c")} and (array.shards is None or index is not None)
    return names, "big" if endian == "big" else "little", plain, plain and len(names) > 1, index


def _index(array: zarr.Array[Any], configuration: dict[str, Any]) -> ShardIndex | None:
    """Return a shard's index, or None where it is encoded in a way that only zarr should read."""
    codecs = [codec["name"] for codec in configuration["index_codecs"]]
    endian = configuration["index_codecs"][0].get("configuration", {}).get("endian")
    if codecs not in (["bytes"], ["bytes", "crc32c"]) or endian != "little" or array.shards is None:
        return None
    chunks = int(np.prod([shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True)]))
    return ShardIndex(chunks, configuration["index_location"] == "end", len(codecs) > 1)


def _files(
    array: zarr.Array[Any],
    outer: tuple[int, ...],
    nbytes: int | None,
    chunk_nbytes: int | None,
    index: ShardIndex | None,
) -> Files | Keys:
    from zarr.storage import LocalStore

    grid = tuple(-(-size // chunk) for size, chunk in zip(array.shape, outer, strict=True))
    last = tuple(count - 1 for count in grid)
    fixed: dict[str, Any] = {
        "grid": grid,
        "file_rows": outer[0],
        "chunk_rows": array.chunks[0],
        "chunk_nbytes": chunk_nbytes,
        "nbytes": nbytes,
        "index": index,
    }
    if type(array.store) is LocalStore:
        root = str(array.store.root / array.path) if array.path else str(array.store.root)
        for prefix, separator in (("c/", "/"), ("c.", "."), ("", "/"), ("", ".")):
            files = Files(root=root, prefix=prefix, separator=separator, **fixed)
            if files.path(last[0], last[1:]) == f"{root}/{array.metadata.encode_chunk_key(last)}":
                return files
    return Keys(array=array, **fixed)
