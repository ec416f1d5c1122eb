"""Stored bytes against their checksums: those of an output's own record, of a manifest, or of the format."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.arguments import check_path, check_whole, show
from pipeline.errors import InputError, IntegrityError, NotFoundError, OpenError
from pipeline.formatting import count_of, format_size
from pipeline.integrity.inspection import Place, StoredArray, describe_arrays, say_runs
from pipeline.integrity.manifest import Manifest
from pipeline.integrity.ranges import Range, cut_file, each_range, read_ranges
from pipeline.integrity.record import METADATA, parse_record
from pipeline.integrity.targets import DOCUMENTS, is_document, locate_files, open_target
from pipeline.runtime.progress import shown
from pipeline.runtime.tasks import Receipt
from pipeline.storage.base import Folder, Objects, checksum
from pipeline.storage.checksums import extend_crc32

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import zarr

    from pipeline.integrity.inspection import Runs
    from pipeline.integrity.manifest import Checksums
    from pipeline.runtime.report import Watch
    from pipeline.storage.base import Opened, Storage
    from pipeline.storage.locations import Url

type Standard = Literal["record", "manifest", "chunks"]
"""What bytes are compared with: the record of an output of ours, a manifest, or the crc32c behind each chunk."""

_STANDARDS: dict[Standard, str] = {
    "record": "their record",
    "manifest": "the manifest",
    "chunks": "the crc32c of each chunk",
}
_MOST_LOST = 10_000
"""Chunks of a foreign array that are named one by one where they are gone; a sparse array may lack far more."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one file."""

    key: str
    """Path below the target; the name of a target that is a file."""
    problem: str
    """In words that follow the key."""
    unit: str = "rows"
    """What `runs` counts: rows of a matrix, windows of a result."""
    runs: Runs = ()
    """Runs [first, stop) that are not to be trusted; empty where that is not known."""

    def __str__(self) -> str:
        return f"{self.key} {self.problem}" + (f" ({say_runs(self.runs, self.unit)})" if self.runs else "")

    def facts(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"file": self.key, "problem": self.problem, "unit": self.unit, "runs": [list(run) for run in self.runs]}


@dataclass(frozen=True, slots=True)
class Verification:
    """What will be read, and compared with what. Made by `prepare_verification`."""

    target: str
    storage: Storage
    standard: Standard
    arrays: tuple[StoredArray, ...]
    """Tell which rows are lost."""
    files: int
    """Files that there should be, and those that nobody wrote."""
    nbytes: int
    """Bytes of them."""
    problems: tuple[Problem, ...]
    """Found already: files that are gone, or that nobody wrote; metadata."""
    ranges: tuple[Range, ...]
    """To be read."""
    ranges_in_all: int

    def run(self, watch: Watch) -> list[Problem]:
        """Read the ranges, telling `watch` of every task that is done; all that is wrong, sorted by file."""
        found = list(self.problems)
        about = (self.storage, self.standard, self.arrays)
        for problems in read_ranges(check_ranges, about, self.ranges, watch):
            found += problems
        # The ranges of one file may all find the same.
        return sorted(dict.fromkeys(found), key=lambda each: (each.key, each.runs))

    def report(self, watch: Watch, problems: list[Problem]) -> tuple[dict[str, str], dict[str, Any]]:
        """Say what was looked at, and what was found, in words and as plain data."""
        wrong = len({each.key for each in problems})
        parts = f"{len(self.ranges):,} of {count_of(self.ranges_in_all, 'range')}"
        facts = {
            "target": self.target,
            "compared": f"{count_of(self.files, 'file')} with {_STANDARDS[self.standard]}",
            "read": f"{parts}, {format_size(watch.nbytes_read)} of {format_size(self.nbytes)}",
            "wrong": count_of(wrong, "file") if wrong else "nothing",
        }
        numbers = {
            "target": self.target,
            "standard": self.standard,
            "files": self.files,
            "wrong_files": wrong,
            "ranges": self.ranges_in_all,
            "ranges_read": len(self.ranges),
            "nbytes": self.nbytes,
            "nbytes_read": watch.nbytes_read,
            "problems": [each.facts() for each in problems],
        }
        return facts, numbers


