"""Which chunks of a stored Zarr array are damaged, by the crc32c that its codecs put behind each."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from pipeline.errors import IntegrityError
from pipeline.matrix.chunks import CHECKSUM_NBYTES, ShardIndex
from pipeline.matrix.layout import read_layout
from pipeline.storage.base import checksum
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import zarr

    from pipeline.storage.base import Opened

type Runs = tuple[tuple[int, int], ...]
"""Runs [first, stop) of rows, ascending, apart from one another."""

_WHOLE: int = google_crc32c.value(bytes(CHECKSUM_NBYTES))
"""The crc32c of any bytes that their own crc32c follows: that of none, which is zeros, among them."""
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Place:
    """What a file holds of an array."""

    array: StoredArray
    position: tuple[int, ...]
    """In the grid of files."""

    @property
    def rows(self) -> Runs:
        """Rows of the file that the array has."""
        return self.array.rows(self.position, self.array.file_shape)


@dataclass(frozen=True, slots=True)
class StoredArray:
    """How an array lies in its files. Picklable."""

    name: str
    """Path below the target; empty for the target itself."""
    unit: str
    """What the first axis counts: rows, or windows."""
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    """Of a chunk, or inner chunk of a shard."""
    chunk_nbytes: int | None
    """Size of one as it is stored, where the codecs fix it."""
    index: ShardIndex | None
    checked: bool
    """Each chunk, or inner chunk, ends in its crc32c."""
    metadata: Any

    @classmethod
    def describe(cls, array: zarr.Array[Any], name: str) -> StoredArray | None:
        """Describe an array from its metadata; None for one of no dimensions or of chunks that vary."""
        if not array.shape:
            return None
        try:
            layout = read_layout(array)
        except NotImplementedError:
            return None
        index = layout.files.index
        names = getattr(array.metadata, "dimension_names", None)
        return cls(
            name,
            "windows" if names and names[0] == "window" else "rows",
            array.shape,
            array.shards or array.chunks,
            array.chunks,
            getattr(layout.files, "chunk_nbytes", None),
            index,
            array.metadata.zarr_format == 3
            and layout.codecs[-1:] == ("crc32c",)
            and (index is not None or array.shards is None),
            array.metadata,
        )

    def place(self, key: str) -> Place | None:
        """Tell what a file holds; None where it is no chunk of this array."""
        prefix = f"{self.name}/" if self.name else ""
        tail = key.removeprefix(prefix)
        position = tuple(int(number) for number in re.findall("[0-9]+", tail[-200:]))[-len(self.shape) :]
        if not key.startswith(prefix) or len(position) != len(self.shape):
            return None
        inside = all(number < count for number, count in zip(position, self._grid, strict=True))
        return Place(self, position) if inside and self.metadata.encode_chunk_key(position) == tail else None

    @property
    def count(self) -> int:
        """Files that there are when no chunk is left out."""
        return math.prod(self._grid)

    def files(self) -> Iterator[str]:
        """Their paths below the target."""
        prefix = f"{self.name}/" if self.name else ""
        for position in itertools.product(*map(range, self._grid)):
            yield prefix + self.metadata.encode_chunk_key(position)

    def inspect(
        self, opened: Opened, position: tuple[int, ...], first: int = 0, stop: int | None = None
    ) -> tuple[str, Runs]:
        """Check the chunks of a file that lie in its bytes [first, stop), each against its crc32c.

        Returns
        -------
        tuple
            What is wrong, in words that follow the file's name, and the rows; empty where nothing is.
        """
        chunks = [(0, opened.nbytes, 0)]
        if self.index is not None:
            where = max(0, opened.nbytes - self.index.nbytes) if self.index.at_end else 0
            raw = b"".join(part.tobytes() for part in opened.read(where, self.index.nbytes))
            try:
                entries = self.index.parse(raw, opened.nbytes, "")
            except IntegrityError:
                return "has a corrupt index", self.rows(position, self.file_shape)
            chunks = sorted((offset, nbytes, number) for number, (offset, nbytes) in enumerate(entries.tolist()))
        absent = [number for offset, _, number in chunks if offset < 0 and self._chunk_rows(position, number)]
        wrong = [
            number
            for offset, nbytes, number in chunks
            if offset >= 0
            and offset + max(1, nbytes) > first
            and (stop is None or offset < stop)
            and not self._is_whole(opened, offset, nbytes)
        ]
        runs = merge_runs(run for number in absent + wrong for run in self._chunk_rows(position, number))
        if self.index is None:
            return ("does not match its crc32c" if wrong else ""), runs
        problems = [_say(sorted(absent), "absent"), _say(sorted(wrong), "corrupt")]
        return ", ".join(filter(None, problems)), runs

    def rows(self, position: tuple[int, ...], shape: tuple[int, ...]) -> Runs:
        """Rows of the file or chunk of this shape at a position of its grid; none where the array has none of it."""
        first = [number * size for number, size in zip(position, shape, strict=True)]
        if any(start >= size for start, size in zip(first, self.shape, strict=True)):
            return ()
        return ((first[0], min(first[0] + shape[0], self.shape[0])),)

    def _chunk_rows(self, position: tuple[int, ...], number: int) -> Runs:
        inner = tuple(file // chunk for file, chunk in zip(self.file_shape, self.chunk_shape, strict=True))
        within = np.unravel_index(number, inner)
        chunk = [i * size + int(j) for i, size, j in zip(position, inner, within, strict=True)]
        return self.rows(tuple(chunk), self.chunk_shape)

    def _is_whole(self, opened: Opened, offset: int, nbytes: int) -> bool:
        if nbytes <= CHECKSUM_NBYTES or self.chunk_nbytes not in {None, nbytes}:
            return False
        return checksum(opened, offset, nbytes, google_crc32c.extend) == _WHOLE

    @property
    def _grid(self) -> tuple[int, ...]:
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.file_shape, strict=True))


@pinned_config()
def describe_arrays(node: zarr.Array[Any] | zarr.Group) -> tuple[dict[str, StoredArray], list[str]]:
    """Describe the arrays of a node by their names; beside them the names of those that cannot be described."""
    import zarr

    members = [("", node)] if isinstance(node, zarr.Array) else list(node.members(max_depth=None))
    arrays = {name: StoredArray.describe(member, name) for name, member in members if isinstance(member, zarr.Array)}
    return {name: each for name, each in arrays.items() if each}, [name for name, each in arrays.items() if not each]


def merge_runs(runs: Iterable[tuple[int, int]]) -> Runs:
    """Sort runs, and join those that meet.

    Examples
    --------
    >>> merge_runs([(8, 12), (0, 4), (4, 8), (20, 24)])
    ((0, 12), (20, 24))
    """
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(runs):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((first, stop))
    return tuple(merged)


def say_runs(runs: Runs, unit: str) -> str:
    """Write runs of rows, the last row included.

    Examples
    --------
    >>> say_runs(((0, 4), (8, 9)), "rows")
    'rows 0 to 3, 8 to 8'
    """
    return f"{unit} " + _list([f"{first} to {stop - 1}" for first, stop in runs])


def _say(numbers: list[int], state: str) -> str:
    if not numbers:
        return ""
    return f"has inner {'chunk' if len(numbers) == 1 else 'chunks'} {_list(list(map(str, numbers)))} {state}"


def _list(words: list[str]) -> str:
    more = len(words) - _NAMED
    return ", ".join(words[:_NAMED]) + (f" and {more} more" if more > 0 else "")
