"""Chunks and shards of a Zarr array: their rows and sizes, and the index of a shard, wherever they lie."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import google_crc32c
import numpy as np

from pipeline.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

CHECKSUM_NBYTES = 4
_ABSENT = 2**64 - 1
_MOST_NBYTES = 2**62
"""More than any file has: offset plus size stay below 2**63."""


class Problem(NamedTuple):
    """What is wrong with a file."""

    number: int
    """It holds rows [number * file_rows, (number + 1) * file_rows)."""
    name: str
    """Its path or key and its rows, for messages."""
    words: str
    """Follow its name, such as "is absent"."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Where the inner chunks of a shard lie: 16 bytes each, (offset, size), little-endian uint64.

    As in the Zarr specification of the `sharding_indexed` codec.
    """

    chunks: int
    """Inner chunks of one shard."""
    at_end: bool
    """The index follows the chunks; otherwise it precedes them."""
    checksum: bool
    """Four bytes of crc32c end the index."""

    @property
    def nbytes(self) -> int:
        """Size of the encoded index."""
        return 16 * self.chunks + CHECKSUM_NBYTES * self.checksum

    def encode(self, offsets: NDArray[np.int64], chunk_nbytes: int) -> bytes:
        """Encode the index of a shard whose first chunks, all of one size, begin at `offsets` (k,); others are absent.

        Examples
        --------
        >>> import numpy
        >>> ShardIndex(chunks=2, at_end=True, checksum=False).encode(numpy.array([0]), 7).hex(" ", 8)
        '0000000000000000 0700000000000000 ffffffffffffffff ffffffffffffffff'
        """
        index = np.full((self.chunks, 2), _ABSENT, "<u8")
        index[: len(offsets), 0], index[: len(offsets), 1] = offsets, chunk_nbytes
        raw = index.tobytes()
        return raw + google_crc32c.value(raw).to_bytes(CHECKSUM_NBYTES, "little") if self.checksum else raw

    def read(self, fd: int, name: str) -> NDArray[np.int64]:
        """Read and check the index of a shard that is open; see `parse`."""
        size = os.fstat(fd).st_size
        where = size - self.nbytes if self.at_end else 0
        return self.parse(os.pread(fd, self.nbytes, where) if where >= 0 else b"", size, name)

    def parse(self, raw: bytes, size: int | None, name: str) -> NDArray[np.int64]:
        """Check the encoded index of one shard.

        Parameters
        ----------
        raw
            What was read where the index lies.
        size
            Bytes of the shard; None where that is not known.
        name
            Tells errors which shard.

        Returns
        -------
        ndarray
            (chunks, 2) int64: offset in the file and size in bytes; (-1, -1) for a chunk that is absent.

        Raises
        ------
        IntegrityError
            If bytes are missing, the checksum is wrong, or an entry points outside of the file.
        """
        if len(raw) != self.nbytes:
            has = len(raw) if size is None else size
            raise IntegrityError(
                f"a shard holds its index; {name} has {has} bytes, its index {self.nbytes}; restore it"
            )
        entries = raw
        if self.checksum:
            entries = raw[:-CHECKSUM_NBYTES]
            if google_crc32c.value(entries) != int.from_bytes(raw[-CHECKSUM_NBYTES:], "little"):
                raise IntegrityError(
                    f"a shard's index matches its checksum; that of {name} does not: torn or corrupt; restore it"
                )
        index = np.frombuffer(entries, dtype="<u8").reshape(self.chunks, 2)
        absent = (index == _ABSENT).all(axis=1)
        end = _MOST_NBYTES if size is None else size
        # Compared one by one, since a corrupt offset plus its size may pass 2**64.
        inside = (index[:, 0] <= end) & (index[:, 1] <= end) & (index[:, 0] <= end - np.minimum(index[:, 1], end))
        if not (inside | absent).all():
            raise IntegrityError(
                f"a shard's index points into its file; that of {name} points past its {end} bytes; restore it"
            )
        return np.where(absent[:, None], np.int64(-1), index.astype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunks:
    """The chunks or shards of a Zarr array, each a file or key; the first axis of their grid runs along the rows."""

    grid: tuple[int, ...]
    """Files along each axis."""
    file_rows: int
    """Rows of one file; the last one is padded to as many."""
    chunk_rows: int
    """Rows of one chunk, or inner chunk of a shard."""
    chunk_nbytes: int | None
    """Size of a chunk, its checksum included, where the codecs fix it."""
    nbytes: int | None
    """Size of a file where the codecs fix it."""
    index: ShardIndex | None
    """Where the files are shards."""
    fills: bool = False
    """Files and inner chunks that are absent read as the array's fill value."""

    @property
    def file_extents(self) -> int:
        """Chunks of one file."""
        return self.file_rows // self.chunk_rows

    def find(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Chunk that holds each row."""
        return rows // self.chunk_rows

    def first_rows(self, extents: NDArray[np.int64]) -> NDArray[np.int64]:
        """First row of each chunk."""
        return extents * self.chunk_rows

    def path(self, number: int, columns: tuple[int, ...] | None = None) -> str:
        """Path or key of the file that holds rows [number * file_rows, (number + 1) * file_rows)."""
        raise NotImplementedError

    def paths(self, number: int) -> Iterator[str]:
        """All files that hold those rows: more than one where columns are chunked, too."""
        for columns in self.columns():
            yield self.path(number, columns)

    def columns(self) -> Iterator[tuple[int, ...]]:
        """Positions in the grid of the files that hold the same rows."""
        return itertools.product(*map(range, self.grid[1:]))

    def name(self, path: str, number: int) -> str:
        """Path and rows of a file, for messages."""
        return f"{path} (rows {number * self.file_rows} to {(number + 1) * self.file_rows - 1})"

    def offsets(self, index: NDArray[np.int64], number: int, extents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Byte at which chunks begin in a shard, from its index; raise IntegrityError if one is absent or not whole."""
        found = index[extents]
        wrong = np.flatnonzero(found[:, 1] != self.chunk_nbytes)
        if len(wrong):
            chunk = int(extents[wrong[0]])
            first = number * self.file_rows + chunk * self.chunk_rows
            state = "is absent"
            if index[chunk, 1] >= 0:
                state = f"has {index[chunk, 1]} bytes instead of {self.chunk_nbytes}"
            raise IntegrityError(
                f"every chunk is there, whole; inner chunk {chunk} of {self.path(number)} (rows {first} to "
                f"{first + self.chunk_rows - 1}) {state}; restore the shard"
            )
        return np.ascontiguousarray(found[:, 0])

    def find_problem(self, numbers: NDArray[np.int64]) -> Problem | None:
        """Look for a file of these rows that is absent, or has not the size that its codecs fix; None if all is right.

        Raises
        ------
        OpenError
            If the store fails.
        """
        raise NotImplementedError

    def size_problem(self, nbytes: int) -> str:
        """Say what is wrong with a file of so many bytes."""
        if self.nbytes is None:
            return "" if nbytes else "is empty"
        if nbytes == self.nbytes or (self.index is not None and nbytes >= self.index.nbytes):
            # Other writers leave out inner chunks that hold only the fill value; their index is read with the rows.
            return ""
        return f"has {nbytes} bytes instead of {self.nbytes}"
