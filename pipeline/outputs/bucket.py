"""Outputs on object stores appear whole or not at all: their root's metadata are put last, on a condition, and decide.

Nothing can be renamed or locked there. One key, `OUT/zarr.json`, says what OUT is, and changes only from what was seen:

    absent        nothing is at OUT that can be read
    metadata      a finished output, with its record
    a notice      no metadata: a finished output, below OUT.partial, is being copied into the place of another

While an output is made there are

    OUT.partial/request.json      the claim: the request, its cut, and which run makes it. A run that goes on, or begins
                                  anew, puts its own in the place of the one that it has read; before each object that
                                  it puts, a task looks whether the claim is still its run's
    OUT.partial/done-ID/N.json    what task N has put: keys, sizes, crc32 and tags; put by the task itself
    OUT/...                       its objects at their final keys, where nothing was at OUT when it was begun
    OUT.partial/output-ID/...     its objects, where something was

An object is put if there is none at its key. What is there and differs is replaced only by the run that has the claim,
and only as it was seen: so a late task of an ended run replaces nothing that another one has put. Objects are proved by
their tag where that is the MD5 of their bytes, else read back.

At the end one listing tells that each object is there, under the tag that it was put with, and that nothing else is.
The metadata of members follow, then, where OUT was empty, those of the root, if there are none still. Otherwise they go
below `output-ID`, which is complete by that, and its replacement begins: the notice is put in the place of what was at
OUT, and of its members' metadata; the store copies the objects; those of the old output that have no successor are
deleted; the new metadata are put in the places of the notices, the root's last; what is below OUT.partial is deleted.
Whoever comes upon the notice, and may go on or overwrite, does the rest first. All metadata bear the ID, so that those
of one making are never taken for those of another.

A run deletes what another has begun once OUT is its own by that one key, not before: until then the other may finish.
Two runs of one request put the same bytes; the later claim ends the earlier run, which ends well where it finds the
request finished. What remains possible: where `apply` gives other values each time, and two runs of one request
overlap, windows of the one may lie beside the checksums of the other, which `verify` finds. Deletions and copies have
no condition: a run that stands still between its last look and such a request, for as long as others take to finish
what it does and to begin anew, harms what is theirs: it deletes objects of a finished output, or has the store copy
older ones into their place, and `verify` finds both, readers the former; or it deletes the claim of a run, which ends
then.
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
from pipeline.matrix.notice import read_notice, say_notice
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


@dataclass(frozen=True, slots=True)
class _Standing:
    """What is at OUT."""

    held: Held | None
    """The object at its root's key."""
    document: bytes | None
    """Metadata of the root: its own, or, where there is a notice, of what is being put in its place."""
    replacing: str
    """Where there is a notice: what it names; else empty."""


