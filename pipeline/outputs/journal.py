"""What a run has finished so far: a line a task, so that another run of the same request goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import msgspec

from pipeline.storage.checksums import FileRecord
from pipeline.storage.filesystem import flush, move_file
from pipeline.storage.trust import Natural, Positive, decode, is_key, read_document

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


_VERSION = 1
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)


class _Header(msgspec.Struct):
    """First line of a journal."""

    version: int
    cut: Positive
    request: dict[str, str]


class _Entry(msgspec.Struct):
    """Every other line: a task, and key, size and crc32 of each file that it wrote."""

    task: Natural
    files: list[tuple[str, Natural, Natural]]


@dataclass(frozen=True, slots=True)
class Request:
    """All that decides the bytes of an output, by name; two runs of equal facts make equal outputs."""

    facts: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 of the facts, hexadecimal."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    def differences(self, facts: Any) -> list[str]:
        """Names of the facts that another request has otherwise, or lacks, or has beside these."""
        # What was read may hold anything.
        other = {str(name): fact for name, fact in facts.items()} if isinstance(facts, dict) else {}
        names = {*self.facts, *other}
        return sorted(
            name for name in names if not (isinstance(other.get(name), str) and self.facts.get(name) == other[name])
        )


class Journal:
    """The journal of one run; opened by `create` or `read`.

    A line outlives the process when `append` returns. One that a crash of the machine loses costs its task once more.
    """

    facts: Any
    """Of the request that it belongs to."""
    cut: int
    """Units of a task: windows, or rows."""
    done: dict[int, tuple[FileRecord, ...]]
    """Finished tasks, by number, and what each wrote."""

    def __init__(self, path: Path, facts: Any, cut: int, done: dict[int, tuple[FileRecord, ...]]) -> None:
        self._path, self.facts, self.cut, self.done = path, facts, cut, done

    @classmethod
    def create(cls, path: Path, request: Request, cut: int) -> Self:
        """Begin a journal: its first line says of which request it is, and how that is cut into tasks."""
        journal = cls(path, request.facts, cut, {})
        journal.rewrite()
        return journal

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read a journal as far as it is whole; None where not even its first line is."""
        try:
            first, *lines = read_document(path).split(b"\n")[:-1]
            header = decode(first, _Header)
        except (OSError, ValueError):
            return None
        if header.version != _VERSION:
            return None
        done: dict[int, tuple[FileRecord, ...]] = {}
        for line in lines:
            try:
                entry = decode(line, _Entry)
            except ValueError:
                # Cut off by a crash: what follows was never said to be done.
                break
            if not all(not key or is_key(key) for key, _, _ in entry.files):
                break
            done[entry.task] = tuple(FileRecord(*file) for file in entry.files)
        return cls(path, header.request, header.cut, done)

    def append(self, tasks: Iterable[tuple[int, tuple[FileRecord, ...]]]) -> None:
        """Note finished tasks, whose bytes are on the disk."""
        tasks = list(tasks)
        # It is there: nothing is begun in its place.
        with open(self._path, "ab", opener=lambda path, _: os.open(path, _APPEND)) as file:
            file.write(_encode(_entry(number, files) for number, files in tasks))
        self.done.update(tasks)

    def rewrite(self) -> None:
        """Write the journal anew, of what `done` holds now: lines that were cut off, or proved wrong, are gone."""
        header = {"version": _VERSION, "cut": self.cut, "request": self.facts}
        entries = [header, *(_entry(number, files) for number, files in self.done.items())]
        partial = self._path.with_name(f"{self._path.name}.partial")
        with partial.open("wb") as file:
            file.write(_encode(entries))
            # It takes the place of one that is whole.
            file.flush()
            flush(file.fileno())
        move_file(partial, self._path)


def _entry(number: int, files: tuple[FileRecord, ...]) -> dict[str, Any]:
    return {"task": number, "files": [(each.key, each.nbytes, each.crc32) for each in files]}


def _encode(entries: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
