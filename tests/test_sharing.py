"""Arrays that other processes write into: who reaches them, until when, and that nothing is left behind."""

from __future__ import annotations

import fcntl
import gc
import os
import queue
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import dask
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline
from pipeline import memory
from pipeline.errors import IncompleteError
from pipeline.readers.choose import choose_reader
from pipeline.runtime import placement as placing
from pipeline.runtime import shared_memory as sharing
from pipeline.runtime.resources import Footprint
from pipeline.runtime.shared_memory import open_handle, share_file, share_memory
from pipeline.runtime.tasks import prepare_work
from tests.layouts import LAYOUTS, READERS, distinct, open_layout, stack

LENGTH = 16
STARTS = [5, 1800, 900, 31, 32, 1234, 1984, 400, 401, 77, 650, 1500, 0, 299]

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create") or not Path("/proc").is_dir(), reason="Linux only")


def open_files():
    """What this process holds open or mapped of ours."""
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(fd.readlink()))
        except OSError:
            continue
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [each for each in links + maps if "random-windows-" in each]


def in_child(function):
    """Run a function in a forked child; its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:  # noqa: BLE001 (it ends here)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write_into(handle, value, places):
    with open_handle(handle) as writer:
        assert writer is not None
        writer.write(np.full((len(places), *handle.shape[1:]), value, handle.dtype), np.array(places))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads
class TestArrays:
    def test_another_process_writes_entries_in_any_order(self):
        shared = share_memory((6, 3), np.dtype("i4"))
        assert in_child(lambda: write_into(shared.handle, 7, [4, 5, 1])) == 0
        np.testing.assert_array_equal(shared.array[:, 0], [0, 7, 0, 0, 7, 7])
        assert shared.close(0)
        shared.array[0] = 9
        np.testing.assert_array_equal(shared.array[:, 2], [9, 7, 0, 0, 7, 7])

    def test_entries_that_are_no_multiple_of_pages_and_large(self):
        shared = share_memory((3, 700_001), np.dtype("u1"))
        values = np.random.default_rng(0).integers(0, 256, (3, 700_001), np.uint8)

        def write():
            with open_handle(shared.handle) as writer:
                writer.write(values[[2, 0]], np.array([2, 0]))

        assert in_child(write) == 0
        np.testing.assert_array_equal(shared.array, values * np.array([[1], [0], [1]], np.uint8))
        shared.close(0)

    def test_entries_that_cross_from_stripe_to_stripe(self, monkeypatch):
        monkeypatch.setattr(sharing, "_LEAST_STRIPE_NBYTES", sharing.PAGE)
        shared = share_memory((40, 5_001), np.dtype("u1"))
        sizes = [os.fstat(file.fd).st_size for file in shared.handle.files]
        assert len(sizes) == 13
        assert sum(sizes) == 40 * 5_001
        assert {shared.handle.stripe_nbytes} == set(sizes[:-1])
        values = np.random.default_rng(0).integers(0, 256, (40, 5_001), np.uint8)
        places = np.random.default_rng(1).permutation(40)
        mine, others = places[:3], places[3:]
        # Runs of places that follow on each other, too.
        others = np.concatenate([np.sort(others[:20]), others[20:]])

        def write():
            with open_handle(shared.handle) as writer:
                writer.write(values[others], others)

        assert in_child(write) == 0
        shared.array[mine] = values[mine]
        np.testing.assert_array_equal(shared.array, values)
        got = np.empty(9 * 5_001 + 7, np.uint8)
        shared.read(got, 12_345)
        np.testing.assert_array_equal(got, values.reshape(-1)[12_345 : 12_345 + len(got)])
        shared.give_back(0, 20 * sharing.PAGE)
        assert not shared.array.reshape(-1)[: 20 * sharing.PAGE].any()
        np.testing.assert_array_equal(
            shared.array.reshape(-1)[20 * sharing.PAGE :], values.reshape(-1)[20 * sharing.PAGE :]
        )
        handle, array = shared.handle, shared.array
        assert shared.close(0)
        assert open_files()
        with open_handle(handle) as writer:
            assert writer is None
        array[-1] = 3
        shared = array = None
        assert not open_files()

    def test_a_file_beside_its_header(self, tmp_path):
        made = np.lib.format.open_memmap(tmp_path / "w.npy", mode="w+", dtype="f8", shape=(4, 2))
        shared = share_file(made)
        assert shared.handle.offset == made.offset
        assert in_child(lambda: write_into(shared.handle, 2.5, [3, 0])) == 0
        np.testing.assert_array_equal(np.load(tmp_path / "w.npy")[:, 1], [2.5, 0, 0, 2.5])
        assert shared.close(0)

    @pytest.mark.parametrize(
        "change", [{"pid": 1}, {"fd": 0}, {"name": "/memfd:other (deleted)"}, {"identity": (0, 0)}]
    )
    def test_whoever_does_not_find_that_very_file_does_without(self, change, monkeypatch):
        shared = share_memory((2, 2), np.dtype("f8"))
        [file] = shared.handle.files
        changed = change if "pid" in change else {"files": (file._replace(**change),)}
        stranger = sharing.replace(shared.handle, **changed)
        if "identity" not in change:
            monkeypatch.setattr("os.open", lambda *_: pytest.fail("opened what may be anything"))
        with open_handle(stranger) as writer:
            assert writer is None
        monkeypatch.undo()
        shared.close(0)

    @pytest.mark.parametrize("missing", ["memfd_create", "ftruncate"])
    def test_a_system_without_the_means(self, missing, monkeypatch):
        def refuse(*_):
            raise OSError(38, "no")

        before = open_files()
        monkeypatch.setattr(os, missing, refuse)
        assert share_memory((2, 2), np.dtype("f8")) is None
        assert open_files() == before

    def test_older_kernels_do_not_know_a_flag(self, monkeypatch):
        real, flags = os.memfd_create, []

        def create(name, given):
            flags.append(given)
            if given & 8:
                raise OSError(22, "Invalid argument")
            return real(name, given)

        monkeypatch.setattr("os.memfd_create", create)
        shared = share_memory((2, 2), np.dtype("f8"))
        assert len(flags) == 2
        assert in_child(lambda: write_into(shared.handle, 1, [0])) == 0
        assert shared.close(0)
        assert shared.array[0, 0] == 1

    def test_pages_are_given_back(self):
        shared = share_memory((64, sharing.PAGE), np.dtype("u1"))
        assert in_child(lambda: write_into(shared.handle, 3, list(range(64)))) == 0
        assert memory._shared_nbytes() == 64 * sharing.PAGE
        got = np.empty((2, sharing.PAGE), np.uint8)
        shared.read(got, 5 * sharing.PAGE)
        assert (got == 3).all()
        shared.give_back(0, 60 * sharing.PAGE)
        assert memory._shared_nbytes() == 4 * sharing.PAGE
        assert shared.array[59].max() == 0
        assert shared.array[60].min() == 3
        shared.close(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestClosing:
    def test_nobody_opens_it_later(self):
        shared = share_memory((2, 2), np.dtype("f8"))
        handle = shared.handle
        assert shared.close(0)
        with open_handle(handle) as writer:
            assert writer is None
        # Another file has the number now, of the same name in every other respect.
        again = share_memory((2, 2), np.dtype("f8"))
        assert again.handle.files[0].fd == handle.files[0].fd
        with open_handle(handle) as writer:
            assert writer is None
        again.close(0)

    def test_whoever_had_it_open_writes_nothing_more(self):
        """As a worker that was stopped while it wrote, and goes on when the array is the caller's."""
        shared = share_memory((3, 4096), np.dtype("u1"))
        go, gone = os.pipe(), os.pipe()

        def write_late():
            with open_handle(shared.handle) as writer:
                writer.write(np.ones((1, 4096), np.uint8), np.array([0]))
                os.write(gone[1], b"x")
                os.read(go[0], 1)
                with pytest.raises(PermissionError):
                    writer.write(np.ones((1, 4096), np.uint8), np.array([1]))

        codes = []
        thread = threading.Thread(target=lambda: codes.append(in_child(write_late)))
        thread.start()
        os.read(gone[0], 1)
        assert shared.close(0)
        shared.array[2] = 5
        os.write(go[1], b"x")
        thread.join()
        assert codes == [0]
        np.testing.assert_array_equal(shared.array[:, 0], [1, 0, 5])
        for fd in (*go, *gone):
            os.close(fd)

    def test_a_late_task_is_told_that_its_run_has_ended(self, samples):
        plan = pipeline.plan_windows(pipeline.open_matrix(samples / "A.zarr"), STARTS, length=LENGTH)
        work = prepare_work(plan, None)
        shared = share_memory((len(plan), *work.result.shape), work.dtype)
        target = placing.Target("run", shared.handle, placed=True, recorded=False, travels=False)
        [task] = plan.tasks("chunk")
        with open_handle(shared.handle) as writer:
            shared.close(0)
            with pytest.raises(IncompleteError, match="ended"):
                placing._write_slabs(work, task, target, None, writer)
        assert placing.place_block(work, task, target) == placing.Declined(0)

    def test_a_file_that_a_hanging_worker_holds_is_not_called_complete(self, tmp_path):
        made = np.lib.format.open_memmap(tmp_path / "w.npy", mode="w+", dtype="f8", shape=(4, 2))
        shared = share_file(made)
        with open_handle(shared.handle):
            destination = placing.Destination(made, shared, recorded=True)
            with pytest.raises(IncompleteError, match=r"w\.npy open; end it"):
                destination.close()
        free = share_file(made)
        assert free.close(0)
        with open_handle(free.handle) as writer:
            assert writer is None

    def test_a_file_is_waited_for(self, tmp_path):
        made = np.lib.format.open_memmap(tmp_path / "w.npy", mode="w+", dtype="f8", shape=(4, 2))
        shared = share_file(made)
        with open_handle(shared.handle) as writer:
            assert writer is not None
            fd = os.dup(writer._fds[0])
        threading.Timer(0.05, os.close, [fd]).start()
        assert shared.close(5)

    def test_locks_that_do_not_work(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(37, "No locks available")

        made = np.lib.format.open_memmap(tmp_path / "w.npy", mode="w+", dtype="f8", shape=(4, 2))
        monkeypatch.setattr(fcntl, "flock", refuse)
        assert share_file(made) is None


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Matrices whose rows lie as plain bytes, in every layout that there is for that."""
    folder = tmp_path_factory.mktemp("layouts")
    names = [name for name, reader in READERS.items() if reader == "direct"]
    for name in names:
        LAYOUTS[name][1](folder / f"{name}.zarr", distinct())
    return {name: open_layout(folder, name) for name in names}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_slabs_of_any_size_hold_each_window_once(layouts, data):
    """Windows that overlap, repeat and cross from file to file, in the order of their starts."""
    matrix = layouts[data.draw(st.sampled_from(sorted(layouts)))]
    length = data.draw(st.integers(1, 40))
    starts = np.array(data.draw(st.lists(st.integers(0, matrix.rows - length), min_size=1, max_size=60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.readers.choose.SLAB_NBYTES", matrix.row_nbytes * data.draw(st.integers(1, 300)))
        patch.setattr("pipeline.plan.plan.GAP_NBYTES", data.draw(st.sampled_from([0, 8192])))
        reader = choose_reader(matrix, row=0)
        read, order = [], []
        for slab in reader.read_slabs(starts, length, matrix.row_shape, matrix.dtype):
            read += [window.copy() for window in slab.block]
            order += slab.numbers.tolist()
    assert sorted(order) == list(range(len(starts)))
    assert (np.diff(starts[order]) >= 0).all()
    np.testing.assert_array_equal(read, stack(distinct(), starts[order], length))


@pytest.fixture(scope="module")
def processes():
    with pipeline.connect(processes=True, n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        yield client


@contextmanager
def current(client):
    with client.as_current(), dask.config.set(scheduler="dask.distributed"):
        yield


@pytest.fixture
def many_tasks(monkeypatch):
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", 7)


@pytest.fixture
def plan(samples, many_tasks):
    """Seven tasks of two windows."""
    return pipeline.plan_windows(pipeline.open_matrix(samples / "A.zarr"), STARTS, length=LENGTH)


@pytest.fixture
def windows(values):
    return np.stack([values[start : start + LENGTH] for start in STARTS])


@pytest.fixture(params=["placed", "passed", "returned"])
def way(request, monkeypatch, processes):
    """How windows come into the array, and a list of what the tasks gave."""
    results = []
    real = placing.Destination.take

    def take(self, result, places):
        results.append(result)
        return real(self, result, places)

    monkeypatch.setattr(placing.Destination, "take", take)
    monkeypatch.setattr(placing, "_LARGE_NBYTES", 1 if request.param == "placed" else 10**9)
    if request.param == "returned":
        # As workers on another host: a process of this number has another file, or none.
        processes.run(hide)
    yield request.param, results
    processes.run(unhide)


def hide():
    sharing.Path = lambda text: Path(text.replace("/proc/", "/nowhere/"))


def unhide():
    sharing.Path = Path


def die_while_writing(alive):
    """Kill the one worker that comes first, in the middle of a block."""
    real = sharing.Writer.write

    def write(self, entries, places):
        real(self, entries[:1], places[:1])
        try:
            alive.unlink()
        except FileNotFoundError:
            real(self, entries, places)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    sharing.Writer.write = write


def kinds(results):
    return {
        ("placed" if not isinstance(each, placing.Unplaced) else "passed" if each.block is None else "returned")
        for each in results
    }


class TestGather:
    def test_each_way_gives_the_same_windows(self, way, plan, windows, processes, tmp_path):
        name, results = way
        before = open_files()
        with current(processes):
            np.testing.assert_array_equal(pipeline.gather(plan), windows, strict=True)
            assert kinds(results) == {name}
            out = np.full(windows.shape, -1.0)
            assert pipeline.gather(plan, out=out) is out
            np.testing.assert_array_equal(out, windows)
            sums = pipeline.gather(plan, apply=sum_columns)
            np.testing.assert_array_equal(sums, windows.sum(axis=2), strict=True)
            results.clear()
            np.testing.assert_array_equal(pipeline.gather(plan, out=tmp_path / "w.npy"), windows, strict=True)
            assert kinds(results) == {name}
            np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), windows)
        del sums
        assert open_files() == before

    def test_the_array_is_the_callers(self, plan, windows, processes, monkeypatch):
        monkeypatch.setattr(placing, "_LARGE_NBYTES", 1)
        with current(processes):
            made = pipeline.gather(plan)
        assert not made.flags.owndata
        made *= 2
        np.testing.assert_array_equal(made, 2 * windows)
        assert made.flags.c_contiguous
        held = memory.held_nbytes()
        del made
        assert memory.held_nbytes() < held

    def test_npy_goes_on_where_workers_wrote_it(self, plan, windows, processes, monkeypatch, tmp_path):
        monkeypatch.setattr(placing, "_LARGE_NBYTES", 1)
        path = tmp_path / "w.npy"
        flag = tmp_path / "flag"
        flag.touch()
        with current(processes):
            with pytest.raises(pipeline.IntegrityError, match="flag"):
                pipeline.gather(plan, out=path, apply=FailOnce(flag))
            flag.unlink()
            np.testing.assert_array_equal(pipeline.gather(plan, out=path, apply=FailOnce(flag), resume=True), windows)
        assert [each.name for each in tmp_path.iterdir()] == ["w.npy"]

    def test_a_worker_that_came_without_the_means_declines_and_its_blocks_are_returned(
        self, plan, windows, processes, monkeypatch
    ):
        """The first was asked before the second came."""
        monkeypatch.setattr(placing, "_LARGE_NBYTES", 1)
        seen = []
        real = placing.run_tasks

        def run_tasks(tasks, **given):
            seen.append(given["results_travel"])
            if len(seen) == 1:
                processes.run(hide, workers=[min(processes.scheduler_info(n_workers=-1)["workers"])])
            return real(tasks, **given)

        monkeypatch.setattr(placing, "run_tasks", run_tasks)
        try:
            with current(processes):
                np.testing.assert_array_equal(pipeline.gather(plan), windows)
        finally:
            processes.run(unhide)
        assert seen[0] is False
        assert set(seen[1:]) <= {True}

    def test_a_worker_that_is_killed_while_it_writes_leaves_nothing(
        self, plan, windows, processes, monkeypatch, tmp_path
    ):
        monkeypatch.setattr(placing, "_LARGE_NBYTES", 1)
        (tmp_path / "alive").touch()
        before = open_files()
        processes.run(die_while_writing, tmp_path / "alive")
        with current(processes):
            made = pipeline.gather(plan)
        assert not (tmp_path / "alive").exists()
        np.testing.assert_array_equal(made, windows)
        del made
        assert open_files() == before
        processes.wait_for_workers(2, timeout=60)

    @pytest.mark.parametrize("at_once", [1, 3])
    def test_results_that_wait_are_few(self, at_once, plan, windows, processes, monkeypatch):
        """What the client holds of returned blocks is bounded by the tasks that memory allows at once."""
        Arrivals.held = Arrivals.most = 0
        monkeypatch.setattr("pipeline.runtime.distributed.SimpleQueue", Arrivals)
        monkeypatch.setattr("pipeline.sinks.gather.fit_memory", lambda *_, **__: Footprint(at_once, at_once, 0))
        processes.run(hide)
        try:
            with current(processes):
                np.testing.assert_array_equal(pipeline.gather(plan), windows)
        finally:
            processes.run(unhide)
        assert 1 <= Arrivals.most <= at_once
        assert Arrivals.held == 0


class Arrivals(queue.SimpleQueue):
    """Counts the blocks that have arrived and were not taken."""

    held = most = 0

    def put(self, item):
        Arrivals.held += 1
        Arrivals.most = max(Arrivals.most, Arrivals.held)
        super().put(item)

    def get(self, *arguments, **named):
        item = super().get(*arguments, **named)
        Arrivals.held -= 1
        return item


def sum_columns(block):
    return block.sum(axis=2)


class FailOnce:
    """Fails on some windows as long as a file is there."""

    def __init__(self, flag):
        self.flag = flag

    def __call__(self, block):
        if block[0, 0, 0] > 25_000 and self.flag.exists():
            raise ValueError("flag")
        return block


def test_peak_memory_counts_shared_pages_once(processes):
    nbytes = 100 * 2**20
    shared = share_memory((100, 2**17), np.dtype("f8"))
    with memory.PeakMemory() as before:
        pass
    with memory.PeakMemory() as peak:
        processes.run(write_all, shared.handle)
        shared.array[:] = 1
    grown = peak.nbytes - before.nbytes
    assert 0.95 * nbytes < grown < 1.6 * nbytes
    shared.close(0)


def write_all(handle):
    for row in range(handle.shape[0]):
        write_into(handle, 1, [row])
