"""An output is whole or not there; what tasks have finished is kept, and another run of the same request goes on."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pytest
import zarr

import pipeline
from pipeline.integrity.record import read_record, seal_folder
from pipeline.outputs import folder as staging
from pipeline.outputs import lock as holding
from pipeline.outputs.journal import Journal, Request
from pipeline.outputs.npy import read_mark
from pipeline.outputs.shards import Cut, create_array, write_entries
from pipeline.runtime.report import Watch
from pipeline.sinks.create import plan_creation
from pipeline.sinks.gather import prepare_gathering
from pipeline.sinks.store import prepare_storing
from pipeline.storage.checksums import FileRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

ROWS, LENGTH, TASKS = 640, 5, 7
A = np.arange(ROWS * 4, dtype="f8").reshape(ROWS, 4)
STARTS = np.random.default_rng(3).permutation(ROWS - LENGTH)[:70]
EXPECTED = np.stack([A[start : start + LENGTH] for start in STARTS.tolist()])


class StopError(Exception):
    """Ends a run where a test wants it to end."""


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


@pytest.fixture(autouse=True)
def many_tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", TASKS)
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "A.npy", A)
    pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr", shard_rows=64, chunk_rows=8)
    return tmp_path


def create(folder: Path, watch: Watch, **given: Any) -> NDArray[Any]:
    settings: dict[str, Any] = {
        "dtype": None,
        "row_shape": None,
        "dataset": None,
        "axis": 0,
        "seed": 0,
        "length": LENGTH,
        "shard_rows": 96,
        "chunk_rows": 8,
        "compress": None,
        "memory": None,
        "resume": False,
        "overwrite": False,
    }
    plan_creation(folder / "A.npy", folder / "out.zarr", **settings | given).run(watch)
    made: NDArray[Any] = zarr.open_array(folder / "out.zarr", mode="r")[:]
    return made


def create_compressed(folder: Path, watch: Watch, **given: Any) -> NDArray[Any]:
    return create(folder, watch, compress="zstd", **given)


def store(folder: Path, watch: Watch, *, order: Any = "request", apply: Any = None, **given: Any) -> NDArray[Any]:
    plan = pipeline.plan_windows(pipeline.open_matrix(folder / "A.zarr"), STARTS, length=LENGTH)
    given = {"resume": False, "overwrite": False} | given
    prepare_storing(plan, folder / "out.zarr", apply=apply, order=order, **given).run(watch)
    group = zarr.open_group(folder / "out.zarr", mode="r")
    windows: NDArray[Any] = group["windows"][:]
    if order == "request":
        return windows
    ordered = np.empty_like(windows)
    ordered[group["places"][:]] = windows
    return ordered


def store_sorted(folder: Path, watch: Watch, **given: Any) -> NDArray[Any]:
    return store(folder, watch, order="chunk", **given)


def gather(folder: Path, watch: Watch, **given: Any) -> NDArray[Any]:
    plan = pipeline.plan_windows(pipeline.open_matrix(folder / "A.zarr"), STARTS, length=LENGTH)
    given = {"resume": False, "overwrite": False, "apply": None} | given
    prepare_gathering(plan, out=folder / "out.npy", **given).run(watch)
    loaded: NDArray[Any] = np.load(folder / "out.npy")
    return loaded


SINKS: list[tuple[Callable[..., NDArray[Any]], str, NDArray[Any]]] = [
    (create, "out.zarr", A),
    (create_compressed, "out.zarr", A),
    (store, "out.zarr", EXPECTED),
    (store_sorted, "out.zarr", EXPECTED),
    (gather, "out.npy", EXPECTED),
]
every_sink = pytest.mark.parametrize(("sink", "name", "expected"), SINKS, ids=[sink.__name__ for sink, _, _ in SINKS])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@every_sink
@pytest.mark.parametrize("after", range(1, TASKS + 1))
def test_goes_on_after_every_task(sink: Any, name: str, expected: NDArray[Any], after: int, folder: Path) -> None:
    before, first = names(folder), StoppingWatch(after=after)
    with pytest.raises(StopError) as stopped:
        sink(folder, first)
    assert "--resume" in " ".join(stopped.value.__notes__)
    assert names(folder) == before | {f"{name}.partial"}
    with pytest.raises(pipeline.OutputExistsError, match="--resume"):
        sink(folder, Watch())
    second = StoppingWatch()
    np.testing.assert_array_equal(sink(folder, second, resume=True), expected, strict=True)
    assert names(folder) == before | {name}
    # The pages of an `.npy` are flushed for several tasks at once: more may be kept than was said.
    assert second.kept_tasks == after or (sink is gather and second.kept_tasks > after)
    assert not set(first.numbers) & set(second.numbers)
    assert second.kept_tasks + second.done_tasks == TASKS
    assert second.done_units == len(expected)


@every_sink
def test_nothing_is_kept_of_nothing(sink: Any, name: str, expected: NDArray[Any], folder: Path) -> None:
    before = names(folder)

    class Broken(Watch):
        def begin(self, tasks: int, units: int, nbytes: int) -> None:
            raise StopError

    with pytest.raises(StopError):
        sink(folder, Broken())
    assert names(folder) == before
    np.testing.assert_array_equal(sink(folder, Watch(), resume=True), expected)
    assert names(folder) == before | {name}


@every_sink
def test_a_finished_output_is_left_alone(sink: Any, name: str, expected: NDArray[Any], folder: Path) -> None:
    sink(folder, Watch())
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = StoppingWatch()
    np.testing.assert_array_equal(sink(folder, again, resume=True), expected)
    assert again.tasks == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps
    with pytest.raises(pipeline.OutputExistsError, match="exists"):
        sink(folder, Watch())


@every_sink
def test_what_was_kept_is_read_again(sink: Any, name: str, expected: NDArray[Any], folder: Path) -> None:
    with pytest.raises(StopError):
        sink(folder, StoppingWatch(after=4))
    [output] = (folder / f"{name}.partial").glob("output-*")
    journal = Journal.read(output.parent / "journal")
    assert journal is not None
    [number, *_] = journal.done
    if output.is_dir():
        victim = output / journal.done[number][0].key
        data = bytearray(victim.read_bytes())
        data[len(data) // 3] ^= 4
        victim.write_bytes(data)
        (output / "c").mkdir(exist_ok=True)
        (output / "c" / "9.partial").write_bytes(b"left by a kill")
    else:
        mapped = np.load(output, mmap_mode="r+")
        mapped[np.argsort(STARTS, kind="stable")[0]] += 1
        mapped.flush()
        number = 0
    second = StoppingWatch()
    np.testing.assert_array_equal(sink(folder, second, resume=True), expected)
    assert number in second.numbers
    assert second.kept_tasks == len(journal.done) - 1


@every_sink
def test_an_old_output_stays_until_the_new_one_is_whole(
    sink: Any, name: str, expected: NDArray[Any], folder: Path
) -> None:
    other = {"shard_rows": 64} if sink in (create, create_compressed) else {"apply": lambda block: -block}
    sink(folder, Watch(), **other)
    old = {path: path.read_bytes() for path in (folder / name).rglob("*") if path.is_file()}
    with pytest.raises(StopError):
        sink(folder, StoppingWatch(after=2), overwrite=True)
    assert {path: path.read_bytes() for path in (folder / name).rglob("*") if path.is_file()} == old
    with pytest.raises(pipeline.OutputExistsError, match="another request"):
        sink(folder, Watch(), resume=True)
    second = StoppingWatch()
    np.testing.assert_array_equal(sink(folder, second, resume=True, overwrite=True), expected)
    assert second.kept_tasks >= 2
    assert f"{name}.partial" not in names(folder)


def test_another_request_is_refused_and_says_what_differs(folder: Path) -> None:
    with pytest.raises(StopError):
        store(folder, StoppingWatch(after=2))
    matrix = pipeline.open_matrix(folder / "A.zarr")
    for starts, length, given, differs in [
        (STARTS[::-1], LENGTH, {}, "starts"),
        (STARTS, LENGTH - 1, {}, "length, result"),
        (STARTS, LENGTH, {"apply": lambda block: block + 1}, "apply"),
        (STARTS, LENGTH, {"order": "chunk"}, "order"),
    ]:
        plan = pipeline.plan_windows(matrix, starts, length=length)
        with pytest.raises(pipeline.OutputExistsError, match=f"differs in .*{differs}"):
            pipeline.store(plan, folder / "out.zarr", resume=True, **given)
    os.utime(folder / "A.zarr" / "c" / "0" / "0")
    with pytest.raises(pipeline.OutputExistsError, match="differs in matrix"):
        store(folder, Watch(), resume=True)
    np.testing.assert_array_equal(store(folder, Watch(), resume=True, overwrite=True), EXPECTED)


@every_sink
def test_a_source_that_changes_is_exit_4(sink: Any, name: str, expected: NDArray[Any], folder: Path) -> None:
    source = folder / "A.npy" if sink in (create, create_compressed) else folder / "A.zarr" / "c" / "3" / "0"

    @dataclass(slots=True)
    class Changing(Watch):
        def task_done(self, receipt: Any) -> None:
            Watch.task_done(self, receipt)
            if self.done_tasks == TASKS:
                os.utime(source)

    with pytest.raises(pipeline.IntegrityError, match=str(source)):
        sink(folder, Changing())
    assert name not in names(folder)


def test_a_second_run_is_kept_out_and_told_who_writes(folder: Path) -> None:
    @dataclass(slots=True)
    class Intruding(Watch):
        def task_done(self, receipt: Any) -> None:
            Watch.task_done(self, receipt)
            for given in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(pipeline.OutputExistsError, match=f"process {os.getpid()}"):
                    store(folder, Watch(), **given)

    np.testing.assert_array_equal(store(folder, Intruding()), EXPECTED)


def test_a_lock_that_went_with_its_folder_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request({"kind": "test"})
    real = holding.fcntl.flock

    def finish_meanwhile(fd: int, how: int) -> None:
        shutil.rmtree(tmp_path / "w.npy.partial")
        real(fd, how)

    monkeypatch.setattr(holding.fcntl, "flock", finish_meanwhile)
    with (
        pytest.raises(pipeline.OutputExistsError, match="another run is writing"),
        staging.stage_output(tmp_path / "w.npy", request, cut=1, nbytes=0, resume=False, overwrite=False),
    ):
        pytest.fail("the lock was of no use")


@pytest.mark.parametrize("killed", [False, True])
def test_replacing_without_exchange(folder: Path, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    store(folder, Watch(), apply=lambda block: -block)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    if not killed:
        np.testing.assert_array_equal(store(folder, Watch(), overwrite=True), EXPECTED)
        return
    real = type(folder).rename

    def die(path: Path, target: Path) -> Any:
        if path.name.startswith("output-"):
            os._exit(9)
        return real(path, target)

    child = os.fork()
    if not child:
        monkeypatch.setattr(type(folder), "rename", die)
        store(folder, Watch(), overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (folder / "out.zarr").exists()
    # The next run finds the old output where it was taken aside, even if it fails itself.
    with pytest.raises(StopError):
        store(folder, StoppingWatch(after=1), overwrite=True)
    np.testing.assert_array_equal(zarr.open_group(folder / "out.zarr", mode="r")["windows"][:], -EXPECTED)


def test_outputs_say_what_they_are(folder: Path) -> None:
    store(folder, Watch())
    gather(folder, Watch())
    record = read_record(folder / "out.zarr")
    assert record is not None
    assert record.whole
    on_disk = {
        str(path.relative_to(folder / "out.zarr")) for path in (folder / "out.zarr").rglob("*") if path.is_file()
    }
    assert set(record.files) == on_disk - {"zarr.json"}
    assert record.ours["request"]["starts"]
    assert read_mark(folder / "out.npy")
    np.save(folder / "mine.npy", EXPECTED)
    assert read_mark(folder / "mine.npy") is None


def test_a_late_task_of_an_ended_run_finds_nothing_to_write_into(folder: Path) -> None:
    """Its client was killed; its worker, elsewhere, knows nothing of that."""
    given: dict[str, Any] = {"cut": 10, "nbytes": 0, "overwrite": False}
    arrays = []
    for compress in (None, "zstd"):
        request, path = Request({"compress": str(compress)}), folder / f"{compress}.zarr"

        def begin(stage: staging.Stage, compress: Any = compress) -> zarr.Array[Any]:
            names = ["row", "column"]
            cut = Cut(8, 32)
            return create_array(
                stage.output,
                shape=A.shape,
                dtype=A.dtype,
                cut=cut,
                compress=compress,
                dimension_names=names,
                attributes={},
            )

        def stop(path: Path = path, request: Request = request, begin: Any = begin) -> None:
            with staging.stage_output(path, request, resume=False, **given) as stage:
                arrays.append(begin(stage))
                stage.finish((0, tuple(write_entries(arrays[-1], 0, 32, lambda a, b: A[a:b]))))
                raise StopError

        with pytest.raises(StopError):
            stop()
        with staging.stage_output(path, request, resume=True, **given) as stage:
            before = sorted(folder.rglob("*"))
            with pytest.raises(pipeline.OpenError, match="its run has ended"):
                write_entries(arrays[-1], 32, 64, lambda a, b: -A[a:b])
            assert sorted(folder.rglob("*")) == before
            begin(stage)
            seal_folder(stage.output, [file for files in stage.done.values() for file in files], {})
        with pytest.raises(pipeline.OpenError, match="its run has ended"):
            write_entries(arrays[-1], 32, 64, lambda a, b: -A[a:b])
        assert not path.with_name(f"{path.name}.partial").exists()


@pytest.mark.parametrize("kind", ["ours", "zarr's"])
def test_what_a_lost_worker_was_writing_is_swept(folder: Path, kind: str) -> None:
    left = f"0.{'5' * 32}.partial" if kind == "ours" else f"{'a' * 32}.{'5' * 32}.partial"

    class Losing(Watch):
        def task_done(self, receipt: Any) -> None:
            [output] = (folder / "out.zarr.partial").glob("output-*")
            (output / "windows" / left).write_bytes(b"half")
            Watch.task_done(self, receipt)

    np.testing.assert_array_equal(store(folder, Losing()), EXPECTED)


def test_an_npy_that_was_cut_is_not_finished(folder: Path) -> None:
    plan = pipeline.plan_windows(pipeline.open_matrix(folder / "A.zarr"), STARTS, length=LENGTH)
    made = pipeline.gather(plan, out=folder / "out.npy")
    made *= 2
    np.testing.assert_array_equal(np.load(folder / "out.npy"), EXPECTED)
    os.truncate(folder / "out.npy", 1000)
    with pytest.raises(pipeline.IntegrityError, match="another size"):
        pipeline.gather(plan, out=folder / "out.npy", resume=True)
    np.testing.assert_array_equal(pipeline.gather(plan, out=folder / "out.npy", overwrite=True), EXPECTED)


@every_sink
def test_the_working_directory_may_change(
    sink: Any, name: str, expected: NDArray[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()

    @dataclass(slots=True)
    class Moving(Watch):
        def task_done(self, receipt: Any) -> None:
            os.chdir(folder / "elsewhere")
            Watch.task_done(self, receipt)

    monkeypatch.chdir(folder)
    matrix, given = pipeline.open_matrix(folder / "A.zarr"), {"resume": False, "overwrite": False}
    plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
    if sink is gather:
        prepare_gathering(plan, apply=None, out=name, **given).run(Moving())
    elif sink in (store, store_sorted):
        prepare_storing(plan, name, apply=None, order="request" if sink is store else "chunk", **given).run(Moving())
    else:
        settings = {"dtype": None, "row_shape": None, "dataset": None, "axis": 0, "seed": 0, "length": LENGTH}
        settings |= {"shard_rows": 96, "chunk_rows": 8, "memory": None}
        settings["compress"] = "zstd" if sink is create_compressed else None
        assert plan_creation(folder / "A.npy", name, **settings, **given).run(Moving()).path == name
    assert not list((folder / "elsewhere").iterdir())
    os.chdir(folder)
    np.testing.assert_array_equal(sink(folder, Watch(), resume=True), expected)


def test_the_note_says_how_to_go_on(folder: Path) -> None:
    store(folder, Watch(), apply=np.negative)
    with pytest.raises(StopError) as stopped:
        store(folder, StoppingWatch(after=2), overwrite=True)
    assert stopped.value.__notes__ == [f"2 of {TASKS} tasks finished and kept; go on with --resume --overwrite"]
    with pytest.raises(pipeline.OutputExistsError, match="--resume --overwrite to go on"):
        store(folder, Watch(), resume=True)
    # The finished one of another request has no say over them.
    store(folder, again := StoppingWatch(), apply=np.negative, resume=True)
    assert again.tasks == 0
    second = StoppingWatch()
    np.testing.assert_array_equal(store(folder, second, resume=True, overwrite=True), EXPECTED)
    assert second.kept_tasks == 2


def test_a_failure_after_the_end_says_that_the_output_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_held: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_discard", fail)
        with pytest.raises(KeyboardInterrupt) as interrupted:
            store(folder, Watch())
    assert "is complete all the same" in interrupted.value.__notes__[0]
    np.testing.assert_array_equal(store(folder, Watch(), resume=True), EXPECTED)
    assert "out.zarr.partial" not in names(folder)


def test_a_journal_without_its_output(folder: Path) -> None:
    with pytest.raises(StopError):
        store(folder, StoppingWatch(after=3))
    [output] = (folder / "out.zarr.partial").glob("output-*")
    shutil.rmtree(output)
    second = StoppingWatch()
    np.testing.assert_array_equal(store(folder, second, resume=True), EXPECTED)
    assert second.kept_tasks == 0


def test_an_old_output_that_was_taken_aside_in_vain(folder: Path) -> None:
    store(folder, Watch())
    (folder / "out.zarr.partial" / "replaced").mkdir(parents=True)
    with pytest.raises(pipeline.OutputExistsError):
        store(folder, Watch())
    np.testing.assert_array_equal(store(folder, Watch(), overwrite=True), EXPECTED)
    assert "out.zarr.partial" not in names(folder)


def test_only_marked_files_are_replaced(folder: Path) -> None:
    np.save(folder / "out.npy", EXPECTED)
    with pytest.raises(pipeline.OutputExistsError, match="none"):
        gather(folder, Watch(), overwrite=True)
    zarr.create_group(folder / "out.zarr", attributes={"random-windows": {"kind": "windows"}})
    with pytest.raises(pipeline.OutputExistsError, match="none"):
        store(folder, Watch(), overwrite=True)
    (folder / "out.zarr.partial").mkdir()
    (folder / "out.zarr.partial" / "thesis.txt").write_text("mine")
    shutil.rmtree(folder / "out.zarr")
    with pytest.raises(pipeline.OutputExistsError, match="remains"):
        store(folder, Watch(), resume=True)
    assert (folder / "out.zarr.partial" / "thesis.txt").read_text() == "mine"


class TestJournal:
    def test_round_trip(self, tmp_path: Path) -> None:
        journal = Journal.create(tmp_path / "journal", Request({"a": "1"}), 12)
        journal.append([(3, (FileRecord("c/0/0", 7, 2**32 - 1),)), (1, ())])
        read = Journal.read(tmp_path / "journal")
        assert read is not None
        assert (read.facts, read.cut, read.done) == ({"a": "1"}, 12, journal.done)

    @pytest.mark.parametrize("tail", [b'{"task": 2', b"\x00" * 40, b"[]\n", b'{"task": 2, "files": [[1]]}\n'])
    def test_what_is_cut_off_was_not_done(self, tmp_path: Path, tail: bytes) -> None:
        path = tmp_path / "journal"
        Journal.create(path, Request({}), 1).append([(0, ())])
        with path.open("ab") as file:
            file.write(tail)
        read = Journal.read(path)
        assert read is not None
        assert list(read.done) == [0]
        read.rewrite()
        read.append([(5, ())])
        again = Journal.read(path)
        assert again is not None
        assert list(again.done) == [0, 5]

    @pytest.mark.parametrize("content", [b"", b"{}", b"\n", b"[1]\n", b'{"version": 99, "cut": 1, "request": {}}\n'])
    def test_what_is_none_is_none(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "journal").write_bytes(content)
        assert Journal.read(tmp_path / "journal") is None


KILLED = """
import os, signal, sys, dask, numpy as np
import pipeline.plan.plan
pipeline.plan.plan._LEAST_BLOCK_NBYTES, pipeline.plan.plan._FEWEST_TASKS = 1, 7
import test_resume
from pathlib import Path

