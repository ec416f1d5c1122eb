"""Workers that are lost during a run: counted, logged with the time, and reported, with what ended them."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import dask
import distributed
import numpy as np
import pytest

import pipeline
from pipeline.cluster import worker_exits as nannies
from pipeline.cluster.connect import connect
from pipeline.cluster.dashboard import dashboard_link
from pipeline.integrity.verify import prepare_verification
from pipeline.runtime import lost_workers as losses
from pipeline.runtime.lost_workers import Loss
from pipeline.runtime.report import Watch
from pipeline.sinks.create import plan_creation
from pipeline.sinks.gather import prepare_gathering
from pipeline.sinks.store import prepare_storing

LIMIT = 400_000_000
LENGTH = 16
STARTS = list(range(0, 1900, 100))
VICTIM = STARTS[7] * 20 + 1.0
"""First value of one window."""
KILLED = r"its process on \S+ was killed by SIGKILL"


@pytest.fixture(scope="module")
def processes():
    kwargs = {"n_workers": 2, "processes": True, "threads_per_worker": 1, "memory_limit": LIMIT}
    with connect(dashboard_address=None, **kwargs) as client:
        yield client


@pytest.fixture
def two(processes):
    """Two worker processes, however many were killed before."""
    with processes.as_current(), dask.config.set(scheduler="dask.distributed"):
        processes.wait_for_workers(2, timeout=60)
        yield processes


@pytest.fixture
def plan(samples, monkeypatch):
    """Nineteen tasks of one window."""
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", 19)
    return pipeline.plan_windows(pipeline.open_matrix(samples / "A.zarr"), STARTS, length=LENGTH)


@pytest.fixture
def sums(values):
    return np.stack([values[start : start + LENGTH] for start in STARTS]).sum(axis=(1, 2))


def workers_of(client):
    return set(client.scheduler_info(n_workers=-1)["workers"])


def kill_one(client):
    """Kill a worker's process, and return its address once the scheduler has noticed."""
    address, pid = min(client.run(os.getpid).items())
    os.kill(pid, signal.SIGKILL)
    while address in workers_of(client):
        os.sched_yield()
    return address


def count_wanted(dask_scheduler):
    """Tasks whose results the client asks for."""
    return sum(bool(task.who_wants) for task in dask_scheduler.tasks.values())


def count_ready(dask_worker):
    """Tasks that wait for a thread of the worker."""
    return len(dask_worker.state.ready)


class Killer(Watch):
    """Kills a worker when the first task is done."""

    def __init__(self, client, kill=kill_one):
        super().__init__()
        self.client, self.kill, self.killed, self.logged = client, kill, None, []

    def task_done(self, receipt):
        super().task_done(receipt)
        if self.killed is None:
            self.killed = self.kill(self.client)

    def log(self, line):
        self.logged.append(line)


def killing_once(gone, block):
    """Sum a window; the first time, end like a process that is killed."""
    if not gone.exists() and (block[:, 0, 0] == VICTIM).any():
        gone.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return block.sum(axis=(1, 2))