def verify(
    path: str | Path | Url | zarr.Array[Any] | zarr.Group,
    *,
    subset: float = 1.0,
    seed: int = 0,
    manifest: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> list[Problem]:
    """Read every stored byte of a matrix or a result, and compare it with its checksums.

    What `create_matrix` and `store` wrote bears a record of all its files. A Zarr array of another writer is compared
    with the crc32c behind each chunk, where its codecs put one there, or with a manifest, as any other file is. Tasks
    run on the active `distributed.Client`, else on Dask's threaded scheduler.

    Parameters
    ----------
    path
        Path or URL of a Zarr array or group, or path of a file; or an open array or group in any store.
    subset
        Part of the ranges (files, or 64 MiB of one) that is read, drawn at random; at least one is. That files are
        there, and what their metadata hold, is always looked at.
    seed
        Of the draw.
    manifest
        What `write_manifest` wrote, when all was right.
    storage_options
        Of a URL; see `open_matrix`.
    progress
        As of `gather`.

    Returns
    -------
    list
        What is wrong, a value for each file or range: its `key`, the `problem` in words, and the `runs` of rows or
        windows where they are known. Empty when all is right.

    Raises
    ------
    NotFoundError, OpenError
        If there is nothing at the path, or it cannot be parsed.
    InputError
        If nothing tells what the bytes should be.

    Examples
    --------
    >>> import pipeline
    >>> folder = getfixture("tmp_path")
    >>> matrix = pipeline.create_matrix("random:1000x20", folder / "A.zarr")
    >>> pipeline.verify(folder / "A.zarr")
    []
    """
    checking = prepare_verification(path, subset=subset, seed=seed, manifest=manifest, storage_options=storage_options)
    with shown("verify", "ranges", progress=progress) as watch:
        return checking.run(watch)


def prepare_verification(
    path: str | Path | Url | zarr.Array[Any] | zarr.Group,
    *,
    subset: float = 1.0,
    seed: int = 0,
    manifest: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Verification:
    """Decide what is compared with what, look at names and metadata, and draw what is read."""
    if isinstance(subset, bool) or not isinstance(subset, int | float | np.number) or not 0 < subset <= 1:
        raise InputError(f"subset {show(subset)} is not a number above 0 and at most 1; give one such as 0.1")
    seed = check_whole("seed", seed, least=0)
    if manifest is not None:
        check_path("manifest", manifest)
    target, storage = locate_files(path, storage_options)
    # First, since a store that is gone is known soon by it.
    document = None if isinstance(storage, Folder) and storage.only is not None else storage.read_document(METADATA)
    listed = _list(target, storage, document)
    given: Any = path if hasattr(path, "store_path") else None
    if manifest is not None:
        recorded = Manifest.read(Path(manifest))
        known = recorded.files
        if isinstance(storage, Folder) and storage.only is not None and len(known) == 1:
            # A file may have been renamed.
            known = dict.fromkeys([storage.only], *known.values())
        wanted = {key: _recorded(key, each, recorded.range_nbytes) for key, each in known.items()}
        found = _compare_all(target, storage, "manifest", wanted, listed, given)
    elif isinstance(storage, Folder) and storage.only is not None:
        raise InputError(f"{target} stores no checksums; {_way_out(target)}")
    else:
        found = _compare_own(target, storage, listed, document, given) or _inspect_all(
            target, storage, listed, given or open_target(storage, listed)
        )
    return replace(found, ranges=_draw(found.ranges, subset, seed))


def _list(target: str, storage: Storage, document: bytes | None) -> dict[str, int]:
    """List what is there; of a web server, which cannot be listed, what our record names is taken to be."""
    if isinstance(storage, Objects) and not storage.store.supports_listing:
        record = None if document is None else parse_record(document, f"{target}/{METADATA}")
        if record is None or document is None:
            raise OpenError(f"{target} cannot be listed, and has no record of its files; verify a copy")
        return {METADATA: len(document)} | {key: each.nbytes for key, each in record.files.items()}
    listed = storage.list_files()
    if not listed and isinstance(storage, Objects):
        raise NotFoundError(f"{target} does not exist; check the name")
    return listed


def parse_subset(text: str) -> float:
    """Read a part of all.

    Examples
    --------
    >>> parse_subset("10%"), parse_subset("0.5")
    (0.1, 0.5)
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise InputError(f"subset {text!r} is not a number above 0 and at most 1; write it such as 10% or 0.1")
    return share


def check_ranges(
    storage: Storage, standard: Standard, arrays: tuple[StoredArray, ...], ranges: Iterable[Range], number: int
) -> tuple[Receipt, list[Problem]]:
    """Read ranges, and say what is wrong with each."""
    begin = time.perf_counter()
    problems: list[Problem] = []
    nbytes = count = 0
    for problem, read in each_range(storage, list(ranges), partial(_check_range, arrays, standard)):
        count += 1
        nbytes += read
        problems += [] if problem is None else [problem]
    return Receipt(number, count, nbytes, time.perf_counter() - begin), problems


def _check_range(
    arrays: tuple[StoredArray, ...], standard: Standard, storage: Storage, wanted: Range
) -> tuple[Problem | None, int]:
    """Say what is wrong with a range, or None; and how much was read."""
    place = find_place(arrays, wanted.key)
    nbytes = 0
    try:
        with storage.open(wanted.key, None if standard == "chunks" else wanted.offset) as opened:
            words, runs = _check(opened, wanted, place, standard)
            nbytes = min(wanted.nbytes, opened.nbytes)
    except IntegrityError as error:
        words, runs = str(error), ()
    return (_problem(wanted.key, words, place, runs) if words else None), nbytes


def find_place(arrays: Iterable[StoredArray], key: str) -> Place | None:
    """Tell what a file holds; None for what is no chunk."""
    return next((place for array in arrays if (place := array.place(key))), None)


def _check(opened: Opened, wanted: Range, place: Place | None, standard: Standard) -> tuple[str, Runs]:
    """Say what is wrong with a range, and with which rows; empty where nothing is."""
    if wanted.file_nbytes not in (None, opened.nbytes):
        return f"has {opened.nbytes} bytes instead of {wanted.file_nbytes}", ()
    stop = wanted.offset + wanted.nbytes
    if standard == "chunks":
        assert place is not None
        return place.array.inspect(opened, place.position)
    if checksum(opened, wanted.offset, wanted.nbytes, extend_crc32) == wanted.checksum:
        return "", ()
    if place is not None and place.array.checked:
        words, runs = place.array.inspect(opened, place.position, wanted.offset, stop)
        return words or "is not the one that was written: another, or an older one, is in its place", runs
    if wanted.nbytes == wanted.file_nbytes:
        return "is not what was written", ()
    return f"is not what was written at bytes {wanted.offset} to {stop - 1}", ()


def _problem(key: str, words: str, place: Place | None, runs: Runs = ()) -> Problem:
    if place is None:
        return Problem(key, words)
    return Problem(key, words, place.array.unit, runs or place.rows)


def _compare_own(
    target: str,
    storage: Storage,
    listed: dict[str, int],
    document: bytes | None,
    node: zarr.Array[Any] | zarr.Group | None,
) -> Verification | None:
    """Compare every file of an output of ours with its record; None where it has none."""
    if document is None:
        return None
    record = parse_record(document, f"{target}/{METADATA}")
    if record is not None:
        wanted = {key: [Range(key, 0, each.nbytes, each.nbytes, each.crc32)] for key, each in record.files.items()}
        return _compare_all(target, storage, "record", wanted, listed, node, whole=record.whole)
    if not _has_traces(document):
        return None
    problem = Problem(METADATA, "is not what was written: its record is damaged")
    return Verification(target, storage, "record", (), 1, 0, (problem,), (), 0)


def _compare_all(
    target: str,
    storage: Storage,
    standard: Standard,
    wanted: dict[str, list[Range]],
    listed: dict[str, int],
    node: zarr.Array[Any] | zarr.Group | None,
    *,
    whole: bool | None = None,
) -> Verification:
    """Compare every file with what is known of it; `whole`: whether the metadata of the root are what was written."""
    known = set(wanted) if whole is None else {*wanted, METADATA}
    documents = [each for key, ranges in wanted.items() if is_document(key) for each in ranges]
    _, problems = check_ranges(storage, standard, (), documents, 0)
    if whole is False:
        problems.append(Problem(METADATA, "is not what was written"))
    arrays: tuple[StoredArray, ...] = ()
    # Metadata that changed would tell of other rows.
    if not problems:
        if node is None and not DOCUMENTS.isdisjoint(known):
            node = open_target(storage, listed)
        arrays = () if node is None else tuple(describe_arrays(node)[0].values())
    rest = [key for key in wanted if not is_document(key)]
    lost = _find_lost(storage, arrays, rest, listed)
    problems += lost.values()
    problems += [Problem(key, "is there, but nobody wrote it") for key in listed if key not in known]
    ranges = tuple(each for key in rest if key not in lost for each in wanted[key])
    nbytes = sum(each[0].file_nbytes or 0 for each in wanted.values())
    files = len(known.union(listed))
    return Verification(target, storage, standard, arrays, files, nbytes, tuple(problems), ranges, len(ranges))


def _inspect_all(
    target: str, storage: Storage, listed: dict[str, int], node: zarr.Array[Any] | zarr.Group
) -> Verification:
    """Compare every chunk with its own crc32c."""
    described, others = describe_arrays(node)
    unchecked = [*others, *(name for name, array in described.items() if not array.checked)]
    if unchecked or not described:
        name = "/".join(filter(None, [target, *unchecked[:1]]))
        problem = f"the codecs of {name} add no crc32c" if unchecked else f"{name} has no array"
        raise InputError(f"{problem}; {_way_out(target)}")
    arrays = tuple(described.values())
    problems: list[Problem] = []
    ranges: list[Range] = []
    for array in arrays:
        present = [key for key in listed if array.place(key)]
        ranges += [Range(key, 0, listed[key]) for key in present]
        missing = array.count - len(present)
        if missing > _MOST_LOST:
            problems.append(Problem(array.name or ".", f"lacks {missing:,} of its {array.count:,} files"))
        else:
            problems += _find_lost(storage, arrays, array.files(), listed).values()
    return Verification(
        target,
        storage,
        "chunks",
        arrays,
        sum(array.count for array in arrays),
        sum(each.nbytes for each in ranges),
        tuple(problems),
        tuple(ranges),
        len(ranges),
    )


def _find_lost(
    storage: Storage, arrays: tuple[StoredArray, ...], keys: Iterable[str], listed: dict[str, int]
) -> dict[str, Problem]:
    """Say of files that are not listed what is in their place."""
    lost = {}
    for key in keys:
        if key in listed:
            continue
        words = "is gone"
        if isinstance(storage, Folder):
            try:
                with storage.open(key):
                    continue
            except IntegrityError as error:
                words = str(error)
        lost[key] = _problem(key, words, find_place(arrays, key))
    return lost


def _recorded(key: str, checksums: Checksums, step: int) -> list[Range]:
    """Ranges of a file in a manifest; one that is empty has one, too, since it must be looked at."""
    cut = cut_file(key, checksums.nbytes, step)
    return [each._replace(checksum=crc32) for each, crc32 in zip(cut, checksums.crc32 or (0,), strict=True)]


def _draw(ranges: tuple[Range, ...], subset: float, seed: int) -> tuple[Range, ...]:
    """Draw a part of the ranges, at least one where there are any, in their order."""
    if subset == 1 or not ranges:
        return ranges
    count = max(1, round(subset * len(ranges)))
    drawn = np.random.default_rng(seed).choice(len(ranges), count, replace=False)
    return tuple(ranges[number] for number in sorted(drawn.tolist()))


def _has_traces(metadata: bytes) -> bool:
    """Whether metadata bear a record of ours that is no longer where it was, or has no list of files."""
    documents = [json.loads(metadata)]
    while documents:
        document = documents.pop()
        values = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
        if isinstance(document, dict) and "digest" in document and document.keys() & {"kind", "files"}:
            return True
        documents += values
    return False


def _way_out(target: str) -> str:
    return f"record them while right: pipeline verify {target} --write-manifest FILE; compare with --manifest FILE"
