"""What a source was when a run began: so that another run can tell if it is the same, and this one if it changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import IntegrityError, OpenError
from pipeline.formatting import count_of
from pipeline.matrix.hdf5 import Hdf5Source
from pipeline.matrix.layout import Files, PlainFiles, array_files
from pipeline.matrix.rows import touched_units
from pipeline.matrix.sources import FileSource, StackedSource, ZarrSource
from pipeline.storage.files import change_time
from pipeline.storage.listing import read_key
from pipeline.storage.locations import name_store
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    import zarr
    from numpy.typing import NDArray

    from pipeline.matrix.keys import Keys
    from pipeline.matrix.matrix import Matrix
    from pipeline.matrix.sources import Source
    from pipeline.storage.files import FileStamp
    from pipeline.storage.listing import Found

type _LookedUp = tuple[tuple[str, int], Found | None]
"""Key and number of a file, and what the store tells of it; None: it is absent."""

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
    """Check that every file or key that windows touch is there with its size, and stamp it; no data are read.

    A store is asked once for both, by listing where windows touch many of its keys.

    Parameters
    ----------
    starts
        (n,) ascending.
    length
        Rows of a window.

    Raises
    ------
    IntegrityError
        Naming the first file that is not right, its rows, and how many windows touch them.
    OpenError
        If the store fails.
    """
    files = matrix.layout.files
    words = _Words((str(matrix.shape), matrix.dtype.str))
    last = starts + (length - 1)
    if isinstance(files, PlainFiles):
        files.check()
        touched = touched_units(files.find(starts), files.find(last))
        words = _Words((*words.words, str(files.offsets), str(files.borders.tolist())))
        return Stamp.of([words, *(_Stats.known(files.stamps[number]) for number in touched.tolist())])
    assert matrix.array is not None
    first, last = starts // files.file_rows, last // files.file_rows
    touched = touched_units(first, last)
    looked_up = [] if isinstance(files, Files) else list(files.look_up(touched))
    problem = files.find_problem(touched) if isinstance(files, Files) else files.judge(looked_up)
    if problem is not None:
        windows = int(((first <= problem.number) & (problem.number <= last)).sum())
        fill = ", or read the fill value with --missing-chunks fill" if problem.words == "is absent" else ""
        raise IntegrityError(
            f"every chunk is there, whole; {problem.name} {problem.words}; restore it{fill}: {windows:,} of "
            f"{count_of(len(starts), 'window')} {'touches' if windows == 1 else 'touch'} it"
        )
    chunks = _chunks(files, touched) if isinstance(files, Files) else _Listing.of(files, touched, looked_up)
    return Stamp.of([words, *_documents(matrix.array), chunks])


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
            for reference in source.data.references:
                yield _Stats.known(reference.stamp)
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
    content = read_key(array.store, key)
    if content is None or not _describes(content, array):
        # Its chunks would be read as those of the array that was there when it was opened.
        raise _other_metadata(array, key)
    yield _Document(array, key, hashlib.sha256(content).hexdigest())


@pinned_config()
def _describes(content: bytes, array: zarr.Array[Any]) -> bool:
    """Whether a metadata document is that of an array that was opened before, attributes aside."""
    try:
        now = type(array.metadata).from_dict(json.loads(content))
    except Exception:  # noqa: BLE001 (zarr's parsers raise what they like)
        return False
    return _plain_metadata(now) == _plain_metadata(array.metadata)


def _plain_metadata(metadata: Any) -> dict[str, Any]:
    from zarr.core.buffer import cpu

    documents = metadata.to_buffer_dict(cpu.buffer_prototype)
    document: dict[str, Any] = json.loads(next(iter(documents.values())).to_bytes())
    return {key: value for key, value in document.items() if key != "attributes"}


def _chunks(files: Files | Keys, numbers: NDArray[np.int64]) -> _Part:
    """Stamp the files or keys of these rows."""
    if not isinstance(files, Files):
        return _Listing.of(files, numbers, files.look_up(numbers))
    root = str(Path(files.root).absolute())
    names = (path for number in numbers.tolist() for path in files.paths(number))
    return _Stats.take(root, tuple(path[len(files.root) + 1 :] for path in names))


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
    """(n,) times of the last change; see `change_time`."""

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
            changed.append(change_time(status))
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

    @classmethod
    def of(cls, keys: Keys, numbers: NDArray[np.int64], looked_up: Iterable[_LookedUp]) -> Self:
        """Take what a store tells of the keys of these rows."""
        names, found = [], []
        for (path, _), told in looked_up:
            names.append(path)
            found.append(
                (_ABSENT, "") if told is None else (_UNKNOWN if told.nbytes is None else told.nbytes, told.tag)
            )
        return cls(
            keys, numbers, tuple(names), np.array([size for size, _ in found], np.int64), tuple(t for _, t in found)
        )

    def feed(self) -> Iterator[bytes]:
        # Some stores are named by where they lie in this process's memory.
        yield re.sub(r" at 0x\w+", "", name_store(self.keys.array.store)).encode()
        yield "\0".join(self.names).encode()
        yield self.sizes.astype("<i8").tobytes()
        yield "\0".join(self.tags).encode()

    def check(self) -> None:
        now = type(self).of(self.keys, self.numbers, self.keys.look_up(self.numbers))
        if now.tags == self.tags and np.array_equal(now.sizes, self.sizes):
            return
        for name, *before_and_now in zip(
            self.names, self.sizes.tolist(), now.sizes.tolist(), self.tags, now.tags, strict=True
        ):
            size, size_now, tag, tag_now = before_and_now
            if (size, tag) != (size_now, tag_now):
                raise _changed(f"{name_store(self.keys.array.store)}/{name}", size, size_now)


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
        content = read_key(self.array.store, self.key)
        if content is None or hashlib.sha256(content).hexdigest() != self.digest:
            raise _other_metadata(self.array, self.key)


def _other_metadata(array: zarr.Array[Any], key: str) -> IntegrityError:
    name = f"{key} of {name_store(array.store)}"
    return IntegrityError(f"a source must stay as it is once it is opened; {name} was changed; open it again")


def _changed(name: str, before: int, now: int) -> IntegrityError:
    def say(nbytes: int) -> str:
        return {_ABSENT: "absent", _UNKNOWN: "there"}.get(nbytes, f"{nbytes} bytes")

    return IntegrityError(
        f"a source must stay as it is while it is read; {name} was changed ({say(before)} when the run began, "
        f"{say(now)} now); start again"
    )
