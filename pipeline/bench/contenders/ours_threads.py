"""The project itself on Dask's threaded scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.matrix.opening import open_matrix
from pipeline.plan.group import plan_windows
from pipeline.sinks.gather import gather

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Open, plan, gather."""
    plan = plan_windows(open_matrix(job.matrix), starts, length=job.length)
    return gather(plan)