def growing_once(gone, block):
    """Hold more than a worker may, once, until it is ended."""
    if not gone.exists() and (block[:, 0, 0] == VICTIM).any():
        gone.touch()
        held = np.ones(LIMIT // 8)
        while True:
            time.sleep(held[0])
    return block.sum(axis=(1, 2))


def create(samples, folder, plan, watch):
    settings = {"dtype": None, "row_shape": None, "dataset": None, "axis": 0, "seed": 0, "length": LENGTH}
    settings |= {"shard_rows": 64, "chunk_rows": 8, "memory": None, "compress": None}
    plan_creation(samples / "A.npy", folder / "B.zarr", resume=False, overwrite=False, **settings).run(watch)


def gather(samples, folder, plan, watch):
    given = {"apply": None, "out": None, "resume": False, "overwrite": False}
    prepare_gathering(plan, **given).run(watch)


def store(samples, folder, plan, watch):
    given = {"apply": None, "order": "request", "resume": False, "overwrite": False}
    prepare_storing(plan, folder / "w.zarr", **given).run(watch)


def verify(samples, folder, plan, watch):
    assert prepare_verification(samples / "A.zarr", subset=1.0, seed=0, manifest=None).run(watch) == []


class TestKilled:
    @pytest.mark.parametrize("sink", [create, gather, store, verify], ids=lambda each: each.__name__)
    def test_each_verb_counts_and_logs_it(self, two, sink, samples, plan, tmp_path):
        sink(samples, tmp_path, plan, watch := Killer(two))
        assert watch.workers_lost == [watch.killed]
        [line] = watch.logged
        assert re.fullmatch(rf"worker {watch.killed} was lost: {KILLED}(; \d+ tasks? run again)?", line)

    def test_tasks_that_are_run_again_are_counted(self, two, plan, sums, tmp_path, caplog):
        apply = functools.partial(killing_once, tmp_path / "gone")
        with caplog.at_level(logging.WARNING, "pipeline"), pipeline.Report() as report:
            got = pipeline.store(plan, tmp_path / "w.zarr", apply=apply)["windows"][:]
            two.wait_for_workers(2, timeout=60)
            (tmp_path / "gone").unlink()
            np.testing.assert_array_equal(pipeline.gather(plan, apply=apply), sums)
            two.wait_for_workers(2, timeout=60)
            (tmp_path / "gone").unlink()
            with pipeline.iter_batches(plan, 19, apply=apply) as batches:
                np.testing.assert_array_equal(np.concatenate(list(batches)), sums)
        np.testing.assert_array_equal(got, sums)
        numbers = report.numbers()
        for run in numbers["runs"]:
            # On a machine that is slow to start another, Dask may close a nanny, too.
            assert run["workers_lost"] >= 1
            assert run["retries"] == 0
            assert 1 <= run["tasks_rerun"] <= 19 * run["workers_lost"]
        for name in ("workers_lost", "tasks_rerun"):
            assert numbers[name] == sum(run[name] for run in numbers["runs"])
        said = [record.getMessage() for record in caplog.records if record.name == "pipeline"]
        assert len(said) == numbers["workers_lost"]
        line = rf"\d\d:\d\d:\d\d worker t(?:cp|ls)://\S+ was lost: {KILLED}; \d+ tasks? run again"
        assert len([each for each in said if re.fullmatch(line, each)]) == 3
        assert re.search(r"\d, \d+ tasks run again; the last: t(cp|ls)://\S+ at \d\d:\d\d:\d\d, it", repr(report))
        assert "workers lost" in report._repr_html_()

    def test_what_was_taken_is_not_made_again(self, two, plan, tmp_path):
        """The scheduler makes results anew that were lost with a worker, as long as somebody holds them."""
        counted, told = tmp_path / "counted", tmp_path / "told"

        def count(block):
            with counted.open("ab") as file:
                file.write(b"x" * len(block))
            made = tmp_path / str(block[0, 0, 0])
            while made.exists() and not told.exists():
                time.sleep(0.01)
            made.touch()
            return block.sum(axis=(1, 2))

        given = {"apply": count, "order": "request", "resume": False, "overwrite": False}

        class Last(Killer):
            def task_done(self, receipt):
                if self.done_tasks == 17:
                    # All but the last are in the hands of the run.
                    super().task_done(receipt)
                else:
                    Watch.task_done(self, receipt)

            def worker_lost(self, loss):
                # The last two may be lost, and what each of two threads has begun.
                while two.run_on_scheduler(count_wanted) > 2 or sum(two.run(count_ready).values()) > 2:
                    os.sched_yield()
                told.touch()
                super().worker_lost(loss)

        storing = prepare_storing(plan, tmp_path / "w.zarr", **given)
        before = counted.stat().st_size
        storing.run(watch := Last(two))
        assert watch.workers_lost == [watch.killed]
        assert counted.stat().st_size - before <= 19 + 4

    def test_one_that_its_nanny_ends_for_its_memory(self, two, plan, sums, tmp_path):
        given = {"out": None, "resume": False, "overwrite": False}
        apply = functools.partial(growing_once, tmp_path / "gone")
        watch = Killer(two, kill=lambda _: "nobody")
        np.testing.assert_array_equal(prepare_gathering(plan, apply=apply, **given).run(watch), sums)
        [line] = watch.logged
        held = r"its nanny ended it, since it held \d+ MiB, too near to its memory_limit; \d+ tasks? run again"
        assert re.search(held, line)

    def test_the_command_line_says_so(self, program, samples, tmp_path):
        (tmp_path / "ends.py").write_text(
            "import os, signal\n"
            "def once(block):\n"
            "    if len(block) > 1 and not os.path.exists('gone'):\n"
            "        open('gone', 'w').close()\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return block.sum(axis=(1, 2))\n"
        )
        line = [program, "run", samples / "A.zarr", "--count", "300", "--apply", "ends:once", "--workers", "2"]
        said = subprocess.run([*line, "--json"], cwd=tmp_path, capture_output=True, text=True, check=True)
        numbers = json.loads(said.stdout)
        assert (numbers["workers_lost"], numbers["retries"]) == (1, 0)
        assert numbers["tasks_rerun"] >= 1
        [logged] = [each for each in said.stderr.splitlines() if "lost" in each]
        assert re.fullmatch(rf"\d\d:\d\d:\d\d worker \S+ was lost: {KILLED}; \d+ tasks? run again", logged)
        (tmp_path / "gone").unlink()
        words = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert re.search(r"^workers lost +1, \d+ tasks? run again; the last: t(cp|ls)://", words.stdout, re.MULTILINE)


class TestOthers:
    def test_one_that_is_retired_is_not_lost(self, two, samples, plan, tmp_path):
        def retire(client):
            worker = min(workers_of(client))
            client.retire_workers([worker])
            while worker in workers_of(client):
                os.sched_yield()
            return worker

        store(samples, tmp_path, plan, watch := Killer(two, kill=retire))
        assert (watch.workers_lost, watch.logged) == ([], [])
        assert watch.done_tasks == 19

    def test_one_that_closes_says_why(self, two, samples, plan, tmp_path):
        def close(client):
            worker = min(workers_of(client))
            client.run(lambda dask_worker: dask_worker.loop.add_callback(dask_worker.close), workers=[worker])
            while worker in workers_of(client):
                os.sched_yield()
            return worker

        store(samples, tmp_path, plan, watch := Killer(two, kill=close))
        assert watch.workers_lost == [watch.killed]
        assert "was lost: it closed (worker-close)" in watch.logged[0]

    def test_a_cluster_of_somebody_else(self, samples, plan, tmp_path):
        """No nanny tells its end; the loss is known all the same, and what nannies say of memory."""
        keywords = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": "127.0.0.1:0"}
        with (
            distributed.LocalCluster(**keywords) as cluster,
            connect(scheduler_address=cluster.scheduler_address) as client,
        ):
            client.wait_for_workers(2, timeout=60)
            store(samples, tmp_path, plan, watch := Killer(client))
        assert watch.workers_lost == [watch.killed]
        assert "was lost: how it ended is not known; look at its log" in watch.logged[0]

    def test_handlers_of_the_users_own_are_kept(self, two, samples, plan, tmp_path):
        heard = []
        two.subscribe_topic("all", heard.append)
        try:
            store(samples, tmp_path, plan, watch := Killer(two))
            two.log_event("all", {"action": "mine"})
            while not any(event.get("action") == "mine" for _, event in heard):
                os.sched_yield()
        finally:
            two.unsubscribe_topic("all")
        assert watch.workers_lost == [watch.killed]
        assert watch.killed in {event.get("worker") for _, event in heard if event.get("action") == "remove-worker"}

    def test_nothing_is_heard_between_runs(self, two, samples, plan, tmp_path):
        store(samples, tmp_path, plan, Watch())
        stream = losses._streams[two]
        assert stream._runs == []
        kill_one(two)
        two.wait_for_workers(2, timeout=60)
        (tmp_path / "second").mkdir()
        store(samples, tmp_path / "second", plan, watch := Watch())
        assert watch.losses == []

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"exitcode": -9}, "its process on n1 was killed by SIGKILL"),
            ({"exitcode": -200}, "its process on n1 was killed by -200"),
            ({"exitcode": 3}, "its process on n1 ended with exit code 3"),
            ({"exitcode": 255}, "its process on n1 was killed by a signal"),
            (
                {"exitcode": -9, "short_of_memory": True},
                "its process on n1 was killed by SIGKILL, and the kernel has ended a process there for want of memory",
            ),
        ],
    )
    def test_how_it_ended(self, given, words):
        assert losses._say_exit({"host": "n1", "short_of_memory": False} | given) == words

    @pytest.mark.parametrize("kills", [["5", "6"], ["5", "5"]])
    def test_what_the_kernel_counts(self, kills, monkeypatch):
        counts = iter(kills)
        monkeypatch.setattr(Path, "read_text", lambda _: f"pgfault 7\noom_kill {next(counts)}\n")
        told, handled = [], []
        nanny = SimpleNamespace(
            _on_worker_exit_sync=handled.append,
            process=SimpleNamespace(on_exit=None),
            worker_address="tcp://w:1",
            status=SimpleNamespace(name="running"),
            log_event=lambda topic, event: told.append((topic, event)),
        )
        nannies._make_watch(nannies.EXITS).setup(nanny)
        nanny.process.on_exit(-9)
        assert handled == [-9]
        [(topic, event)] = told
        assert topic == nannies.EXITS
        assert (event["worker"], event["exitcode"]) == ("tcp://w:1", -9)
        assert event["short_of_memory"] == (kills == ["5", "6"])

    def test_a_loss_that_two_groups_of_batches_hear_of_is_one(self, caplog):
        watch = Watch()
        for tasks in (2, 3):
            watch.worker_lost(Loss("tcp://w:1", 7.0, tasks, "killed"))
        watch.worker_lost(Loss("tcp://w:1", 8.0, 1, "killed"))
        watch.worker_lost(Loss("tcp://w:2", 8.0, 4, "retired", expected=True))
        assert (watch.workers_lost, watch.tasks_rerun) == (["tcp://w:1", "tcp://w:1"], 10)
        assert len(caplog.records) == 2


