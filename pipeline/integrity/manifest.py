"""Manifest: sizes and crc32 checksums of the files of a matrix that stores none, in a JSON file."""

from __future__ import annotations

import contextlib
import json
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import msgspec

from pipeline.errors import IntegrityError, NotFoundError, OpenError, OutputExistsError
from pipeline.integrity.record import digest_document
from pipeline.redaction import plain_words
from pipeline.storage.filesystem import flush, link_file
from pipeline.storage.trust import Natural, Positive, decode, is_key, read_document

if TYPE_CHECKING:
    from pathlib import Path

_VERSION = 1
RANGE_NBYTES = 64 * 2**20
"""Each range of a file has its own checksum, so that many tasks can read a large file."""


class Checksums(NamedTuple):
    """Size and checksums of a file."""

    nbytes: int
    crc32: tuple[int, ...]
    """Of each range."""


class _Document(msgspec.Struct):
    """The manifest without its version and digest."""

    target: str
    range_nbytes: Positive
    files: dict[str, tuple[Natural, list[Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{1,8}\Z")]]]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Sizes and checksums of all files of a target."""

    target: str
    """Name of the target when the manifest was written; the target may have moved since."""
    files: dict[str, Checksums]
    """By path below the target; by its name where the target is one file."""
    range_nbytes: int = RANGE_NBYTES

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest.

        Raises
        ------
        NotFoundError, OpenError
            If the file does not exist, or is not a manifest.
        IntegrityError
            If the content does not match its digest.
        """
        try:
            content = read_document(path, follow=True)
            document = decode(content, dict[str, Any])
            version, digest = document.pop("version"), document.pop("digest", None)
        except FileNotFoundError as error:
            raise NotFoundError(f"{path} does not exist; check the path of the manifest") from error
        except OSError as error:
            raise OpenError(f"the manifest {path} cannot be read: {error.strerror}; check it") from error
        except (ValueError, KeyError) as error:
            raise OpenError(f"{path} is not a manifest; name a file that --write-manifest wrote") from error
        if digest != digest_document({"version": version, **document}):
            raise IntegrityError(f"the manifest {path} does not match its digest; restore it")
        if version != _VERSION:
            raise OpenError(f"the manifest {path} has version {version!r} instead of {_VERSION}; write it again")
        try:
            known = msgspec.convert(document, _Document)
        except ValueError as error:
            raise OpenError(f"the manifest {path} lacks sizes or checksums; write it again") from error
        if wrong := [key for key in known.files if not is_key(key)]:
            raise OpenError(f"{path} names a file outside its target: {plain_words(wrong[0])[:80]}; write it again")
        step = known.range_nbytes
        if any(len(crc32) != -(-nbytes // step) for nbytes, crc32 in known.files.values()):
            raise OpenError(f"the manifest {path} lacks the checksum of a range; write it again")
        files = {
            key: Checksums(nbytes, tuple(int(each, 16) for each in crc32))
            for key, (nbytes, crc32) in known.files.items()
        }
        return cls(known.target, files, step)

    def write(self, path: Path) -> None:
        """Write a temporary file, flush it, and link it to `path`; OutputExistsError where `path` exists."""
        document = asdict(self) | {"version": _VERSION}
        document["files"] = {
            key: [each.nbytes, [f"{crc32:08x}" for crc32 in each.crc32]] for key, each in self.files.items()
        }
        document["digest"] = digest_document(document)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("x") as file:
                json.dump(document, file, indent=1)
                file.flush()
                flush(file.fileno())
            # A rename would replace a file that has appeared meanwhile; a link does not.
            link_file(partial, path)
        except FileExistsError as error:
            raise OutputExistsError(f"{path} appeared during the run; choose another name") from error
        except OSError as error:
            raise OpenError(f"the manifest {path} cannot be written: {error.strerror}; choose another name") from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
