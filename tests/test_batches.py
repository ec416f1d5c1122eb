"""Batches: which windows, in which order, on which rank, again after a stop; how far ahead; and how a pass ends."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import weakref
from contextlib import contextmanager, nullcontext

import dask
import distributed
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline
from pipeline.errors import BudgetError, IncompleteError, InputError, IntegrityError
from pipeline.memory import held_nbytes
from pipeline.runtime import placement as placing
from pipeline.runtime import preflight as workers
from pipeline.sinks import prefetch as module
from pipeline.sinks.epochs import Epochs
from tests.layouts import LAYOUTS, distinct, open_layout, stack

LENGTH = 7
COUNT = 53


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("batches")
    for name in ("npy", "zstd", "shards", "big-endian", "plain"):
        LAYOUTS[name][1](made / f"{name}.zarr", distinct())
    return made


@pytest.fixture(scope="module")
def starts():
    return np.random.default_rng(5).integers(0, len(distinct()) - LENGTH + 1, COUNT)


@pytest.fixture(scope="module")
def windows(starts):
    return stack(distinct(), starts, LENGTH)


@pytest.fixture(scope="module")
def plan(folder, starts):
    return pipeline.plan_windows(open_layout(folder, "npy"), starts, length=LENGTH)


@pytest.fixture(scope="module")
def processes():
    """A client that is active only where a test says so."""
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


kept = []
"""A function that cannot be pickled, for `call_kept`."""


def take_all(batches):
    while True:
        next(batches)


def call_kept(block):
    return kept[0](block)


def ours():
    """Threads that read ahead."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def places_of(count, size, *, seed=0, epoch=0, shuffle=False, drop_last=False, rank=0, world_size=1):
    """The oracle: a list of places for each batch."""
    order = list(range(count))
    if shuffle:
        order = np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(count).tolist()
    if drop_last:
        while len(order) % (size * world_size):
            order.pop()
    for number in range(-len(order) % world_size):
        order.append(order[number])
    mine = order[rank::world_size]
    return [mine[begin : begin + size] for begin in range(0, len(mine), size)]


def check_batches(got, windows, places):
    assert [len(batch) for batch in got] == [len(each) for each in places]
    for batch, each in zip(got, places, strict=True):
        np.testing.assert_array_equal(batch, windows[each])
        assert batch.dtype == windows.dtype
        assert batch.flags.c_contiguous
        assert batch.flags.writeable
        # Its memory is its own alone.
        assert len(memoryview(batch if batch.base is None else batch.base).cast("B")) == batch.nbytes


@pytest.mark.parametrize("name", ["npy", "zstd", "shards", "big-endian", "plain@objects"])
@pytest.mark.parametrize("size", [1, 8, 53, 100])
def test_request_order_of_every_reader(folder, starts, windows, name, size):
    plan = pipeline.plan_windows(open_layout(folder, name), starts, length=LENGTH)
    with pipeline.iter_batches(plan, size) as batches:
        check_batches(list(batches), windows, places_of(COUNT, size))


SETTINGS = {
    "size": st.integers(1, 9),
    "seed": st.integers(0, 2**70),
    "epoch": st.integers(0, 3),
    "drop_last": st.booleans(),
    "world_size": st.integers(1, 5),
}


@given(count=st.integers(1, 60), shuffle=st.booleans(), **SETTINGS)
@settings(max_examples=200, deadline=None)
def test_ranks_share_each_epoch(plan, count, size, world_size, drop_last, **how):
    """Orders alone, without reading."""
    if drop_last and count < size * world_size:
        with pytest.raises(InputError, match="an epoch has a batch"):
            epochs(count, size, how["seed"], 0, world_size, drop_last=True)
        return
    seen = []
    for rank in range(world_size):
        share = epochs(count, size, how["seed"], rank, world_size, drop_last=drop_last)
        reading = module.Reading({}, share, how["shuffle"], None, named=False)
        order = reading.order(how["epoch"]).tolist()
        places = [order[begin : begin + size] for begin in range(0, len(order), size)]
        assert places == places_of(count, size, drop_last=drop_last, rank=rank, world_size=world_size, **how)
        assert len(share) == len(places)
        seen.append(places)
    # As many batches on each, of the same sizes: who has one less would hang the others.
    assert len({tuple(map(len, each)) for each in seen}) == 1
    everything = [place for each in seen for batch in each for place in batch]
    if drop_last:
        assert len(set(everything)) == len(everything) > count - size * world_size
        assert all(len(batch) == size for each in seen for batch in each)
    else:
        assert set(everything) == set(range(count))
        assert len(everything) < count + world_size


