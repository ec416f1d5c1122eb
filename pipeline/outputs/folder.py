"""Outputs appear whole or not at all: made beside their destination, with a journal, and renamed into place last.

While it is made, the folder `OUT.partial` holds:

    lock ...    says which run writes; see `holding`
    journal     the request, and every finished task
    output-ID   the file or folder that becomes OUT; each run renames what it goes on with, so that a task of an earlier
                one, whose worker does not know that its run has ended, finds nothing to write into
    replaced    the output that stood at OUT, where it is to be replaced and names cannot be exchanged at once
    moving      that OUT appears file by file, on a file system that renames no folders
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DiskSpaceError, InputError, IntegrityError, OpenError, OutputExistsError, PipelineError
from pipeline.formatting import count_of, format_size
from pipeline.integrity.record import METADATA, list_files, read_record, record_file
from pipeline.outputs.journal import Journal
from pipeline.outputs.lock import NAMES, hold, refuse_held
from pipeline.outputs.npy import is_whole_npy, read_mark
from pipeline.storage.filesystem import (
    count_free,
    is_ghost,
    is_pin,
    link_file,
    may_write,
    move_file,
    move_files,
    name_plainly,
    note_refusal,
    pin,
    pinned,
    remove,
    rename,
    sync_path,
)
from pipeline.storage.trust import check_own

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipeline.outputs.journal import Request
    from pipeline.outputs.lock import Hold
    from pipeline.storage.checksums import FileRecord

_AT_FDCWD, _EXCHANGE = -100, 2
"""Of `renameat2(2)`."""
_HELD = re.compile(NAMES)
_STAGED = re.compile(rf"{NAMES}|journal|journal.partial|output-[0-9a-f]{{8}}|replaced|moving")
_LEFT = re.compile(r".*\.[0-9a-f]{32}\.partial")
"""Files that a worker was writing when it ended, ours and zarr's: their tasks were run again."""


