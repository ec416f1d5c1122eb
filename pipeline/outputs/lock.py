"""One run at a time writes what is staged in a folder: by the system's lock, else by a claim that its holder renews.

    lock        held by the run that writes, by `flock`; it ends with its process
    holder      who that is, for the message of another
    claim-N     the same where the file system has no locks: a file that only one run can make

A claim outlives a run that is killed; the next run then makes that of the next number. One of this machine is void once
its process is gone. One of another machine is void once nothing has renewed it for a while: no clocks are compared,
since those of two machines differ. A run that only stood still meanwhile sees the higher number before it notes a task
or publishes.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pipeline.errors import OutputExistsError
from pipeline.redaction import plain_words
from pipeline.storage.filesystem import is_refused, note_refusal, pin, remove_empty, write_document
from pipeline.storage.trust import check_own, decode, read_document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAMES = r"lock|holder|holder\.partial|claim-\d+"
"""Pattern of the names of files that say who writes: they are nobody's work."""
_BEAT_SECONDS = 2.0
"""How often a claim is renewed."""
_SILENT_SECONDS = 20.0
"""A claim of another machine that is not renewed for so long is void; Python may be held up for seconds by `apply`."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_TRIES = 20
_TRY_SECONDS = 0.05
"""Between tries for the lock, which another takes for an instant to see whether it is held."""


class Hold:
    """The right to write what is staged in a folder."""

    def __init__(self, name: Path, folder: Path, fds: list[int], claim: _Claim | None) -> None:
        self._name, self._fds, self._claim = name, fds, claim
        self.folder = folder
        """Leads to what is held, whatever others make of its name; see `filesystem.pin`."""

    def check(self) -> None:
        """Raise OutputExistsError where another run has taken this one for dead."""
        if self._claim is not None and not self._claim.is_mine():
            claims = _claims(self.folder)
            raise _taken(self._name, _say(_read(claims[-1]) if claims else None))

    def release(self) -> None:
        """Let others write; files are closed before they are removed, since NFS keeps those that are open."""
        if self._claim is not None:
            self._claim.withdraw()
        while self._fds:
            os.close(self._fds.pop())

    def discard(self) -> None:
        """Let others write, and remove the folder, in which nothing else is left."""
        for path in (self.folder / "holder", self.folder / "holder.partial", *_claims(self.folder)):
            if self._claim is None or path != self._claim.path:
                path.unlink(missing_ok=True)
        # Last, while it is held: whoever waits for it sees that it is gone.
        (self.folder / "lock").unlink(missing_ok=True)
        self.release()
        # Whoever came between has made a lock of its own.
        remove_empty(self._name)


@contextmanager
def hold(folder: Path, name: Path | None = None) -> Iterator[Hold]:
    """Hold a folder, which is made if it is not there, against all other runs.

    Parameters
    ----------
    name
        What it is called, where `folder` lies below a path of `filesystem.pin`.

    Raises
    ------
    OutputExistsError
        Naming the run that holds it.
    """
    held = _lock(folder, name or folder)
    try:
        yield held
    finally:
        held.release()


def find_holder(folder: Path) -> str:
    """Words for the run that holds a folder now; empty where none does."""
    locked = False
    with suppress(FileNotFoundError):
        check_own(folder, deep=False)
    with suppress(OSError):
        fd = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | _NO_LINK)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            locked = True
        finally:
            os.close(fd)
    if locked:
        return _say(_read(folder / "holder"))
    return next((_say(_read(path)) for path in reversed(_claims(folder)) if _is_alive(path)), "")


def refuse_held(folder: Path) -> None:
    """Raise OutputExistsError, naming the run, where one holds a folder now."""
    if who := find_holder(folder):
        raise _taken(folder, who)


def _taken(folder: Path, who: str) -> OutputExistsError:
    path = str(folder).removesuffix(".partial")
    return OutputExistsError(
        f"another run is writing {path} at this moment ({who}); wait until it ends, or choose another name"
    )


def _lock(path: Path, name: Path) -> Hold:
    """Take the lock; its file goes with the folder, so whoever waited for one that is gone must see that."""
    for _ in range(_TRIES):
        fds: list[int] = []
        try:
            return _try_lock(path, name, fds)
        except (BlockingIOError, FileNotFoundError):
            _close(fds)
        except BaseException:
            _close(fds)
            raise
        time.sleep(_TRY_SECONDS)
    raise _taken(name, find_holder(path) or _say(_read(path / "holder")))


def _try_lock(path: Path, name: Path, fds: list[int]) -> Hold:
    """Open a folder and take its lock once; what is opened is added to `fds`."""
    with suppress(FileExistsError):
        # Nobody else puts anything into it.
        path.mkdir(mode=0o700)
    if path.is_symlink() or not path.is_dir():
        check_own(path, deep=False, name=name)
    folder, fd = pin(path)
    fds.append(fd)
    check_own(folder, deep=True, name=name)
    lock = folder / "lock"
    try:
        fds.append(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | _NO_LINK, 0o666))
        fcntl.flock(fds[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fds[-1]), lock.stat()):
            raise BlockingIOError
        _check_claims(folder, {}, name)
        write_document(folder / "holder", json.dumps(_myself()).encode())
    except OSError as error:
        if isinstance(error, OutputExistsError) or not is_refused(error) or not lock.exists():
            raise
        os.close(fds.pop())
        note_refusal(folder, "flock", "each run on an output keeps a claim file, which it renews")
        return Hold(name, folder, fds, _Claim.take(folder, name))
    return Hold(name, folder, fds, None)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class _Claim:
    """A file that says which run writes, and is written anew again and again."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self._content = path, content
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)

    @classmethod
    def take(cls, folder: Path, name: Path) -> _Claim:
        """Make the file; OutputExistsError where that of a living run is there."""
        content = _myself() | {"token": uuid.uuid4().hex}
        void: dict[Path, Any] = {}
        _tokens.add(content["token"])
        path = None
        try:
            while path is None:
                # Numbered after those that were looked at: where another has come since, its file is there already.
                seen = _check_claims(folder, void, name)
                path = folder / f"claim-{max(map(_number, seen), default=0) + 1}"
                if not _make(path, _encode(content, 0)):
                    path = None
            # Whoever has looked before another began, and stood still since, comes second.
            _check_claims(folder, void | {path: _read(path)}, name)
        except BaseException:
            _tokens.discard(content["token"])
            if path is not None:
                path.unlink(missing_ok=True)
            raise
        claim = cls(path, content)
        claim._thread.start()
        return claim

    def is_mine(self) -> bool:
        """Whether nobody has taken this run for dead, as far as the file can be read."""
        found = _read(self.path)
        same = found == {} if not found else found.get("token") == self._content["token"]
        return same and _number(self.path) == max(map(_number, _claims(self.path.parent)), default=0)

    def withdraw(self) -> None:
        """Remove the file."""
        self._ended.set()
        self._thread.join()
        _tokens.discard(self._content["token"])
        with suppress(OSError):
            if (_read(self.path) or {}).get("token") == self._content["token"]:
                self.path.unlink()

    def _renew(self) -> None:
        beats = 0
        while not self._ended.wait(_BEAT_SECONDS):
            beats += 1
            # As long as before, in its place: whoever reads meanwhile finds the one or the other.
            with suppress(OSError):
                if self.is_mine():
                    with self.path.open("r+b") as file:
                        file.write(_encode(self._content, beats))


