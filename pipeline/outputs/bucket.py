"""Outputs on object stores appear whole or not at all: the metadata of the root are put last, on a condition.

Nothing can be renamed or locked on an object store, so an output is written once, where nothing is. One key,
`OUT/zarr.json`, decides: where it is absent, nothing at OUT can be read; where it is there, the output is finished.
While an output is made there are

    OUT.partial/request.json      the claim: the request, its cut, and which run makes the output. A run that resumes
                                  puts its own claim in the place of the one that it has read; before each object that
                                  it puts, a task checks that the claim is still its run's
    OUT.partial/done-ID/N.json    what task N has put: keys, sizes, crc32 and tags; put by the task itself
    OUT/...                       the objects, at their final keys

An object is put on the condition that there is none at its key. An object that differs is replaced only by the run
that has the claim, and only as that run saw it: a late task of an ended run never replaces what another run has put.
The tag of an object proves its bytes where that is their MD5; otherwise the object is read back.

At the end one listing shows that each object is there, under the tag that it was put with, and that nothing else is.
Then the metadata of the members are put, and those of the root last, on the condition that there are none.

Two runs of one request put the same bytes; the later claim ends the earlier run, which succeeds where it finds the
request finished. Two risks remain. Where `apply` returns other values each time, and two runs of one request overlap,
windows of one run may lie beside the checksums of the other: `verify` finds that. Deletions have no condition: a run
that stands still between its last check and a deletion may delete what a later run has put, which then ends.

Earlier versions could replace an output: they put a notice (`matrix.notice`) in the place of its metadata, and staged
the new objects below OUT.partial. What they left unfinished is refused.
"""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, IntegrityError, OpenError, OutputExistsError, PipelineError
from pipeline.formatting import count_of, format_size
from pipeline.integrity.record import METADATA, parse_record, seal_document
from pipeline.matrix.arrays import open_root
from pipeline.matrix.conventions import ATTRIBUTE
from pipeline.matrix.notice import read_notice
from pipeline.outputs.folder import say_kept
from pipeline.outputs.ledger import Claim, Ledger
from pipeline.outputs.shards import create_array
from pipeline.outputs.uploads import MOST_NBYTES, ObjectWriter, Upload, uploading_nbytes
from pipeline.runtime.resources import active_client, shares_memory
from pipeline.storage.buckets import TakenError, open_bucket, put_once
from pipeline.storage.locations import MEMORY, check_apart
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import zarr

    from pipeline.integrity.record import Record
    from pipeline.outputs.journal import Request
    from pipeline.storage.buckets import Bucket, Held
    from pipeline.storage.checksums import FileRecord
    from pipeline.storage.locations import Url

_ARRAYS = ("starts", "places", "windows")
"""Of a result, but for those of a request that names its own."""


def _written(arrays: Iterable[str]) -> re.Pattern[str]:
    """Keys that we put below an output's, but for its root's metadata; all others are somebody else's."""
    member = f"({'|'.join(map(re.escape, arrays))})/"
    return re.compile(rf"({member})?c(/\d+)*|{member}zarr\.json")


