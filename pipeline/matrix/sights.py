"""What workers must see to do their tasks: files, keys of stores and folders, and how one looks for them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.matrix.arrays import local_folder
from pipeline.matrix.hdf5 import Hdf5Source
from pipeline.matrix.layout import PlainFiles
from pipeline.matrix.sources import FileSource, StackedSource, ZarrSource
from pipeline.storage.base import Folder
from pipeline.storage.concurrency import run
from pipeline.storage.filesystem import may_write
from pipeline.storage.locations import name_store, plain, say_failure, store_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    import zarr
    from zarr.abc.store import Store

    from pipeline.matrix.matrix import Matrix
    from pipeline.matrix.sources import Source
    from pipeline.storage.base import Storage
    from pipeline.storage.files import FileStamp

_SUMMED_NBYTES = 65536
"""Of each end of a document: in that of a large matrix the sizes and checksums of all its files fill megabytes."""
_MOST_LOOKED_AT = 16
"""Files of a stacked source: a worker that sees some sees all, or its tasks say which it does not."""


class Sight(Protocol):
    """Something that a worker must see. Picklable."""

    def look(self) -> str:
        """Look for it from here: say what is wrong, after its name; empty where it is there, and the same."""


@dataclass(frozen=True, slots=True)
class FileSight:
    """A file on a disk: its size, and of a small document the bytes."""

    path: str
    nbytes: int
    digest: str | None

    def look(self) -> str:
        """See `Sight.look`."""
        try:
            nbytes = os.stat(self.path).st_size  # noqa: PTH116
            same = nbytes == self.nbytes and self.digest in (None, _digest(self.path, nbytes))
        except OSError as error:
            return f"{self.path}: {error.strerror}"
        return "" if same else f"{self.path}: it is another file"


@dataclass(frozen=True, slots=True)
class FolderSight:
    """A folder on a disk."""

    path: str
    written: bool

    def look(self) -> str:
        """See `Sight.look`."""
        if not os.path.isdir(self.path):  # noqa: PTH112
            return f"{self.path}: No such folder"
        if may_write(Path(self.path)) if self.written else os.access(self.path, os.R_OK | os.X_OK):
            return ""
        return f"{self.path}: it may not be {'written' if self.written else 'read'}"


@dataclass(frozen=True, slots=True)
class KeySight:
    """A key of a store."""

    store: Store
    key: str
    nbytes: int
    name: str

    def look(self) -> str:
        """See `Sight.look`."""
        try:
            same = _size(self.store, self.key) == self.nbytes
        except FileNotFoundError:
            return f"{self.name}: no such key"
        except Exception as error:  # noqa: BLE001 (a store raises what it likes)
            return f"{self.name}: {say_failure(error)}"
        return "" if same else f"{self.name}: it is another key"


def matrix_sights(matrix: Matrix) -> tuple[Sight, ...]:
    """Tell what workers must see of a matrix."""
    if isinstance(matrix.layout.files, PlainFiles):
        return tuple(map(_stamped, matrix.layout.files.stamps[:_MOST_LOOKED_AT]))
    assert matrix.array is not None
    return (_document(matrix.array),)


def source_sights(source: Source) -> tuple[Sight, ...]:
    """Tell what workers must see of a source."""
    return tuple(_source_sights(source))


def _source_sights(source: Source) -> Iterator[Sight]:
    match source:
        case StackedSource():
            for each in source.sources[:_MOST_LOOKED_AT]:
                yield from _source_sights(each)
        case FileSource():
            yield _stamped(source.stamp)
        case Hdf5Source():
            yield _stamped(source.data.stamp)
            yield from (_stamped(reference.stamp) for reference in source.data.references[:_MOST_LOOKED_AT])
        case ZarrSource():
            yield _document(source.array)


def output_sights(array: zarr.Array[Any]) -> tuple[Sight, ...]:
    """Tell what workers must see of an array that they write: its folder; a store says itself what it lacks."""
    folder = local_folder(array)
    return () if folder is None else (FolderSight(str(folder.absolute()), written=True),)


def storage_sights(storage: Storage) -> tuple[Sight, ...]:
    """Tell what workers must see of files that they verify."""
    return (FolderSight(storage.root, written=False),) if isinstance(storage, Folder) else ()


def _stamped(stamp: FileStamp) -> FileSight:
    return FileSight(str(stamp.path), stamp.size, None)


def _document(array: zarr.Array[Any]) -> Sight:
    """Metadata of an array; of ours they tell the checksums of all its files."""
    name = "zarr.json" if array.metadata.zarr_format == 3 else ".zarray"
    folder = local_folder(array)
    if folder is not None:
        path = str(Path(folder, name).absolute())
        nbytes = os.stat(path).st_size  # noqa: PTH116
        return FileSight(path, nbytes, _digest(path, nbytes))
    key = f"{array.path}/{name}" if array.path else name
    shown = f"{name_store(array.store_path)}/{name}"
    try:
        return KeySight(array.store, key, _size(array.store, key), shown)
    except Exception as error:  # noqa: BLE001 (a store raises what it likes)
        raise store_error("a store can be read", shown, error) from plain(error)


def _digest(path: str, nbytes: int) -> str:
    with open(path, "rb") as file:  # noqa: PTH123
        head = file.read(_SUMMED_NBYTES)
        file.seek(max(len(head), nbytes - _SUMMED_NBYTES))
        return hashlib.sha256(head + file.read(_SUMMED_NBYTES)).hexdigest()


def _size(store: Store, key: str) -> int:
    return run(store.getsize(key))