class Stage:
    """An output that is being made."""

    def __init__(self, folder: Path, journal: Journal, held: Hold) -> None:
        self._journal, self._held = journal, held
        self.held_output = held.folder / f"output-{uuid.uuid4().hex[:8]}"
        """The same as `output`, for this process, whatever others make of the folder's name."""
        for earlier in _outputs(held.folder):
            if not rename(earlier, self.held_output):
                self.held_output = earlier
        self.output = folder / self.held_output.name
        """The file or folder to be made; what an earlier run wrote is there. Nobody else knows its name."""
        self.cut = journal.cut
        """Units of a task; those of the earlier run, where there was one."""
        self.tasks = 0
        """See `outputs.Stage.expect`; 0 before."""

    @property
    def done(self) -> dict[int, tuple[FileRecord, ...]]:
        """Tasks that are finished, by number, and what each wrote."""
        return self._journal.done

    def finish(self, *tasks: tuple[int, tuple[FileRecord, ...]]) -> None:
        """Note tasks as finished: their bytes are on the disk, and were read back."""
        self._held.check()
        self._journal.append(tasks)

    def check_kept(self) -> None:
        """Read again what finished tasks wrote into a folder; tasks are redone whose files differ, all else is removed.

        Metadata and what belongs to no task are written anew.
        """
        with ThreadPoolExecutor() as pool:
            whole = list(
                pool.map(lambda files: all(_is_whole(self.held_output, each) for each in files), self.done.values())
            )
        self.redo(number for number, right in zip(list(self.done), whole, strict=True) if not right)
        kept = {file.key for files in self.done.values() for file in files}
        for key, _ in list(list_files(self.held_output)):
            if key not in kept:
                (self.held_output / key).unlink()

    def redo(self, numbers: Iterable[int]) -> None:
        """Take tasks of an earlier run as not finished."""
        wrong = list(numbers)
        for number in wrong:
            del self._journal.done[number]
        if wrong:
            self._journal.rewrite()

    def expect(self, tasks: int) -> None:
        """Learn how many tasks there are."""
        self.tasks = tasks

    def check_complete(self) -> None:
        """Raise IntegrityError unless each expected task is finished; remove what workers left that ended."""
        for key, _ in list(list_files(self.held_output)):
            if _LEFT.fullmatch(key):
                (self.held_output / key).unlink()
        missing = [number for number in range(self.tasks) if number not in self.done]
        if missing:
            raise IntegrityError(
                f"an output is complete; {len(missing):,} of {count_of(self.tasks, 'task')}, the first {missing[0]}, "
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
    with pinned(path.parent) as parent, hold(_partial(parent / path.name), partial) as held:
        place, folder = parent / path.name, held.folder
        earlier = Journal.read(folder / "journal")
        kept, tasks, begun, complete = 0 if earlier is None else len(earlier.done), 0, False, False
        try:
            _finish_moving(folder, place, path)
            _restore_replaced(folder, place)
            journal = _begin_journal(partial, folder, earlier, request, cut, resume=resume, overwrite=overwrite)
            stage = Stage(partial, journal, held)
            begun = True
            if not stage.held_output.is_file():
                stage.check_kept()
            try:
                yield stage
            finally:
                kept, tasks = len(stage.done), stage.tasks
            _sync_tree(stage.held_output)
            held.check()
            _put_in_place(stage.held_output, place, path, overwrite=overwrite)
            complete = True
            sync_path(parent)
            _discard(held)
        except BaseException as error:
            if isinstance(error, OSError) and not isinstance(error, PipelineError):
                error.filename = error.filename or str(partial)
                name_plainly(error, folder, partial)
                name_plainly(error, parent, path.parent)
            if complete:
                error.add_note(f"{path} is complete all the same")
            elif not kept:
                _discard(held)
            elif begun or not isinstance(error, OutputExistsError):
                flags = "--resume --overwrite" if _is_taken(place) else "--resume"
                error.add_note(say_kept(kept, tasks, flags))
            raise


def say_kept(kept: int, tasks: int, flags: str) -> str:
    """Say what a run that failed leaves for the next.

    Parameters
    ----------
    tasks
        All that there are; 0 where that is not known, since the run failed before it cut them.

    Examples
    --------
    >>> say_kept(1, 7, "--resume"), say_kept(2, 0, "--resume")
    ('1 of 7 tasks finished and kept; go on with --resume', '2 tasks finished and kept; go on with --resume')
    """
    return f"{f'{kept:,} of ' if tasks else ''}{count_of(tasks or kept, 'task')} finished and kept; go on with {flags}"


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
    if path.is_file() and not is_whole_npy(path):
        raise IntegrityError(
            f"a finished output stays as it was; {path} has another size; make it again with --overwrite"
        )
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
        with hold(partial) as held:
            journal = Journal.read(held.folder / "journal")
            # Those of another request are somebody's work.
            if journal is None or not request.differences(journal.facts):
                _discard(held)
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


def _begin_journal(
    partial: Path, folder: Path, journal: Journal | None, request: Request, cut: int, *, resume: bool, overwrite: bool
) -> Journal:
    """Go on with the journal of an earlier run, or begin a new one; `folder` leads to what is called `partial`."""
    path = folder / "journal"
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
    if not _has_words_alone(folder) and not (resume or overwrite):
        raise _remains_error(partial)
    for each in [path, folder / "journal.partial", *_outputs(folder)]:
        remove(each)
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


def _sync_tree(output: Path) -> None:
    """Flush what tasks did not: metadata, and the names in each folder."""
    for folder, _, names in os.walk(output):
        for name in names:
            if name.endswith(".json"):
                sync_path(Path(folder, name))
        sync_path(Path(folder))


def check_destination(path: Path, *, nbytes: int, resume: bool = False, overwrite: bool) -> None:
    """Raise unless an output of `nbytes` may go to `path`: nothing is there, or what `resume` and `overwrite` allow."""
    if not path.name:
        raise InputError(f"an output has a name; got {str(path)!r}; give one such as windows.zarr")
    if not path.parent.is_dir():
        raise OpenError(f"an output goes into a folder that is there; {path.parent} is not; make it first")
    if not may_write(path.parent):
        raise OpenError(f"an output goes into a folder that can be written; {path.parent} cannot; change its mode")
    partial = _partial(path)
    refuse_held(partial)
    taken = _is_taken(path) and not _is_moving(partial, path)
    if taken and not overwrite:
        what = "exists, of another request" if resume else "exists"
        flags = "--overwrite (overwrite=True)"
        if _is_begun(partial):
            flags = "--resume --overwrite to go on with what is kept"
        raise OutputExistsError(f"an output is written once; {path} {what}; name another, or pass {flags}")
    if _is_begun(partial) and not (overwrite or resume):
        raise _remains_error(partial)
    if taken and not _is_ours(path):
        raise OutputExistsError(
            f"only an output of ours is replaced; {path} is none; name another, or remove it yourself"
        )
    if taken:
        check_own(path, deep=True, published=True)
    there = _check_remains(partial) if _is_taken(partial) else 0
    free = count_free(path.parent)
    if free is not None and nbytes > free + there:
        raise DiskSpaceError(
            f"an output fits its disk; {path} takes {format_size(nbytes)}, the disk has {format_size(free + there)}; "
            f"free some"
        )


def _remains_error(partial: Path) -> OutputExistsError:
    return OutputExistsError(
        f"an output is written once; {partial} holds an interrupted run's remains; pass --resume to go on with it, or "
        f"--overwrite to start anew"
    )


def _check_remains(partial: Path) -> int:
    """Return the bytes that an interrupted run's output takes on the disk; OutputExistsError if it is none of ours."""
    if not _is_remains(partial):
        raise OutputExistsError(f"only our own remains are removed; {partial} is none; name another, or move it")
    # The blocks of an `.npy` are reserved.
    files = [each.stat().st_blocks * 512 for each in _outputs(partial) if each.is_file()]
    return sum(files) + sum(size for each in _outputs(partial) for _, size in list_files(each))


def _outputs(partial: Path) -> list[Path]:
    """Return the output that is being made, if it is begun."""
    return sorted(partial.glob("output-*"))


def _discard(held: Hold) -> None:
    """Remove all that was staged, and last what says who writes: who comes meanwhile is kept out by it."""
    for each in held.folder.iterdir():
        if not (_HELD.fullmatch(each.name) or is_ghost(each.name)):
            remove(each)
    held.discard()


def _is_begun(partial: Path) -> bool:
    """Whether anything is where an output is staged but who writes it, or wrote it, and files that are gone."""
    if not _is_taken(partial) or partial.is_symlink() or not partial.is_dir():
        return _is_taken(partial)
    return not _has_words_alone(partial)


def _has_words_alone(folder: Path) -> bool:
    """Whether nothing is in a folder but what says who writes, or wrote, and files that are gone."""
    return all(_HELD.fullmatch(each.name) or is_ghost(each.name) for each in folder.iterdir())


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
        if path.is_symlink() and not is_pin(path):
            return False
        return read_record(path) is not None if path.is_dir() else read_mark(path) is not None
    except (OSError, ValueError):
        return False


def _is_remains(partial: Path) -> bool:
    """Whether `partial` is what an interrupted run of ours left."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    return all(_STAGED.fullmatch(each.name) or is_ghost(each.name) for each in partial.iterdir())


def _put_in_place(output: Path, place: Path, path: Path, *, overwrite: bool) -> None:
    """Rename what is complete; what stood there before, if it may be replaced, is there until the new one is.

    Parameters
    ----------
    place
        Leads to what is called `path`, by the folder that was opened first.
    """
    if not (overwrite and _is_taken(place)):
        with _appearing(path):
            if not output.is_dir():
                # A rename would replace a file that has appeared meanwhile; a link does not.
                link_file(output, place)
            elif not rename(output, place):
                _move_by_files(output, place, path)
        return
    replaced = _exchange(output, place, path, aside=output.with_name("replaced"))
    if replaced is None:
        return
    try:
        # Here nobody else can reach it any more, nor have it changed before it is removed.
        _check_replaced(replaced, path)
    except BaseException:
        _exchange(replaced, place, path, aside=output)
        raise


def _check_replaced(replaced: Path, path: Path) -> None:
    """Raise OutputExistsError where what stood at `path` last is no output of ours, or others could write into it."""
    check_own(replaced, deep=True, published=True, name=path)
    if not _is_ours(replaced):
        raise OutputExistsError(f"{path} has become something else meanwhile; choose another name")


def _exchange(new: Path, old: Path, path: Path, *, aside: Path) -> Path | None:
    """Let two names change places at once (Linux), or one after the other where the file system cannot.

    Parameters
    ----------
    path
        What `old` is called.

    Returns
    -------
    Path or None
        Where what was at `old` is now: `new` or `aside`; None where it was replaced file by file.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and not renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _EXCHANGE):
        return new
    if not rename(old, aside):
        if new.is_dir():
            _move_by_files(new, old, path, overwrite=True)
        else:
            move_file(new, old)
        return None
    try:
        if not rename(new, old):
            _move_by_files(new, old, path)
    except BaseException:
        if not _is_taken(old):
            aside.rename(old)
        raise
    return aside


