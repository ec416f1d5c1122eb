"""One contract, every cluster: the same job through threads, processes, TLS, SSH and Slurm equals plain NumPy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pytest
import zarr
from obstore.store import S3Store
from zarr.storage import ObjectStore

import pipeline
from pipeline.runtime.report import Watch
from pipeline.sinks.store import prepare_storing

if TYPE_CHECKING:
    from pathlib import Path

    import distributed

LENGTH = 16
VARIANTS = (
    "threads",
    "in-process",
    "processes",
    pytest.param("tls", marks=pytest.mark.tls),
    pytest.param("ssh", marks=pytest.mark.ssh),
    pytest.param("slurm", marks=pytest.mark.slurm),
)
SIZES = {
    "small": (8_000, 200, 500, {"shard_rows": 640, "chunk_rows": 4}),
    "sixteenth": (125_000, 2_000, 625, {}),
}


@dataclass(frozen=True)
class Sample:
    """A matrix of counted values, windows of it, and what they are."""

    source: Path
    matrix: Path
    starts: np.ndarray
    expected: np.ndarray
    settings: dict[str, Any]
    """With which the matrix was made."""


@pytest.fixture(
    scope="module", params=["small", pytest.param("sixteenth", marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def sample(request, tmp_path_factory):
    rows, columns, count, settings = SIZES[request.param]
    folder = tmp_path_factory.mktemp("sample")
    values = np.lib.format.open_memmap(folder / "A.npy", "w+", "f8", (rows, columns))
    for first in range(0, rows, 5_000):
        values[first : first + 5_000] = np.arange(1 + first * columns, 1 + min(first + 5_000, rows) * columns).reshape(
            -1, columns
        )
    pipeline.create_matrix(folder / "A.npy", folder / "A.zarr", **settings)
    starts = np.random.default_rng(5).integers(0, rows - LENGTH + 1, count)
    starts[:2] = rows - LENGTH, 0
    expected = np.stack([values[start : start + LENGTH] for start in starts])
    yield Sample(folder / "A.npy", folder / "A.zarr", starts, expected, settings)
    # Pytest keeps the folders of some runs: not gigabytes.
    shutil.rmtree(folder)


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs."""

    name: str
    file: Path | None
    """Its `cluster.yaml`; None for Dask's threads, where there is no cluster."""
    client: distributed.Client | None


