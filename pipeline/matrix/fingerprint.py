"""Fingerprint: what a source was when a run began, so that a change of it shows, here and on workers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from pipeline.errors import IntegrityError, OpenError, PipelineError
from pipeline.formatting import count_of
from pipeline.matrix.hdf5 import Hdf5Source
from pipeline.matrix.layout import Files, PlainFiles, array_files
from pipeline.matrix.rows import touched_units
from pipeline.matrix.sources import FileSource, StackedSource, ZarrSource
from pipeline.storage.files import change_time
from pipeline.storage.listing import read_key
from pipeline.storage.locations import name_store, say_failure
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Self

    import zarr
    from numpy.typing import NDArray
    from zarr.abc.store import Store

    from pipeline.matrix.keys import Keys
    from pipeline.matrix.matrix import Matrix
    from pipeline.matrix.sources import Source
    from pipeline.storage.files import FileStamp
    from pipeline.storage.listing import Found

_ABSENT = -1
"""Size of a file or key that is not there."""
_UNKNOWN = -2
"""Size of a key whose store reports none."""
_MOST_SAMPLED = 16
"""Files that a worker looks at: a worker that sees some sees all, or its tasks name the one that it does not see."""


class _Change(NamedTuple):
    """A file or key that is no longer what it was."""

    name: str
    before: str
    """Its size, or "absent"."""
    now: str


class _Part(Protocol):
    """One of the things that a source is made of. Picklable. The digest includes the names of the classes."""

    @property
    def shared(self) -> bool:
        """Whether workers must see it before their first task."""

    def feed(self) -> Iterator[bytes]:
        """Yield what it was, for the digest."""

    def find_change(self) -> _Change | None:
        """Compare it with what it is now."""


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """What a source was when a run began. Picklable."""

    digest: str
    """64 hexadecimal digits of SHA-256: the same in any process, as long as nothing has changed."""
    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, parts: Iterable[_Part]) -> Self:
        """Fingerprint of these parts, in this order."""
        parts = tuple(parts)
        digest = hashlib.sha256()
        for part in parts:
            for content in (type(part).__name__.encode(), *part.feed()):
                digest.update(len(content).to_bytes(8, "little") + content)
        return cls(digest.hexdigest(), parts)

    def check(self) -> None:
        """Compare the source with what it is now.

        Raises
        ------
        IntegrityError
            Naming the first file or key that changed: its size, the time of its last change, or, of Zarr's metadata,
            its bytes.
        OpenError
            If the store fails.
        """
        for part in self.parts:
            if change := part.find_change():
                raise IntegrityError(
                    f"{change.name} was changed ({change.before} when the run began, {change.now} now); start again"
                )

    def sample(self) -> Fingerprint:
        """Return what each worker must see: metadata, and the first of the files that are read in place."""
        return Fingerprint(self.digest, tuple(part for part in self.parts if part.shared)[:_MOST_SAMPLED])

    def look(self) -> str:
        """Say what this process does not see as the client does; empty where it sees all. See `preflight.Sight`."""
        for part in self.parts:
            try:
                change = part.find_change()
            except PipelineError as error:
                return f"the source: {say_failure(error.__cause__ or error)}"
            if change:
                other = "another file of " if change.before == change.now else ""
                return f"{change.name} ({change.before} on the client, {other}{change.now} on the worker)"
        return ""


def fingerprint_matrix(matrix: Matrix, starts: NDArray[np.int64], length: int) -> Fingerprint:
    """Check that every file or key that windows touch is there with its size, and take the fingerprint of these.

    No data are read. A store is queried once for both, by a listing where windows touch many of its keys.

    Parameters
    ----------
    starts
        (n,) ascending.
    length
        Rows of a window.

    Raises
    ------
    IntegrityError
        Naming the first file that is absent or has another size, its rows, and how many windows touch them.
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
        return Fingerprint.of([words, *(_Stats.known(files.stamps[number]) for number in touched.tolist())])
    assert matrix.array is not None
    first, last = starts // files.file_rows, last // files.file_rows
    touched = touched_units(first, last)
    looked_up = [] if isinstance(files, Files) else list(files.look_up(touched))
    problem = files.find_problem(touched) if isinstance(files, Files) else files.judge(looked_up)
    if problem is not None:
        windows = int(((first <= problem.number) & (problem.number <= last)).sum())
        fill = ", or read the fill value with --missing-chunks fill" if problem.words == "is absent" else ""
        raise IntegrityError(
            f"{problem.name} {problem.words}, and {windows:,} of {count_of(len(starts), 'window')} "
            f"{'touches' if windows == 1 else 'touch'} it; restore it{fill}"
        )
    chunks = _chunks(files, touched) if isinstance(files, Files) else _Listing.of(files, touched, looked_up)
    return Fingerprint.of([words, _Document.of(matrix.array), chunks])


def fingerprint_source(source: Source) -> Fingerprint:
    """Take the fingerprint of all of a source of any kind; no data are read."""
    return Fingerprint.of(_source_parts(source))


def _source_parts(source: Source) -> Iterator[_Part]:
    kind = type(source).__name__
    match source:
        case StackedSource():
            yield _Words((kind, str(len(source.sources))))
            for member in source.sources:
                yield from _source_parts(member)
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
            yield _Document.of(source.array)
            files = array_files(source.array)
            yield _chunks(files, np.arange(files.grid[0]))
        case _:
            # Nothing is stored: the arguments that values are drawn from say what it is.
            yield _Words((repr(source),))