class ObjectStage:
    """An output that is being made; see `outputs.Stage`."""

    def __init__(self, upload: Upload, claim: Claim, done: dict[int, tuple[FileRecord, ...]]) -> None:
        from zarr.storage import MemoryStore

        self.upload, self.cut, self.done = upload, claim.cut, done
        self.tasks = 0
        """See `outputs.Stage.expect`; 0 before."""
        self.written = _written([*_ARRAYS, *claim.arrays])
        """Keys that are ours, at the final place."""
        self.may_linger = False
        """Whether tasks may end after the run has: those of other processes, of which nobody hears any more."""
        self.document = b""
        """Metadata of the root, sealed."""
        self._kept: dict[str, Any] = {}
        """Metadata, by key: on the store they appear at the end."""
        self._store = MemoryStore(self._kept)

    @pinned_config()
    def create_group(self) -> None:
        """See `outputs.Stage.create_group`."""
        import zarr

        zarr.create_group(self._store)

    def create_array(self, name: str | None, **layout: Any) -> ObjectWriter:
        """See `outputs.Stage.create_array`."""
        if name is not None:
            # Metadata of members differ from one making to the next: whoever saw the old ones knows the new ones apart.
            layout["attributes"] = {ATTRIBUTE: {"made": self.upload.making}, **layout["attributes"]}
        array = create_array(self._store, name, **layout)
        nbytes = math.prod(array.shards or array.chunks) * array.dtype.itemsize
        self.may_linger = not shares_memory(active_client())
        if nbytes > MOST_NBYTES:
            raise InputError(
                f"an object is put in one go, {format_size(MOST_NBYTES)} at most; {name or 'the matrix'} has files of "
                f"{format_size(nbytes)}; make them smaller, such as by fewer shard rows"
            )
        return ObjectWriter(self.upload, array)

    def finish(self, *tasks: tuple[int, tuple[FileRecord, ...]]) -> None:
        """See `outputs.Stage.finish`; the task itself has noted it on the store."""
        self.done.update(tasks)

    def expect(self, tasks: int) -> None:
        """See `outputs.Stage.expect`."""
        self.tasks = tasks

    def check_complete(self) -> None:
        """See `outputs.Stage.check_complete`."""
        missing = [number for number in range(self.tasks) if number not in self.done]
        if missing:
            raise IntegrityError(
                f"an output is complete; {len(missing):,} of {count_of(self.tasks, 'task')}, the first {missing[0]}, "
                f"left no word; go on with --resume"
            )

    def check_kept(self) -> None:
        """Compare what finished tasks have put with a listing: those are done again of which an object differs."""
        bucket, root = self.upload.ledger.bucket, self.upload.root
        files = [each for files in self.done.values() for each in files]
        wrong = set(_find_changed(bucket, root, files, bucket.list_keys(root) if files else {}))
        for number in [number for number, files in self.done.items() if not wrong.isdisjoint(files)]:
            del self.done[number]

    def seal(self, files: Iterable[FileRecord], ours: dict[str, Any]) -> None:
        """See `outputs.Stage.seal`."""
        bucket, root, name = self.upload.ledger.bucket, self.upload.root, self.upload.ledger.bucket.url
        known = {each.key: each for each in files}
        self.upload.ledger.check(self.upload.run)
        members = {key: kept.to_bytes() for key, kept in self._kept.items()}
        sealed = members.pop(METADATA)
        listed = bucket.list_keys(root)
        for key in (key.removeprefix(root) for key in listed):
            if key not in known and key not in members and key != METADATA:
                raise IntegrityError(
                    f"an output holds what was written; {name}/{root}{key} was not; remove it, and go on"
                )
        for each in _find_changed(bucket, root, list(known.values()), listed):
            state = "is another object now" if root + each.key in listed else "is gone"
            raise IntegrityError(
                f"an output holds what was written; {name}/{root}{each.key} {state}; go on with --resume"
            )
        for key, content in members.items():
            known[key] = self.upload.put(key, content)
        tags = {key: known[key].tag for key in sorted(known) if known[key].tag}
        self.document = seal_document(sealed, known.values(), ours | {"made": self.upload.making, "tags": tags})


