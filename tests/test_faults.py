"""Faults of a run: workers that die, that lack memory, that never come; a scheduler that goes; signals."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import numpy as np
import pytest
from distributed.chaos import KillWorker

import pipeline
from pipeline.cluster.connect import connect
from pipeline.runtime import distributed as flights
from pipeline.runtime import progress
from pipeline.runtime import retries as failures
from pipeline.runtime import runner as runs
from pipeline.runtime.report import Watch
from pipeline.runtime.tasks import Receipt, name_tasks
from pipeline.sinks.gather import prepare_gathering
from pipeline.sinks.store import prepare_storing
from pipeline.storage import preads

ROWS, COLUMNS, LENGTH = 2_000, 20, 16
LIMIT = 500_000_000
STARTS = [5, 1800, 900, 31, 32, 1234, 1984, 400, 401, 77, 650, 1500, 0, 299]
VICTIM = 1234 * COLUMNS + 1.0
"""First value of one window, the sixth."""


@pytest.fixture
def plan(samples, monkeypatch):
    """Seven tasks of two windows."""
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", 7)
    return pipeline.plan_windows(pipeline.open_matrix(samples / "A.zarr"), STARTS, length=LENGTH)


@pytest.fixture
def sums(values):
    """What `apply` makes of the windows here."""
    return np.stack([values[start : start + LENGTH] for start in STARTS]).sum(axis=(1, 2))


@pytest.fixture(scope="module")
def processes():
    kwargs = {"n_workers": 2, "processes": True, "threads_per_worker": 2, "memory_limit": LIMIT}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        connect(dashboard_address=None, **kwargs) as client,
    ):
        yield client


@pytest.fixture
def two_processes(processes):
    """Two worker processes of two threads, however many were killed before."""
    with processes.as_current(), dask.config.set(scheduler="dask.distributed"):
        processes.wait_for_workers(2, timeout=60)
        yield processes


def is_victim(block):
    return bool((block[:, 0, 0] == VICTIM).any())


def end_while(flag, block):
    """Kill the worker as long as a file is there."""
    if is_victim(block) and flag.exists():
        os._exit(1)
    return block.sum(axis=(1, 2))


def end_once(go, gone, block):
    """Kill the worker once, when the file `go` says so."""
    if is_victim(block) and not gone.exists():
        while not go.exists():
            os.sched_yield()
        gone.touch()
        os._exit(1)
    return block.sum(axis=(1, 2))


def grow(block):
    """Hold three times what a worker may, until it is killed."""
    if is_victim(block):
        held = np.ones(3 * LIMIT // 8)
        threading.Event().wait()
        del held
    return block.sum(axis=(1, 2))


class TestWorkers:
    def test_one_that_dies_is_replaced_and_its_task_run_again(self, two_processes, plan, sums, tmp_path):
        go, gone = tmp_path / "go", tmp_path / "gone"

        class Starter(Watch):
            def task_done(self, receipt):
                super().task_done(receipt)
                go.touch()

        apply = functools.partial(end_once, go, gone)
        storing = prepare_storing(
            plan, tmp_path / "w.zarr", apply=apply, order="request", resume=False, overwrite=False
        )
        result = storing.run(Starter())
        assert gone.exists()
        np.testing.assert_array_equal(result["windows"][:], sums, strict=True)
        two_processes.wait_for_workers(2, timeout=60)

    def test_one_that_leaves_is_replaced(self, two_processes):
        """Its nanny goes with it."""
        before = set(two_processes.scheduler_info(n_workers=-1)["workers"])
        leaves = min(before)
        two_processes.retire_workers([leaves])
        while leaves in two_processes.scheduler_info(n_workers=-1)["workers"]:
            os.sched_yield()
        two_processes.wait_for_workers(2, timeout=30)
        assert len(set(two_processes.scheduler_info(n_workers=-1)["workers"]) - before) == 1

    def test_a_task_that_kills_is_named_and_the_rest_is_kept(self, two_processes, plan, sums, tmp_path):
        """Its companions die with it: they are not to blame."""
        flag, path = tmp_path / "flag", tmp_path / "w.zarr"
        flag.touch()
        apply = functools.partial(end_while, flag)
        message = "not done: 1 of 7 tasks, and write 2 ended 2 workers each"
        with pytest.raises(pipeline.IncompleteError, match=message) as caught:
            pipeline.store(plan, path, apply=apply)
        assert caught.value.exit_code == 6
        assert "\n" not in str(caught.value)
        assert not path.exists()
        flag.unlink()
        watch = Watch()
        storing = prepare_storing(plan, path, apply=apply, order="request", resume=True, overwrite=False)
        np.testing.assert_array_equal(storing.run(watch)["windows"][:], sums, strict=True)
        assert (watch.kept_tasks, watch.done_tasks) == (6, 1)

    def test_one_short_of_memory_ends_with_need_and_limit(self, two_processes, plan):
        with pytest.raises(pipeline.BudgetError, match=r"read \d held .* memory_limit is 477 MiB") as caught:
            pipeline.gather(plan, apply=grow)
        assert caught.value.exit_code == 5
        held = str(caught.value).partition("held ")[2].split()
        assert float(held[0]) * {"MiB": 1, "GiB": 1024}[held[1]] > 0.9 * 477

    @pytest.mark.slow
    def test_tasks_that_all_kill_come_to_an_end(self, two_processes):
        tasks = name_tasks("read", os._exit, ((1,) for _ in range(200)))
        with pytest.raises(pipeline.IncompleteError, match="not done: 200 of 200 tasks"):
            list(runs.run_tasks(tasks, at_once=4))

    def test_none_is_not_waited_for_without_end(self):
        patience = {"distributed.scheduler.no-workers-timeout": "600 ms"}
        with dask.config.set(patience), connect(dashboard_address=None) as client:
            client.cluster.scale(0)
            while client.scheduler_info(n_workers=-1)["workers"]:
                os.sched_yield()
            with pytest.raises(pipeline.IncompleteError, match=r"read \d waited 0.6 s"):
                list(runs.run_tasks(name_tasks("read", divmod, [(1, 1), (2, 1)]), at_once=4))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_killed_at_random(plan, sums, tmp_path):
    kwargs = {"n_workers": 2, "processes": True, "threads_per_worker": 1, "dashboard_address": None}
    with dask.config.set({"distributed.scheduler.allowed-failures": 3}), connect(**kwargs) as client:
        client.register_plugin(KillWorker("2 s"))
        before = set(client.run(os.getpid).values())
        rounds, end = 0, time.monotonic() + 30
        while time.monotonic() < end:
            np.testing.assert_array_equal(pipeline.gather(plan, apply=slow_sums), sums)
            result = pipeline.store(plan, tmp_path / "w.zarr", apply=slow_sums, overwrite=rounds > 0)
            np.testing.assert_array_equal(result["windows"][:], sums)
            rounds += 1
        client.wait_for_workers(2, timeout=60)
        assert rounds
        assert not before & set(client.run(os.getpid).values())


def slow_sums(block):
    time.sleep(0.1)
    return block.sum(axis=(1, 2))


class Arrivals(queue.Queue):
    """What ended, in this order: a result, a failure, the other result."""

    def __init__(self):
        super().__init__()
        self.taken, self.failed, self.last = (threading.Event() for _ in range(3))

    def put(self, item):
        super().put(item)
        (self.failed if item[2] is not None else self.last).set()


def raised_from(error, cause):
    error.__cause__ = cause
    return error


SHARED = {}
"""What tasks of this process find without its being pickled."""


def fail_second(error, number):
    arrivals = SHARED["arrivals"]
    if number == 1:
        assert arrivals.taken.wait(30)
        raise error
    if number == 2:
        assert arrivals.failed.wait(30)
    return number


def fail_in_the_middle(number):
    SHARED["ran"].append(number)
    if number == 2:
        raise pipeline.IntegrityError("rows 3 to 4")
    return number


class TestWindow:
    """How many tasks are submitted at once, as workers come and go."""

    @pytest.mark.parametrize(
        ("at_once", "travel", "windows"),
        [
            (10**9, False, {1: 2000, 1000: 4000}),
            (5, False, {1: 2000, 5: 2000, 6: 5, 1000: 5}),
            (10**9, True, {1: 9, 4: 15, 5000: 10007}),
            (5, True, {1: 5, 1000: 5}),
        ],
    )
    def test_memory_bounds_it_and_results_that_wait(self, at_once, travel, windows, monkeypatch):
        given = {}
        monkeypatch.setattr(flights.Flight, "run", lambda _, tasks, **named: given.update(named) or iter(()))
        with connect(dashboard_address=None):
            list(runs.run_tasks(iter(()), at_once=at_once, results_travel=travel, waiting=7))
        assert {threads: given["window"](threads) for threads in windows} == windows

    def test_it_follows_the_threads_that_there_are(self, monkeypatch):
        monkeypatch.setattr(flights, "_COUNT_SECONDS", 0)
        seen = []

        def window(threads):
            seen.append(threads)
            return 4

        with connect(dashboard_address=None, threads_per_worker=1) as client:
            flight = flights.Flight(client, {}, Watch(), threads=1, direct=False)
            for number in flight.run(
                name_tasks("read", wait_for_seconds, ((0.05,) for _ in range(60))), window=window, held=0
            ):
                assert number == 0.05
                if len(seen) == 3:
                    client.cluster.scale(2)
        assert seen[0] == 1
        assert seen[-1] == 2


class TestTasksThatRaise:
    @pytest.mark.parametrize(
        ("error", "kind", "message"),
        [
            (pipeline.IntegrityError("rows 3 to 4"), pipeline.IntegrityError, "^rows 3 to 4$"),
            (MemoryError("1 TiB"), pipeline.BudgetError, "read 1 found none: 1 TiB"),
            (ZeroDivisionError("7"), ZeroDivisionError, "^7$"),
        ],
    )
    def test_results_that_are_there_come_first(self, monkeypatch, error, kind, message):
        arrivals = SHARED["arrivals"] = Arrivals()
        monkeypatch.setattr(flights, "SimpleQueue", lambda: arrivals)
        tasks = name_tasks("read", fail_second, ((error, number) for number in range(3)))
        with connect(dashboard_address=None, threads_per_worker=3):
            results = runs.run_tasks(tasks, at_once=3)
            assert next(results) == 0
            arrivals.last.clear()
            arrivals.taken.set()
            assert arrivals.last.wait(30)
            assert next(results) == 2
            with pytest.raises(kind, match=message):
                next(results)

    @pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
    def test_also_on_schedulers_of_dask(self, scheduler):
        SHARED["ran"], got = (ran := []), []
        tasks = name_tasks("read", fail_in_the_middle, ((number,) for number in range(5)))
        with dask.config.set(scheduler=scheduler, num_workers=1), pytest.raises(pipeline.IntegrityError):
            got.extend(runs.run_tasks(tasks, at_once=5))
        before = ran[: ran.index(2)]
        assert before
        assert set(before) <= set(got) <= set(ran)
        assert len(got) == len(set(got))


SCHEDULER = """
import distributed, sys
with distributed.LocalCluster(
    n_workers=1, threads_per_worker=20, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None,
    worker_dashboard_address="127.0.0.1:0", memory_limit=0, silence_logs=50,
) as cluster:
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
"""


@pytest.mark.timeout(60)
def test_scheduler_that_goes():
    with subprocess.Popen(
        [sys.executable, "-c", SCHEDULER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            address = process.stdout.readline().strip()
            with (  # noqa: PT012
                connect(scheduler_address=address) as client,
                pytest.raises(pipeline.IncompleteError, match="the scheduler stays"),
                runs.open_run(),
            ):
                for _ in runs.run_tasks(name_tasks("read", time.sleep, [(0,), *[(600,)] * 9]), at_once=10):
                    process.kill()
        finally:
            process.kill()
    assert client.status == "closed"


class TestWhatMayPass:
    """Failures of a network are tried again; those of data and arguments are not."""

    @pytest.fixture(autouse=True)
    def pauses(self, monkeypatch):
        monkeypatch.setattr(failures, "_PAUSES", (0.01, 0.02, 0.04))

    @pytest.fixture(params=["threads", "synchronous", "in-process", "processes"])
    def anywhere(self, request):
        if request.param == "processes":
            client = request.getfixturevalue("two_processes")
            yield client.run
        elif request.param == "in-process":
            with connect(dashboard_address=None):
                yield lambda function, *given: function(*given)
        else:
            with dask.config.set(scheduler=request.param):
                yield lambda function, *given: function(*given)

    @pytest.mark.parametrize("sink", ["gather", "store"])
    def test_a_server_that_is_away_for_a_while(self, anywhere, sink, plan, values, tmp_path):
        expected = np.stack([values[start : start + LENGTH] for start in STARTS])
        watch = Watch()
        planned = prepare(sink, plan, tmp_path / "w.zarr")
        anywhere(fail_reads, tmp_path, 3, errno.ESTALE)
        try:
            result = planned.run(watch)
        finally:
            anywhere(mend_reads)
        np.testing.assert_array_equal(result if sink == "gather" else result["windows"][:], expected)
        assert 1 <= watch.retries <= 3
        assert not list(tmp_path.glob("token*"))
        assert watch.done_tasks == 7

    def test_one_that_stays_away(self, anywhere, plan, tmp_path):
        watch = Watch()
        planned = prepare("gather", plan, None)
        anywhere(fail_reads, tmp_path, 1000, errno.ETIMEDOUT)
        try:
            with pytest.raises(pipeline.IntegrityError, match="check the disk") as caught:
                planned.run(watch)
        finally:
            anywhere(mend_reads)
        assert any("task " in note for note in caught.value.__notes__)
        assert 3 <= watch.retries <= 3 * 7
        assert 1000 - len(list(tmp_path.glob("token*"))) <= 4 * 7

    def test_a_disk_that_gives_nothing_is_not_asked_again(self, anywhere, plan, tmp_path):
        watch = Watch()
        planned = prepare("gather", plan, None)
        anywhere(fail_reads, tmp_path, 1000, errno.EACCES)
        try:
            with pytest.raises(pipeline.IntegrityError):
                planned.run(watch)
        finally:
            anywhere(mend_reads)
        assert watch.retries == 0

    def test_others_go_on_meanwhile(self, plan, tmp_path, monkeypatch):
        monkeypatch.setattr(failures, "_PAUSES", (1.0,))
        seen, failed = [], []

        class Seen(Watch):
            def task_done(self, receipt):
                super().task_done(receipt)
                seen.append(receipt.number)

            def task_retried(self, words):
                super().task_retried(words)
                failed.append(int(words.split()[1]))

        with connect(dashboard_address=None, threads_per_worker=1):
            planned = prepare("gather", plan, None)
            fail_reads(tmp_path, 1, errno.ECONNRESET)
            try:
                planned.run(Seen())
            finally:
                mend_reads()
        assert sorted(seen) == list(range(7))
        assert failed == seen[-1:]

    @pytest.mark.parametrize(
        ("failure", "passes"),
        [
            (OSError(errno.EIO, "x"), False),
            (OSError(errno.EHOSTUNREACH, "x"), True),
            (ConnectionResetError("x"), True),
            (TimeoutError("x"), True),
            (raised_from(pipeline.OpenError("x"), OSError(errno.ESTALE, "x")), True),
            (raised_from(pipeline.IntegrityError("x"), OSError(errno.ESTALE, "x")), True),
            (raised_from(pipeline.IntegrityError("x"), OSError(errno.EIO, "x")), False),
            (pipeline.OpenError("x"), False),
            (pipeline.IntegrityError("x"), False),
            (OSError(errno.ENOENT, "x"), False),
            (ValueError("x"), False),
            (raised_from(pipeline.BudgetError("x"), TimeoutError("x")), False),
            (raised_from(pipeline.DiskSpaceError("x"), TimeoutError("x")), False),
            (raised_from(pipeline.InputError("x"), TimeoutError("x")), False),
        ],
    )
    def test_what_does(self, failure, passes):
        assert failures.may_pass(failure) == passes

    def test_pauses_grow_and_are_few(self, monkeypatch):
        monkeypatch.undo()
        said = []
        retries = failures.Retries(said.append)
        [task] = name_tasks("read", divmod, [(1, 1)])
        pauses = []
        while retries.postpone(task, TimeoutError("no answer")):
            pauses.append(retries.pause())
            retries.waiting.clear()
        assert len(pauses) == len(said) == 3
        assert np.allclose(pauses, [1, 4, 15], rtol=0.26)
        assert said[0].endswith("s, try 2 of 4: no answer")
        assert said[0].startswith("read 0 is run again in ")

    def test_the_command_line_says_so(self, cli, samples, tmp_path):
        fail_reads(tmp_path, 1, errno.ESTALE)
        try:
            outcome = cli("run", samples / "A.zarr", "--count", 20, "--json")
        finally:
            mend_reads()
        assert outcome.code == 0
        assert outcome.numbers["retries"] == 1
        assert (
            len(
                re.findall(
                    r"^\d\d:\d\d:\d\d read 0 is run again in 0.0 s, try 2 of 4: .*Stale file handle",
                    outcome.err,
                    re.MULTILINE,
                )
            )
            == 1
        )


def prepare(sink, plan, path):
    if sink == "store":
        return prepare_storing(plan, path, apply=None, order="request", resume=False, overwrite=False)
    return prepare_gathering(plan, apply=None, out=None, resume=False, overwrite=False)


def fail_reads(folder, times, number):
    """Let reads fail so many times in all, in whatever process."""
    for token in range(times):
        (folder / f"token{token}").touch()
    preads.preadv = os.preadv

    def preadv(*given):
        for token in folder.glob("token*"):
            with contextlib.suppress(FileNotFoundError):
                token.unlink()
                raise OSError(number, os.strerror(number))
        return preads.preadv(*given)

    os.preadv = preadv


def mend_reads():
    os.preadv = preads.preadv


SERVE = """
import asyncio, sys
from distributed import Scheduler, Worker

