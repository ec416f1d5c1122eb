# ruff: noqa: F811 (fixtures of another file)
"""File systems that lack a call: outputs are made and published all the same, or a line says why not; nothing blocks."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import mmap
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import pipeline
from pipeline.cli.main import main
from pipeline.outputs import folder as staging
from pipeline.outputs import lock as holding
from pipeline.outputs.journal import Request
from pipeline.runtime.report import Watch
from pipeline.storage import filesystem
from tests.test_resume import (  # noqa: F401 (fixtures)
    EXPECTED,
    LENGTH,
    STARTS,
    A,
    StopError,
    StoppingWatch,
    create,
    create_compressed,
    folder,
    gather,
    many_tasks,
    names,
    store,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

ERRORS = ["ENOSYS", "ENOLCK", "EINVAL", "EOPNOTSUPP", "ENOTSUP", "EPERM", "ENODEV"]
SINKS: list[tuple[Any, str, NDArray[Any]]] = [
    (create, "out.zarr", A),
    (create_compressed, "out.zarr", A),
    (store, "out.zarr", EXPECTED),
    (gather, "out.npy", EXPECTED),
]


def refuse(name: str, monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let a kind of call fail as a file system does that lacks it; the list grows with each such call."""
    refused: list[str] = []

    def fail(*_: Any, **__: Any) -> Any:
        refused.append(name)
        raise OSError(number, os.strerror(number))

    real_rename, real_map = os.rename, mmap.mmap

    def rename_files(source: Any, target: Any, **given: Any) -> None:
        if os.path.isdir(source):  # noqa: PTH112
            fail()
        real_rename(source, target, **given)

    def map_memory(fd: int, *given: Any, **named: Any) -> mmap.mmap:
        return fail() if fd >= 0 else real_map(fd, *given, **named)  # type: ignore[no-any-return]

    class NoExchange:
        def __getattr__(self, _name: str) -> Any:
            return lambda *_: refused.append(name) or -1

    patches: dict[str, list[tuple[Any, str, Any]]] = {
        "flock": [(holding.fcntl, "flock", fail)],
        "fsync": [(os, "fsync", fail)],
        "fsync, fdatasync": [(os, "fsync", fail), (os, "fdatasync", fail)],
        "posix_fallocate": [(os, "posix_fallocate", fail)],
        "posix_fadvise": [(os, "posix_fadvise", fail)],
        "link": [(os, "link", fail)],
        "rename": [(os, "rename", fail)],
        "rename of folders": [(os, "rename", rename_files)],
        "renameat2": [(staging.ctypes, "CDLL", lambda *_, **__: NoExchange())],
        "statvfs": [(shutil, "disk_usage", fail)],
        "access": [(os, "access", lambda *_, **__: refused.append(name) is not None)],
        "mmap": [(mmap, "mmap", map_memory)],
    }
    for module, attribute, replacement in patches[name]:
        monkeypatch.setattr(module, attribute, replacement)
    return refused


CALLS = [
    *("flock", "fsync", "fsync, fdatasync", "posix_fallocate", "posix_fadvise", "link", "rename"),
    *("rename of folders", "renameat2", "statvfs", "access", "mmap"),
]


MATRIX = [
    (call, error, sink)
    for row, call in enumerate(CALLS)
    for column, error in enumerate(ERRORS)
    # All sinks meet the first error, and each call all errors.
    for sink in (SINKS if not column else [SINKS[(row + column) % len(SINKS)]])
]