def describe(name: str, folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the `cluster.yaml` of a variant says; as little as it can."""
    if name == "in-process":
        return {}
    if name == "processes":
        return {"kwargs": {"processes": True, "n_workers": 2, "threads_per_worker": 1, "memory_limit": "1GB"}}
    if name == "tls":
        return json.loads(request.getfixturevalue("tls_service").read_text())
    if name == "ssh":
        server = request.getfixturevalue("ssh_service")
        kwargs = {
            "hosts": list(server.hosts),
            "connect_options": {"config": [str(server.config)]},
            "worker_options": {"nthreads": 1, "memory_limit": "1GB", "local_directory": str(folder)},
            "remote_python": sys.executable,
        }
        return {"module": "dask.distributed", "class": "SSHCluster", "kwargs": kwargs}
    request.getfixturevalue("slurm_service")
    kwargs = {
        "cores": 1,
        "processes": 1,
        "memory": "1GB",
        "walltime": "00:10:00",
        "interface": "lo",
        "log_directory": str(folder),
        "local_directory": str(folder),
        "shared_temp_directory": str(folder),
    }
    return {"module": "dask_jobqueue", "class": "SLURMCluster", "kwargs": kwargs, "scale": {"jobs": 2}}


@pytest.fixture(scope="module", params=VARIANTS)
def cluster(request, tmp_path_factory):
    name = request.param
    if name == "threads":
        yield Cluster(name, None, None)
        return
    folder = tmp_path_factory.mktemp(name)
    file = folder / "cluster.yaml"
    file.write_text(json.dumps({"version": 1, **describe(name, folder, request)}))
    with pipeline.connect(file) as client:
        client.wait_for_workers(1 if name == "in-process" else 2, timeout=60)
        yield Cluster(name, file, client)


@pytest.fixture(autouse=True)
def _scheduler(cluster):
    """Whatever Dask's settings became: the cluster, or threads."""
    with dask.config.set(scheduler="threads" if cluster.client is None else "dask.distributed"):
        yield


@pytest.fixture
def plan(sample, monkeypatch):
    """A plan of some more tasks than there are threads."""
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", 24)
    return pipeline.plan_windows(pipeline.open_matrix(sample.matrix), sample.starts, length=LENGTH)


def test_gather(plan, sample, cluster):
    np.testing.assert_array_equal(pipeline.gather(plan), sample.expected, strict=True)


def test_gather_into_a_file(plan, sample, cluster, tmp_path):
    pipeline.gather(plan, out=tmp_path / "w.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), sample.expected, strict=True)


def test_gather_what_a_function_makes_of_it(plan, sample, cluster):
    got = pipeline.gather(plan, apply=lambda block: block[:, ::5].sum(axis=1))
    np.testing.assert_array_equal(got, sample.expected[:, ::5].sum(axis=1), strict=True)


@pytest.mark.parametrize("order", ["request", "chunk"])
def test_store(plan, sample, cluster, order, tmp_path):
    pipeline.store(plan, tmp_path / "w.zarr", order=order)
    group = zarr.open_group(tmp_path / "w.zarr", mode="r")
    places = np.arange(len(sample.starts)) if order == "request" else group["places"][:]
    np.testing.assert_array_equal(np.sort(places), np.arange(len(sample.starts)))
    np.testing.assert_array_equal(group["windows"][:], sample.expected[places], strict=True)
    np.testing.assert_array_equal(group["starts"][:], sample.starts[places])


def test_create_and_verify(sample, cluster, tmp_path):
    pipeline.create_matrix(sample.source, tmp_path / "B.zarr", **sample.settings)
    array, values = zarr.open_array(tmp_path / "B.zarr", mode="r"), np.load(sample.source, mmap_mode="r")
    for first in range(0, len(values), 10_000):
        np.testing.assert_array_equal(array[first : first + 10_000], values[first : first + 10_000], strict=True)
    assert pipeline.verify(tmp_path / "B.zarr") == []
    with (tmp_path / "B.zarr" / "c" / "5" / "0").open("r+b") as file:
        file.seek(77)
        byte = file.read(1)
        file.seek(77)
        file.write(bytes([byte[0] ^ 1]))
    assert len(pipeline.verify(tmp_path / "B.zarr")) == 1
    shutil.rmtree(tmp_path / "B.zarr")


class Killer(Watch):
    """Kills a worker that is busy when the first task is in the journal; all other tasks wait for that."""

    def __init__(self, client, killed):
        super().__init__()
        self._client, self._killed, self.pid = client, killed, None

    def task_done(self, receipt):
        super().task_done(receipt)
        if self.pid is None:
            while not (busy := [worker for worker, keys in self._client.processing().items() if keys]):
                time.sleep(0.01)
            self.pid = self._client.run(os.getpid, workers=busy[:1])[busy[0]]
            assert self.pid != os.getpid()
            os.kill(self.pid, signal.SIGKILL)
            self._killed.touch()


def test_a_worker_that_is_killed(plan, sample, cluster, tmp_path):
    if cluster.name in ("threads", "in-process"):
        pytest.skip("its worker is this process")
    first, killed = tmp_path / "first", tmp_path / "killed"

    def wait(block):
        try:
            first.touch(exist_ok=False)
        except FileExistsError:
            end = time.monotonic() + 60
            while not killed.exists() and time.monotonic() < end:
                time.sleep(0.01)
        return block

    killer = Killer(cluster.client, killed)
    storing = prepare_storing(plan, tmp_path / "w.zarr", apply=wait, order="request", resume=False, overwrite=False)
    first.unlink()  # `apply` is tried on one window.
    result = storing.run(killer)
    assert killer.pid is not None
    assert killer.done_tasks > 10
    np.testing.assert_array_equal(result["windows"][:], sample.expected, strict=True)
    assert not (tmp_path / "w.zarr.partial").exists()
    cluster.client.wait_for_workers(2, timeout=60)
    assert killer.pid not in cluster.client.run(os.getpid).values()
    assert pipeline.verify(tmp_path / "w.zarr") == []


@pytest.mark.s3
def test_matrix_and_result_in_a_bucket(sample, cluster, bucket, monkeypatch):
    """Workers elsewhere have no credentials of their own: these go with the tasks."""
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", 4)
    options = {
        "endpoint": bucket.proxy.url,
        "allow_http": True,
        "region": "us-east-1",
        "access_key_id": "loopback",
        "secret_access_key": "loopback",
    }
    pipeline.create_matrix(sample.source, f"{bucket.url}/B.zarr", storage_options=options, **sample.settings)
    store = ObjectStore(S3Store.from_url(f"{bucket.url}/B.zarr"), read_only=True)
    np.testing.assert_array_equal(
        zarr.open_array(store, mode="r")[:5_000], np.load(sample.source, mmap_mode="r")[:5_000]
    )
    matrix = pipeline.open_matrix(f"{bucket.url}/B.zarr", storage_options=options)
    plan = pipeline.plan_windows(matrix, sample.starts, length=LENGTH)
    np.testing.assert_array_equal(pipeline.gather(plan), sample.expected, strict=True)
    pipeline.store(plan, f"{bucket.url}/w.zarr", storage_options=options)
    store = ObjectStore(S3Store.from_url(f"{bucket.url}/w.zarr"), read_only=True)
    group = zarr.open_group(store, mode="r")
    np.testing.assert_array_equal(group["windows"][:], sample.expected, strict=True)
    np.testing.assert_array_equal(group["starts"][:], sample.starts)


@pytest.mark.slow
def test_from_the_shell(sample, cluster, cli, tmp_path):
    if cluster.file is None:
        pytest.skip("the command line runs on a cluster")
    np.save("starts.npy", sample.starts)
    done = cli("run", sample.matrix, "--starts", "starts.npy", "--out", "w.npy", "--cluster", cluster.file, "--json")
    assert (done.code, done.err.count("error")) == (0, 0)
    np.testing.assert_array_equal(np.load("w.npy"), sample.expected, strict=True)
