"""System calls that a network or FUSE file system may refuse: done another way, or without.

Only what is a second safety is done without; that is remembered by file system, and said in the report of a run.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_REFUSALS = {
    getattr(errno, name)
    for name in ("ENOSYS", "ENOLCK", "EINVAL", "EOPNOTSUPP", "ENOTSUP", "EPERM", "ENODEV", "ENOTTY")
    if hasattr(errno, name)
}
_MOVE_REFUSALS = _REFUSALS | {errno.EXDEV, errno.EMFILE}
"""gcsfuse says EMFILE, and overlays say EXDEV, of a folder that they cannot rename."""
_IN_THE_WAY = {errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOENT, errno.ENOTDIR}
_STEP_NBYTES = 4 * 2**20
_FDS = Path("/proc/self/fd")
_GHOST = re.compile(r"\.nfs[0-9a-fA-F]+|\.fuse_hidden[0-9a-fA-F]+")

_lacking: dict[int, dict[str, str]] = {}
"""By device: what its file system refuses, and what follows from that."""


def is_refused(error: OSError) -> bool:
    """Whether a file system says that it has no such call; a disk that is full or broken says something else.

    Examples
    --------
    >>> is_refused(OSError(errno.ENOSYS, "")), is_refused(OSError(errno.EIO, ""))
    (True, False)
    """
    return error.errno in _REFUSALS


def is_ghost(name: str) -> bool:
    """Whether a file's name is the one that NFS or FUSE gives to a file that was removed while it was open."""
    return _GHOST.fullmatch(name) is not None


def note_refusal(place: Path | int, call: str, consequence: str) -> None:
    """Remember that the file system of a path or descriptor refuses a call."""
    with suppress(OSError):
        _lacking.setdefault(os.stat(place).st_dev, {})[call] = consequence  # noqa: PTH116 (or a descriptor)


def say_refusals(place: object) -> str:
    """Say in one line what the file system of a path has refused to this process; empty where it refused nothing."""
    lacking: dict[str, str] = {}
    if isinstance(place, Path):
        with suppress(OSError):
            lacking = _lacking.get(place.absolute().parent.stat().st_dev, {})
    return "; ".join(f"no {call}: {consequence}" for call, consequence in lacking.items())


def flush(fd: int) -> None:
    """Flush an open file, or a folder's list of names, to the disk; OSError where the disk fails."""
    try:
        os.fsync(fd)
    except OSError as error:
        if not is_refused(error):
            raise
        try:
            getattr(os, "fdatasync", os.fsync)(fd)
        except OSError as again:
            if not is_refused(again):
                raise
            note_refusal(fd, "fsync", "a crash of the machine may lose what was written last")


