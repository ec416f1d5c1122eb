"""Outputs appear whole or not at all: written beside their destination, flushed to the disk, renamed last."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DiskSpaceError, InputError, OpenError, OutputExistsError
from pipeline.matrix import ATTRIBUTE
from pipeline.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray


@contextmanager
def stage_folder(path: Path, *, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder beside `path`, which takes its place when the body ends, and is removed when it raises.

    Parameters
    ----------
    nbytes
        Bytes that the body will write.
    overwrite
        Whether a Zarr that this package wrote may be replaced. Nothing else ever is.

    Raises
    ------
    OutputExistsError
        If something is at `path`, or an interrupted run left its remains.
    DiskSpaceError
        If the disk has less room.
    """
    partial = _prepare(path, nbytes, overwrite=overwrite)
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise OutputExistsError(f"one run writes an output; {partial} appeared; wait for the other run") from error
    try:
        yield partial
        for folder, _, names in os.walk(partial):
            for name in names:
                if name.endswith(".json"):
                    sync_path(Path(folder, name))
            sync_path(Path(folder))
        _put_in_place(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def stage_file(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], *, overwrite: bool) -> Iterator[NDArray[Any]]:
    """Yield a memory map of a new `.npy`, which takes its place when the body ends, and is removed when it raises.

    Its blocks are reserved first, since a memory map on a full disk kills the process that writes into it.
    """
    nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    partial = _prepare(path, nbytes, overwrite=overwrite)
    try:
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        with partial.open("r+b") as file:
            _reserve(file.fileno(), partial.stat().st_size, partial)
        yield array
        array.flush()
        sync_path(partial)
        _put_in_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_path(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_apart(path: Path, inputs: Iterable[str | Path]) -> None:
    """Raise OutputExistsError where an output is one of its inputs, lies inside of one, or holds one."""
    place = path.resolve()
    for each in inputs:
        source = Path(each).resolve()
        if place == source or source in place.parents or place in source.parents:
            raise OutputExistsError(f"an output lies apart from its input; {path} and {each} do not; name another")


def check_destination(path: Path, *, nbytes: int, overwrite: bool) -> None:
    """Raise unless an output of `nbytes` may go to `path`: nothing is there, or with `overwrite` an output of ours."""
    if not path.name:
        raise InputError(f"an output has a name; got {str(path)!r}; give one such as windows.zarr")
    if not path.parent.is_dir():
        raise OpenError(f"an output goes into a folder that is there; {path.parent} is not; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OpenError(f"an output goes into a folder that can be written; {path.parent} cannot; change its mode")
    partial = _partial(path)
    for taken in (path, partial):
        if _is_taken(taken) and not overwrite:
            kind = "holds an interrupted run's remains" if taken == partial else "exists"
            raise OutputExistsError(f"an output is written once; {taken} {kind}; name another, or pass --overwrite")
    if _is_taken(path) and not _is_ours(path):
        raise OutputExistsError(
            f"only an output of ours is replaced; {path} is none; name another, or remove it yourself"
        )
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise DiskSpaceError(
            f"an output fits its disk; {path} takes {format_size(nbytes)}, the disk has {format_size(free)}; free some"
        )


def _is_taken(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise OpenError(f"an output can be named so; {path}: {error.strerror}; name another") from error
    return True


def _partial(path: Path) -> Path:
    """Return the path beside an output where it is staged."""
    return path.with_name(path.name + ".partial")


def _prepare(path: Path, nbytes: int, *, overwrite: bool) -> Path:
    """Check the destination once more, clear what an interrupted run left, and return where to stage."""
    check_destination(path, nbytes=nbytes, overwrite=overwrite)
    partial = _partial(path)
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)
    return partial


def _is_ours(path: Path) -> bool:
    """Whether `path` is a Zarr that this package wrote, or an `.npy` file; a link is neither."""
    try:
        if path.is_symlink():
            return False
        if path.is_dir():
            metadata = json.loads((path / "zarr.json").read_bytes())
            return ATTRIBUTE in metadata.get("attributes", {})
        with path.open("rb") as file:
            return path.suffix == ".npy" and file.read(6) == b"\x93NUMPY"
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _reserve(fd: int, nbytes: int, path: Path) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        raise DiskSpaceError(f"an output fits its disk; {path} of {format_size(nbytes)}: {error.strerror}") from error


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename, with what was there before moved aside until the new one is in its place."""
    aside = path.with_name(path.name + ".replaced")
    replaces = os.path.lexists(path)
    if replaces and path.is_dir():
        path.rename(aside)
    partial.rename(path)
    sync_path(path.parent)
    if replaces and aside.is_dir():
        shutil.rmtree(aside)
