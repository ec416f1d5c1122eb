"""Outputs on object stores are whole or not there, whatever ends a run, and whoever else runs; never a wrong row."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster

import pipeline
from pipeline.outputs import bucket as publication
from pipeline.outputs.ledger import Ledger
from pipeline.runtime.report import Watch
from pipeline.sinks.create import plan_creation
from pipeline.sinks.store import prepare_storing
from pipeline.storage.buckets import Bucket, Held, TakenError, open_bucket
from pipeline.storage.locations import Url, locate
from pipeline.storage.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

ROWS, LENGTH, TASKS = 96, 4, 3
A = np.arange(1.0, ROWS * 4 + 1).reshape(ROWS, 4)
STARTS = np.random.default_rng(3).permutation(ROWS - LENGTH)[:9]
EXPECTED = np.stack([A[start : start + LENGTH] for start in STARTS.tolist()])
_numbers = itertools.count()


class StopError(Exception):
    """Ends a run where a test wants it to end."""


class KilledError(BaseException):
    """The process is gone: from now on nothing that it asks of a store happens."""


@dataclass(slots=True)
class StoppingWatch(Watch):
    """Raises once so many tasks are finished and noted."""

    after: int = -1
    numbers: list[int] = field(default_factory=list)

    def task_done(self, receipt: Any) -> None:
        Watch.task_done(self, receipt)
        self.numbers.append(receipt.number)
        if len(self.numbers) == self.after:
            raise StopError


@dataclass(frozen=True)
class Dying:
    """A bucket of a process that is killed at its n-th change of an object, before the store has done it, or after."""

    bucket: Bucket
    at: int
    after: bool
    counted: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bucket, name)

    def hurried(self) -> Dying:
        return self

    def list_keys(self, prefix: str) -> dict[str, Held]:
        self.live()
        return self.bucket.list_keys(prefix)

    def get(self, keys: Any) -> Any:
        self.live()
        return self.bucket.get(keys)

    def live(self) -> None:
        if len(self.counted) > self.at:
            raise KilledError

    def change(self, what: str, make: Callable[[], Any]) -> Any:
        self.live()
        self.counted.append(what)
        if len(self.counted) > self.at and not self.after:
            raise KilledError
        made = make()
        self.live()
        return made

    def put(self, key: str, content: Any) -> Held:
        return self.change(f"put {key}", lambda: self.bucket.put(key, content))

    def put_if(self, key: str, content: Any, held: Held | None) -> Held:
        return self.change(f"put_if {key}", lambda: self.bucket.put_if(key, content, held))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.change(f"delete {key}", lambda key=key: self.bucket.delete([key]))


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", TASKS)
    # One after the other, each journaled before the next begins.
    monkeypatch.setattr("pipeline.runtime.runner._TOGETHER", 1)
    monkeypatch.setattr("pipeline.runtime.runner.count_threads", lambda _: 0)
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    np.save(folder / "A.npy", A)
    pipeline.create_matrix(folder / "A.npy", folder / "A.zarr", shard_rows=16, chunk_rows=4)
    return folder


@pytest.fixture
def base() -> str:
    return f"memory://results-{next(_numbers)}"


def create(local: Path, base: str, watch: Watch, **given: Any) -> NDArray[Any]:
    settings: dict[str, Any] = {"dtype": None, "row_shape": None, "dataset": None, "axis": 0, "seed": 0}
    settings |= {"length": LENGTH, "shard_rows": 32, "chunk_rows": 4, "compress": None, "memory": None}
    settings |= {"resume": False, "overwrite": False}
    matrix = plan_creation(local / "A.npy", f"{base}/out.zarr", **settings | given).run(watch)
    assert matrix.path == f"{base}/out.zarr"
    made: NDArray[Any] = matrix.array[:]
    return made


def create_compressed(local: Path, base: str, watch: Watch, **given: Any) -> NDArray[Any]:
    return create(local, base, watch, compress="zstd", **given)


def store(
    local: Path, base: str, watch: Watch, *, order: Any = "request", apply: Any = None, **given: Any
) -> NDArray[Any]:
    plan = pipeline.plan_windows(pipeline.open_matrix(local / "A.zarr"), STARTS, length=LENGTH)
    given = {"resume": False, "overwrite": False} | given
    group = prepare_storing(plan, f"{base}/out.zarr", apply=apply, order=order, **given).run(watch)
    windows: NDArray[Any] = group["windows"][:]
    if order == "request":
        np.testing.assert_array_equal(group["starts"][:], STARTS)
        return windows
    ordered = np.empty_like(windows)
    ordered[group["places"][:]] = windows
    return ordered


def store_sorted(local: Path, base: str, watch: Watch, **given: Any) -> NDArray[Any]:
    return store(local, base, watch, order="chunk", **given)


SINKS: list[tuple[Callable[..., NDArray[Any]], NDArray[Any]]] = [
    (create, A),
    (create_compressed, A),
    (store, EXPECTED),
    (store_sorted, EXPECTED),
]
every_sink = pytest.mark.parametrize(("sink", "expected"), SINKS, ids=[sink.__name__ for sink, _ in SINKS])
OTHER: dict[Any, dict[str, Any]] = {
    create: {"shard_rows": 16},
    create_compressed: {"shard_rows": 16},
    store: {"apply": np.negative},
    store_sorted: {"apply": np.negative},
}
"""Of another request."""


def bucket_of(base: str) -> Bucket:
    url = locate(f"{base}/x")
    assert isinstance(url, Url)
    return open_bucket(url.parent)


def objects(base: str) -> dict[str, bytes]:
    """Everything in a bucket."""
    bucket = bucket_of(base)
    keys = sorted({**bucket.list_keys("out.zarr/"), **bucket.list_keys("out.zarr.partial/")})
    return {key: found[0] for key, found in zip(keys, bucket.get(keys), strict=True) if found}


def read(base: str, member: str = "") -> NDArray[Any] | None:
    """What plain Zarr finds; None where it finds nothing."""
    try:
        node = zarr.open(open_store(locate(f"{base}/out.zarr{member}"), read_only=True), mode="r")  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 (zarr raises what it likes)
        return None
    if isinstance(node, zarr.Array):
        return np.asarray(node)
    ordered = np.asarray(node["windows"])
    if "places" in node:
        ordered[np.asarray(node["places"])] = ordered.copy()
    return ordered


def verify(base: str) -> Any:
    try:
        return pipeline.verify(f"{base}/out.zarr")
    except pipeline.NotFoundError:
        found = {key.removeprefix("out.zarr/"): each for key, each in objects(base).items() if "partial" not in key}
        ours = json.loads(found.pop("zarr.json"))["attributes"]["random-windows"]
        here = {key: [len(each), f"{zlib.crc32(each):08x}"] for key, each in found.items()}
        return [key for key in {*here, *ours["files"]} if here.get(key) != ours["files"].get(key)]


def assert_finished(base: str, expected: NDArray[Any]) -> None:
    np.testing.assert_array_equal(read(base), expected, strict=True)
    assert verify(base) == []
    assert not [key for key in objects(base) if not key.startswith("out.zarr/")]


@every_sink
def test_same_objects_as_files(sink: Any, expected: NDArray[Any], local: Path, base: str, tmp_path: Path) -> None:
    np.testing.assert_array_equal(sink(local, base, Watch()), expected, strict=True)
    assert_finished(base, expected)
    folder = tmp_path / "here"
    folder.mkdir()
    sink(local, str(folder), Watch())
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    made = objects(base)
    assert made.keys() == files.keys()
    assert {key for key in made if made[key] != files[key]} == {key for key in made if key.endswith("zarr.json")}
    documents = [{key: json.loads(each[key]) for key in each if key.endswith("zarr.json")} for each in (files, made)]
    for each in documents:
        for key, document in each.items():
            ours = document["attributes"].pop("random-windows", {})
            assert ours.keys() <= {"made", "kind", "files", "digest", "tags", "request", "matrix", "length", "order"}
            assert ("tags" in ours) == (each is documents[1] and key == "out.zarr/zarr.json")
    assert documents[0] == documents[1]


@every_sink
@pytest.mark.parametrize("after", range(1, TASKS + 1))
def test_goes_on_after_every_task(sink: Any, expected: NDArray[Any], after: int, local: Path, base: str) -> None:
    first = StoppingWatch(after=after)
    with pytest.raises(StopError) as stopped:
        sink(local, base, first)
    assert stopped.value.__notes__ == [f"{after} of {TASKS} tasks finished and kept; go on with --resume"]
    assert read(base) is None
    for given in ({}, OTHER[sink]):
        with pytest.raises(pipeline.OutputExistsError, match="interrupted run's remains, .*process .*--resume"):
            sink(local, base, Watch(), **given)
    with pytest.raises(pipeline.OutputExistsError, match="remains of another request, which differs in "):
        sink(local, base, Watch(), resume=True, **OTHER[sink])
    second = StoppingWatch()
    np.testing.assert_array_equal(sink(local, base, second, resume=True), expected, strict=True)
    assert second.kept_tasks == after
    assert not set(first.numbers) & set(second.numbers)
    assert_finished(base, expected)
    before = objects(base)
    again = StoppingWatch()
    np.testing.assert_array_equal(sink(local, base, again, resume=True), expected)
    assert again.tasks == 0
    assert objects(base) == before
    with pytest.raises(pipeline.OutputExistsError, match="exists; "):
        sink(local, base, Watch())


def run_dying(monkeypatch: pytest.MonkeyPatch, at: int, after: bool, run: Callable[[], Any]) -> tuple[bool, list[str]]:
    """Run something that is killed at its n-th change; whether it was, and what it had changed."""
    counted: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(publication, "open_bucket", lambda url: Dying(open_bucket(url), at, after, counted))
        try:
            run()
        except KilledError:
            return True, counted
    return False, counted


# Each step, or, in the tests that always run, one of a few.
strides = pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
moments = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


@every_sink
@moments
@strides
def test_killed_at_every_step(
    sink: Any, expected: NDArray[Any], after: bool, stride: int, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in itertools.count(0, stride):
        base = f"memory://results-{next(_numbers)}"
        killed, counted = run_dying(monkeypatch, at, after, lambda base=base: sink(local, base, Watch()))
        decided = any(each == "put_if out.zarr/zarr.json" for each in counted[: at + after])
        assert (read(base) is not None) == decided
        # And once more, as it goes on.
        run_dying(monkeypatch, at * 5 % 7, after, lambda base=base: sink(local, base, Watch(), resume=True))
        np.testing.assert_array_equal(sink(local, base, Watch(), resume=True), expected, strict=True)
        assert_finished(base, expected)
        if not killed:
            break
    assert at > 10


FLAGS: list[dict[str, bool]] = [
    {},
    {"resume": True},
    {"overwrite": True},
    {"resume": True, "overwrite": True},
]


@every_sink
def test_overwrite_is_harmless_where_nothing_is(sink: Any, expected: NDArray[Any], local: Path, base: str) -> None:
    np.testing.assert_array_equal(sink(local, base, Watch(), overwrite=True), expected, strict=True)
    assert_finished(base, expected)


@every_sink
@pytest.mark.parametrize("given", FLAGS)
def test_a_finished_output_is_never_replaced(
    sink: Any, expected: NDArray[Any], given: dict[str, bool], local: Path, base: str
) -> None:
    sink(local, base, Watch())
    bucket_of(base).put("out.zarr.partial/thesis.txt", b"mine")
    before = objects(base)
    with pytest.raises(pipeline.OutputExistsError) as refused:
        sink(local, base, Watch(), **given, **OTHER[sink])
    state = "already exists, of another request" if "resume" in given else "already exists"
    assert str(refused.value) == f"{base}/out.zarr {state}; choose another URL, or delete it first"
    if "resume" in given:
        np.testing.assert_array_equal(sink(local, base, again := StoppingWatch(), **given), expected)
        assert again.tasks == 0
    assert objects(base) == before


@pytest.mark.parametrize("given", FLAGS)
def test_remains_of_another_request_are_named_and_kept(given: dict[str, bool], local: Path, base: str) -> None:
    with pytest.raises(StopError):
        store(local, base, StoppingWatch(after=2))
    before = objects(base)
    with pytest.raises(pipeline.OutputExistsError) as refused:
        store(local, base, Watch(), apply=np.negative, **given)
    assert f"delete {base}/out.zarr/ and {base}/out.zarr.partial/ first" in str(refused.value)
    assert objects(base) == before
    np.testing.assert_array_equal(store(local, base, again := StoppingWatch(), **{**given, "resume": True}), EXPECTED)
    assert again.kept_tasks == 2
    assert_finished(base, EXPECTED)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("given", FLAGS)
def test_remains_of_a_replacement_by_an_older_version(
    given: dict[str, bool], beside: bool, local: Path, base: str
) -> None:
    """Also of the same request: its objects do not lie at the final keys."""
    with pytest.raises(StopError):
        store(local, base, StoppingWatch(after=1))
    bucket, key = bucket_of(base), "out.zarr.partial/request.json"
    document = json.loads(objects(base)[key]) | {"staged": True, "beside": beside}
    bucket.put(key, json.dumps(document).encode())
    before = objects(base)
    with pytest.raises(pipeline.OutputExistsError, match="interrupted replacement by an older version") as refused:
        store(local, base, Watch(), **given)
    doomed = f"{base}/out.zarr.partial/{f' and {base}/out.zarr/' if beside else ''}"
    assert str(refused.value).endswith(f"delete {doomed} first")
    assert objects(base) == before


@pytest.mark.parametrize("given", FLAGS)
def test_a_notice_of_an_older_version(given: dict[str, bool], local: Path, base: str) -> None:
    """Of an output and of its members, whose objects are those of two outputs."""
    store(local, base, Watch())
    notice = {"attributes": {"random-windows": {"replaced by": "0123abcd"}}}
    content = json.dumps({"zarr_format": 3, "node_type": "replacement"} | notice).encode()
    for key in ("out.zarr/zarr.json", "out.zarr/windows/zarr.json"):
        bucket_of(base).put(key, content)
    before = objects(base)
    with pytest.raises(pipeline.OutputExistsError, match="unfinished replacement that an older version") as refused:
        store(local, base, Watch(), **given)
    assert f"whole at {base}/out.zarr.partial/output-0123abcd" in str(refused.value)
    assert str(refused.value).endswith(f"delete {base}/out.zarr/ and {base}/out.zarr.partial/")
    assert read(base) is None
    for look in (pipeline.open_matrix, pipeline.verify):
        for name in ("out.zarr", "out.zarr/windows"):
            with pytest.raises(pipeline.OpenError, match=f"{name} holds an unfinished replacement"):
                look(f"{base}/{name}")
    assert objects(base) == before


@dataclass(frozen=True)
class Interrupted:
    """A bucket of a process that stands still at its n-th change of an object, while something else happens."""

    bucket: Bucket
    at: int
    after: bool
    meanwhile: Callable[[], Any]
    counted: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bucket, name)

    def hurried(self) -> Interrupted:
        return self

    def change(self, what: str, make: Callable[[], Any]) -> Any:
        self.counted.append(what)
        now = len(self.counted) == self.at + 1
        if now and not self.after:
            self.meanwhile()
        try:
            return make()
        finally:
            if now and self.after:
                self.meanwhile()

    put, put_if, delete = Dying.put, Dying.put_if, Dying.delete


class InterruptedAnywhere(Interrupted):
    """The same at its n-th request, those that read among them."""

    def get(self, keys: Any) -> Any:
        return self.change(f"get {keys[:1]}", lambda: self.bucket.get(keys))

    def list_keys(self, prefix: str) -> dict[str, Held]:
        return self.change(f"list {prefix}", lambda: self.bucket.list_keys(prefix))

    def compare(self, key: str, content: Any) -> tuple[Held, bool] | None:
        return self.change(f"compare {key}", lambda: self.bucket.compare(key, content))  # type: ignore[no-any-return]


QUICK = [
    ("same", "changing", "after", 5),
    ("another", "changing", "before", 5),
    ("killed", "changing", "before", 1),
    ("same", "reading", "after", 9),
    ("another", "reading", "after", 9),
]
ALL = itertools.product(("same", "another", "killed"), ("changing", "reading"), ("before", "after"), (1,))


@pytest.mark.parametrize(
    ("other", "kind", "moment", "stride"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in ALL)]
)
def test_another_run_at_every_step(
    other: str, kind: str, moment: str, stride: int, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run stands still, at any moment, for as long as another takes, of the same request or not."""
    after = moment == "after"
    kept = InterruptedAnywhere if kind == "reading" else Interrupted
    wanted, apply = (-EXPECTED, np.negative) if other == "another" else (EXPECTED, None)
    endings = set()
    for at in itertools.chain(range(min(2, stride - 1)), itertools.count(stride // 3, stride)):
        base = f"memory://results-{next(_numbers)}"
        made: list[NDArray[Any]] = []

        def meanwhile(base: str = base, at: int = at, made: list[NDArray[Any]] = made) -> None:
            steps = (at * 5 + 7) % 17 if other == "killed" else 10**9
            with monkeypatch.context() as patch:
                patch.setattr(publication, "open_bucket", lambda url: Dying(open_bucket(url), steps, after))
                with suppress(KilledError, pipeline.OutputExistsError):
                    made.append(store(local, base, Watch(), apply=apply, resume=True))

        counted: list[str] = []
        with monkeypatch.context() as patch:
            standing = functools.partial(kept, at=at, after=after, meanwhile=meanwhile, counted=counted)
            patch.setattr(publication, "open_bucket", lambda url, standing=standing: standing(open_bucket(url)))
            try:
                mine = store(local, base, Watch())
            except pipeline.PipelineError as error:
                endings.add(type(error))
                if made:
                    np.testing.assert_array_equal(read(base), wanted)
            else:
                endings.add(None)
                np.testing.assert_array_equal(mine, EXPECTED)
        if len(counted) <= at:
            break
        for each in made:
            np.testing.assert_array_equal(each, wanted)
        found = read(base)
        assert found is not None or not made
        # What is begun, or whole with something left beside it, is of one request; the other is refused.
        for run in (None, np.negative):
            with suppress(pipeline.OutputExistsError):
                store(local, base, Watch(), apply=run, resume=True)
        final = read(base)
        assert final is not None
        assert found is None or np.array_equal(final, found)
        assert_finished(base, EXPECTED if np.array_equal(final, EXPECTED) else wanted)
    assert at > 10
    # Who finds its request finished by the other ends well, unless it had not begun.
    assert None in endings <= {None, pipeline.OutputExistsError, pipeline.OpenError, pipeline.IntegrityError}
    assert other == "same" or len(endings) > 1


@every_sink
def test_nothing_is_kept_of_nothing(sink: Any, expected: NDArray[Any], local: Path, base: str) -> None:
    class Broken(Watch):
        def begin(self, tasks: int, units: int, nbytes: int) -> None:
            raise StopError

    with pytest.raises(StopError) as stopped:
        sink(local, base, Broken())
    assert not getattr(stopped.value, "__notes__", [])
    assert objects(base) == {}
    np.testing.assert_array_equal(sink(local, base, Watch(), resume=True), expected)


def test_tasks_that_end_late_leave_a_claim_on_what_they_put(
    local: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process a put may be under way when its run has ended, with nothing finished."""
    writers: list[Any] = []
    real = publication.ObjectStage.create_array

    class Broken(Watch):
        def begin(self, tasks: int, units: int, nbytes: int) -> None:
            raise StopError

    for lingers in (False, True):
        with monkeypatch.context() as patch:

            def keep(stage: Any, name: str | None, patch: Any = patch, lingers: bool = lingers, **layout: Any) -> Any:
                # Not before: to memory:// no other process writes.
                patch.setattr(publication, "shares_memory", lambda _: not lingers)
                writers.append(real(stage, name, **layout))
                return writers[-1]

            patch.setattr(publication.ObjectStage, "create_array", keep)
            with pytest.raises(StopError) as stopped:
                create(local, base, Broken())
        assert bool(getattr(stopped.value, "__notes__", [])) == lingers
        assert bool(objects(base)) == lingers
        if lingers:
            writers[-1].write(0, 32, lambda start, stop: A[start:stop], 0)
        else:
            # Whose claim is gone notes nothing, either.
            with pytest.raises(pipeline.OpenError, match="its run has ended"):
                writers[-1].upload.ledger.note(writers[-1].upload.run, writers[-1].upload.making, 0, [])
            assert objects(base) == {}
    again = StoppingWatch()
    np.testing.assert_array_equal(create(local, base, again, resume=True), A)
    assert again.kept_tasks == 1
    assert_finished(base, A)


def test_a_failure_before_a_run_that_goes_on_is_told(local: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if another run has finished the same meanwhile."""
    with pytest.raises(StopError):
        store(local, base, StoppingWatch(after=1))
    real = publication._find_changed

    def fail(*given: Any) -> Any:
        monkeypatch.setattr(publication, "_find_changed", real)
        store(local, base, Watch(), resume=True)
        raise pipeline.OpenError("a store can be read; it cannot: 503; check the store")

    monkeypatch.setattr(publication, "_find_changed", fail)
    with pytest.raises(pipeline.OpenError, match="503"):
        store(local, base, Watch(), resume=True)
    store(local, base, Watch(), resume=True)
    assert_finished(base, EXPECTED)


@every_sink
@pytest.mark.parametrize("how", ["other bytes", "another object", "gone"])
def test_what_was_kept_is_looked_at_again(sink: Any, expected: NDArray[Any], how: str, local: Path, base: str) -> None:
    with pytest.raises(StopError):
        sink(local, base, StoppingWatch(after=2))
    bucket = bucket_of(base)
    notes = sorted(key for key in objects(base) if "/done-" in key)
    [[victim, *_], *_] = json.loads(objects(base)[notes[0]])["files"]
    if how == "gone":
        bucket.delete([f"out.zarr/{victim}"])
    else:
        content = bytearray(objects(base)[f"out.zarr/{victim}"])
        content[len(content) // 3] ^= 4
        bucket.put(f"out.zarr/{victim}", bytes(content if how == "other bytes" else content[:-1]))
    second = StoppingWatch()
    np.testing.assert_array_equal(sink(local, base, second, resume=True), expected)
    assert second.kept_tasks == 1
    assert_finished(base, expected)


@pytest.mark.parametrize("how", ["other bytes", "gone", "metadata", "more"])
def test_a_finished_output_is_looked_at_again(how: str, local: Path, base: str) -> None:
    store(local, base, Watch())
    bucket, key = bucket_of(base), "out.zarr/windows/c/1/0/0"
    if how == "gone":
        bucket.delete([key])
    elif how == "metadata":
        document = json.loads(objects(base)["out.zarr/zarr.json"])
        document["attributes"]["random-windows"]["length"] = 5
        bucket.put("out.zarr/zarr.json", json.dumps(document).encode())
    else:
        content = bytearray(objects(base)[key])
        content[7] ^= 1
        bucket.put(key if how == "other bytes" else f"{key}1", bytes(content))
    if how == "more":
        store(local, base, Watch(), resume=True)
        assert len(verify(base)) == 1
    else:
        words = ": its metadata changed|1 object changed, the first windows/c/1/0/0"
        with pytest.raises(pipeline.IntegrityError, match=words):
            store(local, base, Watch(), resume=True)
    bucket.delete(objects(base))
    np.testing.assert_array_equal(store(local, base, Watch(), resume=True), EXPECTED)
    assert_finished(base, EXPECTED)


@pytest.mark.parametrize("like_md5", [False, True])
def test_tags_that_tell_nothing_are_made_up_for_by_reading(
    like_md5: bool, local: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some stores an entity tag is no MD5; of objects that a store encrypts it looks like one."""

    @dataclass(frozen=True)
    class Opaque:
        bucket: Bucket
        salt: str
        read: list[str] = field(default_factory=list)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.bucket, name)

        def hurried(self) -> Opaque:
            return self

        def veil(self, key: str, held: Held) -> Held:
            tag = hashlib.md5(f"{self.salt} {key} {held.tag}".encode()).hexdigest()
            return held._replace(tag=tag if like_md5 else f"{tag}-1")

        def list_keys(self, prefix: str) -> dict[str, Held]:
            return {key: self.veil(key, held) for key, held in self.bucket.list_keys(prefix).items()}

        def get(self, keys: Any) -> Any:
            found = zip(keys, self.bucket.get(keys), strict=True)
            return [each and (each[0], self.veil(key, each[1])) for key, each in found]

        def compare(self, key: str, content: Any) -> tuple[Held, bool] | None:
            self.read.append(key)
            found = self.bucket.compare(key, content)
            return found and (self.veil(key, found[0]), found[1])

        def checksum(self, key: str) -> tuple[int, int] | None:
            self.read.append(key)
            return self.bucket.checksum(key)

        def put(self, key: str, content: Any) -> Held:
            return self.veil(key, self.bucket.put(key, content))

        def put_if(self, key: str, content: Any, held: Held | None) -> Held:
            [found] = self.bucket.get([key])
            if held is not None and (found is None or self.veil(key, found[1]) != held):
                raise TakenError(key)
            return self.veil(key, self.bucket.put_if(key, content, held and found and found[1]))

    def run(salt: str, **given: Any) -> set[str]:
        read: list[str] = []
        monkeypatch.setattr(publication, "open_bucket", lambda url: Opaque(open_bucket(url), salt, read))
        np.testing.assert_array_equal(store(local, base, Watch(), **given), EXPECTED)
        return set(read)

    read = run("one")
    made = {key for key in objects(base) if key != "out.zarr/zarr.json"}
    assert read == made
    assert run("one", resume=True) == set()
    # Copied elsewhere, objects have other tags than those that were recorded.
    assert run("other", resume=True) == made
    assert_finished(base, EXPECTED)


def test_a_late_task_of_an_ended_run_harms_nobody(local: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client was killed; its worker, elsewhere, knows nothing of that."""
    writers: list[Any] = []
    real = publication.ObjectStage.create_array

    def keep(stage: Any, name: str | None, **layout: Any) -> Any:
        writers.append(real(stage, name, **layout))
        return writers[-1]

    monkeypatch.setattr(publication.ObjectStage, "create_array", keep)
    with pytest.raises(StopError):
        create(local, base, StoppingWatch(after=1))
    [late] = writers

    def write(task: int) -> None:
        late.write(32 * task, 32 * task + 32, lambda start, stop: -A[start:stop], task)

    with pytest.raises(StopError):
        create(local, base, StoppingWatch(after=1), resume=True)
    before = objects(base)
    with pytest.raises(pipeline.OutputExistsError, match="another has taken over"):
        write(1)
    # Its look at the claim was just before the other run began.
    looks = itertools.count()
    real_check = Ledger.check
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "check", lambda *given: next(looks) and real_check(*given))
        with pytest.raises(pipeline.OutputExistsError, match="another has taken over"):
            write(0)
    assert objects(base) == before
    np.testing.assert_array_equal(create(local, base, Watch(), resume=True), A)
    before = objects(base)
    with pytest.raises(pipeline.OpenError, match="its run has ended"):
        write(1)
    assert objects(base) == before
    assert_finished(base, A)


def test_what_is_not_ours_is_let_alone(local: Path, base: str) -> None:
    bucket = bucket_of(base)

    def refuses(words: str) -> None:
        before = objects(base)
        for given in FLAGS:
            with pytest.raises(pipeline.OutputExistsError, match=words):
                store(local, base, Watch(), **given)
        assert objects(base) == before

    bucket.put("out.zarr/thesis.txt", b"mine")
    refuses(f"{base}/out.zarr is not empty: .*thesis.txt is there; choose .* or delete {base}/out.zarr/ first")
    zarr.create_array(open_store(locate(f"{base}/out.zarr"), read_only=False), data=A)  # type: ignore[arg-type]
    refuses("already exists.*; choose another URL, or delete it first")
    bucket.delete(objects(base))
    bucket.put("out.zarr.partial/request.json", b"{}")
    refuses("request.json is no claim of this program")
    bucket.delete(["out.zarr.partial/request.json"])
    bucket.put("out.zarr.partial/thesis.txt", b"mine")
    np.testing.assert_array_equal(store(local, base, Watch()), EXPECTED)
    assert objects(base)["out.zarr.partial/thesis.txt"] == b"mine"


def test_a_failure_removes_what_is_ours_alone(local: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    killed, counted = run_dying(monkeypatch, 4, after=True, run=lambda: store(local, base, Watch()))
    assert killed
    assert counted[-1].startswith("put_if out.zarr/")
    foreign = {"out.zarr/other/zarr.json": b"{}", "out.zarr/other/c/0": b"precious"}
    for key, content in foreign.items():
        bucket_of(base).put(key, content)

    class Broken(Watch):
        def begin(self, tasks: int, units: int, nbytes: int) -> None:
            raise StopError

    with pytest.raises(StopError):
        store(local, base, Broken(), resume=True)
    assert objects(base) == foreign


def test_what_appears_among_the_objects_is_refused(local: Path, base: str) -> None:
    @dataclass(slots=True)
    class Littering(Watch):
        def task_done(self, receipt: Any) -> None:
            Watch.task_done(self, receipt)
            bucket_of(base).put("out.zarr/thesis.txt", b"mine")

    with pytest.raises(pipeline.IntegrityError, match="out.zarr/thesis.txt was not; remove it"):
        store(local, base, Littering())
    assert read(base) is None
    bucket_of(base).delete(["out.zarr/thesis.txt"])
    np.testing.assert_array_equal(store(local, base, again := StoppingWatch(), resume=True), EXPECTED)
    assert again.kept_tasks == TASKS


@pytest.mark.parametrize("how", ["gone", "another object"])
def test_what_changes_under_way_is_noticed(how: str, local: Path, base: str) -> None:
    @dataclass(slots=True)
    class Meddling(Watch):
        def task_done(self, receipt: Any) -> None:
            Watch.task_done(self, receipt)
            if self.done_tasks == TASKS:
                bucket, key = bucket_of(base), "out.zarr/windows/c/0/0/0"
                content = objects(base)[key]
                bucket.delete([key])
                if how != "gone":
                    bucket.put(key, content[:-1] + b"!")

    with pytest.raises(pipeline.IntegrityError, match=f"windows/c/0/0/0 is {how}.*--resume"):
        store(local, base, Meddling())
    assert read(base) is None
    np.testing.assert_array_equal(store(local, base, again := StoppingWatch(), resume=True), EXPECTED)
    assert again.numbers == [0]
    assert_finished(base, EXPECTED)


def test_a_source_that_changes_is_exit_4(local: Path, base: str, tmp_path: Path) -> None:
    shutil.copytree(local / "A.zarr", tmp_path / "A.zarr")

    @dataclass(slots=True)
    class Changing(Watch):
        def task_done(self, receipt: Any) -> None:
            Watch.task_done(self, receipt)
            os.utime(tmp_path / "A.zarr" / "c" / "1" / "0")

    with pytest.raises(pipeline.IntegrityError, match="was changed"):
        store(tmp_path, base, Changing())
    assert read(base) is None
    with pytest.raises(pipeline.OutputExistsError, match="differs in matrix"):
        store(tmp_path, base, Watch(), resume=True)


@pytest.mark.parametrize("minds", ["nothing", "that nothing is there", "what is there"])
def test_a_store_that_ignores_conditions_is_refused(
    minds: str, local: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(Dying):
        def put_if(self, key: str, content: Any, held: Held | None) -> Held:
            if minds == ("that nothing is there" if held is None else "what is there"):
                return self.bucket.put_if(key, content, held)
            return self.bucket.put(key, content)

    monkeypatch.setattr(publication, "open_bucket", lambda url: Careless(open_bucket(url), 10**9, after=False))
    with pytest.raises(pipeline.OpenError, match="can refuse to replace"):
        store(local, base, Watch())
    assert objects(base) == {}


def test_an_object_that_reads_back_otherwise(local: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rotten(Dying):
        def put_if(self, key: str, content: Any, held: Held | None) -> Held:
            content = bytes(content)
            return self.bucket.put_if(key, content[:-1] + b"!" if key.endswith("c/1/0/0") else content, held)

    with monkeypatch.context() as patch:
        patch.setattr(publication, "open_bucket", lambda url: Rotten(open_bucket(url), 10**9, after=False))
        with pytest.raises(pipeline.IntegrityError, match="reads back as it was written; .*windows/c/1/0/0 does not"):
            store(local, base, Watch())
    np.testing.assert_array_equal(store(local, base, Watch(), resume=True), EXPECTED)
    assert_finished(base, EXPECTED)


def test_names_that_are_refused(local: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = pipeline.create_matrix(local / "A.npy", f"{base}/A.zarr", shard_rows=16)
    plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
    for name, kind, words in [
        (f"{base}/A.zarr", pipeline.OutputExistsError, "exists|lies apart from its input"),
        (f"{base}/A.zarr/w.zarr", pipeline.OutputExistsError, "lies apart from its input"),
        (f"{base}/w", pipeline.InputError, "name it .zarr"),
        ("https://example.org/w.zarr", pipeline.InputError, "web servers are read from"),
        ("ftp://example.org/w.zarr", pipeline.InputError, "can refuse to replace"),
        ("memory://w.zarr", pipeline.InputError, "below a bucket"),
    ]:
        with pytest.raises(kind, match=words):
            pipeline.store(plan, name)
        if not words.startswith("lies apart"):
            with pytest.raises(kind, match=words):
                pipeline.create_matrix(local / "A.npy", name)
    with pytest.raises(pipeline.InputError, match="storage_options are for URLs"):
        pipeline.store(plan, local / "w.zarr", storage_options={"region": "x"})
    with pytest.raises(pipeline.InputError, match="object stores cannot.*X.zarr"):
        pipeline.gather(plan, out=f"{base}/w.npy")
    with pytest.raises(pipeline.OutputExistsError, match="lies apart"):
        pipeline.create_matrix(f"{base}/A.zarr", f"{base}/A.zarr", overwrite=True)
    with pytest.raises(pipeline.OutputExistsError, match="lies apart"):
        pipeline.create_matrix(matrix.array, f"{base}/A.zarr/B.zarr")
    monkeypatch.setattr(publication, "shares_memory", lambda _: False)
    with pytest.raises(pipeline.InputError, match="seen by one process alone"):
        pipeline.store(plan, f"{base}/w.zarr")


def test_windows_chunked_along_their_rows(local: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as are larger than 64 MiB: each window in several objects, through zarr's own codecs."""
    monkeypatch.setattr("pipeline.outputs.shards.SHARD_NBYTES", 64)
    np.testing.assert_array_equal(store(local, base, Watch()), EXPECTED)
    assert "out.zarr/windows/c/8/1/0" in objects(base)
    assert_finished(base, EXPECTED)


KILLED = """
import os, signal, sys, dask
import pipeline.plan.plan
pipeline.plan.plan._LEAST_BLOCK_NBYTES, pipeline.plan.plan._FEWEST_TASKS = 1, 3
from pathlib import Path
from tests import test_object_results as results

class Killing(results.Watch):
    def task_done(self, receipt):
        results.Watch.task_done(self, receipt)
        print("finished", receipt.number, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

pipeline.runtime.runner._TOGETHER, pipeline.runtime.runner.count_threads = 1, lambda _: 0
with dask.config.set(scheduler="synchronous"):
    results.store(Path(sys.argv[1]), sys.argv[2], Killing(), resume=True)
"""


@pytest.mark.s3
class TestS3:
    """The same on a real server, which is asked for no more than is needed, and fails now and then."""

    @every_sink
    def test_requests(self, sink: Any, expected: NDArray[Any], local: Path, bucket: Any) -> None:
        proxy, made = bucket.proxy, StoppingWatch()
        np.testing.assert_array_equal(sink(local, bucket.url, made), expected, strict=True)
        assert_finished(bucket.url, expected)
        asked = [(each.method, each.key.removeprefix(f"/{bucket.url[5:]}/")) for each in proxy.asked]
        count = Counter((method, re.sub(r"\d+|-[0-9a-f]{8}", "N", key)) for method, key in asked)
        # Each object once, each task noted once, nothing copied.
        puts = [key for method, key in asked if method == "PUT" and key.startswith("out.zarr/")]
        assert sorted(puts) == sorted(key for key in objects(bucket.url))
        assert count["PUT", "out.zarr.partial/doneN/N.json"] == TASKS
        # Until they are read as a result, objects are not read: their tags are proof.
        last = asked.index(("PUT", "out.zarr/zarr.json"))
        assert not [key for method, key in asked[:last] if method == "GET" and re.search(r"/c/\d", key)]
        assert count["GET", "out.zarr.partial/request.json"] <= len(puts) + TASKS + 8
        assert sum(method == "GET" and key.startswith("?list") for method, key in asked[: last + 4]) <= 4
        assert len([each for each in asked[:last] if each[0] == "POST"]) == 0

    def test_refused_by_reading_alone(self, local: Path, bucket: Any) -> None:
        store(local, bucket.url, Watch(), order="chunk")
        bucket.proxy.reset()
        with pytest.raises(pipeline.OutputExistsError, match="already exists; choose another URL"):
            store(local, bucket.url, Watch(), overwrite=True)
        assert {each.method for each in bucket.proxy.asked} == {"GET"}
        assert_finished(bucket.url, EXPECTED)

    @pytest.mark.parametrize("kind", ["error", "drop", "lose"])
    def test_troubles(self, kind: Any, local: Path, bucket: Any) -> None:
        troubles = [
            bucket.proxy.trouble(kind, method=method, skip=skip)
            for method, skips in (("PUT", (0, 4, 6, 9, 12, 13)), ("GET", (3, 11, 30)), ("POST", (0,)))
            for skip in skips
        ]
        np.testing.assert_array_equal(store(local, bucket.url, Watch()), EXPECTED)
        assert all(each.done for each in troubles)
        bucket.proxy.reset()
        assert_finished(bucket.url, EXPECTED)

    def test_answers_that_end_early(self, local: Path, bucket: Any) -> None:
        """Of which obstore itself asks for none again."""
        bucket.proxy.trouble("cut", method="GET", key=r"\?.*prefix=out\.zarr", times=2)
        bucket.proxy.trouble("cut", method="GET", key=r"request\.json", skip=1, times=2)
        with pytest.raises(StopError):
            store(local, bucket.url, StoppingWatch(after=2))
        bucket.proxy.trouble("cut", method="GET", key=r"done-.*\.json", times=2)
        [note] = [key for key in objects(bucket.url) if key.endswith("0.json")]
        [[key, *_], *_] = json.loads(objects(bucket.url)[note])["files"]
        path = f"out.zarr/{key}"
        bucket.proxy.trouble("cut", method="GET", key=re.escape(path), times=2)
        assert bucket_of(bucket.url).compare(path, objects(bucket.url)[path]) is not None
        bucket.proxy.trouble("cut", method="GET", key=re.escape(path), times=2)
        assert bucket_of(bucket.url).checksum(path) is not None
        np.testing.assert_array_equal(store(local, bucket.url, again := StoppingWatch(), resume=True), EXPECTED)
        assert again.kept_tasks == 2
        assert all(each.done for each in bucket.proxy._troubles)
        bucket.proxy.reset()
        assert_finished(bucket.url, EXPECTED)

    def test_a_store_that_stays_away(self, local: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.storage.stores._RETRIES", {"max_retries": 0})
        monkeypatch.setattr("pipeline.runtime.retries._PAUSES", (0.01, 0.01))
        bucket.proxy.trouble("error", method="PUT", key="windows/c/2", times=10**6)
        with pytest.raises(pipeline.OpenError, match=f"a store can be written to; {bucket.url}") as failed:
            store(local, bucket.url, Watch())
        assert failed.value.__notes__[-1] == f"2 of {TASKS} tasks finished and kept; go on with --resume"
        bucket.proxy.reset()
        np.testing.assert_array_equal(store(local, bucket.url, again := StoppingWatch(), resume=True), EXPECTED)
        assert again.kept_tasks == 2
        assert_finished(bucket.url, EXPECTED)

    def test_a_bucket_that_is_not_there(self, local: Path, bucket: Any) -> None:
        for resume in (False, True):
            with pytest.raises(pipeline.NotFoundError, match="a bucket is there before it is written to"):
                store(local, f"{bucket.url}-not", Watch(), resume=resume)

    def test_killed_and_resumed_in_another_process(self, local: Path, bucket: Any) -> None:
        finished = []
        for _ in range(2):
            command = [sys.executable, "-c", KILLED, str(local), bucket.url]
            ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
            assert ran.returncode == -signal.SIGKILL, ran.stderr
            finished += [int(line.split()[1]) for line in ran.stdout.splitlines()]
        made = StoppingWatch()
        np.testing.assert_array_equal(store(local, bucket.url, made, resume=True), EXPECTED)
        assert sorted(finished + made.numbers) == list(range(TASKS))
        assert_finished(bucket.url, EXPECTED)

    def test_worker_processes_with_credentials_from_options(
        self, local: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without any in their environment."""
        given = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
        options = {"endpoint": given["AWS_ENDPOINT_URL"], "region": given["AWS_REGION"]}
        options |= {"access_key_id": given["AWS_ACCESS_KEY_ID"], "secret_access_key": given["AWS_SECRET_ACCESS_KEY"]}
        for name in given:
            monkeypatch.delenv(name)
        with (
            dask.config.set(scheduler=None),
            LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster),
        ):
            plan = pipeline.plan_windows(pipeline.open_matrix(local / "A.zarr"), STARTS, length=LENGTH)
            made = pipeline.store(plan, f"{bucket.url}/out.zarr", storage_options=options)
            np.testing.assert_array_equal(made["windows"][:], EXPECTED)
            with pytest.raises(pipeline.InputError, match="seen by one process alone"):
                pipeline.store(plan, "memory://here/out.zarr")
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert_finished(bucket.url, EXPECTED)