def _chunks(files: Files | Keys, numbers: NDArray[np.int64]) -> _Part:
    """Files or keys of these rows, as they are now."""
    if not isinstance(files, Files):
        return _Listing.of(files, numbers, files.look_up(numbers))
    root = str(Path(files.root).absolute())
    names = tuple(path[len(files.root) + 1 :] for number in numbers.tolist() for path in files.paths(number))
    return _Stats(root, names, *_stat(root, names))


@dataclass(frozen=True, slots=True)
class _Words:
    """What is known of a source beside its files. It cannot change."""

    words: tuple[str, ...]
    shared = False

    def feed(self) -> Iterator[bytes]:
        return (word.encode() for word in self.words)

    def find_change(self) -> None:
        return None


@dataclass(frozen=True, slots=True, eq=False)
class _Stats:
    """Local files, and their sizes and times."""

    root: str
    """Folder, absolute."""
    names: tuple[str, ...]
    """Within the folder."""
    sizes: NDArray[np.int64]
    """(n,) bytes, or `_ABSENT`."""
    changed: NDArray[np.int64]
    """(n,) times of the last change; see `change_time`."""
    shared: bool = False

    @classmethod
    def known(cls, stamp: FileStamp) -> Self:
        """Take a file as it was when it was opened."""
        folder, name = os.path.split(stamp.path)
        return cls(folder, (name,), np.array([stamp.size]), np.array([stamp.changed]), shared=True)

    def feed(self) -> Iterator[bytes]:
        # A folder of several names is one folder.
        yield os.fsencode(os.path.realpath(self.root))
        yield os.fsencode("\0".join(self.names))
        yield self.sizes.astype("<i8").tobytes()
        yield self.changed.astype("<i8").tobytes()

    def find_change(self) -> _Change | None:
        sizes, changed = _stat(self.root, self.names)
        return _first_change(self.root, self.names, (self.sizes, self.changed), (sizes, changed))


def _stat(root: str, names: tuple[str, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Size and time of the last change of each file: a stat each, and little else, since files are many."""
    sizes, changed = [], []
    for name in names:
        try:
            status = os.stat(f"{root}/{name}")  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            sizes.append(_ABSENT)
            changed.append(0)
        except OSError as error:
            raise OpenError(f"{root}/{name} cannot be read: {error.strerror}; check its permissions") from error
        else:
            sizes.append(status.st_size)
            changed.append(change_time(status))
    return np.array(sizes, np.int64), np.array(changed, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Listing:
    """Keys of a store, and the sizes and tags that it reports."""

    keys: Keys
    numbers: NDArray[np.int64]
    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    """(n,) bytes, or `_ABSENT`, or `_UNKNOWN`."""
    tags: tuple[str, ...]
    shared = False

    @classmethod
    def of(
        cls, keys: Keys, numbers: NDArray[np.int64], looked_up: Iterable[tuple[tuple[str, int], Found | None]]
    ) -> Self:
        """Take what `Keys.look_up` gives of the keys of these rows."""
        names, sizes, tags = [], [], []
        for (path, _), found in looked_up:
            names.append(path)
            sizes.append(_ABSENT if found is None else _UNKNOWN if found.nbytes is None else found.nbytes)
            tags.append("" if found is None else found.tag)
        return cls(keys, numbers, tuple(names), np.array(sizes, np.int64), tuple(tags))

    def feed(self) -> Iterator[bytes]:
        # Some stores are named by their address in this process's memory.
        yield re.sub(r" at 0x\w+", "", name_store(self.keys.array.store)).encode()
        yield "\0".join(self.names).encode()
        yield self.sizes.astype("<i8").tobytes()
        yield "\0".join(self.tags).encode()

    def find_change(self) -> _Change | None:
        now = type(self).of(self.keys, self.numbers, self.keys.look_up(self.numbers))
        root = name_store(self.keys.array.store)
        return _first_change(root, self.names, (self.sizes, self.tags), (now.sizes, now.tags))


type _Told = tuple[NDArray[np.int64], NDArray[np.int64] | tuple[str, ...]]
"""Sizes of files, and what else changes with their bytes: times or tags."""


def _first_change(root: str, names: Sequence[str], before: _Told, now: _Told) -> _Change | None:
    """Return the first file of which a size, a time or a tag differs."""
    differing = np.flatnonzero((before[0] != now[0]) | (np.asarray(before[1]) != np.asarray(now[1])))
    if not len(differing):
        return None
    first = int(differing[0])
    return _Change(f"{root}/{names[first]}", _say(int(before[0][first])), _say(int(now[0][first])))


def _say(nbytes: int) -> str:
    return {_ABSENT: "absent", _UNKNOWN: "there"}.get(nbytes, f"{nbytes} bytes")


@dataclass(frozen=True, slots=True, eq=False)
class _Document:
    """Metadata of a Zarr array, under a key of its store."""

    store: Store
    key: str
    digest: str
    nbytes: int
    shared = True

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> Self:
        """Take it as it is now; IntegrityError where it no longer describes the array that was opened."""
        name = "zarr.json" if array.metadata.zarr_format == 3 else ".zarray"
        key = f"{array.path}/{name}" if array.path else name
        content = read_key(array.store, key)
        if content is None or not _describes(content, array):
            # The chunks would be read as those of the array that was there before.
            raise IntegrityError(f"{key} of {name_store(array.store)} was changed; open it again")
        return cls(array.store, key, hashlib.sha256(content).hexdigest(), len(content))

    def feed(self) -> Iterator[bytes]:
        yield self.key.encode()
        yield self.digest.encode()

    def find_change(self) -> _Change | None:
        content = read_key(self.store, self.key)
        if content is not None and hashlib.sha256(content).hexdigest() == self.digest:
            return None
        now = _ABSENT if content is None else len(content)
        return _Change(f"{self.key} of {name_store(self.store)}", _say(self.nbytes), _say(now))


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
