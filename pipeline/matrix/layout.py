"""How a matrix lies in storage: its files or keys, their rows, what can be read without reading its neighbours."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from pipeline.matrix.chunks import CHECKSUM_NBYTES, Chunks, Problem, ShardIndex
from pipeline.matrix.keys import Keys
from pipeline.storage.preads import open_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import zarr
    from numpy.typing import NDArray

    from pipeline.storage.files import FileStamp


_MOST_LOOKED_FOR = 1_000_000
"""Files that are looked for one by one."""


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
        wanted = math.prod(self.grid)
        paths: Iterable[str] = (path for number in range(self.grid[0]) for path in self.paths(number))
        if wanted > _MOST_LOOKED_FOR:
            # A sparse array may have more chunks than there are files on any disk.
            paths = (
                f"{folder}/{name}" for folder, _, names in os.walk(self.root) for name in names if name[0].isdigit()
            )
        for path in paths:
            with contextlib.suppress(OSError):
                nbytes += Path(path).stat().st_size
                present += 1
        return present, wanted, nbytes

    def find_problem(self, numbers: NDArray[np.int64]) -> Problem | None:
        """Look for a file that is not right, a stat each; see `Chunks.find_problem`."""
        for number in numbers.tolist():
            for path in self.paths(number):
                words = self._problem(path)
                if words:
                    return Problem(number, self.name(path, number), words)
        return None

    def _problem(self, path: str) -> str:
        try:
            # A Path would take three times as long as the call itself, and files are many.
            status = os.stat(path)  # noqa: PTH116
        except FileNotFoundError:
            if self.is_absent(path):
                return "" if self.fills else "is absent"
            return "is a link to nothing, or lies in one"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return self.size_problem(status.st_size) if stat.S_ISREG(status.st_mode) else "is no file"

    def is_absent(self, path: str) -> bool:
        """Whether nothing has the name of a file, not even a link to nothing, in an array that is there."""
        try:
            os.lstat(path)
        except FileNotFoundError:
            while len(path) > len(self.root) and not os.path.lexists(path):
                path = os.path.dirname(path)  # noqa: PTH120
            return os.path.isdir(path)  # noqa: PTH112
        except OSError:
            pass
        return False


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
        """All rows: a file that changed makes the matrix another one."""
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
        """Paths of all files; `number` is 0."""
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

    def check(self) -> None:
        """Raise IntegrityError unless every file is as it was when the matrix was opened: a stat each."""
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
    checksums: bool
    """What decodes a chunk checks it against a checksum that is stored with it; so it is with the index of a shard."""
    files: Files | Keys | PlainFiles

    @property
    def file_rows(self) -> int:
        """Rows of one file or key."""
        return self.shard_rows or self.chunk_rows

    @property
    def checked(self) -> bool:
        """Whether all that is read is checked against a stored checksum."""
        return self.checksums and self.reader == "decoded"

    def decode(self, *, fills: bool) -> Layout:
        """Return the same layout, of which chunks are decoded whole, and thus checked; see `Chunks.fills`."""
        assert isinstance(self.files, Chunks)
        return replace(self, reader="decoded", files=replace(self.files, fills=fills))


def read_layout(array: zarr.Array[Any]) -> Layout:
    """Tell a Zarr array's layout from its metadata, without reading any of its data."""
    inner, outer = array.chunks, array.shards or array.chunks
    names, byteorder, plain, checksum, index = _codecs(array)
    whole_rows = inner[1:] == array.shape[1:] and outer[1:] == array.shape[1:]
    chunk_nbytes = int(np.prod(inner, dtype=object)) * array.dtype.itemsize + CHECKSUM_NBYTES * checksum
    nbytes = None
    if plain:
        nbytes = chunk_nbytes * (index.chunks if index else 1) + (index.nbytes if index else 0)
    files = _files(
        array,
        grid=tuple(-(-size // chunk) for size, chunk in zip(array.shape, outer, strict=True)),
        file_rows=outer[0],
        chunk_rows=inner[0],
        chunk_nbytes=chunk_nbytes if plain else None,
        nbytes=nbytes,
        index=index,
    )
    in_rows: Literal["direct", "ranged"] = "direct" if isinstance(files, Files) else "ranged"
    return Layout(
        reader=in_rows if plain and whole_rows and byteorder == "little" else "decoded",
        chunk_rows=inner[0],
        shard_rows=array.shards[0] if array.shards else None,
        chunk_checksum=checksum,
        byteorder=byteorder,
        codecs=names,
        checksums=_have_checksums(_describe(array)),
        files=files,
    )


_CHECKSUMS = frozenset({"adler32", "bz2", "crc32", "crc32c", "fletcher32", "gzip", "jenkins_lookup3", "zlib"})
"""Codecs that fail to decode what is not as it was encoded."""


def _have_checksums(codecs: list[dict[str, Any]]) -> bool:
    """Whether any damage to what these codecs made is found when it is decoded."""
    for codec in codecs:
        name, settings = codec["name"].removeprefix("numcodecs."), codec.get("configuration") or {}
        if name == "sharding_indexed":
            found = _have_checksums(settings["index_codecs"]) and _have_checksums(settings["codecs"])
        else:
            found = name in _CHECKSUMS or (name == "zstd" and bool(settings.get("checksum")))
        if found:
            return True
    return False


def _describe(array: zarr.Array[Any]) -> list[dict[str, Any]]:
    """Codecs of an array, those of v2 in the words of v3."""
    from zarr.core.metadata.v2 import ArrayV2Metadata

    if not isinstance(array.metadata, ArrayV2Metadata):
        return [codec.to_dict() for codec in array.metadata.codecs]
    codecs: list[Any] = [*(array.metadata.filters or ()), array.metadata.compressor]
    configured = [codec.get_config() for codec in codecs if codec is not None]
    return [{"name": settings["id"], "configuration": settings} for settings in configured]


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


def array_files(array: zarr.Array[Any]) -> Files | Keys:
    """Tell the files or keys of any Zarr array, of chunks of several sizes, too, but not what is in them."""
    sizes = array.write_chunk_sizes
    rows = max(sizes[0])
    grid = tuple(map(len, sizes))
    return _files(array, grid=grid, file_rows=rows, chunk_rows=rows, chunk_nbytes=None, nbytes=None, index=None)


def _files(array: zarr.Array[Any], **fixed: Any) -> Files | Keys:
    from zarr.storage import LocalStore

    from pipeline.storage.folderstore import FolderStore

    last = tuple(count - 1 for count in fixed["grid"])
    # A class of somebody else may keep its keys in another way.
    if type(array.store) is LocalStore or isinstance(array.store, FolderStore):
        root = str(array.store.root / array.path) if array.path else str(array.store.root)
        for prefix, separator in (("c/", "/"), ("c.", "."), ("", "/"), ("", ".")):
            files = Files(root=root, prefix=prefix, separator=separator, **fixed)
            if files.path(last[0], last[1:]) == f"{root}/{array.metadata.encode_chunk_key(last)}":
                return files
    return Keys(array=array, **fixed)