@pytest.mark.ssh
def test_hosts_over_ssh(ssh_service, processes, samples, plan, tmp_path):
    """Beside another cluster, which keeps the processes that it starts quiet: Dask learns addresses from the log."""
    assert processes.status == "running"
    kwargs = {
        "hosts": list(ssh_service.hosts),
        "connect_options": {"config": [str(ssh_service.config)]},
        "worker_options": {"nthreads": 1},
        "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
        "remote_python": sys.executable,
    }
    lose_one(samples, plan, tmp_path, {"class": "SSHCluster", "kwargs": kwargs})


@pytest.mark.slurm
def test_jobs_of_slurm(slurm_service, samples, plan, tmp_path):
    kwargs = {"cores": 1, "memory": "1GB", "interface": "lo", "log_directory": str(tmp_path / "logs")}
    kwargs |= {"local_directory": str(tmp_path), "shared_temp_directory": str(tmp_path)}
    file = {"module": "dask_jobqueue", "class": "SLURMCluster", "kwargs": kwargs, "scale": {"jobs": 2}}
    lose_one(samples, plan, tmp_path, file)


def lose_one(samples, plan, folder, file):
    """Kill a worker of the cluster of a file; links lead where something listens."""
    (folder / "my.yaml").write_text(json.dumps({"version": 1} | file))
    with connect(folder / "my.yaml") as client:
        client.wait_for_workers(2, timeout=60)
        link = dashboard_link(client)
        assert (client.dashboard_link, client.cluster.dashboard_link) == (link, link)
        assert f'href="{link}"' in client._repr_html_()
        with urlopen(link) as response:
            assert response.status == 200
        store(samples, folder, plan, watch := Killer(client))
        assert watch.workers_lost == [watch.killed]
        assert re.match(rf"worker {watch.killed} was lost: {KILLED}", watch.logged[0])
