"""`write_manifest`: read every file of a target, and write its size and checksums to a manifest."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.arguments import check_path
from pipeline.errors import IntegrityError, OpenError, OutputExistsError
from pipeline.formatting import count_of, format_size
from pipeline.integrity.manifest import Checksums, Manifest
from pipeline.integrity.ranges import Range, cut_file, each_range, read_ranges
from pipeline.integrity.targets import locate_files, open_target
from pipeline.runtime.progress import shown
from pipeline.runtime.tasks import Receipt
from pipeline.storage.base import Folder, checksum
from pipeline.storage.checksums import extend_crc32
from pipeline.storage.locations import check_apart

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import zarr

    from pipeline.runtime.report import Watch
    from pipeline.storage.base import Storage
    from pipeline.storage.locations import Url


@dataclass(frozen=True, slots=True)
class Recording:
    """A checked call of `write_manifest` that may begin. Made by `prepare_recording`."""

    target: str
    storage: Storage
    path: Path
    sizes: dict[str, int]

    @property
    def ranges(self) -> tuple[Range, ...]:
        """Ranges to read: those of all files."""
        return tuple(itertools.chain.from_iterable(cut_file(key, nbytes) for key, nbytes in self.sizes.items()))

    def run(self, watch: Watch) -> Manifest:
        """Read every file, report each finished task to `watch`, and write the manifest."""
        found: dict[tuple[str, int], int] = {}
        for part in read_ranges(sum_ranges, (self.storage,), self.ranges, watch):
            found |= part
        files = {
            key: Checksums(
                nbytes, tuple(found[key, offset] for _, offset, nbytes, *_ in cut_file(key, nbytes) if nbytes)
            )
            for key, nbytes in self.sizes.items()
        }
        manifest = Manifest(self.target, files)
        manifest.write(self.path)
        return manifest

    def report(self, watch: Watch) -> tuple[dict[str, str], dict[str, Any]]:
        """Return what was recorded, as text for people and as plain data."""
        nbytes = sum(self.sizes.values())
        facts = {
            "target": self.target,
            "recorded": f"{count_of(len(self.sizes), 'file')}, {format_size(nbytes)}",
            "manifest": str(self.path),
        }
        numbers = {
            "target": self.target,
            "manifest": str(self.path),
            "files": len(self.sizes),
            "nbytes": nbytes,
            "nbytes_read": watch.nbytes_read,
        }
        return facts, numbers


def write_manifest(
    path: str | Path | Url | zarr.Array[Any] | zarr.Group,
    manifest: str | Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> None:
    """Record size and checksum of every file of a matrix, for `verify` to compare with.

    Parameters
    ----------
    path, storage_options
        As for `verify`.
    manifest
        JSON file to write; it lies apart from the matrix.
    progress
        As of `gather`.

    Raises
    ------
    OutputExistsError
        If something is at `manifest` already.
    IntegrityError
        If a file cannot be read.

    Examples
    --------
    >>> import numpy, pipeline
    >>> folder = getfixture("tmp_path")
    >>> numpy.save(folder / "A.npy", numpy.arange(6.0))
    >>> pipeline.write_manifest(folder / "A.npy", folder / "A.json")
    >>> pipeline.verify(folder / "A.npy", manifest=folder / "A.json")
    []
    """
    recording = prepare_recording(path, manifest, storage_options=storage_options)
    with shown("write_manifest", "ranges", progress=progress) as watch:
        recording.run(watch)


def prepare_recording(
    path: str | Path | Url | zarr.Array[Any] | zarr.Group,
    manifest: str | Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Recording:
    """Check everything that `write_manifest` needs before it reads."""
    target, storage = locate_files(path, storage_options)
    manifest = Path(check_path("manifest", manifest))
    if os.path.lexists(manifest):
        raise OutputExistsError(f"{manifest} already exists; choose another name, or remove it first")
    if not manifest.absolute().parent.is_dir():
        raise OpenError(f"the folder {manifest.parent} does not exist; create it first")
    if isinstance(storage, Folder):
        check_apart(manifest, [Path(storage.root, storage.only or "")])
    listed = storage.list_files()
    if not isinstance(storage, Folder) or storage.only is None:
        open_target(storage, listed)
    return Recording(target, storage, manifest, dict(sorted(listed.items())))


def sum_ranges(storage: Storage, ranges: Iterable[Range], number: int) -> tuple[Receipt, dict[tuple[str, int], int]]:
    """Compute the checksum of each range, by key and offset; IntegrityError where one cannot be read."""
    begin = time.perf_counter()
    ranges = list(ranges)
    sums = each_range(storage, ranges, _sum)
    found = {(each.key, each.offset): value for each, value in zip(ranges, sums, strict=True)}
    nbytes = sum(each.nbytes for each in ranges)
    return Receipt(number, len(found), nbytes, time.perf_counter() - begin), found


def _sum(storage: Storage, wanted: Range) -> int:
    try:
        with storage.open(wanted.key, wanted.offset) as opened:
            if opened.nbytes != wanted.file_nbytes:
                raise IntegrityError("changed during the run")  # noqa: TRY301
            return checksum(opened, wanted.offset, wanted.nbytes, extend_crc32)
    except IntegrityError as error:
        raise IntegrityError(f"{wanted.key} {error}; restore it before writing a manifest") from error
