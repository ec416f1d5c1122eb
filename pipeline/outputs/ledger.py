"""Beside an output that is being made on an object store: whose it is, and an object for each finished task."""

from __future__ import annotations

import json
import os
import platform
import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

from pipeline.errors import OpenError, OutputExistsError
from pipeline.matrix.notice import Making  # noqa: TC001 (msgspec reads annotations)
from pipeline.redaction import plain_words
from pipeline.storage.buckets import TakenError, put_once
from pipeline.storage.checksums import FileRecord
from pipeline.storage.trust import Key, Natural, Positive, decode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.storage.buckets import Bucket, Held

_MARK = re.compile(r"(0|[1-9][0-9]{0,17})\.json")
_OURS = re.compile(r"request\.json|probe-[0-9a-f]{8}|done-[0-9a-f]{8}/[0-9]+\.json|output-[0-9a-f]{8}/.+")


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which run makes an output. The next one puts its own in its place, and this one ends as soon as it sees that."""

    facts: dict[str, str]
    """Of its request."""
    cut: Positive
    """Units of a task; those of the earlier run, where it goes on with what that has finished."""
    staged: bool = False
    """Of an older version, which replaced outputs: its objects lie below the ledger, not at their final keys."""
    making: Making = msgspec.field(default_factory=lambda: uuid.uuid4().hex[:8])
    """Name of what is made; runs that go on with it keep it."""
    beside: bool = False
    """Of an older version: objects of another request lie at the final keys, unfinished."""
    arrays: list[Key] = []
    """Names of arrays that the request has of its own."""
    run: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)
    holder: dict[str, str | int] = {}
    """Who it is, for the message of another."""
    version: Literal[1] = 1

    def encode(self) -> bytes:
        """Turn into the bytes of an object."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = self.holder or {"process": os.getpid(), "host": platform.node(), "since": now}
        return json.dumps(msgspec.structs.asdict(self) | {"holder": holder}, indent=1).encode()

    @classmethod
    def parse(cls, content: bytes) -> Claim | None:
        """Read such bytes; None where they are none of ours."""
        with suppress(ValueError):
            return decode(content, cls)
        return None

    def again(self) -> Claim:
        """Return the claim of another run that goes on with what this one has begun."""
        return msgspec.structs.replace(self, holder={}, run=uuid.uuid4().hex)

    @property
    def who(self) -> str:
        """Words for its holder."""
        return plain_words(", ".join(f"{key} {value}" for key, value in self.holder.items()))[:200] or "unknown"


class _Entry(msgspec.Struct):
    """What a finished task has put: key, size, crc32 and tag of each object."""

    files: list[tuple[Key, Natural, Natural, str]]