async def main():
    local = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    server = Worker(sys.argv[1], nthreads=1, **local) if sys.argv[1:] else Scheduler(port=0, **local)
    async with server:
        print(server.address, flush=True)
        await server.finished()

asyncio.run(main())
"""


@pytest.fixture
def served():
    """A scheduler and a worker, a process each; yields the scheduler's address and process."""
    with contextlib.ExitStack() as stack:

        def start(*arguments):
            command = [sys.executable, "-c", SERVE, *arguments]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            process = stack.enter_context(subprocess.Popen(command, text=True, **pipes))
            stack.callback(process.kill)
            return process, process.stdout.readline().strip()

        scheduler, address = start()
        start(address)
        yield address, scheduler


class TestScheduler:
    @pytest.mark.timeout(90)
    @pytest.mark.parametrize(
        ("number", "message"), [(signal.SIGKILL, "the scheduler stays"), (signal.SIGSTOP, "has not for")]
    )
    def test_one_that_goes_or_hangs_ends_the_run_which_another_finishes(
        self, served, number, message, plan, sums, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(failures, "_ASK_SECONDS", 0.5)
        monkeypatch.setattr(failures, "_ANSWER_SECONDS", 1)
        monkeypatch.setattr(failures, "_SILENT_SECONDS", 2.5)
        address, scheduler = served
        path = tmp_path / "w.zarr"

        class Sender(Watch):
            def task_done(self, receipt):
                super().task_done(receipt)
                if self.done_tasks == 2:
                    scheduler.send_signal(number)

        given = {"apply": slow_sums, "order": "request", "overwrite": False}
        begin = time.monotonic()
        with (
            pytest.raises(pipeline.IncompleteError, match=message) as caught,
            connect(scheduler_address=address),
        ):
            prepare_storing(plan, path, resume=False, **given).run(Sender())
        assert time.monotonic() - begin < 60
        assert caught.value.exit_code == 6
        kept = int(re.search(r"(\d) of 7 tasks finished and kept; go on with --resume", caught.value.__notes__[0])[1])
        assert 2 <= kept < 7
        assert not path.exists()
        watch = Watch()
        with dask.config.set(scheduler="threads"):
            result = prepare_storing(plan, path, resume=True, **given).run(watch)
        np.testing.assert_array_equal(result["windows"][:], sums)
        assert watch.kept_tasks == kept

    def test_one_that_is_busy_is_waited_for(self, monkeypatch):
        monkeypatch.setattr(failures, "_ASK_SECONDS", 0.1)
        monkeypatch.setattr(failures, "_SILENT_SECONDS", 0.4)
        with connect(dashboard_address=None):
            [seconds] = runs.run_tasks(name_tasks("read", wait_for_seconds, [(1.5,)]), at_once=1)
        assert seconds == 1.5


def wait_for_seconds(seconds):
    time.sleep(seconds)
    return seconds


@pytest.mark.parametrize("sink", ["gather", "store"])
def test_workers_that_leave_during_a_run_take_nothing_along(two_processes, sink, plan, sums, tmp_path):
    """As where a cluster adapts to its work."""
    leaving = min(two_processes.scheduler_info(n_workers=-1)["workers"])

    class Leaver(Watch):
        def task_done(self, receipt):
            super().task_done(receipt)
            if self.done_tasks == 2:
                two_processes.retire_workers([leaving])

    if sink == "gather":
        planned = prepare_gathering(plan, apply=slow_sums, out=None, resume=False, overwrite=False)
    else:
        path = tmp_path / "w.zarr"
        planned = prepare_storing(plan, path, apply=slow_sums, order="request", resume=False, overwrite=False)
    watch = Leaver()
    result = planned.run(watch)
    np.testing.assert_array_equal(result if sink == "gather" else result["windows"][:], sums)
    assert watch.done_tasks == 7
    two_processes.wait_for_workers(2, timeout=60)


class TestStall:
    """Lines come as fast as they can; a stall is announced when nothing has happened since the last task."""

    @pytest.fixture(params=[False, True], ids=["plain", "terminal"])
    def lines(self, request, monkeypatch):
        said = queue.Queue()
        monkeypatch.setattr(progress, "_SECONDS", 0.001)
        monkeypatch.setattr(progress, "_STALL_SECONDS", 0.02)
        monkeypatch.setattr(progress, "_STALL_TASKS", 1)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: request.param)
        monkeypatch.setattr(progress.Progress, "write", lambda _, line: said.put(line))
        return said

    def next_stall(self, lines):
        while "stalled" not in (line := lines.get(timeout=30)):
            pass
        return line

    def test_it_is_said_once_until_a_task_ends(self, lines):
        with dask.config.set(scheduler="threads", num_workers=2), progress.ShownWatch("windows", quiet=False) as watch:
            before = time.localtime()
            watch.begin(4, 40, 400)
            line = self.next_stall(lines)
            assert re.match(r"stalled: no task has finished for \d+ s, since ", line)
            assert "2 tasks under way, 4 not done" in line
            since = line.partition("since ")[2][:8]
            assert since in {time.strftime("%H:%M:%S", each) for each in (before, time.localtime())}
            watch.task_kept(10)
            for number in (1, 2):
                watch.task_done(Receipt(number, 10, 100, 0.0))
            assert "1 task under way, 1 not done" in self.next_stall(lines)
            # Its time is far from over where a task has taken an hour.
            watch.longest_seconds = 3600.0
            watch._progress._last = time.perf_counter(), time.time()
            time.sleep(0.1)
        assert not [line for line in iter(lambda: lines.get() if lines.qsize() else "", "") if "stalled" in line]

    def test_quiet_is_quiet(self, lines):
        with progress.ShownWatch("windows", quiet=True) as watch:
            watch.begin(4, 40, 400)
            time.sleep(0.05)
        assert lines.empty()

    def test_a_minute_at_least(self):
        assert progress._STALL_SECONDS == 60