class Killing(test_resume.StoppingWatch):
    def task_done(self, receipt):
        test_resume.Watch.task_done(self, receipt)
        print("finished", receipt.number, flush=True)
        if self.done_tasks == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

with dask.config.set(scheduler="threads", num_workers=2):
    getattr(test_resume, sys.argv[1])(Path(sys.argv[2]), Killing(), resume=True)
"""


@every_sink
def test_killed_after_every_marker(sink: Any, name: str, expected: NDArray[Any], folder: Path) -> None:
    """One process after the other, each killed as it says that a task is finished."""
    finished: list[int] = []
    before = names(folder)
    while True:
        command = [sys.executable, "-c", KILLED, sink.__name__, str(folder), "3"]
        ran = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )
        finished += [int(line.split()[1]) for line in ran.stdout.splitlines()]
        if ran.returncode != -signal.SIGKILL:
            break
    assert ran.returncode == 0, ran.stderr
    assert len(finished) == len(set(finished))
    assert sink is gather or set(finished) == set(range(TASKS))
    assert names(folder) == before | {name}
    made = StoppingWatch()
    np.testing.assert_array_equal(sink(folder, made, resume=True), expected)
    assert made.tasks == 0


@dataclass(slots=True)
class FailingCalls:
    """Counts calls, and lets one fail, or that and all after it."""

    number: int
    for_good: bool
    count: int = 0

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.number or (self.for_good and self.count > self.number):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **kwargs)

        return call


@every_sink
@pytest.mark.parametrize("for_good", [False, True])
def test_the_nth_operation_fails(
    sink: Any,
    name: str,
    expected: NDArray[Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    for_good: bool,
) -> None:
    """Whatever fails, once or for good, there is no output or the right one; what is right again goes on."""
    before = names(folder)
    calls = ("write", "fsync", "rename", "mkdir", "open")
    failed = 0
    for number in range(1, 4000, 1 if sink is gather else 13 if for_good else 11):
        counter = FailingCalls(number, for_good)
        with monkeypatch.context() as patch:
            for call in calls:
                patch.setattr(os, call, counter.wrap(getattr(os, call)))
            try:
                sink(folder, Watch(), resume=True)
            except (OSError, RuntimeError):
                failed += 1
            else:
                if counter.count < number:
                    break
        np.testing.assert_array_equal(sink(folder, Watch(), resume=True), expected)
        assert names(folder) == before | {name}
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert failed > 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
@pytest.mark.parametrize("sink", [create, store, gather], ids=["create", "store", "gather"])
def test_a_full_disk_that_grows(sink: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    np.save(tmp_path / "A.npy", A)
    pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False).returncode:
        pytest.skip("no tmpfs can be mounted")
    try:
        big = np.random.default_rng(0).random((6000, 50))
        np.save(tmp_path / "big.npy", big)
        matrix = pipeline.create_matrix(tmp_path / "big.npy", tmp_path / "big.zarr")
        starts = np.arange(0, 5900, 100)
        plan = pipeline.plan_windows(matrix, starts, length=100)
        runs: dict[Any, Callable[..., Any]] = {
            create: lambda **given: pipeline.create_matrix(
                tmp_path / "big.npy", disk / "out.zarr", shard_rows=400, compress="zstd", **given
            ),
            store: lambda **given: pipeline.store(plan, disk / "out.zarr", **given),
            gather: lambda **given: pipeline.gather(plan, out=disk / "out.npy", **given),
        }
        # Where the need is known it is refused before the work.
        with pytest.raises(pipeline.DiskSpaceError):
            runs[sink]()
        kept = bool(list(disk.iterdir()))
        assert kept == (sink is create)
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        made = runs[sink](resume=True)
        got = made.array[:] if sink is create else made["windows"][:] if sink is store else made
        right = big if sink is create else np.stack([big[start : start + 100] for start in starts])
        np.testing.assert_array_equal(got, right)
        assert {path.name for path in disk.iterdir()} == {"out.npy" if sink is gather else "out.zarr"}
        del made, got
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_the_command_line_says_what_was_kept(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(folder / "starts.npy", STARTS)
    command = ["run", str(folder / "A.zarr"), "--starts", str(folder / "starts.npy"), "--length", str(LENGTH)]
    command += ["--out", str(folder / "out.zarr"), "--json", "--resume", "-q"]
    from pipeline.cli.main import main

    with pytest.raises(StopError):
        store(folder, StoppingWatch(after=3))
    for kept, finished in ((3, False), (0, True)):
        monkeypatch.setattr(sys, "argv", ["pipeline", *command])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["tasks_kept"], said["finished_before"]) == (kept, finished)
        # What an earlier run did is no rate of this one.
        if finished:
            assert (said["bytes_per_second"], said["amplification"]) == (None, None)
        else:
            assert 0 < said["bytes_per_second"] * said["work_seconds"] < 0.9 * said["nbytes_delivered"]
            assert said["amplification"] == pytest.approx(
                said["nbytes_read"] / (said["bytes_per_second"] * said["work_seconds"])
            )
    monkeypatch.setattr(sys, "argv", ["pipeline", *(word for word in command if word not in {"--json", "-q"})])
    with pytest.raises(SystemExit):
        main()
    words = capsys.readouterr().out
    assert "nothing was left to do" in words
    assert "rate" not in words
    np.testing.assert_array_equal(zarr.open_group(folder / "out.zarr", mode="r")["windows"][:], EXPECTED)
