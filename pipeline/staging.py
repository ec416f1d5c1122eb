"""Outputs appear whole or not at all: made beside their destination, with a journal, and renamed into place last.

While it is made, the folder `OUT.partial` holds:

    lock        held by the run that writes; it ends with its process
    holder      who that is, for the message of another
    journal     the request, and every finished task
    output      the file or folder that becomes OUT
    replaced    the output that stood at OUT, where it is to be replaced and names cannot be exchanged at once
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DiskSpaceError, InputError, IntegrityError, OpenError, OutputExistsError
from pipeline.journal import Journal
from pipeline.npy import read_mark
from pipeline.record import list_files, read_record, record_file
from pipeline.sizes import count_of, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipeline.journal import Request
    from pipeline.record import FileRecord

_AT_FDCWD, _EXCHANGE = -100, 2
"""Of `renameat2(2)`."""
_STAGED = {"lock", "holder", "journal", "journal.partial", "output", "replaced"}


class Stage:
    """An output that is being made."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._journal = journal
        self.output = folder / "output"
        """The file or folder to be made; what an earlier run wrote is there."""
        self.cut = journal.cut
        """Units of a task; those of the earlier run, where there was one."""

    @property
    def done(self) -> dict[int, tuple[FileRecord, ...]]:
        """Tasks that are finished, by number, and what each wrote."""
        return self._journal.done

    def finish(self, *tasks: tuple[int, tuple[FileRecord, ...]]) -> None:
        """Note tasks as finished: their bytes are on the disk, and were read back."""
        self._journal.append(tasks)

    def check_kept(self) -> None:
        """Read again what finished tasks wrote into a folder; tasks are redone whose files differ, all else is removed.

        Metadata and what belongs to no task are written anew.
        """
        with ThreadPoolExecutor() as pool:
            whole = list(
                pool.map(lambda files: all(_is_whole(self.output, each) for each in files), self.done.values())
            )
        self.redo(number for number, right in zip(list(self.done), whole, strict=True) if not right)
        kept = {file.key for files in self.done.values() for file in files}
        for key, _ in list(list_files(self.output)):
            if key not in kept:
                (self.output / key).unlink()

    def redo(self, numbers: Iterable[int]) -> None:
        """Take tasks of an earlier run as not finished."""
        wrong = list(numbers)
        for number in wrong:
            del self._journal.done[number]
        if wrong:
            self._journal.rewrite()

    def check_complete(self, tasks: int) -> None:
        """Raise IntegrityError unless each of so many tasks is finished."""
        missing = [number for number in range(tasks) if number not in self.done]
        if missing:
            raise IntegrityError(
                f"an output is complete; {count_of(len(missing), 'task')} of {tasks:,}, the first number {missing[0]}, "
                f"left no line in its journal; go on with --resume"
            )


@contextmanager
def stage_output(
    path: Path, request: Request, *, cut: int, nbytes: int, resume: bool, overwrite: bool
) -> Iterator[Stage]:
    """Yield the place where an output is made, which takes its name when the body ends.

    When the body raises, what tasks have finished is kept, and a note on the error says so; without any, nothing is.

    Parameters
    ----------
    cut
        Units of a task; a run that resumes keeps to that of the earlier one.
    nbytes
        Bytes that the body will write.
    resume
        Whether to go on with what an interrupted run of the same request left.
    overwrite
        Whether an output that this package wrote may be replaced. Nothing else ever is.

    Raises
    ------
    OutputExistsError
        If something is at `path`, another run writes it, or an interrupted run left its remains.
    DiskSpaceError
        If the disk has less room.
    """
    check_destination(path, nbytes=nbytes, resume=resume, overwrite=overwrite)
    partial = _partial(path)
    with _appearing(partial):
        partial.mkdir(exist_ok=resume or overwrite)
    with _locked(partial):
        _restore_replaced(partial, path)
        stage = Stage(partial, _begin_journal(partial, request, cut, resume=resume, overwrite=overwrite))
        if stage.output.is_dir():
            stage.check_kept()
        try:
            yield stage
            _sync_tree(stage.output)
            _put_in_place(partial, path, overwrite=overwrite)
        except BaseException as error:
            if stage.done:
                error.add_note(f"{count_of(len(stage.done), 'task')} finished and kept; go on with --resume")
            else:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial)
        sync_path(path.parent)


