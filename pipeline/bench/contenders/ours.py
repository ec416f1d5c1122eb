"""Ways of this project to deliver windows, and the clusters on which it does so."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.bench.job import BATCH_SIZE, DATASET, WindowsOf
from pipeline.bench.tls_cluster import WORKERS, tls_cluster
from pipeline.cluster.connect import Connection, connect
from pipeline.matrix.opening import open_matrix
from pipeline.plan.group import plan_windows
from pipeline.sinks.batches import iter_batches
from pipeline.sinks.create import create_matrix
from pipeline.sinks.gather import gather
from pipeline.sinks.store import store

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.job import Job
    from pipeline.plan.plan import Plan


def plan_job(job: Job, starts: NDArray[np.int64]) -> Plan:
    """Open the matrix, and plan its windows."""
    return plan_windows(open_matrix(job.matrix), starts, length=job.length)


def array(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Gather windows into one array."""
    return gather(plan_job(job, starts))


def batches(job: Job, starts: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Iterate over batches, and keep all of them."""
    with iter_batches(plan_job(job, starts), BATCH_SIZE) as iterator:
        return list(iterator)


def zarr(job: Job, starts: NDArray[np.int64]) -> Any:
    """Store windows in Zarr, flushed to the disk."""
    return store(plan_job(job, starts), job.scratch / f"{len(starts)}.zarr")["windows"]


def matrix(job: Job, starts: NDArray[np.int64]) -> WindowsOf:
    """Create a matrix from the HDF5 file, flushed to the disk."""
    created = create_matrix(str(job.hdf5), job.scratch / "A.zarr", dataset=DATASET)
    return WindowsOf(created.array, starts, job.length)


def cluster(job: Job) -> Connection:
    """Connect to the user's cluster, by default one worker in this process."""
    return connect(**job.where)


@contextmanager
def warm_cluster(job: Job) -> Iterator[None]:
    """Connect to the user's cluster, and create a first matrix, which imports what the first use needs."""
    with cluster(job):
        create_matrix("random:64x8", job.scratch / "first.zarr")
        yield


def in_process(job: Job, **settings: Any) -> Connection:
    """Start one worker in this process, whatever cluster file is in the working directory."""
    file = job.scratch / "cluster.yaml"
    file.write_text("version: 1\n", encoding="utf-8")
    return connect(file, dashboard_address="127.0.0.1:0", **settings)


def processes(job: Job) -> Connection:
    """Start two worker processes."""
    return in_process(job, processes=True, n_workers=2)


@contextmanager
def tls(job: Job) -> Iterator[None]:
    """Connect to a scheduler and two workers that accept only TLS."""
    with tls_cluster(job.scratch) as file, connect(file) as client:
        client.wait_for_workers(WORKERS, timeout=60)
        yield