def epochs(count, size, seed, rank, world_size, *, drop_last):
    return Epochs(count=count, batch_size=size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size)


@given(data=st.data(), **SETTINGS)
@settings(max_examples=25, deadline=None)
def test_a_run_continues_after_the_batch_it_saw(plan, windows, data, size, seed, epoch, drop_last, world_size):
    how = {"shuffle": True, "seed": seed, "drop_last": drop_last, "world_size": world_size}
    rank, other = (data.draw(st.integers(0, world_size - 1)) for _ in range(2))
    places = places_of(COUNT, size, epoch=epoch, rank=rank, **how)
    with pipeline.iter_batches(plan, size, rank=other, **how, epoch=epoch) as batches:
        for _, _ in zip(range(data.draw(st.integers(0, len(places)))), batches, strict=False):
            pass
        text = json.dumps(batches.state_dict())
    assert len(text) < 1000
    state = json.loads(text)
    seen = state["batch"]
    with pipeline.iter_batches(plan, size, rank=rank, **how) as again:
        again.load_state_dict(state)
        # What follows is the loop that trains, as it is without a state.
        assert again.epoch == epoch
        again.set_epoch(epoch)
        assert again.state_dict() == state
        check_batches(list(again), windows, places[seen:])
        again.set_epoch(epoch + 1)
        check_batches(list(again), windows, places_of(COUNT, size, epoch=epoch + 1, rank=rank, **how))