COMMAND = """
import sys, threading
import pipeline.plan.plan
from pipeline.runtime import progress
from pipeline.cluster import signals
from pipeline.cli.main import main

pipeline.plan.plan._LEAST_BLOCK_NBYTES, pipeline.plan.plan._FEWEST_TASKS = 1, 7
done = progress.ShownWatch.task_done

def task_done(self, receipt):
    done(self, receipt)
    if self.done_tasks == 3:
        print("MARKER", file=sys.stderr, flush=True)

def never_end(*_):
    print("UNWINDING", file=sys.stderr, flush=True)
    threading.Event().wait()

progress.ShownWatch.task_done = task_done
{}
sys.argv[0] = "pipeline"
main()
"""
NEVER_END = "progress.ShownWatch.__exit__ = never_end"
SOON = "signals._SECONDS = {number: 0.3 for number in signals._SECONDS}"
WAITS = """
import os, sys

def wait_after_three(block):
    # The window on which it is probed is left alone, and so is whoever takes one of the tokens.
    for token in ("1", "2", "3") if len(block) > 1 else ():
        try:
            os.unlink(token)
            break
        except FileNotFoundError:
            pass
    else:
        if len(block) > 1:
            open("fifo").read()
    return block[:, 0, 0]

def wait_at_once(block):
    print("MARKER", file=sys.stderr, flush=True)
    open("fifo").read()
"""
PRELOAD = """
import sys
print("MARKER", file=sys.stderr, flush=True)
open("fifo").read()
"""
CLUSTER = "version: 1\nkwargs: {n_workers: 2, processes: true, threads_per_worker: 1, dashboard_address: null}\n"