def _make(path: Path, content: bytes) -> bool:
    """Make a file that is not there yet."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _claims(folder: Path) -> list[Path]:
    """Files of claims in a folder, the latest last."""
    return sorted((each for each in folder.glob("claim-*") if re.fullmatch(NAMES, each.name)), key=_number)


def _number(claim: Path) -> int:
    return int(claim.name.partition("-")[2])


def _check_claims(folder: Path, void: dict[Path, Any], name: Path) -> list[Path]:
    """Return the claims; OutputExistsError where the run of one goes on; the others become `void`: not looked at."""
    claims = _claims(folder)
    for path in claims:
        found = _read(path)
        if path in void and void[path] == found:
            continue
        if _is_alive(path):
            raise _taken(name, _say(_read(path)))
        void[path] = found
    return claims


_tokens: set[str] = set()
"""Claims of this process: one that it has left, as in a fork or by an error, is void."""


def _encode(content: dict[str, Any], beats: int) -> bytes:
    return json.dumps(content | {"beats": f"{beats:012}"}).encode()


def _myself() -> dict[str, Any]:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return {
        "process": os.getpid(),
        "host": platform.node(),
        "since": now,
        "place": _place(),
        "born": _born(os.getpid()),
    }


def _place() -> str:
    """Name of what process numbers are unique in: this boot of this machine, and this container; empty if unknown."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    return ""


def _born(process: int) -> str:
    """When a process began, in the kernel's ticks, which tells it from a later one of its number; empty if unknown."""
    with suppress(OSError, IndexError), open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()[19]
    return ""


def _is_alive(path: Path, *, wait: Callable[[float], object] = time.sleep) -> bool:
    """Whether the run of a claim goes on: its process is there, or, on another machine, the claim is renewed."""
    claim = _read(path)
    if claim is None:
        return False
    place = claim.get("place")
    if place and place == _place():
        if claim.get("process") == os.getpid():
            return claim.get("token") in _tokens
        return bool(claim.get("born")) and claim.get("born") == _born(int(claim.get("process", -1)))
    for _ in range(int(_SILENT_SECONDS / _BEAT_SECONDS)):
        wait(_BEAT_SECONDS)
        now = _read(path)
        if now is not None and now != claim:
            return True
    return False


def _read(path: Path) -> dict[str, Any] | None:
    """What a file says of a run; None where it is not there, nothing where it cannot be read now."""
    try:
        return decode(read_document(path), dict[str, str | int])
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _say(who: dict[str, Any] | None) -> str:
    if not who:
        return "which one is not known"
    return plain_words(f"process {who.get('process')} on {who.get('host')}, since {who.get('since')}")