@dataclass(frozen=True, slots=True)
class Ledger:
    """What lies below `OUT.partial/`. Picklable."""

    bucket: Bucket
    prefix: str
    """Ends in a slash."""

    @property
    def name(self) -> str:
        """URL, for messages."""
        return f"{self.bucket.url}/{self.prefix}".rstrip("/")

    def read(self) -> tuple[Claim, Held] | None:
        """Read the claim, and which object it is; OutputExistsError where this program did not write it."""
        [found] = self.bucket.get([self._claim])
        if found is None:
            return None
        claim = Claim.parse(found[0])
        if claim is None:
            raise OutputExistsError(
                f"{self.bucket.url}/{self._claim} is no claim of this program; choose another URL, or move it elsewhere"
            )
        return claim, found[1]

    def take(self, claim: Claim, held: Held | None) -> None:
        """Put a claim where `held` was read, or none; OutputExistsError where another run was faster."""
        content = claim.encode()
        try:
            put = put_once(self.bucket, self._claim, content, held)
        except TakenError as error:
            raise OutputExistsError(
                f"one run writes an output at a time; another has just taken {self.name}; wait, or name another"
            ) from error
        if held is None:
            self._probe(claim, put)

    def check(self, run: str) -> None:
        """Raise unless a run still makes the output: on any machine, before anything is put."""
        found = self.read()
        if found is None:
            raise OpenError(
                f"workers share the output's store; {self.name} is not there: its run has ended, or this worker "
                f"reaches another store; give it the same"
            )
        claim, _ = found
        if claim.run != run:
            raise OutputExistsError(
                f"one run writes an output at a time; another has taken over {self.name}: {claim.who}; wait for it, "
                f"or name another"
            )

    def holds(self, run: str) -> bool:
        """Whether a run still makes the output."""
        found = self.read()
        return found is not None and found[0].run == run

    def note(self, run: str, making: str, number: int, files: Iterable[FileRecord]) -> None:
        """Note a task of a run as finished: its objects are there, and proved to hold what was put; as `check` raises.

        What lies beside an output without a claim is nobody's, and would be in everybody's way.
        """
        self.check(run)
        self.bucket.put(f"{self._done(making)}{number}.json", json.dumps({"files": list(files)}).encode())

    def count(self, making: str) -> int:
        """Count the tasks that are finished."""
        return len(self._marks(making))

    def finished(self, making: str) -> dict[int, tuple[FileRecord, ...]]:
        """Tasks that are finished, by number, and what each put: a request for each."""
        keys = self._marks(making)
        done = {}
        for (number, _), found in zip(keys.items(), self.bucket.get([*keys.values()]), strict=True):
            with suppress(ValueError):
                entry = decode(b"" if found is None else found[0], _Entry)
                done[number] = tuple(FileRecord(*file) for file in entry.files)
        return done

    def _marks(self, making: str) -> dict[int, str]:
        """Keys of what says that a task is finished, by its number."""
        listed = self.bucket.list_keys(self._done(making))
        found = ((_MARK.fullmatch(key.removeprefix(self._done(making))), key) for key in sorted(listed))
        return {int(match[1]): key for match, key in found if match}

    def forget(self, making: str) -> None:
        """Delete what late tasks of a run that has ended have put, where nobody goes on with it."""
        found = self.read()
        if found is None or found[0].making != making:
            listed = self.bucket.list_keys(self.prefix)
            parts = (self._done(making), f"{self.prefix}probe-{making}")
            if doomed := [key for key in listed if key.startswith(parts)]:
                self.bucket.delete(doomed)

    def sweep(self, run: str, *, claim: bool = True) -> None:
        """Delete what is ours below the ledger, all or but for the claim, where a run still makes the output.

        What another run puts once it has taken over is not among what was listed before.
        """
        listed = self.bucket.list_keys(self.prefix)
        if not self.holds(run):
            return
        doomed = {key for key in listed if _OURS.fullmatch(key.removeprefix(self.prefix))}
        claims = doomed & {self._claim}
        # Last the claim, without which nobody would know whose the others are.
        for some in (doomed - claims, claims if claim else set()):
            if some:
                self.bucket.delete(sorted(some))

    @property
    def _claim(self) -> str:
        return f"{self.prefix}request.json"

    def _done(self, making: str) -> str:
        return f"{self.prefix}done-{making}/"

    def _probe(self, claim: Claim, other: Held) -> None:
        """Raise OpenError where the store does not mind conditions: then nobody can know that his was kept.

        There are those that nothing is there, and that one object is, which `other` is not.
        """
        key = f"{self.prefix}probe-{claim.making}"
        minded = []
        for held in (None, None, other):
            try:
                self.bucket.put_if(key, uuid.uuid4().bytes, held)
            except TakenError:
                minded.append(held)
        # The first may be refused, too, where its answer was lost: it was put twice, then.
        if None in minded and other in minded:
            return
        if not self.holds(claim.run):
            # Another has swept it meanwhile.
            return
        self.sweep(claim.run)
        raise OpenError(
            f"an output goes to a store that can refuse to replace; {self.bucket.url} replaces all the same; name "
            f"another store"
        )