class ObjectStage:
    """An output that is being made; see `outputs.Stage`."""

    def __init__(self, upload: Upload, claim: Claim, done: dict[int, tuple[FileRecord, ...]]) -> None:
        from zarr.storage import MemoryStore

        self.upload, self.cut, self.done = upload, claim.cut, done
        self.staged, self.beside = upload.root.startswith(upload.ledger.prefix), claim.beside
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
        if self.staged:
            self.upload.put(METADATA, self.document)


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

    def check(self, *, nbytes: int, resume: bool = False, overwrite: bool) -> None:  # noqa: ARG002 (nobody knows how much fits)
        """See `outputs.Output.check`."""
        if self.location.scheme == MEMORY and not shares_memory(active_client()):
            raise InputError(
                f"memory:// is seen by one process alone; {self.location} is to be written by worker processes; use "
                f"threads (processes: false), or s3://"
            )
        hurried = replace(self, bucket=self.bucket.hurried())
        standing, found = hurried.look(), hurried.ledger.read()
        if standing.replacing and not overwrite:
            raise OutputExistsError(
                f"an output is written once; {self.location} was being replaced by a finished one; ask for that with "
                f"--resume to go on with it, or pass --overwrite"
            )
        if standing.held is not None and not overwrite:
            what = "exists, of another request" if resume else "exists"
            flags = "--resume --overwrite to go on with what is kept" if found is not None else "--overwrite"
            raise OutputExistsError(f"an output is written once; {self.location} {what}; name another, or pass {flags}")
        if found is not None and not (overwrite or resume):
            raise OutputExistsError(
                f"an output is written once; {self.ledger.name} holds an interrupted run's remains, or another run's "
                f"work ({found[0].who}); pass --resume to go on with it, or --overwrite to start anew"
            )
        if standing.held is not None and not standing.replacing and self._record(standing.document) is None:
            raise OutputExistsError(
                f"only an output of ours is replaced; {self.location} is none; name another, or remove it yourself"
            )
        if standing.held is None and found is None and (stray := self.bucket.find(self.root)) is not None:
            raise OutputExistsError(
                f"an output goes where nothing is; {self.bucket.url}/{stray} is there; name another, or remove it "
                f"yourself"
            )

    def is_result(self, request: Request) -> bool:
        """See `outputs.Output.is_result`."""
        record = self._record(replace(self, bucket=self.bucket.hurried()).look().document)
        return record is not None and not request.differences(record.ours.get("request"))

    def is_finished(self, request: Request) -> bool:
        """See `outputs.Output.is_finished`; objects of which the tag tells that they are the same are not read."""
        if not self.is_result(request):
            return False
        self._finish_replacing()
        standing = self.look()
        record = self._record(standing.document)
        if record is None:
            return False
        listed = self.bucket.list_keys(self.root)
        files = [each._replace(tag=record.tags.get(each.key, "")) for each in record.files.values()]
        wrong = [each.key for each in _find_changed(self.bucket, self.root, files, listed)]
        if wrong or not record.whole:
            raise IntegrityError(
                f"a finished output stays as it was; in {self.location} {count_of(len(wrong), 'object')} changed"
                f"{', the first ' + wrong[0] if wrong else ', but its metadata'}; make it again with --overwrite"
            )
        self._sweep_remains()
        return True

    @contextmanager
    def stage(self, request: Request, *, cut: int, nbytes: int, resume: bool, overwrite: bool) -> Iterator[ObjectStage]:
        """See `outputs.Output.stage`."""
        self.check(nbytes=nbytes, resume=resume, overwrite=overwrite)
        if self._finish_replacing():
            self.check(nbytes=nbytes, resume=resume, overwrite=overwrite)
        self._sweep_remains()
        stage = self._begin(request, cut, resume=resume, overwrite=overwrite)
        run, begun, decided = stage.upload.run, False, False
        try:
            stage.check_kept()
            begun = True
            yield stage
            self.ledger.check(run)
            if stage.staged:
                self._announce(stage, overwrite=overwrite)
                decided = True
                self._finish_replacing()
            else:
                self._reveal(stage)
                decided = True
            self.ledger.sweep(run)
        except BaseException as error:
            # Who has been given no stage yet needs to be told that there will be none.
            if begun and isinstance(error, PipelineError) and self._did_another(stage, request, decided=decided):
                return
            if decided and self._holds(stage.document):
                error.add_note(f"{self.location} is complete all the same")
            elif decided:
                error.add_note(
                    f"the new output is complete; go on with --resume to put it in the place of {self.location}"
                )
            else:
                self._leave(stage, error)
            raise

    def _begin(self, request: Request, cut: int, *, resume: bool, overwrite: bool) -> ObjectStage:
        """Put a claim, and go on with what an earlier run of the same request has finished, where that is wanted."""
        found, standing = self.ledger.read(), self.look()
        earlier, held = found or (None, None)
        differs = [] if earlier is None else request.differences(earlier.facts)
        if differs and resume and not overwrite:
            raise OutputExistsError(
                f"a run resumes one of the same request; that of {self.ledger.name} differs in {', '.join(differs)}; "
                f"ask for the same, or start anew with --overwrite"
            )
        if earlier is not None and not differs and (earlier.staged or standing.held is None):
            # Also by a run that begins anew: an earlier one that does not know yet that it has ended puts the same.
            claim = earlier.again()
        else:
            # Another request's objects at the final keys may become a finished output until OUT is ours by its key.
            beside = earlier is not None and standing.held is None and (earlier.beside or not earlier.staged)
            staged = found is not None or standing.held is not None
            # Objects of the earlier run may lie at the final keys still.
            arrays = {*json.loads(request.facts.get("arrays", "[]")), *([] if earlier is None else earlier.arrays)}
            claim = Claim(request.facts, cut, staged=staged, beside=beside, arrays=sorted(arrays))
        self.ledger.take(claim, held)
        if not claim.staged and self.look() != standing:
            if found is None:
                self.ledger.sweep(claim.run)
                self._forget(claim.making)
            raise OutputExistsError(f"an output is written once; {self.location} appeared meanwhile; name another")
        root = self.ledger.staged(claim.making) if claim.staged else self.root
        upload = Upload(self.ledger, claim.run, claim.making, root)
        done = self.ledger.finished(claim.making) if resume and claim.making == getattr(earlier, "making", "") else {}
        return ObjectStage(upload, claim, done)

    def _reveal(self, stage: ObjectStage) -> None:
        """Put the root's metadata where nothing was: from now on the output is there."""
        try:
            put_once(self.bucket, self.root + METADATA, stage.document, None)
        except TakenError as error:
            raise OutputExistsError(
                f"an output is written once; {self.location} appeared meanwhile; name another"
            ) from error

    def _announce(self, stage: ObjectStage, *, overwrite: bool) -> None:
        """Put the notice in the place of what stands at OUT, if that may be replaced still."""
        standing = self.look()
        # Once another has taken over, what stands there may be what it has made of the very objects of this run.
        self.ledger.check(stage.upload.run)
        if standing.held is not None and not overwrite:
            raise OutputExistsError(
                f"an output is written once; {self.location} appeared meanwhile; go on with --resume --overwrite"
            )
        if standing.replacing or (standing.held is not None and self._record(standing.document) is None):
            raise OutputExistsError(
                f"one run replaces an output at a time; another has begun to replace {self.location}; go on with "
                f"--resume --overwrite"
            )
        if standing.held is None:
            # The replacement deletes all that lies there.
            keys = [key.removeprefix(self.root) for key in self.bucket.list_keys(self.root)]
            if strays := [key for key in keys if not stage.written.fullmatch(key) and key != METADATA]:
                raise OutputExistsError(
                    f"an output goes where nothing is; {self.bucket.url}/{self.root}{strays[0]} is there; remove it "
                    f"yourself, and go on with --resume"
                )
        try:
            put_once(self.bucket, self.root + METADATA, say_notice(stage.upload.making), standing.held)
        except TakenError as error:
            raise OutputExistsError(
                f"one run replaces an output at a time; {self.location} has just changed; go on with --resume "
                f"--overwrite"
            ) from error

    def _finish_replacing(self) -> bool:
        """Do what is left of a replacement that was announced; whether there was one.

        Another run may do the same at the same time, and be faster at any point.
        """
        standing = self.look()
        if not standing.replacing:
            return False
        try:
            self._replace(standing)
        except (OpenError, TakenError, IntegrityError) as error:
            if self.look() != standing:
                return True
            if isinstance(error, TakenError):
                raise OutputExistsError(
                    f"one run replaces an output at a time; {self.location} changes under way; go on with --resume"
                ) from error
            raise
        return True

    def _replace(self, standing: _Standing) -> None:
        """Put what was announced in its place; TakenError where something changes that should not."""
        source, record = self.ledger.staged(standing.replacing), self._record(standing.document)
        made = {key.removeprefix(source): held for key, held in self.bucket.list_keys(source).items()}
        if record is None or standing.document is None or not {*record.files, METADATA} <= made.keys():
            raise IntegrityError(
                f"what replaces an output is complete; of {self.bucket.url}/{source}, which was to replace "
                f"{self.location}, objects are gone; remove {self.location} yourself, and begin anew"
            )
        del made[METADATA]
        members = [key for key in made if _is_document(key)]
        fresh = {key: found[0] for key, found in self._get(source, members).items() if found is not None}
        listed = self.bucket.list_keys(self.root)
        old = [key for key in (key.removeprefix(self.root) for key in listed) if _is_document(key) and key != METADATA]
        hidden, found_members = {}, self._get(self.root, old)
        # Those of the new output, where another has put them meanwhile, stay.
        if self.look() != standing:
            return
        for key, found in found_members.items():
            # Nobody shall read, by the metadata of a member, objects of both outputs.
            if found is not None and found[0] not in (fresh.get(key), say_notice(standing.replacing)):
                hidden[key] = put_once(self.bucket, self.root + key, say_notice(standing.replacing), found[1])
            elif found is not None:
                hidden[key] = found[1]
        self.bucket.copy((source + key, self.root + key) for key in made if key not in members)
        listed = self.bucket.list_keys(self.root)
        files = [each._replace(tag=made[key].tag) for key, each in record.files.items() if key not in members]
        for each in _find_changed(self.bucket, self.root, files, listed):
            raise IntegrityError(
                f"an object is copied as it is; {self.bucket.url}/{self.root}{each.key} is not: check the store, and "
                f"go on with --resume"
            )
        if self.look() != standing:
            return
        doomed = [key for key in listed if key.removeprefix(self.root) not in {*made, METADATA}]
        if doomed:
            self.bucket.delete(doomed)
        for key, content in fresh.items():
            put_once(self.bucket, self.root + key, content, hidden.get(key))
        put_once(self.bucket, self.root + METADATA, standing.document, standing.held)

    def _get(self, prefix: str, keys: list[str]) -> dict[str, tuple[bytes, Held] | None]:
        return dict(zip(keys, self.bucket.get([prefix + key for key in keys]), strict=True))

    def _leave(self, stage: ObjectStage, error: BaseException) -> None:
        """Note on a failure what is kept of a run; without anything, delete what it has begun."""
        ledger, upload = self.ledger, stage.upload
        kept = len(stage.done)
        with suppress(OpenError):
            # Tasks of which word has not come yet are kept, too.
            kept = max(kept, ledger.count(upload.making))
            if not kept and ledger.holds(upload.run):
                if not stage.staged:
                    keys = self.bucket.list_keys(self.root)
                    doomed = [key for key in keys if stage.written.fullmatch(key.removeprefix(self.root))]
                    if doomed:
                        self.bucket.delete(doomed)
                # As long as another request's objects lie at the final keys, the claim says that they are ours; and
                # as long as tasks may put more there.
                ledger.sweep(upload.run, claim=not stage.beside and not stage.may_linger)
                if stage.may_linger:
                    error.add_note("tasks that ended late may have left something; begin anew with --resume")
            self._forget(stage.upload.making)
        if kept:
            flags = "--resume --overwrite" if stage.staged else "--resume"
            error.add_note(say_kept(kept, stage.tasks, flags))

    def _sweep_remains(self) -> None:
        """Delete what the run that made the finished output has left below the ledger; another's is its own."""
        found, standing = self.ledger.read(), self.look()
        record = self._record(standing.document)
        if found is None or record is None or standing.replacing:
            return
        if record.ours.get("made") == found[0].making:
            self.ledger.sweep(found[0].run)

    def _forget(self, making: str) -> None:
        """Delete what a run and its late tasks have put, once no run goes on with what it has begun."""
        if self.look().replacing != making:
            self.ledger.forget(making)

    def _holds(self, document: bytes) -> bool:
        with suppress(OpenError):
            standing = self.look()
            return standing.document == document and not standing.replacing
        return False

    def _did_another(self, stage: ObjectStage, request: Request, *, decided: bool) -> bool:
        """Whether a run of the same request that took over, or our own in spite of all, has finished the output."""
        with suppress(PipelineError):
            if (decided or not self.ledger.holds(stage.upload.run)) and self.is_finished(request):
                self._forget(stage.upload.making)
                return True
        return False

    def look(self) -> _Standing:
        """Look at what stands at OUT."""
        [found] = self.bucket.get([self.root + METADATA])
        if found is None:
            return _Standing(None, None, "")
        document, held = found
        replacing = read_notice(document)
        if not replacing:
            return _Standing(held, document, "")
        [made] = self.bucket.get([self.ledger.staged(replacing) + METADATA])
        return _Standing(held, made[0] if made else None, replacing)

    def _record(self, document: bytes | None) -> Record | None:
        with suppress(OpenError):
            return None if document is None else parse_record(document, f"{self.location}/{METADATA}")
        return None


def _is_document(key: str) -> bool:
    return key.rsplit("/", 1)[-1] == METADATA


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
