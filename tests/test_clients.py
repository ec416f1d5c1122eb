"""Connections that are kept as objects, and clients that the caller has made: limited, without workers, or failed."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys

import dask
import distributed
import numpy as np
import pytest

import pipeline
from pipeline.cluster import connect as module
from pipeline.cluster.connect import connect
from pipeline.errors import BudgetError, OpenError
from pipeline.memory import Budget, resident_nbytes
from pipeline.runtime import resources as capacity


@pytest.fixture(autouse=True)
def _settings(tmp_path, monkeypatch):
    """A working directory without a cluster.yaml; Dask's settings come back as they were."""
    monkeypatch.chdir(tmp_path)
    before = copy.deepcopy(dask.config.config)
    yield
    assert dask.config.config == before


def test_a_connection_is_an_object_too(capfd):
    settings = copy.deepcopy(dask.config.config)
    cluster = connect(threads=3)
    link = capfd.readouterr().err.split()[1]
    assert distributed.get_client() is cluster.client
    assert repr(cluster) == f"<Connection: 1 worker, 3 threads, dashboard {link}>"
    assert cluster.dashboard_link == link
    with cluster as client:
        assert client is cluster.client
        assert client.submit(sum, [1, 2]).result() == 3
    assert repr(cluster) == "<Connection: closed>"
    cluster.close()
    cluster.close()
    assert dask.config.config == settings
    with pytest.raises(ValueError, match="No global client"):
        distributed.get_client()


def test_gather_uses_a_connection_that_nobody_holds(samples):
    connect(dashboard_address=None)
    client = distributed.get_client()
    try:
        gc.collect()
        plan = pipeline.plan_windows(pipeline.open_matrix(samples / "A.zarr"), [5, 9], length=4)
        before = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.transition_counter)
        assert pipeline.gather(plan).shape == (2, 4, 20)
        assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.transition_counter) > before
    finally:
        for connection in list(module._connections):
            connection.close()
    assert client.status == "closed"


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_connection_that_is_never_closed_ends_without_noise(tmp_path, kind):
    script = tmp_path / "script.py"
    script.write_text(
        "import pipeline\n"
        "if __name__ == '__main__':\n"
        f"    cluster = pipeline.connect(dashboard_address=None, processes={kind == 'processes'}, n_workers=1)\n"
        "    print(cluster.client.submit(sum, [1, 2]).result())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def planned(samples, count=5):
    matrix = pipeline.open_matrix(samples / "A.zarr")
    return pipeline.plan_windows(matrix, np.arange(count), length=16)


def use(samples, tmp_path):
    """Every function that runs tasks."""
    plan = planned(samples)
    values = np.load(samples / "A.npy")
    wanted = np.stack([values[start : start + 16] for start in range(5)])
    assert np.array_equal(pipeline.gather(plan), wanted)
    assert np.array_equal(pipeline.gather(plan, out=tmp_path / "w.npy", overwrite=True), wanted)
    pipeline.store(plan, tmp_path / "w.zarr", overwrite=True)
    pipeline.create_matrix(samples / "A.npy", tmp_path / "A.zarr", overwrite=True)
    assert pipeline.verify(tmp_path / "A.zarr") == []
    with pipeline.iter_batches(plan, 2) as batches:
        assert np.array_equal(np.concatenate(list(batches)), wanted)


@pytest.mark.parametrize("options", [{}, {"n_workers": 2}, {"protocol": "tcp"}, {"memory_limit": "4GB"}])
def test_workers_in_process_may_have_a_memory_limit(samples, tmp_path, options):
    """As the default ones of notebooks have: the memory of the machine, by the number of workers."""
    with distributed.Client(processes=False, dashboard_address="127.0.0.1:0", **options):
        use(samples, tmp_path)


def test_what_would_pause_a_worker_in_process_is_refused(samples, tmp_path):
    """It measures all of the process, the result among it, and would never go on."""
    limit = resident_nbytes() + 300 * 2**20
    with distributed.Client(
        processes=False, n_workers=1, memory_limit=2 * limit, dashboard_address="127.0.0.1:0"
    ) as client:
        assert pipeline.gather(planned(samples)).shape == (5, 16, 20)
        room = 1.6 * limit - resident_nbytes()
        large = planned(samples, 1_900)
        plan = pipeline.plan_windows(large.matrix, np.tile(large.starts, int(room / large.nbytes) + 1), length=16)
        out = np.empty((len(plan), 16, 20))
        for how in ({}, {"out": out}, {"out": tmp_path / "w.npy"}):
            with pytest.raises(BudgetError, match="not enough memory for the client's workers.*memory_limit=0"):
                pipeline.gather(plan, **how)
        with dask.config.set({"distributed.worker.memory.pause": False}):
            assert pipeline.gather(planned(samples)).shape == (5, 16, 20)
        pipeline.store(plan, tmp_path / "w.zarr")
        assert client.status == "running"


def test_a_worker_that_has_hardly_room_left_gets_fewer_tasks(monkeypatch):
    monkeypatch.setattr(capacity, "_worker_room", lambda _: Budget(400 * 2**20, "a limit"))
    footprint = capacity.fit_memory(100 * 2**20, None, threads=16, what="a task")
    assert footprint.at_once == footprint.fits == 3


def test_a_client_without_workers_is_refused_in_time(samples, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_WORKER_SECONDS", 0.3)
    cluster = distributed.LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0")
    with cluster, distributed.Client(cluster):
        for run in (
            lambda: pipeline.gather(planned(samples)),
            lambda: pipeline.store(planned(samples), tmp_path / "w.zarr"),
            lambda: pipeline.create_matrix(samples / "A.npy", tmp_path / "A.zarr"),
            lambda: pipeline.verify(samples / "A.zarr"),
            lambda: next(iter(pipeline.iter_batches(planned(samples), 2))),
        ):
            with pytest.raises(OpenError, match="must have a worker within 0.3 s; got none of LocalCluster"):
                run()


def test_a_cluster_that_adapts_is_asked_for_its_first_worker(samples):
    cluster = distributed.LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0")
    with cluster, distributed.Client(cluster):
        cluster.adapt(minimum=0, maximum=1, interval="50ms")
        assert pipeline.gather(planned(samples)).shape == (5, 16, 20)


@pytest.mark.parametrize("setting", ["scheduler", "keyword"])
def test_a_client_that_failed_to_start_is_none(samples, tmp_path, setting):
    script = tmp_path / "script.py"
    wrong = {"scheduler": "scheduler_port=-5", "keyword": "no_such_keyword=1"}[setting]
    script.write_text(
        "import contextlib, logging, sys, distributed, numpy as np, pipeline\n"
        "logging.disable()\n"
        "with contextlib.suppress(TypeError, RuntimeError):\n"
        f"    distributed.Client(processes=False, dashboard_address='127.0.0.1:0', {wrong})\n"
        "matrix = pipeline.open_matrix(sys.argv[1])\n"
        "plan = pipeline.plan_windows(matrix, np.arange(5), length=16)\n"
        "with pipeline.iter_batches(plan, 2) as batches:\n"
        "    assert np.array_equal(np.concatenate(list(batches)), pipeline.gather(plan))\n"
        "pipeline.store(plan, sys.argv[2])\n"
        "print(pipeline.verify(sys.argv[2]))\n"
    )
    command = [sys.executable, script, samples / "A.zarr", tmp_path / "w.zarr"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