def is_result(path: Path, request: Request) -> bool:
    """Whether `path` is the finished output of this very request, by what it says of itself."""
    return _is_taken(path) and not _request_differs(path, request)


def is_finished(path: Path, request: Request) -> bool:
    """Whether `path` is the finished output of this very request, whose files are read again; its remains are swept.

    Raises
    ------
    IntegrityError
        If it is, but files of it are gone, or not what was written.
    OutputExistsError
        If another run is at it.
    """
    if not is_result(path, request):
        return False
    record = read_record(path) if path.is_dir() else None
    if record is not None:
        with ThreadPoolExecutor() as pool:
            right = pool.map(lambda file: _is_whole(path, file), record.files.values())
            wrong = [key for key, whole in zip(record.files, right, strict=True) if not whole]
        if wrong or not record.whole:
            raise IntegrityError(
                f"a finished output stays as it was; in {path} {count_of(len(wrong), 'file')} changed"
                f"{', the first ' + wrong[0] if wrong else ', but its metadata'}; make it again with --overwrite"
            )
    partial = _partial(path)
    if _is_taken(partial) and _is_remains(partial):
        with _locked(partial):
            shutil.rmtree(partial)
    return True


def _is_whole(root: Path, file: FileRecord) -> bool:
    with suppress(OSError):
        return record_file(root, file.key) == file
    return False


def _request_differs(path: Path, request: Request) -> list[str]:
    """Names of the facts in which the output at `path` is of another request; empty where it is of this one."""
    try:
        if path.is_dir():
            record = read_record(path)
            return ["all"] if record is None else request.differences(record.ours.get("request"))
        return [] if read_mark(path) == request.digest else ["the request"]
    except (OpenError, OSError):
        return ["all"]


