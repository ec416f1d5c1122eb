"""What a source was when a run began: so that another run can tell if it is the same, and this one if it changed."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.decoding import touched_units
from pipeline.errors import IntegrityError, OpenError
from pipeline.hdf5 import Hdf5Source
from pipeline.layout import Files, PlainFiles, array_files
from pipeline.sources import FileSource, StackedSource, ZarrSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    import zarr
    from numpy.typing import NDArray

    from pipeline.files import FileStamp
    from pipeline.keys import Keys
    from pipeline.matrix import Matrix
    from pipeline.sources import Source

_ABSENT = -1
"""Size of a file or key that is not there."""
_UNKNOWN = -2
"""Size of a key of which the store tells none."""


class _Part(Protocol):
    """One thing that a source is made of. Picklable."""

    def feed(self) -> Iterator[bytes]:
        """What it was, for a digest."""

    def check(self) -> None:
        """Raise IntegrityError if it is no longer what it was."""


@dataclass(frozen=True, slots=True, eq=False)
class Stamp:
    """What a source was when it was stamped. Picklable."""

    digest: str
    """64 hexadecimal digits of SHA-256: the same, in any process, as long as nothing has changed."""
    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, parts: Iterable[_Part]) -> Self:
        """Stamp of these parts, in this order."""
        parts = tuple(parts)
        digest = hashlib.sha256()
        for part in parts:
            for each in (type(part).__name__.encode(), *part.feed()):
                digest.update(len(each).to_bytes(8, "little") + each)
        return cls(digest.hexdigest(), parts)

    def check(self) -> None:
        """Look again at all that was stamped.

        Raises
        ------
        IntegrityError
            Naming the first file or key that changed: its size, the time of its last change, or, of Zarr's metadata,
            its bytes.
        OpenError
            If the store fails.
        """
        for part in self.parts:
            part.check()


def stamp_matrix(matrix: Matrix, starts: NDArray[np.int64], length: int) -> Stamp:
    """Stamp the files or keys of a matrix that windows touch, and its metadata; no data are read.

    Parameters
    ----------
    starts
        (n,) ascending.
    length
        Rows of a window.
    """
    files = matrix.layout.files
    words = _Words((str(matrix.shape), matrix.dtype.str))
    last = starts + (length - 1)
    if isinstance(files, PlainFiles):
        touched = touched_units(files.find(starts), files.find(last))
        words = _Words((*words.words, str(files.offsets), str(files.borders.tolist())))
        return Stamp.of([words, *(_Stats.known(files.stamps[number]) for number in touched.tolist())])
    assert matrix.array is not None
    touched = touched_units(starts // files.file_rows, last // files.file_rows)
    return Stamp.of([words, *_documents(matrix.array), _chunks(files, touched)])


def stamp_source(source: Source) -> Stamp:
    """Stamp a source of any kind, all of it; no data are read."""
    return Stamp.of(_source_parts(source))


def _source_parts(source: Source) -> Iterator[_Part]:
    kind = type(source).__name__
    match source:
        case StackedSource():
            yield _Words((kind, str(len(source.sources))))
            for each in source.sources:
                yield from _source_parts(each)
        case FileSource():
            form = (source.offset, source.stored_shape, source.stored_dtype.str, source.fortran, source.axis)
            yield _Words((kind, *map(str, form)))
            yield _Stats.known(source.stamp)
        case Hdf5Source():
            yield _Words((kind, source.data.name, str(source.data.shape), source.data.dtype.str, str(source.axis)))
            yield _Stats.known(source.data.stamp)
            for stamp in source.data.others:
                yield _Stats.known(stamp)
        case ZarrSource():
            yield _Words((kind, str(source.axis)))
            yield from _documents(source.array)
            files = array_files(source.array)
            yield _chunks(files, np.arange(files.grid[0]))
        case _:
            # Nothing is stored: what it is made of says what it is.
            yield _Words((repr(source),))


def _documents(array: zarr.Array[Any]) -> Iterator[_Part]:
    name = "zarr.json" if array.metadata.zarr_format == 3 else ".zarray"
    key = f"{array.path}/{name}" if array.path else name
    yield _Document(array, key, _digest_key(array, key))


def _chunks(files: Files | Keys, numbers: NDArray[np.int64]) -> _Part:
    """Stamp the files or keys of these rows."""
    names = tuple(path for number in numbers.tolist() for path in files.paths(number))
    if isinstance(files, Files):
        root = str(Path(files.root).absolute())
        return _Stats.take(root, tuple(path[len(files.root) + 1 :] for path in names))
    found = list(_describe(files, numbers))
    sizes = np.array([nbytes for nbytes, _ in found], np.int64)
    return _Listing(files, numbers, names, sizes, tuple(tag for _, tag in found))


@dataclass(frozen=True, slots=True)
class _Words:
    """What is known of a source beside its files: cannot change."""

    words: tuple[str, ...]

    def feed(self) -> Iterator[bytes]:
        return (word.encode() for word in self.words)

    def check(self) -> None:
        pass


@dataclass(frozen=True, slots=True, eq=False)
class _Stats:
    """Local files, and what the system said of them."""

    root: str
    """Folder, absolute."""
    names: tuple[str, ...]
    """Within the folder."""
    sizes: NDArray[np.int64]
    """(n,) bytes, or `_ABSENT`."""
    changed: NDArray[np.int64]
    """(n,) times of the last change, in ns."""

    @classmethod
    def take(cls, root: str, names: tuple[str, ...]) -> Self:
        """Look at files as they are now."""
        return cls(root, names, *_look(root, names))

    @classmethod
    def known(cls, stamp: FileStamp) -> Self:
        """Take a file as it was when it was opened."""
        folder, name = os.path.split(stamp.path)
        return cls(folder, (name,), np.array([stamp.size]), np.array([stamp.changed]))

    def feed(self) -> Iterator[bytes]:
        # A folder of several names is one folder.
        yield os.fsencode(os.path.realpath(self.root))
        yield os.fsencode("\0".join(self.names))
        yield self.sizes.astype("<i8").tobytes()
        yield self.changed.astype("<i8").tobytes()

    def check(self) -> None:
        sizes, changed = _look(self.root, self.names)
        differing = np.flatnonzero((sizes != self.sizes) | (changed != self.changed))
        if len(differing):
            first = differing[0]
            raise _changed(f"{self.root}/{self.names[first]}", int(self.sizes[first]), int(sizes[first]))


def _look(root: str, names: tuple[str, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Size and time of the last change of each file: a stat each, and little else, since files are many."""
    sizes, changed = [], []
    for name in names:
        try:
            status = os.stat(f"{root}/{name}")  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            sizes.append(_ABSENT)
            changed.append(0)
        except OSError as error:
            raise OpenError(f"a source can be looked at; {root}/{name}: {error.strerror}; check it") from error
        else:
            sizes.append(status.st_size)
            changed.append(status.st_mtime_ns)
    return np.array(sizes, np.int64), np.array(changed, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Listing:
    """Keys of a store, and what it told of them."""

    keys: Keys
    numbers: NDArray[np.int64]
    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    """(n,) bytes, or `_ABSENT`, or `_UNKNOWN`."""
    tags: tuple[str, ...]

    def feed(self) -> Iterator[bytes]:
        # Some stores are named by where they lie in this process's memory.
        yield re.sub(r" at 0x\w+", "", str(self.keys.array.store)).encode()
        yield "\0".join(self.names).encode()
        yield self.sizes.astype("<i8").tobytes()
        yield "\0".join(self.tags).encode()

    def check(self) -> None:
        before = zip(self.names, self.sizes.tolist(), self.tags, strict=True)
        for (name, size, tag), (now, tag_now) in zip(before, _describe(self.keys, self.numbers), strict=True):
            if (size, tag) != (now, tag_now):
                raise _changed(f"{self.keys.array.store}/{name}", size, now)


def _describe(keys: Keys, numbers: NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    """Size and tag of each key."""
    for _, found in keys.look_up(numbers):
        if found is None:
            yield _ABSENT, ""
        else:
            yield _UNKNOWN if found.nbytes is None else found.nbytes, found.tag


@dataclass(frozen=True, slots=True, eq=False)
class _Document:
    """Metadata of a Zarr array, under a key of its store."""

    array: zarr.Array[Any]
    key: str
    digest: str

    def feed(self) -> Iterator[bytes]:
        yield self.key.encode()
        yield self.digest.encode()

    def check(self) -> None:
        if _digest_key(self.array, self.key) != self.digest:
            name = f"{self.key} of {self.array.store}"
            raise IntegrityError(f"a source must stay as it is while it is read; {name} was changed; start again")


def _digest_key(array: zarr.Array[Any], key: str) -> str:
    """Digest of the bytes under a key; empty where it is absent."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    try:
        buffer = sync(array.store.get(key, default_buffer_prototype()))
    except Exception as error:  # a store raises what it likes
        raise OpenError(f"a store can be read; {array.store}: {' '.join(str(error).split())}; check it") from error
    return "" if buffer is None else hashlib.sha256(buffer.to_bytes()).hexdigest()


def _changed(name: str, before: int, now: int) -> IntegrityError:
    def say(nbytes: int) -> str:
        return {_ABSENT: "absent", _UNKNOWN: "there"}.get(nbytes, f"{nbytes} bytes")

    return IntegrityError(
        f"a source must stay as it is while it is read; {name} was changed ({say(before)} when the run began, "
        f"{say(now)} now); start again"
    )
