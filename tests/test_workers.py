"""Workers in other processes: asked what they see and have before a run, and named where they fail in it."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import dask
import distributed
import numpy as np
import pytest

import pipeline
from pipeline.errors import OpenError
from pipeline.matrix.fingerprint import fingerprint_matrix, fingerprint_source
from pipeline.runtime import preflight as workers
from pipeline.runtime.preflight import IN_PROCESS, Answer, Terms, survey_workers
from pipeline.runtime.report import Watch
from tests.layouts import in_memory

LENGTH = 16
STARTS = [5, 1800, 900, 31, 32, 1234, 1984, 400, 401, 77, 650, 1500, 0, 299]


@pytest.fixture(scope="module")
def processes():
    with pipeline.connect(processes=True, n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        yield client


@pytest.fixture
def active(processes):
    with processes.as_current(), dask.config.set(scheduler="dask.distributed"):
        yield processes


@pytest.fixture
def windows(values):
    return np.stack([values[start : start + LENGTH] for start in STARTS])


@pytest.fixture
def plan(samples):
    return pipeline.plan_windows(pipeline.open_matrix(samples / "A.zarr"), STARTS, length=LENGTH)


def seen(matrix):
    """What workers must see of a matrix."""
    return fingerprint_matrix(matrix, np.sort(STARTS), LENGTH).sample()


def one_of(client):
    return min(client.scheduler_info(n_workers=-1)["workers"])


def change_versions(**changed):
    workers.find_versions.cache_clear()
    found = workers.find_versions()
    found.update(changed)
    for name in [name for name, value in changed.items() if value is None]:
        del found[name]


class TestSurvey:
    def test_all_see_all(self, active, plan):
        said = []
        survey = survey_workers([seen(plan.matrix)], say=said.append, reach=True)
        assert survey.shares
        assert survey.same_host
        assert not survey.in_process
        assert not said

    def test_threads_are_not_asked(self, monkeypatch):
        monkeypatch.setattr(workers, "_ask", lambda *_: pytest.fail("asked"))
        with pipeline.connect(dashboard_address=None):
            assert survey_workers(say=pytest.fail) is IN_PROCESS
        with dask.config.set(scheduler="threads"):
            assert survey_workers(say=pytest.fail) is IN_PROCESS

    @pytest.mark.skipif(not workers._OOM.exists(), reason="Linux only")
    def test_the_kernel_ends_workers_before_their_client(self, active, plan):
        before = workers._OOM.read_text()
        pipeline.gather(plan)
        assert [int(score) for score in active.run(workers._OOM.read_text).values()] == [500, 500]
        assert workers._OOM.read_text() == before

    def test_each_worker_is_asked_once(self, active, plan, monkeypatch):
        asked = []
        real = workers._ask
        monkeypatch.setattr(workers, "_ask", lambda *given: asked.append(given) or real(*given))
        pipeline.gather(plan)
        assert len(asked) == 1

    def test_one_that_does_not_see_the_matrix_is_named_with_the_path(self, active, plan, tmp_path):
        worker = one_of(active)
        active.run(lose, str(plan.matrix.path), workers=[worker])
        try:
            for sink in (pipeline.gather, lambda plan: pipeline.store(plan, tmp_path / "w.zarr")):
                message = rf"{re.escape(worker)} \(1 of 2 workers\) does not see zarr.json of file://{re.escape(plan.matrix.path)} \(\d+ bytes on the client, absent on the worker\); let it"
                with pytest.raises(OpenError, match=message) as caught:
                    sink(plan)
                assert caught.value.exit_code == 3
                assert "\n" not in str(caught.value)
        finally:
            active.run(find)

    def test_another_matrix_at_the_same_path(self, active, samples, tmp_path):
        """As on a worker whose disk has a matrix of the same shape."""
        shutil.copytree(samples / "A.zarr", tmp_path / "A.zarr")
        plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.zarr"), STARTS, length=LENGTH)
        sight = seen(plan.matrix)
        document = tmp_path / "A.zarr" / "zarr.json"
        document.write_bytes(document.read_bytes().replace(b'"shape"', b'"shapf"'))
        with pytest.raises(
            OpenError,
            match=r"does not see zarr\.json of .* \((\d+) bytes on the client, another file of \1 bytes on the",
        ):
            survey_workers([sight], say=pytest.fail)

    def test_one_that_does_not_see_the_output(self, active, plan, tmp_path):
        worker = one_of(active)
        active.run(lose, str(tmp_path / "w.zarr.partial"), workers=[worker])
        try:
            with pytest.raises(OpenError, match=f"{worker} .* does not see {tmp_path}/w.zarr.partial/output-"):
                pipeline.store(plan, tmp_path / "w.zarr")
            with pytest.raises(OpenError, match="does not see"):
                pipeline.create_matrix("random:1000x20", tmp_path / "w.zarr")
        finally:
            active.run(find)
        assert not list(tmp_path.iterdir())

    def test_what_is_verified(self, active, samples):
        worker = one_of(active)
        active.run(lose, str(samples / "A.zarr"), workers=[worker])
        try:
            with pytest.raises(OpenError, match=f"{worker} .* does not see {samples}/A.zarr: No such folder"):
                pipeline.verify(samples / "A.zarr")
        finally:
            active.run(find)
        assert pipeline.verify(samples / "A.zarr") == []

    @pytest.mark.parametrize(
        "changed",
        [{"random-windows": "9.9"}, {"python": "3.11.4"}, {"dask": "2026.7.9"}, {"zarr": "3.3.9"}, {"numpy": "1.26.4"}],
        ids=lambda each: next(iter(each)),
    )
    def test_versions_that_must_be_the_same(self, active, plan, changed):
        [(name, version)] = changed.items()
        worker = one_of(active)
        active.run(change_versions, workers=[worker], **changed)
        own = workers.find_versions()[name]
        try:
            message = re.escape(f"{worker} (1 of 2 workers) has {name} {version}, the client {own}; install the same")
            with pytest.raises(OpenError, match=message):
                pipeline.gather(plan)
        finally:
            active.run(change_versions)

    @pytest.mark.parametrize("changed", [{"numcodecs": "0.1"}, {"obstore": None}], ids=lambda each: next(iter(each)))
    def test_versions_that_may_differ_are_told_of(self, active, plan, windows, changed):
        [(name, version)] = changed.items()
        active.run(change_versions, **changed)
        try:
            with pytest.warns(UserWarning, match=f"on 2 workers differ from those here: {name} {version or 'none'} "):
                np.testing.assert_array_equal(pipeline.gather(plan), windows)
        finally:
            active.run(change_versions)

    def test_a_worker_without_this_package(self, active, plan, monkeypatch):
        lacks = ModuleNotFoundError("No module named 'pipeline'", name="pipeline")
        monkeypatch.setattr(workers, "_ask", lambda *_: {"tcp://a:1": lacks, "tcp://b:1": lacks})
        message = r"tcp://a:1 \(2 of 2 workers\) lacks a package: No module named 'pipeline'; install random-windows"
        with pytest.raises(OpenError, match=message):
            pipeline.gather(plan)

    def test_one_that_went_meanwhile_is_no_failure(self, active, plan, windows, monkeypatch):
        real = workers._ask
        monkeypatch.setattr(workers, "_ask", lambda *given: real(*given) | {"tcp://a:1": OSError("closed")})
        np.testing.assert_array_equal(pipeline.gather(plan), windows)

    def test_one_that_hangs_is_not_waited_for(self, active, plan, windows, monkeypatch):
        monkeypatch.setattr(workers, "_ANSWER_SECONDS", 1)
        pid = active.run(os.getpid)[one_of(active)]
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.warns(UserWarning, match="did not answer within 1 s"):
                survey = survey_workers(say=Watch().say)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert not survey.shares
        np.testing.assert_array_equal(pipeline.gather(plan), windows)

    def test_the_answer_is_plain_data(self, plan):
        terms = Terms("run", workers.find_versions(), (seen(plan.matrix),), "another machine")
        answer = workers._answer(pickle.loads(pickle.dumps(terms)), None)
        assert answer == Answer("", workers.find_versions(), shares=False, boot=workers._boot())
        assert len(pickle.dumps(terms)) < 2000


def lose(path):
    """Let a worker not see what begins with a path."""
    import os

    from pipeline.matrix import fingerprint
    from pipeline.runtime import preflight

    def guarded(name):
        return not name.startswith(path) and os.path.isdir(name)  # noqa: PTH112

    class Blind:
        path = type("path", (), {"isdir": staticmethod(guarded)})

        def __getattr__(self, name):
            return getattr(os, name)

    real = fingerprint.read_key
    fingerprint.read_key = lambda store, key: None if path in str(store) else real(store, key)
    preflight.os = Blind()


def find():
    import os

    from pipeline.matrix import fingerprint
    from pipeline.runtime import preflight
    from pipeline.storage.listing import read_key

    fingerprint.read_key, preflight.os = read_key, os


class TestLaterWorkers:
    """Those that come while a run goes are not asked: their tasks look themselves, once a run."""

    def test_a_task_says_which_does_not_see(self, active, plan, monkeypatch):
        worker = one_of(active)
        active.run(lose, str(plan.matrix.path), workers=[worker])
        monkeypatch.setattr(workers, "_judge", lambda replies: {})
        monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
        try:
            with pytest.raises(OpenError, match=f"{worker} does not see zarr.json of file://{plan.matrix.path}"):
                pipeline.gather(pipeline.plan_windows(plan.matrix, STARTS * 20, length=LENGTH))
        finally:
            active.run(find)

    def test_a_process_looks_once_a_run(self, monkeypatch):
        looked = []

        class Sight:
            def look(self):
                looked.append(1)
                return "" if len(looked) < 2 else "A.zarr: gone"

        for run in ("1", "1", "2", "2"):
            terms = Terms(run, workers.find_versions(), (Sight(),), "another machine")
            if run == "1":
                assert workers.do_on_worker(terms, divmod, 7, 2) == (3, 1)
            else:
                with pytest.raises(OpenError, match=r"does not see A\.zarr: gone; let it see"):
                    workers.do_on_worker(terms, divmod, 7, 2)
        assert len(looked) == 2

    def test_a_failure_names_its_worker(self, active, plan):
        with pytest.raises(pipeline.IntegrityError) as caught:
            pipeline.gather(plan, apply=fail_later)
        assert any(re.fullmatch(r"on worker tls://127\.0\.0\.1:\d+", note) for note in caught.value.__notes__)


def fail_later(block):
    if len(block) > 1:
        raise ValueError("later")
    return block


class TestStores:
    def test_a_store_is_looked_at_too(self, active, samples, windows):
        import zarr
        from obstore.store import LocalStore
        from zarr.storage import ObjectStore

        array = zarr.open_array(ObjectStore(LocalStore(samples / "A.zarr"), read_only=True), mode="r")
        plan = pipeline.plan_windows(pipeline.open_matrix(array), STARTS, length=LENGTH)
        sight = seen(plan.matrix)
        assert sight.look() == ""
        np.testing.assert_array_equal(pipeline.gather(plan), windows)
        [document] = sight.parts
        for changed, now in [({"key": "no.json"}, "absent"), ({"digest": "0" * 64}, r"another file of \d+ bytes")]:
            other = replace(sight, parts=(replace(document, **changed),))
            assert re.fullmatch(
                rf"\w+\.json of .*LocalStore.* \(\d+ bytes on the client, {now} on the worker\)", other.look()
            )

    def test_a_store_that_fails(self, samples, monkeypatch):
        import zarr

        sight = seen(pipeline.open_matrix(zarr.open_array(in_memory(samples / "A.zarr"), mode="r")))

        async def fail(*_, **__):
            raise TimeoutError("no answer")

        monkeypatch.setattr(zarr.storage.MemoryStore, "get", fail)
        assert sight.look() == "the source: TimeoutError: no answer"

    @pytest.mark.parametrize("name", ["A.npy", "A.zarr"])
    def test_sources(self, active, samples, name, tmp_path, values):
        sight = fingerprint_source(pipeline.matrix.formats.open_source(samples / name)).sample()
        assert len(sight.parts) == 1
        assert sight.look() == ""
        matrix = pipeline.create_matrix(samples / name, tmp_path / "B.zarr")
        np.testing.assert_array_equal(matrix.array[:], values)


WORKER = """
import asyncio, sys
from distributed import Worker