@dataclass(frozen=True, slots=True)
class BucketOutput:
    """A place on an object store that an output goes to; see `outputs.Output`."""

    location: Url
    bucket: Bucket = field(repr=False)
    """Rooted at what the output lies in."""

    @classmethod
    def at(cls, url: Url) -> BucketOutput:
        """Take a URL as such a place; nothing is asked of the store yet."""
        url.with_name(url.name)  # Refuses a whole bucket.
        return cls(url, open_bucket(url.parent))

    @property
    def place(self) -> Url:
        """See `outputs.Output.place`."""
        return self.location

    @property
    def root(self) -> str:
        """Prefix of the output's keys."""
        return f"{self.location.name}/"

    @property
    def ledger(self) -> Ledger:
        """What lies beside it while it is made."""
        return Ledger(self.bucket, f"{self.location.name}.partial/")

    def writing_nbytes(self, file_nbytes: int, chunk_nbytes: int, *, plain: bool) -> int:
        """See `outputs.Output.writing_nbytes`."""
        return uploading_nbytes(file_nbytes, chunk_nbytes, plain=plain)

    def open_group(self) -> zarr.Group:
        """See `outputs.Output.open_group`."""
        import zarr

        from pipeline.storage.stores import open_store

        group = open_root(open_store(self.location, read_only=True), str(self.location))
        assert isinstance(group, zarr.Group)
        return group

    def check_apart(self, inputs: Iterable[str | Path | Url]) -> None:
        """See `outputs.Output.check_apart`."""
        check_apart(self.location, inputs)

    def check(self, *, nbytes: int, resume: bool = False, overwrite: bool) -> None:  # noqa: ARG002
        """See `outputs.Output.check`; nobody knows how much fits, and nothing is replaced."""
        if self.location.scheme == MEMORY and not shares_memory(active_client()):
            raise InputError(
                f"memory:// is seen by one process alone; {self.location} is to be written by worker processes; use "
                f"threads (processes: false), or s3://"
            )
        hurried = replace(self, bucket=self.bucket.hurried())
        document, found = hurried.read_metadata(), hurried.ledger.read()
        if document is not None and (making := read_notice(document)):
            raise OutputExistsError(
                f"{self.location} holds an unfinished replacement that an older version left; the new output is whole "
                f"at {self.ledger.name}/output-{making}: copy it elsewhere or finish it with that version, else delete "
                f"{self._prefixes}"
            )
        if document is not None:
            state = "already exists, of another request" if resume else "already exists"
            doomed = "it" if found is None else f"it and {self.ledger.name}/"
            raise OutputExistsError(f"{self.location} {state}; choose another URL, or delete {doomed} first")
        if found is not None:
            self._check_remains(found[0], resume=resume)
        elif (stray := self.bucket.find(self.root)) is not None:
            raise OutputExistsError(
                f"{self.location} is not empty: {self.bucket.url}/{stray} is there; choose another URL, or delete "
                f"{self.location}/ first"
            )

    def _check_remains(self, claim: Claim, *, resume: bool) -> None:
        """Raise OutputExistsError unless a run may go on with what another one has begun."""
        if claim.staged:
            raise OutputExistsError(
                f"{self.ledger.name} holds the remains of an interrupted replacement by an older version; choose "
                f"another URL, or delete {self.ledger.name}/{f' and {self.location}/' if claim.beside else ''} first"
            )
        if not resume:
            raise OutputExistsError(
                f"{self.ledger.name} holds an interrupted run's remains, or another run's work ({claim.who}); pass "
                f"--resume to go on with it, choose another URL, or delete {self._prefixes} first"
            )

    @property
    def _prefixes(self) -> str:
        """What to delete before an output can be written anew, for messages."""
        return f"{self.location}/ and {self.ledger.name}/"

    def is_result(self, request: Request) -> bool:
        """See `outputs.Output.is_result`."""
        record = replace(self, bucket=self.bucket.hurried()).read_record()
        return record is not None and not request.differences(record.ours.get("request"))

    def is_finished(self, request: Request) -> bool:
        """See `outputs.Output.is_finished`; objects of which the tag tells that they are the same are not read."""
        record = self.read_record()
        if record is None or request.differences(record.ours.get("request")):
            return False
        listed = self.bucket.list_keys(self.root)
        files = [each._replace(tag=record.tags.get(each.key, "")) for each in record.files.values()]
        wrong = [each.key for each in _find_changed(self.bucket, self.root, files, listed)]
        if wrong or not record.whole:
            what = (
                f"{count_of(len(wrong), 'object')} changed, the first {wrong[0]}" if wrong else "its metadata changed"
            )
            raise IntegrityError(
                f"{self.location} is not as it was written: {what}; choose another URL, or delete it first"
            )
        found = self.ledger.read()
        if found is not None and record.ours.get("made") == found[0].making:
            # Left by the run that made it, which was interrupted once the output was whole.
            self.ledger.sweep(found[0].run)
        return True

    @contextmanager
    def stage(self, request: Request, *, cut: int, nbytes: int, resume: bool, overwrite: bool) -> Iterator[ObjectStage]:
        """See `outputs.Output.stage`."""
        self.check(nbytes=nbytes, resume=resume, overwrite=overwrite)
        stage = self._begin(request, cut, resume=resume)
        run, begun, decided = stage.upload.run, False, False
        try:
            stage.check_kept()
            begun = True
            yield stage
            self.ledger.check(run)
            self._reveal(stage)
            decided = True
            self.ledger.sweep(run)
        except BaseException as error:
            # Who has been given no stage yet needs to be told that there will be none.
            if begun and isinstance(error, PipelineError) and self._did_another(stage, request, decided=decided):
                return
            if decided:
                error.add_note(f"{self.location} is complete all the same")
            else:
                self._leave(stage, error)
            raise

    def _begin(self, request: Request, cut: int, *, resume: bool) -> ObjectStage:
        """Put a claim, and go on with what an earlier run of the same request has finished."""
        found = self.ledger.read()
        if found is None:
            held, claim = None, Claim(request.facts, cut, arrays=json.loads(request.facts.get("arrays", "[]")))
        else:
            earlier, held = found
            self._check_remains(earlier, resume=resume)
            if differs := request.differences(earlier.facts):
                raise OutputExistsError(
                    f"{self.ledger.name} holds the remains of another request, which differs in {', '.join(differs)}; "
                    f"ask for the same, choose another URL, or delete {self._prefixes} first"
                )
            claim = earlier.again()
        self.ledger.take(claim, held)
        if self.read_metadata() is not None:
            if found is None:
                self.ledger.sweep(claim.run)
                self.ledger.forget(claim.making)
            raise OutputExistsError(f"{self.location} appeared meanwhile; choose another URL, or delete it first")
        upload = Upload(self.ledger, claim.run, claim.making, self.root)
        return ObjectStage(upload, claim, self.ledger.finished(claim.making) if found is not None else {})

    def _reveal(self, stage: ObjectStage) -> None:
        """Put the root's metadata where nothing was: from now on the output is there."""
        try:
            put_once(self.bucket, self.root + METADATA, stage.document, None)
        except TakenError as error:
            raise OutputExistsError(
                f"{self.location} appeared meanwhile; choose another URL, or delete it first"
            ) from error

    def _leave(self, stage: ObjectStage, error: BaseException) -> None:
        """Note on a failure what is kept of a run; without anything, delete what it has begun."""
        ledger, upload = self.ledger, stage.upload
        kept = len(stage.done)
        with suppress(OpenError):
            # Tasks of which word has not come yet are kept, too.
            kept = max(kept, ledger.count(upload.making))
            if not kept and ledger.holds(upload.run):
                keys = self.bucket.list_keys(self.root)
                doomed = [key for key in keys if stage.written.fullmatch(key.removeprefix(self.root))]
                if doomed:
                    self.bucket.delete(doomed)
                # As long as tasks may put more there, the claim says that it is ours.
                ledger.sweep(upload.run, claim=not stage.may_linger)
                if stage.may_linger:
                    error.add_note("tasks that ended late may have left something; begin anew with --resume")
            ledger.forget(upload.making)
        if kept:
            error.add_note(say_kept(kept, stage.tasks, "--resume"))

    def _did_another(self, stage: ObjectStage, request: Request, *, decided: bool) -> bool:
        """Whether a run of the same request that took over, or our own in spite of all, has finished the output."""
        with suppress(PipelineError):
            if (decided or not self.ledger.holds(stage.upload.run)) and self.is_finished(request):
                self.ledger.forget(stage.upload.making)
                return True
        return False

    def read_metadata(self) -> bytes | None:
        """Read the metadata of the root at OUT; None where nothing is there."""
        [found] = self.bucket.get([self.root + METADATA])
        return None if found is None else found[0]

    def read_record(self) -> Record | None:
        """Read the record of the output at OUT; None where there is none that this program wrote."""
        document = self.read_metadata()
        with suppress(OpenError):
            return None if document is None else parse_record(document, f"{self.location}/{METADATA}")
        return None


def _find_changed(bucket: Bucket, root: str, files: list[FileRecord], listed: dict[str, Held]) -> list[FileRecord]:
    """Files that are not what was put: by their tags, or read again, some at once, where those do not tell."""
    changed, untold = [], []
    for file in files:
        found = listed.get(root + file.key)
        if found is None or found.nbytes != file.nbytes:
            changed.append(file)
        elif not file.tag or found.tag != file.tag:
            untold.append(file)
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda file: bucket.checksum(root + file.key), untold)
        return changed + [file for file, found in zip(untold, read, strict=True) if found != (file.nbytes, file.crc32)]