def descendants(pid):
    pids = [pid]
    for each in pids:
        for task in Path(f"/proc/{each}/task").iterdir():
            pids += map(int, (task / "children").read_text().split())
    return pids[1:]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
class TestSignals:
    @pytest.fixture
    def interrupt(self, samples, tmp_path):
        """Start the command line, send it a signal after each of the lines named, and return what it said last."""
        (tmp_path / "waits.py").write_text(WAITS)
        (tmp_path / "preload.py").write_text(PRELOAD)
        (tmp_path / "starts.txt").write_text("\n".join(str(20 * number) for number in range(14)))
        os.mkfifo(tmp_path / "fifo")
        for token in "123":
            (tmp_path / token).touch()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PIPELINE_")}

        def interrupt(number, markers, *, apply="wait_after_three", change="", cluster=CLUSTER, seconds=5):
            (tmp_path / "my.yaml").write_text(cluster)
            line = [sys.executable, "-c", COMMAND.replace("{}", change, 1), "run", samples / "A.zarr", "--json"]
            line += ["--starts", "starts.txt", "--apply", f"waits:{apply}", "--out", "w.zarr", "--cluster", "my.yaml"]
            with subprocess.Popen(
                line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            ) as process:
                try:
                    for marker in markers:
                        while process.stderr.readline().strip() != marker:
                            assert process.poll() is None
                        pids = descendants(process.pid)
                        process.send_signal(number)
                    said, complained = process.communicate(timeout=seconds)
                finally:
                    process.kill()
            while any(map(is_alive, pids)):
                os.sched_yield()
            lines = [each for each in complained.splitlines() if each not in ("MARKER", "UNWINDING")]
            assert len(lines) == 1
            assert said.count("\n") == 1
            assert lines[0].removeprefix("error: ") in said
            return process.returncode, lines[0]

        return interrupt

    def test_workers_end_and_the_line_says_what_is_kept(self, interrupt, tmp_path):
        said = interrupt(signal.SIGTERM, ["MARKER"], seconds=10)
        assert said == (143, "error: terminated; 3 of 7 tasks finished and kept; go on with --resume")
        assert (tmp_path / "w.zarr.partial").exists()

    def test_the_second_ends_at_once(self, interrupt):
        said = interrupt(signal.SIGINT, ["MARKER", "UNWINDING"], change=NEVER_END, seconds=2)
        assert said == (130, "error: interrupted; 3 of 7 tasks finished and kept; go on with --resume")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
    def test_one_is_enough_however_long_unwinding_takes(self, interrupt, number):
        threads = "version: 1\nkwargs: {dashboard_address: null}\n"
        code, line = interrupt(number, ["MARKER"], change=f"{NEVER_END}\n{SOON}", cluster=threads)
        assert code == 128 + number
        assert "3 of 7 tasks finished and kept" in line

    def test_while_the_cluster_starts(self, interrupt, tmp_path):
        code, line = interrupt(signal.SIGINT, ["MARKER"], cluster=CLUSTER.replace("{", "{preload: [preload.py], "))
        assert (code, line) == (130, "error: interrupted; no task was finished; run it again")
        assert not list(tmp_path.glob("w.zarr*"))

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
    def test_while_it_plans(self, interrupt, number):
        code, line = interrupt(number, ["MARKER"], apply="wait_at_once")
        assert code == 128 + number
        assert line.endswith("no task was finished; run it again")