def _move_by_files(output: Path, place: Path, path: Path, *, overwrite: bool = False) -> None:
    """Put a folder into its place where folders cannot be renamed: it is whole once its metadata, the last, are there.

    What stood there goes before; all that is to take its place lies beside it, finished.
    """
    note_refusal(output, "rename of folders", "the output took its place file by file, its metadata last")
    output.with_name("moving").touch()
    there = overwrite and _is_taken(place)
    if not there:
        place.mkdir()
    with _opened(place, path) as target:
        if there:
            _check_replaced(target, path)
        (target / METADATA).unlink(missing_ok=True)
        for each in target.iterdir():
            remove(each)
        move_files(output, target, last=METADATA)


@contextmanager
def _opened(place: Path, path: Path) -> Iterator[Path]:
    """Yield a path that leads to a result of ours, not to what somebody else may put in its place meanwhile."""
    if place.is_symlink():
        check_own(place, deep=False, published=True, name=path)
    target, fd = pin(place)
    try:
        check_own(target, deep=True, published=True, name=path)
        yield target
    finally:
        os.close(fd)


def _is_moving(partial: Path, path: Path) -> bool:
    """Whether what is at `path` is an output of ours that a run was putting there file by file when it ended."""
    return (partial / "moving").exists() and path.is_dir() and not (path / METADATA).exists()


def _finish_moving(partial: Path, place: Path, path: Path) -> None:
    """Take back what an earlier run has put at `path` of an output whose last file it did not."""
    if _is_moving(partial, place):
        output = next(iter(_outputs(partial)), partial / "output-00000000")
        output.mkdir(exist_ok=True)
        with _opened(place, path) as source:
            move_files(source, output, last=METADATA)
            for each in source.iterdir():
                remove(each)
        place.rmdir()
    remove(partial / "moving")


def _restore_replaced(partial: Path, path: Path) -> None:
    """Put back the output that an earlier run had taken aside, where it ended before the new one took its place."""
    replaced = partial / "replaced"
    if not _is_taken(replaced):
        return
    if _is_taken(path):
        remove(replaced)
        return
    replaced.rename(path)
    sync_path(path.parent)
