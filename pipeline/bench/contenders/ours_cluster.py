"""The project itself on a cluster, by default in this process; its start is not timed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.bench.contenders import ours_threads
from pipeline.cluster.connect import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


@contextmanager
def session(job: Job) -> Iterator[None]:
    """Hold the cluster open around the clock: it serves many requests."""
    with connect(**job.where):
        yield


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Open, plan, gather."""
    return ours_threads.read(job, starts)
