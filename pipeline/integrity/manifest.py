"""A manifest: size and crc32 of every file of a matrix that has no checksums, kept in a file of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import msgspec

from pipeline.errors import IntegrityError, NotFoundError, OpenError, OutputExistsError
from pipeline.redaction import plain_words
from pipeline.storage.filesystem import flush, link_file
from pipeline.storage.trust import Natural, Positive, decode, is_key, read_document

if TYPE_CHECKING:
    from pathlib import Path

_VERSION = 1
RANGE_NBYTES = 64 * 2**20
"""Each range of a file has a checksum of its own, so that a large one is read by many tasks."""


class Checksums(NamedTuple):
    """What a file holds."""

    nbytes: int
    crc32: tuple[int, ...]
    """Of each range."""


class _Document(msgspec.Struct):
    """What a manifest says beside its version and digest."""

    target: str
    range_nbytes: Positive
    files: dict[str, tuple[Natural, list[Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{1,8}\Z")]]]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What all files of a target hold."""

    target: str
    """The name by which it was called; it may be moved."""
    files: dict[str, Checksums]
    """By their paths below the target; a target that is a file has one, by its name."""
    range_nbytes: int = RANGE_NBYTES

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest.

        Raises
        ------
        NotFoundError, OpenError
            If it is absent, or no manifest.
        IntegrityError
            If it is not what was written.
        """
        try:
            content = read_document(path, follow=True)
            document = decode(content, dict[str, Any])
            version, digest = document.pop("version"), document.pop("digest", None)
        except FileNotFoundError as error:
            raise NotFoundError(f"a manifest is there; nothing is at {path}; check the path") from error
        except OSError as error:
            raise OpenError(f"a manifest can be read; {path}: {error.strerror}; check it") from error
        except (ValueError, KeyError) as error:
            raise OpenError(f"a manifest is what --write-manifest wrote; {path} is not; name another") from error
        if digest != _digest({"version": version, **document}):
            raise IntegrityError(f"a manifest is as it was written; {path} does not match its digest; restore it")
        if version != _VERSION:
            raise OpenError(f"a manifest has version {_VERSION}; {path} has {version!r}; write it anew")
        try:
            known = msgspec.convert(document, _Document)
        except ValueError as error:
            raise OpenError(f"a manifest names sizes and checksums; {path} does not; write it anew") from error
        if wrong := [key for key in known.files if not is_key(key)]:
            raise OpenError(f"{path} names a file outside its target: {plain_words(wrong[0])[:80]}; write it anew")
        step = known.range_nbytes
        if any(len(crc32) != -(-nbytes // step) for nbytes, crc32 in known.files.values()):
            raise OpenError(f"a manifest has a checksum for each range; {path} has not; write it anew")
        files = {
            key: Checksums(nbytes, tuple(int(each, 16) for each in crc32))
            for key, (nbytes, crc32) in known.files.items()
        }
        return cls(known.target, files, step)

    def write(self, path: Path) -> None:
        """Write it beside its name, flushed, then in place; OutputExistsError where something is there already."""
        document = asdict(self) | {"version": _VERSION}
        document["files"] = {
            key: [each.nbytes, [f"{crc32:08x}" for crc32 in each.crc32]] for key, each in self.files.items()
        }
        document["digest"] = _digest(document)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("x") as file:
                json.dump(document, file, indent=1)
                file.flush()
                flush(file.fileno())
            # A rename would replace a file that has appeared meanwhile; a link does not.
            link_file(partial, path)
        except FileExistsError as error:
            raise OutputExistsError(f"a manifest is written once; {path} appeared meanwhile; name another") from error
        except OSError as error:
            raise OpenError(f"a manifest can be written; {path}: {error.strerror}; name another") from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()


def _digest(document: dict[str, Any]) -> str:
    """Digest of all but itself, whatever its spaces and the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
