"""Who could have written what is found beside the data: only what is the user's own is used without being named."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from pipeline.errors import OutputExistsError
from pipeline.storage.filesystem import is_pin, open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENT_NBYTES = 2**30
"""Bytes of a document that are read at most: some ten million tasks are noted in them."""
_KEY = r"(?!/)(?:(?!\.{1,2}(?:/|$))[^/\x00-\x1f\x7f]+(?:/(?=[^/]))?)+"
type Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
type Positive = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
type Key = Annotated[str, msgspec.Meta(pattern=rf"\A{_KEY}\Z", max_length=4096)]
"""See `is_key`."""


def find_stranger(status: os.stat_result) -> str | None:
    """Say how somebody else could have written a file or folder.

    Parameters
    ----------
    status
        Of the file or folder, as `os.fstat` gives it.

    Returns
    -------
    str or None
        Such as ``"belongs to user 1000"``; None where only the user and root can write it.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "cluster.yaml"
    >>> path.touch(0o600)
    >>> find_stranger(path.stat())
    >>> path.chmod(0o666)
    >>> find_stranger(path.stat())
    'can be written by other users'
    """
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)):
        return "can be written by other users"
    return None


def _is_private(group: int) -> bool:
    """Whether a group is the user's own, without other members: Linux distributions make one for each user."""
    import grp
    import pwd

    with suppress(KeyError):
        found, name = grp.getgrgid(group), pwd.getpwuid(os.geteuid()).pw_name
        return found.gr_name == name and not {*found.gr_mem} - {name}
    return False


def private_folder() -> Path:
    """Make, where it is absent, the user's own folder for temporary files, which nobody else can write; return it."""
    place = Path(tempfile.gettempdir(), f"random-windows-{os.geteuid() if hasattr(os, 'geteuid') else 'scratch'}")
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    status = place.lstat()
    if stat.S_ISDIR(status.st_mode) and find_stranger(status) is None:
        return place
    return Path(tempfile.mkdtemp(prefix="random-windows-"))


def is_key(text: object) -> bool:
    r"""Whether a text names a file below a folder: no name in it leads upwards, and none has control characters.

    Examples
    --------
    >>> [is_key(text) for text in ("c/0/0", "zarr.json", "../a", "/etc/a", "a//b", "a/..", "a\nb", "", "a/")]
    [True, True, False, False, False, False, False, False, False]
    """
    return isinstance(text, str) and re.fullmatch(_KEY, text) is not None


def read_document(path: Path, *, follow: bool = False) -> bytes:
    """Read a small file; OSError for what is no file or too large, and for a link, unless it may be one."""
    with open_regular(path, follow=follow) as file:
        if os.fstat(file.fileno()).st_size > DOCUMENT_NBYTES:
            raise OSError(errno.EFBIG, f"has more than {DOCUMENT_NBYTES:,} bytes", str(path))
        content: bytes = file.read(DOCUMENT_NBYTES)
    return content


def decode[T](content: bytes, kind: type[T]) -> T:
    """Parse a JSON document that others may have written by a strict schema; ValueError for any other."""
    if len(content) > DOCUMENT_NBYTES:
        raise ValueError(f"more than {DOCUMENT_NBYTES:,} bytes")
    try:
        return msgspec.json.decode(content, type=kind)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_own(root: Path, *, deep: bool, published: bool = False, name: Path | None = None) -> None:
    """Refuse remains, or a result, in which somebody else could have put something; nothing in it is opened.

    Parameters
    ----------
    root
        A folder, or the file that a result is.
    deep
        Whether to look at all that is below it, and not only at what lies in it.
    published
        Whether it is a result, which a group may share, so that only owners and links count.
    name
        What it is called, where `root` is a path of `filesystem.pin`.

    Raises
    ------
    OutputExistsError
        If `root` is a link or another user's, or others can write it, or something in it is a link, another user's, or
        neither a file nor a folder.
    """
    name = name or root
    for path, fault in _find_faults(root, name, deep=deep, published=published):
        raise OutputExistsError(
            f"{name / path.relative_to(root)} {fault}: nothing of {name} is used or removed; choose another name, or "
            f"remove it yourself"
        )


def _find_faults(root: Path, name: Path, *, deep: bool, published: bool) -> Iterator[tuple[Path, str]]:
    # What a pin leads to is no link.
    status = os.lstat(f"{root}/.") if is_pin(root) else root.lstat()
    kind = _find_kind(status)
    if kind or not (published or stat.S_ISDIR(status.st_mode)):
        yield root, kind or "is not a folder"
        return
    if published:
        status = os.stat_result((status.st_mode & ~0o022, *status[1:]))
    stranger = find_stranger(status)
    if stranger and not _is_shown_so(name, status, published=published):
        yield root, stranger
        return
    for parent, folders, files in os.walk(root):
        for path in (Path(parent, name) for name in (*folders, *files)):
            # A file that a worker has renamed meanwhile is looked at under its next name, where it matters.
            with suppress(FileNotFoundError):
                entry = path.lstat()
                if kind := _find_kind(entry):
                    yield path, kind
                elif entry.st_uid not in (status.st_uid, 0):
                    yield path, f"belongs to user {entry.st_uid}"
        if not deep:
            return


def _find_kind(status: os.stat_result) -> str:
    """Say what is neither a file nor a folder; empty for these."""
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    return "" if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) else "is neither a file nor a folder"


def _is_shown_so(name: Path, status: os.stat_result, *, published: bool) -> bool:
    """Whether a file system shows a new folder of this process as it shows what has this name and this status.

    Network and FUSE file systems may give all files to one user, and let everybody write them.
    """
    with suppress(OSError), tempfile.TemporaryDirectory(prefix=f"{name.name}.", dir=name.parent) as own:
        new = os.lstat(own)
        same = published or new.st_mode == status.st_mode
        return find_stranger(new) is not None and new.st_uid == status.st_uid and same
    return False
