"""The project itself: batches, on Dask's threaded scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.bench.scenarios import BATCH_SIZE, BatchesOf
from pipeline.matrix.opening import open_matrix
from pipeline.plan.group import plan_windows
from pipeline.sinks.batches import iter_batches

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> BatchesOf:
    """Open, plan, and keep every batch, so that all can be checked."""
    plan = plan_windows(open_matrix(job.matrix), starts, length=job.length)
    with iter_batches(plan, BATCH_SIZE) as batches:
        return BatchesOf(list(batches))