@pytest.mark.parametrize(
    ("call", "error", "made"), MATRIX, ids=lambda value: getattr(value, "__name__", str(value)[:18])
)
def test_every_call_may_be_refused(
    call: str, error: str, made: tuple[Any, str, NDArray[Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made, interrupted and resumed, left alone when finished, replaced: the right bytes, and nothing beside them."""
    before, (sink, name, expected) = names(folder), made
    with monkeypatch.context() as patch:
        refuse(call, patch, getattr(errno, error))
        with pytest.raises(StopError):
            sink(folder, StoppingWatch(after=3))
        second = StoppingWatch()
        np.testing.assert_array_equal(sink(folder, second, resume=True), expected)
        assert second.kept_tasks >= 3
        np.testing.assert_array_equal(sink(folder, third := StoppingWatch(), resume=True), expected)
        assert third.tasks == 0
        np.testing.assert_array_equal(sink(folder, Watch(), overwrite=True), expected)
    assert names(folder) == before | {name}
    np.testing.assert_array_equal(sink(folder, again := StoppingWatch(), resume=True), expected)
    assert again.tasks == 0


@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_made_somewhere(call: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix above tests what it says."""
    refused = refuse(call, monkeypatch, errno.ENOSYS)
    for sink, _, _ in SINKS:
        sink(folder, Watch(), overwrite=True)
        sink(folder, Watch(), overwrite=True)
    pipeline.write_manifest(folder / "A.npy", folder / "A.json")
    assert refused


def test_all_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in CALLS:
        if call != "rename":
            refuse(call, monkeypatch, errno.ENOSYS)
    for sink, name, expected in SINKS:
        with pytest.raises(StopError):
            sink(folder, StoppingWatch(after=2), overwrite=True)
        np.testing.assert_array_equal(sink(folder, Watch(), resume=True, overwrite=True), expected)
        assert f"{name}.partial" not in names(folder)
    pipeline.write_manifest(folder / "out.npy", folder / "out.json")
    assert pipeline.verify(folder / "out.npy", manifest=folder / "out.json") == []


@pytest.mark.parametrize("call", ["flock", "fsync, fdatasync", "rename of folders"])
def test_what_was_done_without_is_said_once(
    call: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(filesystem, "_lacking", {})
    command = ["pipeline", "run", str(folder / "A.zarr"), "--count", "9", "--length", "5"]
    said = []
    for lacks in (False, True):
        with monkeypatch.context() as patch:
            if lacks:
                refuse(call, patch, errno.ENOSYS)
            for more in ([], ["--json"]):
                patch.setattr("sys.argv", [*command, "--out", str(folder / f"w{len(said)}.zarr"), *more])
                with pytest.raises(SystemExit) as done:
                    main()
                assert done.value.code == 0
                said.append(capsys.readouterr().out)
    assert "file system" not in said[0]
    assert json.loads(said[1])["file_system_lacks"] is None
    [line] = [line for line in said[2].splitlines() if line.startswith("file system")]
    assert call.partition(",")[0] in line
    assert json.loads(said[3])["file_system_lacks"] in line


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["flock", "fsync", "posix_fallocate", "rename"])
def test_a_disk_that_fails_is_no_missing_call(
    call: str,
    error: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = names(folder)
    with monkeypatch.context() as patch:
        refuse(call, patch, error)
        with pytest.raises(OSError, match=os.strerror(error)):
            gather(folder, Watch())
    # What the failed try left blocks nobody.
    np.testing.assert_array_equal(gather(folder, Watch()), EXPECTED)
    assert names(folder) == before | {"out.npy"}


@pytest.mark.parametrize(
    "left", [[], ["lock"], ["lock", "holder"], ["claim-1", "claim-3"], [".nfs000000000012abcd00000001"]]
)
@pytest.mark.parametrize(("sink", "name", "expected"), [SINKS[0], SINKS[2], SINKS[3]])
def test_an_empty_remainder_is_used_again(
    sink: Any, name: str, expected: NDArray[Any], left: Any, folder: Path
) -> None:
    before = names(folder)
    partial = folder / f"{name}.partial"
    partial.mkdir()
    for each in left:
        (partial / each).write_text(json.dumps(holding._myself() | {"process": 2**22 + 1}))
    np.testing.assert_array_equal(sink(folder, Watch()), expected)
    assert names(folder) - {partial.name} == before | {name}
    # What NFS keeps is its own.
    assert partial.exists() == any(each.startswith(".nfs") for each in left)
    np.testing.assert_array_equal(sink(folder, Watch(), overwrite=True), expected)


@pytest.mark.parametrize("moved", range(9))
@pytest.mark.parametrize("replaces", [False, True])
def test_ended_while_it_took_its_place_file_by_file(
    moved: int,
    replaces: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = names(folder)
    if replaces:
        store(folder, Watch(), apply=np.negative)

    class EndedError(BaseException):
        pass

    real, count = filesystem.move_file, itertools.count()

    def end(source: Path, target: Path) -> None:
        if "out.zarr/" in os.path.realpath(target) and next(count) == moved:
            raise EndedError
        real(source, target)

    with monkeypatch.context() as patch:
        refuse("rename of folders", patch, errno.ENOSYS)
        refuse("renameat2", patch, errno.ENOSYS)
        patch.setattr(filesystem, "move_file", end)
        with pytest.raises(EndedError):
            store(folder, Watch(), overwrite=replaces)
        assert not (folder / "out.zarr" / "zarr.json").exists()
    with pytest.raises(pipeline.OutputExistsError, match="remains"):
        store(folder, Watch())
    second = StoppingWatch()
    np.testing.assert_array_equal(store(folder, second, resume=True, overwrite=replaces), EXPECTED)
    assert second.kept_tasks == second.tasks
    assert names(folder) == before | {"out.zarr"}


class TestClaims:
    """Two runs on one output, where the file system has no locks."""

    @pytest.fixture(autouse=True)
    def _no_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        refuse("flock", monkeypatch, errno.ENOSYS)

    @pytest.mark.parametrize("given", [{}, {"resume": True}, {"overwrite": True}])
    def test_a_second_run_is_kept_out(self, given: Any, folder: Path) -> None:
        class Intruding(Watch):
            def task_done(self, receipt: Any) -> None:
                super().task_done(receipt)
                with pytest.raises(pipeline.OutputExistsError, match=f"process {os.getpid()} on .*, since "):
                    store(folder, Watch(), **given)

        np.testing.assert_array_equal(store(folder, Intruding()), EXPECTED)
        assert "out.zarr.partial" not in names(folder)

    def test_a_killed_run_keeps_nobody_out(self, folder: Path) -> None:
        class Dying(Watch):
            def task_done(self, receipt: Any) -> None:
                super().task_done(receipt)
                if self.done_tasks == 2:
                    os._exit(9)

        child = os.fork()
        if not child:
            store(folder, Dying())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert (folder / "out.zarr.partial" / "claim-1").exists()
        second = StoppingWatch()
        np.testing.assert_array_equal(store(folder, second, resume=True), EXPECTED)
        assert second.kept_tasks in (1, 2)

    def test_one_of_another_machine(self, tmp_path: Path) -> None:
        claim = holding._myself() | {"place": "another", "token": "a", "beats": "1"}
        path = tmp_path / "claim-1"
        path.write_text(json.dumps(claim))
        waited: list[float] = []
        assert not holding._is_alive(path, wait=waited.append)
        assert sum(waited) == pytest.approx(holding._SILENT_SECONDS)

        def renew(_seconds: float) -> None:
            path.write_text(json.dumps(claim | {"beats": "2"}))

        assert holding._is_alive(path, wait=renew)
        path.unlink()
        assert not holding._is_alive(path, wait=lambda _: None)

    def test_a_silent_claim_of_another_machine_goes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(holding, "_BEAT_SECONDS", 0.001)
        monkeypatch.setattr(holding, "_SILENT_SECONDS", 0.01)
        (tmp_path / "claim-1").write_text(json.dumps(holding._myself() | {"place": "another", "token": "a"}))
        with holding.hold(tmp_path) as held:
            assert json.loads((tmp_path / "claim-2").read_text())["process"] == os.getpid()
            held.check()
            held.discard()
        assert not tmp_path.exists()

    def test_a_claim_is_renewed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(holding, "_BEAT_SECONDS", 0.001)
        with holding.hold(tmp_path) as held:
            first = (tmp_path / "claim-1").read_text()
            while (tmp_path / "claim-1").read_text() == first:
                held.check()
            assert len((tmp_path / "claim-1").read_text()) == len(first)

    def test_who_was_taken_for_dead_writes_no_more(self, folder: Path) -> None:
        claim = folder / "out.zarr.partial" / "claim-2"

        class Overtaken(StoppingWatch):
            def task_done(self, receipt: Any) -> None:
                super().task_done(receipt)
                claim.write_text(json.dumps(holding._myself() | {"token": "another", "process": 12}))

        watch = Overtaken()
        with pytest.raises(pipeline.OutputExistsError, match="process 12 on"):
            store(folder, watch)
        assert len(watch.numbers) == 1
        assert "out.zarr" not in names(folder)
        claim.unlink()

    @pytest.mark.parametrize("stale", [False, True])
    def test_one_of_many_gets_it(self, tmp_path: Path, stale: bool) -> None:
        for _ in range(20):
            if stale:
                (tmp_path / "claim-7").write_text(json.dumps(holding._myself() | {"process": 2**22 + 1}))
            start, ended = threading.Barrier(6), threading.Barrier(6)

            def run() -> bool:
                start.wait()  # noqa: B023
                try:
                    with holding.hold(tmp_path):
                        ended.wait()  # noqa: B023
                        return True
                except pipeline.OutputExistsError:
                    ended.wait()  # noqa: B023
                    return False

            with ThreadPoolExecutor(6) as pool:
                assert sum(each.result() for each in [pool.submit(run) for _ in range(6)]) == 1


class TestRunning:
    """Who is told of the run that writes, with locks."""

    @pytest.mark.parametrize("given", [{}, {"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}])
    @pytest.mark.parametrize(("sink", "name", "expected"), [SINKS[0], SINKS[2], SINKS[3]])
    @pytest.mark.parametrize("replaces", [False, True])
    def test_a_second_run_hears_who_writes(
        self,
        sink: Any,
        name: str,
        expected: NDArray[Any],
        given: Any,
        replaces: bool,
        folder: Path,
    ) -> None:
        if replaces and sink is not create:
            sink(folder, Watch(), apply=np.negative)
        heard = []

        class Intruding(Watch):
            def task_done(self, receipt: Any) -> None:
                super().task_done(receipt)
                with pytest.raises(pipeline.OutputExistsError) as refused:
                    sink(folder, Watch(), **given)
                heard.append(str(refused.value))

        np.testing.assert_array_equal(sink(folder, Intruding(), overwrite=True), expected)
        for words in (f"process {os.getpid()} on ", f"since {time.strftime('%Y-')}", name):
            assert all(words in each for each in heard), heard
        assert heard

    def test_once_it_has_ended_its_remains_are_there(self, folder: Path) -> None:
        with pytest.raises(StopError):
            store(folder, StoppingWatch(after=2))
        with pytest.raises(pipeline.OutputExistsError, match="interrupted run's remains"):
            store(folder, Watch())


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a file that is removed while this process has it open, or mapped, keep another name until then, as NFS does.

    Gives the paths that were removed so.
    """
    kept: list[str] = []
    ghosts: set[str] = set()
    real, rename, rmdir = os.unlink, os.rename, os.rmdir

    def is_open(status: os.stat_result) -> bool:
        for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208
            try:
                found = os.stat(int(fd))  # noqa: PTH116
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                return True
        with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:  # noqa: PTH123
            return any(line.split()[4] == str(status.st_ino) and status.st_ino for line in maps)

    def unlink(path: Any, *, dir_fd: int | None = None) -> None:
        if is_open(os.stat(path, dir_fd=dir_fd, follow_symlinks=False)):
            folder = os.path.realpath(os.path.dirname(path) if dir_fd is None else f"/proc/self/fd/{dir_fd}")  # noqa: PTH120
            ghosts.add(ghost := f"{folder}/.nfs{len(kept):08x}")
            rename(path, ghost, src_dir_fd=dir_fd)
            kept.append(os.fspath(path))
        else:
            real(path, dir_fd=dir_fd)

    def remove_folder(path: Any, *, dir_fd: int | None = None) -> None:
        for ghost in [each for each in ghosts if os.path.exists(each) and not is_open(os.stat(each))]:  # noqa: PTH110, PTH116
            real(ghost)
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "rmdir", remove_folder)
    return kept


@pytest.mark.parametrize("locks", [False, True])
@pytest.mark.parametrize(("sink", "name", "expected"), SINKS)
def test_files_are_closed_before_they_are_removed(
    sink: Any,
    name: str,
    expected: NDArray[Any],
    locks: bool,
    folder: Path,
    nfs: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not locks:
        refuse("flock", monkeypatch, errno.ENOLCK)
    before = names(folder)
    np.testing.assert_array_equal(sink(folder, Watch()), expected)
    assert names(folder) == before | {name}
    with pytest.raises(StopError):
        sink(folder, StoppingWatch(after=2), overwrite=True)
    np.testing.assert_array_equal(sink(folder, Watch(), resume=True, overwrite=True), expected)
    np.testing.assert_array_equal(sink(folder, Watch(), resume=True), expected)
    assert names(folder) == before | {name}
    # The lock is closed before its folder is removed, after it has let nobody in until then.
    assert {os.path.basename(each) for each in nfs} <= {"lock"}  # noqa: PTH119


def test_what_nfs_keeps_of_a_failed_run_blocks_nobody(
    folder: Path,
    nfs: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = names(folder)

    def fail(*_: Any, **__: Any) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.sinks.gather.fill_array", fail)
        with pytest.raises(StopError) as held:
            gather(folder, Watch())
    assert nfs  # Its map is in the frames of the error.
    np.testing.assert_array_equal(gather(folder, Watch()), EXPECTED)
    del held
    gc.collect()
    assert names(folder) - {"out.npy.partial"} == before | {"out.npy"}


def test_an_array_that_cannot_be_mapped_or_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse("mmap", monkeypatch, errno.ENODEV)
    plan = pipeline.plan_windows(pipeline.open_matrix(folder / "A.zarr"), STARTS, length=LENGTH)
    loaded = pipeline.gather(plan, out=folder / "out.npy")
    assert isinstance(loaded, np.ndarray)
    np.testing.assert_array_equal(loaded, EXPECTED)
    monkeypatch.setattr("pipeline.sinks.gather.held_nbytes", lambda: 2**64)
    read = pipeline.gather(plan, out=folder / "out.npy", resume=True)
    assert not isinstance(read, np.ndarray)
    np.testing.assert_array_equal(read[:], EXPECTED)
    np.testing.assert_array_equal(read[np.array([5, 0, 69])], EXPECTED[[5, 0, 69]])
    assert (len(read), read.shape, read.dtype) == (len(EXPECTED), EXPECTED.shape, EXPECTED.dtype)


@pytest.fixture(scope="module")
def tracing() -> Callable[..., list[str]]:
    """Prefix of a command that lets system calls fail; skips where processes cannot be traced."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace")

    def prefix(*faults: str) -> list[str]:
        calls = ",".join(fault.partition(":")[0] for fault in faults)
        known = [f"--inject={fault}" for fault in faults]
        return [strace, "-f", "--seccomp-bpf", "-qqq", f"--trace={calls}", "--signal=none", "-o", os.devnull, *known]

    if subprocess.run([*prefix("flock:error=ENOSYS"), "true"], check=False, capture_output=True).returncode:
        pytest.skip("processes cannot be traced")
    return prefix


@pytest.mark.parametrize(
    "faults",
    [
        ["flock:error=ENOSYS"],
        ["flock:error=ENOLCK", "fsync,fdatasync:error=EINVAL"],
        ["fallocate:error=ENOSYS", "fadvise64:error=EOPNOTSUPP", "link,linkat:error=EPERM", "renameat2:error=EINVAL"],
        ["flock,fsync,fdatasync,fallocate,link,linkat,renameat2,msync:error=EOPNOTSUPP", "statfs,fstatfs:error=ENOSYS"],
    ],
    ids=lambda faults: faults[0].split(":")[0][:20],
)
def test_system_calls_that_fail(
    faults: list[str], tracing: Callable[..., list[str]], program: str, samples: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "starts.npy", np.arange(0, 1000, 7))
    run = [*tracing(*faults), program]
    asked = ["run", str(samples / "A.zarr"), "--starts", str(tmp_path / "starts.npy"), "--length", "5"]
    expected = np.stack([np.load(samples / "A.npy")[start : start + 5] for start in range(0, 1000, 7)])
    for words in (
        ["create", str(samples / "A.npy"), "B.zarr"],
        [*asked, "--out", "w.zarr"],
        [*asked, "--out", "w.npy"],
        [*asked, "--out", "w.npy", "--overwrite"],
    ):
        done = subprocess.run([*run, *words], cwd=tmp_path, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"starts.npy", "B.zarr", "w.zarr", "w.npy"}
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), expected)
    np.testing.assert_array_equal(pipeline.open_matrix(tmp_path / "B.zarr").array[:], np.load(samples / "A.npy"))
    assert pipeline.verify(tmp_path / "w.zarr") == []


def test_a_journal_is_no_ones_but_the_holders(tmp_path: Path) -> None:
    """A folder that another run has begun meanwhile is not emptied by one that was not asked to."""
    path, request = tmp_path / "w.npy", Request({"kind": "test"})
    given: dict[str, Any] = {"cut": 1, "nbytes": 0, "resume": False, "overwrite": False}

    def begin_meanwhile(partial: Path, name: Path) -> Any:
        partial.mkdir()
        (partial / "journal").write_text("{}\n")
        return real(partial, name)

    real = staging.hold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "hold", begin_meanwhile)
        with (
            pytest.raises(pipeline.OutputExistsError, match="remains"),
            staging.stage_output(path, request, **given),
        ):
            pytest.fail("begun")