def sync_path(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flush(fd)
    finally:
        os.close(fd)


def pin(folder: Path, *, follow: bool = False) -> tuple[Path, int]:
    """Open a folder, so that it can be reached whatever others make of its name meanwhile.

    Parameters
    ----------
    follow
        Whether its name may be a link.

    Returns
    -------
    tuple
        A path of this process that leads to the open folder, or `folder` itself without `/proc`; and the descriptor,
        to be closed by the caller.
    """
    flags = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(folder, flags)
    path = _FDS / str(fd)
    return (path if path.is_dir() else folder), fd


def is_pin(path: Path) -> bool:
    """Whether a path is one of `pin`: of the folder itself, which it leads to as a link does."""
    return path.parent == _FDS


@contextmanager
def pinned(folder: Path) -> Iterator[Path]:
    """Yield a path that leads to a folder, whose name may be a link, until the block ends; see `pin`."""
    path, fd = pin(folder, follow=True)
    try:
        yield path
    finally:
        os.close(fd)


def name_plainly(error: OSError, path: Path, name: Path) -> None:
    """Let an error name files below a path of `pin` as they are called below `name`."""
    for attribute in ("filename", "filename2"):
        text = str(getattr(error, attribute) or "")
        if path != name and text.startswith(f"{path}/"):
            setattr(error, attribute, f"{name}{text.removeprefix(str(path))}")


def open_regular(path: Path, *, follow: bool = True, buffering: int = -1) -> Any:
    """Open a file for reading in binary; OSError at once for a pipe, whose writer would be waited for, and a device.

    Parameters
    ----------
    follow
        Whether its name may be a link.
    buffering
        As of `open`.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(fd, "rb", buffering)
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))


def write_document(path: Path, content: bytes) -> None:
    """Write a small file beside its name, then in its place: nobody reads a part of it, and no link is followed."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content)
    move_file(partial, path)


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner can read, from the first moment; FileExistsError where anything is there."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)


def advise(fd: int, offset: int, nbytes: int, advice: str) -> None:
    """Tell the kernel what will be read or was written, where it can be told; `nbytes` 0 means all of the file."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, offset, nbytes, getattr(os, f"POSIX_FADV_{advice}"))


def reserve(fd: int, offset: int, nbytes: int) -> None:
    """Give a file `nbytes` in all, with blocks for those behind `offset`, which read as zeros; OSError on a full disk.

    Zeros are written where blocks cannot be reserved otherwise.
    """
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and not is_refused(error):
            raise
    else:
        if os.fstat(fd).st_size == nbytes:
            return
    zeros = memoryview(bytes(min(_STEP_NBYTES, max(0, nbytes - offset))))
    while offset < nbytes:
        offset += os.pwrite(fd, zeros[: nbytes - offset], offset)


def count_free(folder: Path) -> int | None:
    """Bytes that are free on a folder's disk; None where its file system does not tell."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        if not is_refused(error):
            raise
        return None
    # Some FUSE file systems answer with zeros alone.
    return usage.free if usage.total else None


def may_write(folder: Path) -> bool:
    """Whether names can be made in a folder: by trying, where the system says no or does not know."""
    if os.access(folder, os.W_OK | os.X_OK):
        return True
    probe = folder / f".{os.urandom(16).hex()}.partial"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def move_file(source: Path, target: Path) -> None:
    """Give a file another name, in the place of a file that has it; by copying, where none can be renamed."""
    if not rename(source, target):
        target.unlink(missing_ok=True)
        # What another has put there since, such as a link, is not written through.
        with source.open("rb") as old, target.open("xb") as new:
            shutil.copyfileobj(old, new, _STEP_NBYTES)
            new.flush()
            flush(new.fileno())
        source.unlink()


def link_file(source: Path, target: Path) -> None:
    """Give a file another name, FileExistsError where something has it; a second name stays where links work."""
    try:
        target.hardlink_to(source)
    except FileExistsError:
        # Over NFS, an answer that was lost is asked for again.
        if not source.samefile(target):
            raise
    except OSError as error:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        move_file(source, target)


def rename(source: Path, target: Path) -> bool:
    """Rename a file or folder as the system does; False where its file system does not."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in _MOVE_REFUSALS:
            raise
        return False
    return True


def move_files(source: Path, target: Path, *, last: str) -> None:
    """Move the files of a folder that another lacks, one by one, at the end that of a name at its top.

    Parameters
    ----------
    last
        Name of the file without which nobody takes a folder for whole.
    """
    for folder, _, names in os.walk(source):
        place = target / Path(folder).relative_to(source)
        place.mkdir(exist_ok=True)
        for name in names:
            if (place != target or name != last) and not os.path.lexists(place / name):
                move_file(Path(folder, name), place / name)
        sync_path(place)
    if (source / last).exists():
        move_file(source / last, target / last)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, but for what NFS or FUSE keep of files that are open."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onexc=lambda _, __, error: _let_ghosts_be(error))
    else:
        path.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Remove a folder if nothing is in it."""
    try:
        folder.rmdir()
    except OSError as error:
        _let_ghosts_be(error)


def _let_ghosts_be(error: BaseException) -> None:
    """Raise an error of removing, unless something that is open is in the way, or it is gone."""
    if not isinstance(error, OSError) or error.errno not in _IN_THE_WAY:
        raise error
