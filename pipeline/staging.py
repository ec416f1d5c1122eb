"""Outputs appear whole or not at all: written beside their destination, flushed to the disk, renamed last."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import uuid
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

_AT_FDCWD, _EXCHANGE = -100, 2
"""Of `renameat2(2)`."""


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
        If something is at `path`, another run writes it, or an interrupted run left its remains.
    DiskSpaceError
        If the disk has less room.
    """
    check_destination(path, nbytes=nbytes, overwrite=overwrite)
    partial = _partial(path)
    with _appearing(partial):
        partial.mkdir(exist_ok=overwrite)
    with _locked(partial):
        try:
            for remains in partial.iterdir():
                _remove(remains)
            yield partial
            for folder, _, names in os.walk(partial):
                for name in names:
                    if name.endswith(".json"):
                        sync_path(Path(folder, name))
                sync_path(Path(folder))
            _put_in_place(partial, path, overwrite=overwrite)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def stage_file(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], *, overwrite: bool) -> Iterator[NDArray[Any]]:
    """Yield a memory map of a new `.npy`, which takes its place when the body ends, and is removed when it raises.

    Its blocks are reserved first, since a memory map on a full disk kills the process that writes into it.
    """
    nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    check_destination(path, nbytes=nbytes, overwrite=overwrite, dtype=dtype, shape=shape)
    partial = _partial(path)
    with _appearing(partial):
        partial.touch(exist_ok=overwrite)
    with _locked(partial):
        try:
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
            with partial.open("r+b") as file:
                _reserve(file.fileno(), partial.stat().st_size, partial)
            yield array
            array.flush()
            sync_path(partial)
            _put_in_place(partial, path, overwrite=overwrite)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def _appearing(path: Path) -> Iterator[None]:
    """Turn the system's word that something is at `path` into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise OutputExistsError(f"an output is written once; {path} appeared meanwhile; name another") from error
        raise


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the operating system's lock on what is being staged: it ends with its holder, and leaves no file behind."""
    fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(fd), partial.stat())
        except OSError as error:
            if not isinstance(error, BlockingIOError | FileNotFoundError):
                raise
            same = False
        if not same:
            raise OutputExistsError(
                f"one run writes an output at a time; another writes {partial}; wait, or name another"
            )
        yield
    finally:
        os.close(fd)


def sync_path(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_apart(path: Path, inputs: Iterable[str | Path]) -> None:
    """Raise OutputExistsError where an output is one of its inputs, lies inside of one, or holds one."""
    for each in inputs:
        source = Path(each).resolve()
        for place in (path.resolve(), _partial(path).resolve()):
            if place != source and source not in place.parents and place not in source.parents:
                continue
            raise OutputExistsError(f"an output lies apart from its input; {path} and {each} do not; name another")


def check_destination(
    path: Path,
    *,
    nbytes: int,
    overwrite: bool,
    dtype: np.dtype[Any] | None = None,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Raise unless an output of `nbytes` may go to `path`: nothing is there, or with `overwrite` an output of ours.

    An `.npy` bears no name: one of the same `dtype` and window shape as the new one (where they are given) counts as
    ours.
    """
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
    if _is_taken(path) and not _is_ours(path, dtype, shape):
        raise OutputExistsError(
            f"only an output of ours is replaced; {path} is none; name another, or remove it yourself"
        )
    if _is_taken(partial) and not _is_remains(partial):
        raise OutputExistsError(f"only our own remains are removed; {partial} is none; name another, or move it")
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


def _is_ours(path: Path, dtype: np.dtype[Any] | None, shape: tuple[int, ...] | None) -> bool:
    """Whether `path` is a Zarr that this package wrote, or an `.npy` such as it writes; a link is neither."""
    try:
        if path.is_symlink():
            return False
        if path.is_dir():
            metadata = json.loads((path / "zarr.json").read_bytes())
            return ATTRIBUTE in metadata.get("attributes", {})
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    alike = dtype is None or shape is None or (array.dtype == dtype and array.shape[1:] == shape[1:])
    return path.suffix == ".npy" and alike


def _is_remains(partial: Path) -> bool:
    """Whether `partial` is what an interrupted run of ours left: our Zarr, an `.npy`, or either not begun yet."""
    if partial.is_symlink():
        return False
    if partial.is_dir():
        return not any(partial.iterdir()) or _is_ours(partial, None, None)
    with partial.open("rb") as file:
        return file.read(6) in (b"", b"\x93NUMPY")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _reserve(fd: int, nbytes: int, path: Path) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        raise DiskSpaceError(f"an output fits its disk; {path} of {format_size(nbytes)}: {error.strerror}") from error


def _put_in_place(partial: Path, path: Path, *, overwrite: bool) -> None:
    """Rename what is complete; what stood there before, if it may be replaced, is there until the new one is."""
    if overwrite and _is_taken(path):
        _exchange(partial, path)
        sync_path(path.parent)
        _remove(partial)
    elif partial.is_dir():
        with _appearing(path):
            partial.rename(path)
    else:
        # A rename would replace a file that has appeared meanwhile; a link does not.
        with _appearing(path):
            path.hardlink_to(partial)
        partial.unlink()
    sync_path(path.parent)


def _exchange(one: Path, other: Path) -> None:
    """Let two names change places at once (Linux), or one after the other where the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and not renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE):
        return
    aside = other.with_name(f"{other.name}.{uuid.uuid4().hex[:8]}.replaced")
    other.rename(aside)
    try:
        one.rename(other)
    except BaseException:
        aside.rename(other)
        raise
    aside.rename(one)