def _begin_journal(partial: Path, request: Request, cut: int, *, resume: bool, overwrite: bool) -> Journal:
    path = partial / "journal"
    journal = Journal.read(path)
    if journal is not None and resume:
        differs = request.differences(journal.facts)
        if not differs:
            journal.rewrite()
            return journal
        if not overwrite:
            raise OutputExistsError(
                f"a run resumes one of the same request; that of {partial} differs in {', '.join(differs)}; ask for "
                f"the same, or start anew with --overwrite"
            )
    for name in ("output", "journal", "journal.partial"):
        if _is_taken(partial / name):
            _remove(partial / name)
    return Journal.create(path, request, cut)


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
    """Hold the operating system's lock on what is being staged: it ends with its holder.

    The lock's file goes with the folder, so whoever waited for one that is gone must see that: hence not filelock.
    """
    lock, holder = partial / "lock", partial / "holder"
    fd = -1
    try:
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(fd), lock.stat())
        except OSError as error:
            if not isinstance(error, BlockingIOError | FileNotFoundError):
                raise
            same = False
        if not same:
            who = ""
            with suppress(OSError, ValueError):
                who = ": " + ", ".join(f"{key} {value}" for key, value in json.loads(holder.read_text()).items())
            raise OutputExistsError(
                f"one run writes an output at a time; another writes {partial}{who}; wait, or name another"
            )
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        holder.write_text(json.dumps({"process": os.getpid(), "host": platform.node(), "since": now}))
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def sync_path(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(output: Path) -> None:
    """Flush what tasks did not: metadata, and the names in each folder."""
    for folder, _, names in os.walk(output):
        for name in names:
            if name.endswith(".json"):
                sync_path(Path(folder, name))
        sync_path(Path(folder))


def check_apart(path: Path, inputs: Iterable[str | Path]) -> None:
    """Raise OutputExistsError where an output is one of its inputs, lies inside of one, or holds one."""
    for each in inputs:
        source = Path(each).resolve()
        for place in (path.resolve(), _partial(path).resolve()):
            if place != source and source not in place.parents and place not in source.parents:
                continue
            raise OutputExistsError(f"an output lies apart from its input; {path} and {each} do not; name another")


def check_destination(path: Path, *, nbytes: int, resume: bool = False, overwrite: bool) -> None:
    """Raise unless an output of `nbytes` may go to `path`: nothing is there, or what `resume` and `overwrite` allow."""
    if not path.name:
        raise InputError(f"an output has a name; got {str(path)!r}; give one such as windows.zarr")
    if not path.parent.is_dir():
        raise OpenError(f"an output goes into a folder that is there; {path.parent} is not; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OpenError(f"an output goes into a folder that can be written; {path.parent} cannot; change its mode")
    partial = _partial(path)
    if _is_taken(path) and not overwrite:
        what = "exists, of another request" if resume else "exists"
        raise OutputExistsError(f"an output is written once; {path} {what}; name another, or pass --overwrite")
    if _is_taken(partial) and not (overwrite or resume):
        raise OutputExistsError(
            f"an output is written once; {partial} holds an interrupted run's remains; pass --resume to go on with "
            f"it, or --overwrite to start anew"
        )
    if _is_taken(path) and not _is_ours(path):
        raise OutputExistsError(
            f"only an output of ours is replaced; {path} is none; name another, or remove it yourself"
        )
    there = _check_remains(partial) if _is_taken(partial) else 0
    free = shutil.disk_usage(path.parent).free + there
    if nbytes > free:
        raise DiskSpaceError(
            f"an output fits its disk; {path} takes {format_size(nbytes)}, the disk has {format_size(free)}; free some"
        )


def _check_remains(partial: Path) -> int:
    """Return the bytes that an interrupted run's output takes on the disk; OutputExistsError if it is none of ours."""
    if not _is_remains(partial):
        raise OutputExistsError(f"only our own remains are removed; {partial} is none; name another, or move it")
    output = partial / "output"
    if output.is_file():
        # Its blocks were reserved.
        return output.stat().st_blocks * 512
    return sum(size for _, size in list_files(output))


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


def _is_ours(path: Path) -> bool:
    """Whether `path` is a Zarr or an `.npy` that this package finished; a link is neither."""
    try:
        if path.is_symlink():
            return False
        return read_record(path) is not None if path.is_dir() else read_mark(path) is not None
    except (OSError, ValueError):
        return False


def _is_remains(partial: Path) -> bool:
    """Whether `partial` is what an interrupted run of ours left."""
    return partial.is_dir() and not partial.is_symlink() and {each.name for each in partial.iterdir()} <= _STAGED


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _put_in_place(partial: Path, path: Path, *, overwrite: bool) -> None:
    """Rename what is complete; what stood there before, if it may be replaced, is there until the new one is."""
    output = partial / "output"
    if overwrite and _is_taken(path):
        _exchange(output, path, aside=partial / "replaced")
    elif output.is_dir():
        with _appearing(path):
            output.rename(path)
    else:
        with _appearing(path):
            try:
                # A rename would replace a file that has appeared meanwhile; a link does not.
                path.hardlink_to(output)
            except OSError as error:
                if error.errno == errno.EEXIST or _is_taken(path):
                    raise
                # A file system without links.
                output.rename(path)
    sync_path(path.parent)


def _exchange(new: Path, old: Path, *, aside: Path) -> None:
    """Let two names change places at once (Linux), or one after the other where the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and not renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _EXCHANGE):
        return
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise


def _restore_replaced(partial: Path, path: Path) -> None:
    """Put back the output that an earlier run had taken aside, where it ended before the new one took its place."""
    if _is_taken(partial / "replaced") and not _is_taken(path):
        (partial / "replaced").rename(path)
        sync_path(path.parent)