@contextmanager
def travelling(client):
    """Workers that do not reach the memory of this process, as on another host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "share_memory", lambda *_: None)
        patch.setattr(placing, "share_memory", lambda *_: None)
        with client.as_current():
            yield


@pytest.mark.parametrize("scheduler", ["threads", "synchronous", "in process", "processes", "travelling"])
@pytest.mark.parametrize("apply", [None, lambda block: block[:, ::2].sum(axis=3)], ids=["windows", "apply"])
def test_the_same_on_every_cluster(request, folder, starts, windows, scheduler, apply):
    plan = pipeline.plan_windows(open_layout(folder, "zstd"), starts, length=LENGTH)
    where = {
        "threads": nullcontext,
        "synchronous": lambda: dask.config.set(scheduler="synchronous"),
        "in process": lambda: pipeline.connect(processes=False, n_workers=1, dashboard_address=None),
        "processes": lambda: request.getfixturevalue("processes").as_current(),
        "travelling": lambda: travelling(request.getfixturevalue("processes")),
    }[scheduler]
    expected = windows if apply is None else apply(windows)
    with where(), pipeline.iter_batches(plan, 10, shuffle=True, seed=3, epoch=1, apply=apply) as batches:
        check_batches(list(batches), expected, places_of(COUNT, 10, seed=3, epoch=1, shuffle=True))
        batches.set_epoch(2)
        check_batches(list(batches), expected, places_of(COUNT, 10, seed=3, epoch=2, shuffle=True))
    assert ours() == []


def test_large_windows_into_memory_that_processes_share(processes, tmp_path):
    a = np.arange(60 * 6000.0).reshape(60, 6000)
    np.save(tmp_path / "A.npy", a)
    starts = np.random.default_rng(0).integers(0, 57, 40)
    plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.npy"), starts, length=4)
    with processes.as_current(), pipeline.iter_batches(plan, 7) as batches:
        check_batches(list(batches), stack(a, starts, 4), places_of(40, 7))


def test_a_report_counts_it(plan):
    with pipeline.Report() as report:
        for _ in pipeline.iter_batches(plan, 10):
            pass
    [run] = report.runs
    assert (run.done_units, run.units, run.nbytes, run.failed) == (COUNT, COUNT, plan.nbytes, "")
    assert run.done_tasks == run.tasks > 0


def test_inside_a_task_no_other_task_is_waited_for(plan, windows):
    def train():
        with pipeline.iter_batches(plan, 10) as batches:
            return [batch.copy() for batch in batches]

    with pipeline.connect(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        check_batches(client.submit(train).result(timeout=60), windows, places_of(COUNT, 10))


def test_a_group_of_arrays_gives_dicts(folder, starts, windows):
    sources = {"x": folder / "npy.zarr", "y": folder / "zstd.zarr"}
    plan = pipeline.plan_windows(pipeline.open_matrix(sources), starts, length=LENGTH)
    with pipeline.iter_batches(plan, 20, shuffle=True, epoch=1, apply={"y": lambda b: b.mean(axis=1)}) as batches:
        got = list(batches)
    check_batches([batch["x"] for batch in got], windows, places_of(COUNT, 20, epoch=1, shuffle=True))
    check_batches([batch["y"] for batch in got], windows.mean(axis=1), places_of(COUNT, 20, epoch=1, shuffle=True))


class TestPasses:
    def test_each_iter_begins_the_epoch(self, plan, windows):
        batches = pipeline.iter_batches(plan, 20, shuffle=True)
        places = places_of(COUNT, 20, shuffle=True)
        assert len(batches) == 3
        first = iter(batches)
        np.testing.assert_array_equal(next(first), windows[places[0]])
        second = iter(batches)
        assert list(first) == []
        np.testing.assert_array_equal(next(second), windows[places[0]])
        np.testing.assert_array_equal(next(batches), windows[places[1]])
        batches.set_epoch(1)
        np.testing.assert_array_equal(next(batches), windows[places[2]])
        with pytest.raises(StopIteration):
            next(batches)
        check_batches(list(batches), windows, places_of(COUNT, 20, epoch=1, shuffle=True))
        batches.close()
        assert ours() == []

    def test_next_begins_a_pass(self, plan, windows):
        with pipeline.iter_batches(plan, 50) as batches:
            np.testing.assert_array_equal(next(batches), windows[:50])
            assert batches.state_dict()["batch"] == 1

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"seed": 2}, "seed"),
            ({"batch_size": 6}, "batch_size"),
            ({"world_size": 2}, "world_size"),
            ({"shuffle": False}, "seed, shuffle"),
            ({"drop_last": True}, "drop_last"),
        ],
    )
    def test_a_state_of_another_request_is_refused(self, plan, change, named):
        how = {"batch_size": 5, "seed": 1, "shuffle": True}
        state = pipeline.iter_batches(plan, **how).state_dict()
        with pytest.raises(InputError, match=f"differs in: {named};"):
            pipeline.iter_batches(plan, **how | change).load_state_dict(state)

    def test_a_state_of_other_windows_is_refused(self, plan, folder, starts):
        state = pipeline.iter_batches(plan, 5).state_dict()
        matrix = open_layout(folder, "npy")
        for other, length, named in ((starts[::-1], LENGTH, "starts"), (starts, LENGTH - 1, "length, window")):
            changed = pipeline.plan_windows(matrix, other, length=length)
            with pytest.raises(InputError, match=f"differs in: {named};"):
                pipeline.iter_batches(changed, 5).load_state_dict(state)

    @pytest.mark.parametrize(
        "state",
        [None, {}, "x", {"batch": 1}, {"version": 3}, {"batch": 999}, {"batch": -1}, {"epoch": 0.5}, {"request": 3}],
    )
    def test_what_is_no_state_is_refused(self, plan, state):
        batches = pipeline.iter_batches(plan, 5)
        if isinstance(state, dict) and state and set(state) != {"batch"} | {"x"}:
            state = batches.state_dict() | state if state != {"batch": 1} else state
        with pytest.raises(InputError):
            batches.load_state_dict(state)

    def test_every_epoch_is_shuffled_the_first_too(self, folder):
        """Sorted events must not train in order; `shuffle=False` alone is the order of the request, in every epoch."""
        matrix = open_layout(folder, "npy")
        plan = pipeline.plan_windows(matrix, np.arange(COUNT), length=LENGTH)
        row_of = {row.tobytes(): number for number, row in enumerate(distinct())}
        orders = {}
        for shuffle in (False, True):
            with pipeline.iter_batches(plan, 20, shuffle=shuffle) as batches:
                for epoch in range(3):
                    batches.set_epoch(epoch)
                    firsts = np.concatenate([batch[:, 0] for batch in batches])
                    orders[shuffle, epoch] = [row_of[row.tobytes()] for row in firsts]
        in_order = list(range(COUNT))
        assert all(orders[False, epoch] == in_order for epoch in range(3))
        shuffled = [orders[True, epoch] for epoch in range(3)]
        assert all(sorted(order) == in_order != order for order in shuffled)
        assert len(set(map(tuple, shuffled))) == 3

    @pytest.mark.parametrize("shuffle", [False, True])
    def test_a_state_of_an_earlier_version_is_refused(self, plan, shuffle):
        """Its epoch 0 was in the order of the request: to go on in another order would read windows twice, others never."""
        batches = pipeline.iter_batches(plan, 5, shuffle=shuffle)
        with pytest.raises(InputError, match="version 1") as caught:
            batches.load_state_dict(batches.state_dict() | {"version": 1})
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"batch_size": 0},
            {"batch_size": 2.0},
            {"batch_size": True},
            {"seed": -1},
            {"epoch": -1},
            {"rank": 1},
            {"rank": -1},
            {"world_size": 0},
            {"prefetch": -1},
            {"batch_size": 54, "drop_last": True},
        ],
    )
    def test_wrong_arguments(self, plan, wrong):
        with pytest.raises(InputError):
            pipeline.iter_batches(plan, **{"batch_size": 5} | wrong)


class Counted:
    """An `apply` that counts its windows, and may wait."""

    def __init__(self, seconds=0.0):
        self.windows, self.seconds, self.lock = 0, seconds, threading.Lock()

    def __call__(self, block):
        with self.lock:
            self.windows += len(block)
        time.sleep(self.seconds)
        return block[:, 0]


def settle(count):
    """Wait until a number no longer changes."""
    before = -1
    while before != (before := count()):
        time.sleep(0.15)
    return before


class TestReadingAhead:
    @pytest.mark.parametrize(("prefetch", "ahead"), [(0, 0), (1, 1), (2, 2), (6, 6)])
    def test_so_many_batches_and_no_more(self, plan, prefetch, ahead):
        counted = Counted()
        batches = pipeline.iter_batches(plan, 2, apply=counted, prefetch=prefetch)
        probed = counted.windows
        with batches:
            for number in range(1, 5):
                next(batches)
                # Of its group, those that are not handed out yet are ahead, too.
                read = (settle(lambda: counted.windows) - probed) // 2
                assert read <= number + 2 * ahead
            assert any(name.startswith("batches_") for name in ours()) == bool(prefetch)
            assert len(list(batches)) == len(batches)

    def test_by_bytes(self, plan, monkeypatch):
        monkeypatch.setattr(module, "_GROUP_NBYTES", 8 * 15 * 4)
        counted = Counted()
        with pipeline.iter_batches(plan, 2, apply=counted) as batches:
            probed = counted.windows
            next(batches)
            # One batch alone, and four groups of two, where groups hold four windows.
            assert settle(lambda: counted.windows) - probed <= 2 + 4 * 4

    def test_what_does_not_fit_is_refused(self, folder, starts):
        matrix = open_layout(folder, "npy")
        tight = pipeline.plan_windows(matrix, starts, length=LENGTH, memory=1)
        with pytest.raises(BudgetError, match="raise the limit"):
            pipeline.iter_batches(tight, 4)
        wide = pipeline.plan_windows(matrix, np.zeros(200_000, int), length=200, memory=held_nbytes() + 2**29)
        with pytest.raises(BudgetError, match="take a smaller batch_size"):
            pipeline.iter_batches(wide, 200_000)
        plenty = pipeline.plan_windows(matrix, np.zeros(200_000, int), length=200)
        with pytest.raises(BudgetError, match="take a smaller prefetch"):
            pipeline.iter_batches(plenty, 100_000, prefetch=10**6)
        assert ours() == []

    def test_memory_is_let_go_of(self, plan):
        with pipeline.iter_batches(plan, 5) as batches:
            kept = [weakref.ref(batch) for batch in batches]
            assert [each() for each in kept] == [None] * len(batches)
            first = next(iter(batches))
            gone = weakref.ref(first)
            del first
            assert gone() is None


class TestEnds:
    def test_leaving_early_stops_what_is_under_way(self, folder, starts):
        plan = pipeline.plan_windows(open_layout(folder, "npy"), np.repeat(starts, 20), length=LENGTH)
        counted = Counted(0.02)
        with pipeline.iter_batches(plan, 10, apply=counted) as batches:
            next(batches)
        assert ours() == []
        read = counted.windows
        assert read < len(plan) // 2
        time.sleep(0.2)
        assert counted.windows == read

    def test_a_loop_that_is_left_lets_go_of_its_threads(self, plan):
        for _ in pipeline.iter_batches(plan, 5):
            break
        assert ours() == []

    def test_ctrl_c_while_a_batch_is_waited_for(self, plan):
        counted = Counted()
        batches = pipeline.iter_batches(plan, 5, apply=counted)
        counted.seconds = 0.5
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert time.monotonic() - begin < 5
        timer.join()
        assert ours() == []

    @pytest.mark.parametrize("kind", ["slow", "retried"])
    @pytest.mark.parametrize("where", ["threads", "cluster"])
    def test_what_does_not_return_is_not_waited_for(self, plan, kind, where):
        """A function that takes long, or tasks that wait to be run again: a pass that is left ends all the same."""
        released, begun = threading.Event(), threading.Event()

        def apply(block):
            if len(block) > 1 and kind == "retried":
                begun.set()
                raise ConnectionError("the network is away")
            if len(block) > 1:
                begun.set()
                released.wait(20)
            return block[:, 0, 0, 0]

        cluster = pipeline.connect(dashboard_address=None) if where == "cluster" else nullcontext()
        kept[:] = [apply]
        with cluster:
            batches = pipeline.iter_batches(plan, 20, apply=call_kept)
            timer = threading.Timer(0.3, lambda: begun.wait(10) and os.kill(os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                next(batches)
            begin = time.monotonic()
            batches.close()
            assert time.monotonic() - begin < 4
            timer.join()
            released.set()

    def test_a_function_that_cannot_be_sent(self, plan):
        lock = threading.Lock()

        def guarded(block):
            with lock:
                return block[:, 0, 0, 0]

        assert len(next(pipeline.iter_batches(plan, 5, apply=guarded, prefetch=0))) == 5
        with pipeline.connect(dashboard_address=None):
            for take in (pipeline.gather, lambda plan, apply: next(pipeline.iter_batches(plan, 5, apply=apply))):
                with pytest.raises(InputError, match="cannot be pickled: .*lock.*; make .*, or run without a client"):
                    take(plan, apply=guarded)

    def test_a_client_that_was_closed(self, plan):
        with pipeline.connect(dashboard_address=None):
            batches = pipeline.iter_batches(plan, 5, prefetch=1)
            next(batches)
        with pytest.raises(IncompleteError, match="needs its client until it ends"):
            take_all(batches)
        batches.close()
        assert ours() == []

    def test_an_error_names_the_place_in_the_request(self, plan, starts):
        at = 31

        def fail(block):
            if (block[:, 0] == distinct()[starts[at]]).all(axis=(1, 2)).any():
                raise ValueError("no")
            return block[:, 0, 0, 0]

        batches = pipeline.iter_batches(plan, 1, apply=fail, shuffle=True, epoch=2)
        with pytest.raises(IntegrityError) as caught:
            list(batches)
        row, place = map(int, re.search(r"row (\d+) \(place (\d+)\)", str(caught.value)).groups())
        assert starts[place] == row

    def test_an_error_of_a_task_comes_with_its_batch(self, folder, starts, windows):
        bad = int(starts[40])

        def fail(block):
            if (block[:, 0, 0, 0] == windows[40, 0, 0, 0]).any():
                raise ValueError("the bad window")
            return block

        plan = pipeline.plan_windows(open_layout(folder, "npy"), starts, length=LENGTH)
        batches = pipeline.iter_batches(plan, 5, apply=fail, prefetch=2)
        got = []
        with pytest.raises(IntegrityError, match=f"(?s)row {bad} |the bad window"):
            got.extend(iter(batches))
        assert len(got) <= 8
        assert ours() == []
        # Who takes batches by hand must not take this for the end.
        with pytest.raises(IntegrityError, match="the bad window"):
            next(batches)
        assert len(next(iter(batches))) == 5
        batches.close()

    def test_a_chunk_that_is_broken(self, tmp_path, starts):
        LAYOUTS["zstd"][1](tmp_path / "zstd.zarr", distinct())
        plan = pipeline.plan_windows(open_layout(tmp_path, "zstd"), starts, length=LENGTH)
        batches = pipeline.iter_batches(plan, 5)
        for path in (tmp_path / "zstd.zarr" / "c").rglob("0"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:200] + bytes(path.stat().st_size - 200))
        with pytest.raises(IntegrityError):
            list(batches)
        assert ours() == []

    def test_a_matrix_that_changes_under_the_run(self, tmp_path, starts):
        np.save(tmp_path / "A.npy", distinct())
        plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.npy"), starts, length=LENGTH)
        batches = pipeline.iter_batches(plan, 5, prefetch=1)
        next(batches)
        os.utime(tmp_path / "A.npy", ns=(1, 1))
        taken = []
        with pytest.raises(IntegrityError, match="stay as it is"):
            taken.extend(iter(batches.__next__, None))
        assert 1 + len(taken) < len(batches)

    def test_a_worker_process_that_fails_says_so(self, processes, plan):
        def fail(block):
            if len(block) > 1:
                raise ValueError("no")
            return block

        batches = pipeline.iter_batches(plan, 10, apply=fail)
        with processes.as_current(), pytest.raises(IntegrityError, match="apply takes any block"):
            list(batches)
        assert ours() == []
