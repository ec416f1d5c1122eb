"""Record: size and checksum of each file of an output, stored in the attributes of the output's root."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from pipeline.errors import IntegrityError, OpenError
from pipeline.matrix.conventions import ATTRIBUTE
from pipeline.redaction import plain_words
from pipeline.storage.checksums import FileRecord, extend_crc32
from pipeline.storage.filesystem import flush, is_ghost, move_file, open_regular
from pipeline.storage.trust import Natural, is_key, read_document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


METADATA = "zarr.json"
_STEP_NBYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Record:
    """Record of a finished output."""

    ours: dict[str, Any]
    """Attributes of this package: `kind`, the facts of the `request`, and the others given to `seal_folder`."""
    files: dict[str, FileRecord]
    """Every file but the metadata of the root, by key."""
    whole: bool
    """Whether the metadata of the root match the digest of the record."""
    tags: dict[str, str]
    """Entity tags of the files on an object store, by key."""


class _Ours(msgspec.Struct):
    """The attributes that are checked on reading."""

    files: dict[str, tuple[Natural, Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{1,8}\Z")]]]
    tags: dict[str, str] = {}


def record_file(root: Path, key: str, *, extend: Callable[[int, Any], int] = extend_crc32) -> FileRecord:
    """Read a file below `root`, and return its size and checksum (`extend`); raises OSError."""
    checksum = nbytes = 0
    buffer = np.empty(_STEP_NBYTES, np.uint8)
    with open_regular(root / key, buffering=0) as file:
        while got := file.readinto(buffer):
            checksum = extend(checksum, buffer[:got])
            nbytes += got
    return FileRecord(key, nbytes, checksum)


def seal_folder(root: Path, files: Iterable[FileRecord], ours: dict[str, Any]) -> None:
    """Write the record of a finished output into the attributes of its root, which makes it complete.

    Parameters
    ----------
    root
        Folder of a Zarr array or group; its metadata are there already.
    files
        What was written, read back before; metadata documents need not be among them.
    ours
        Our attributes.

    Raises
    ------
    IntegrityError
        If a file is absent, of another size, or there that nobody wrote.
    """
    known = {each.key: each for each in files}
    for key, nbytes in list_files(root):
        if key == METADATA:
            continue
        if key.rsplit("/")[-1] == METADATA:
            known[key] = record_file(root, key)
        elif key not in known:
            raise IntegrityError(f"{root / key} was not written by this run; remove it, then continue with --resume")
        elif known[key].nbytes != nbytes:
            raise IntegrityError(
                f"{root / key} has {nbytes} bytes, but {known[key].nbytes} were written; continue with --resume"
            )
    absent = [key for key in known if not (root / key).is_file()]
    if absent:
        raise IntegrityError(f"{root / absent[0]} is gone; continue with --resume")
    sealed = seal_document((root / METADATA).read_bytes(), known.values(), ours)
    partial = root / f"{METADATA}.partial"
    with partial.open("wb") as file:
        file.write(sealed)
        file.flush()
        flush(file.fileno())
    move_file(partial, root / METADATA)


def seal_document(document: bytes, files: Iterable[FileRecord], ours: dict[str, Any]) -> bytes:
    """Add the record of a finished output to the metadata of its root; `files` and `ours` as for `seal_folder`."""
    sealed = json.loads(document)
    listed = {each.key: [each.nbytes, f"{each.crc32:08x}"] for each in sorted(files)}
    added = ours | {"files": listed}
    sealed.setdefault("attributes", {})[ATTRIBUTE] = added
    added["digest"] = digest_document(sealed)
    return json.dumps(sealed, indent=1).encode()


def read_record(root: Path) -> Record | None:
    """Return what the output in a folder says of itself; see `parse_record`."""
    try:
        document = read_document(root / METADATA, follow=True)
    except OSError as error:
        raise OpenError(f"the metadata {root / METADATA} cannot be read: {error.strerror}; restore it") from error
    return parse_record(document, str(root / METADATA))


def parse_record(document: bytes, name: str) -> Record | None:
    """Return what an output says of itself in the metadata of its root; None where they have no record of ours.

    Parameters
    ----------
    name
        Of the metadata, for messages.

    Raises
    ------
    OpenError
        If they are no JSON object.
    """
    try:
        parsed = json.loads(document)
        ours = parsed.get("attributes", {}).get(ATTRIBUTE)
    except (ValueError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise OpenError(f"the metadata {name} cannot be parsed: {reason}; restore it") from error
    if not isinstance(ours, dict) or not isinstance(ours.get("files"), dict):
        return None
    try:
        checked = msgspec.convert(ours, _Ours)
        files = {key: FileRecord(key, nbytes, int(crc, 16)) for key, (nbytes, crc) in checked.files.items()}
    except ValueError as error:
        raise OpenError(f"the record in {name} lacks sizes or checksums; restore it") from error
    if wrong := [key for key in files if not is_key(key)]:
        raise OpenError(f"{name} names a file outside its output: {plain_words(wrong[0])[:80]}; restore it")
    digest = ours.pop("digest", None)
    return Record(ours, files, digest == digest_document(parsed), checked.tags)


def list_files(root: Path) -> Iterator[tuple[str, int]]:
    """Yield key and size of everything below a folder that is not a folder itself, links among them."""
    for folder, _, names in os.walk(root):
        base = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in (name for name in names if not is_ghost(name)):
            yield (name if base == "." else f"{base}/{name}"), Path(folder, name).lstat().st_size


def digest_document(document: dict[str, Any]) -> str:
    """SHA-256 of a JSON document, independent of its spaces and the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