async def main():
    async with Worker(sys.argv[1], nthreads=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as worker:
        print(worker.address, flush=True)
        await worker.finished()

asyncio.run(main())
"""


@contextmanager
def namespaced_worker(address, cwd):
    """Start a worker that sees no process of ours, as one on another host or in another container."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", WORKER, address]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def can_unshare():
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return shutil.which("unshare") and not subprocess.run(command, capture_output=True, check=False).returncode


@pytest.fixture(scope="class")
def remote(tmp_path_factory):
    if not can_unshare():
        pytest.skip("needs namespaces")
    kwargs = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}
    with (
        distributed.LocalCluster(n_workers=0, processes=True, silence_logs=50, **kwargs) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        namespaced_worker(cluster.scheduler_address, tmp_path_factory.mktemp("remote")),
    ):
        client.wait_for_workers(1, timeout=60)
        yield client


@pytest.fixture
def away(remote):
    with remote.as_current(), dask.config.set(scheduler="dask.distributed"):
        yield remote


class TestRemote:
    def test_blocks_come_straight_from_the_worker(self, away, plan, windows, monkeypatch):
        monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
        survey = survey_workers(say=pytest.fail, reach=True)
        assert (survey.shares, survey.same_host, survey.reached) == (False, True, True)
        before = count_gathers(away)
        np.testing.assert_array_equal(pipeline.gather(plan), windows)
        assert count_gathers(away) == before

    def test_by_way_of_the_scheduler_where_the_worker_cannot_be_reached(self, away, plan, windows, monkeypatch):
        monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
        monkeypatch.setattr(workers, "_REACH_SECONDS", 0)
        before = count_gathers(away)
        with pytest.warns(UserWarning, match="through the scheduler, .* cannot connect to tcp://127.0.0.1:") as said:
            np.testing.assert_array_equal(pipeline.gather(plan), windows)
        assert len(said) == 1
        assert count_gathers(away) > before

    def test_every_sink(self, away, plan, windows, tmp_path):
        out = np.empty_like(windows)
        pipeline.gather(plan, out=out, apply=np.negative)
        np.testing.assert_array_equal(out, -windows)
        np.testing.assert_array_equal(pipeline.gather(plan, out=tmp_path / "w.npy"), windows)
        np.testing.assert_array_equal(pipeline.store(plan, tmp_path / "w.zarr")["windows"][:], windows)

    def test_memory_of_another_machine_bounds_nothing_here(self, away, plan, monkeypatch):
        """The client holds blocks; what tasks hold beside them is the worker's affair."""
        from pipeline.sinks.gather import prepare_gathering

        out = np.empty((len(STARTS), LENGTH, 20))
        gathering = prepare_gathering(plan, apply=None, out=out, resume=False, overwrite=False)
        here = survey_workers(say=pytest.fail)
        monkeypatch.setattr(workers, "_boot", lambda: "another")
        there = survey_workers(say=pytest.fail)
        assert not there.same_host
        assert there.bound(3) > 10**9
        assert here.bound(3) == 3
        block = plan.nbytes
        difference = gathering.footprint(survey=here).peak_nbytes - gathering.footprint(survey=there).peak_nbytes
        assert difference >= plan.reading_nbytes + block - 2**20


def count_gathers(client):
    """Blocks that passed through the scheduler."""

    def count(dask_scheduler):
        return sum(event.get("action") == "gather" for _, event in dask_scheduler.get_events("all"))

    return client.run_on_scheduler(count)


def test_a_closed_port_is_not_reached():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    with pipeline.connect(dashboard_address=None) as client:
        assert client.sync(workers._find_unreached, client, [address]) == address
        assert client.sync(workers._find_unreached, client, list(client.scheduler_info()["workers"])) == ""
