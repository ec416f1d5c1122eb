"""The project itself: windows written back to Zarr on a cluster, flushed to the disk; its start is not timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.bench.contenders.ours_cluster import session
from pipeline.matrix.opening import open_matrix
from pipeline.plan.group import plan_windows
from pipeline.sinks.store import store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job

__all__ = ["read", "session"]


def read(job: Job, starts: NDArray[np.int64]) -> Any:
    """Open, plan, store; the windows are read back after the clock."""
    plan = plan_windows(open_matrix(job.matrix), starts, length=job.length)
    return store(plan, job.scratch() / f"{len(starts)}.zarr")["windows"]
