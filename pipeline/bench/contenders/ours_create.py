"""The project itself: a matrix made of the file on a cluster, flushed to the disk; the cluster's start is not timed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.bench.scenarios import DATASET, WindowsOf
from pipeline.cluster.connect import connect
from pipeline.sinks.create import create_matrix

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


@contextmanager
def session(job: Job) -> Iterator[None]:
    """Hold the cluster open around the clock."""
    with connect(**job.where):
        # Much is imported at the first use.
        create_matrix("random:64x8", job.scratch() / "first.zarr")
        yield


def read(job: Job, starts: NDArray[np.int64]) -> Any:
    """Create; windows of the matrix are read after the clock."""
    matrix = create_matrix(str(job.hdf5), job.scratch() / "A.zarr", dataset=DATASET)
    return WindowsOf(matrix.array, starts, job.length)
