"""A torch DataLoader over the project's data set, with a worker process for each core."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline.bench.scenarios import BATCH_SIZE, BatchesOf
from pipeline.matrix.opening import open_matrix
from pipeline.plan.group import plan_windows
from pipeline.sinks.dataset import WindowDataset

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> BatchesOf:
    """Open, plan, and copy every batch out of the shared memory that its worker put it into."""
    from torch.utils.data import DataLoader  # Loaded by the worker already: this file can be imported without torch.

    plan = plan_windows(open_matrix(job.matrix), starts, length=job.length)
    places = [list(range(begin, min(begin + BATCH_SIZE, len(plan)))) for begin in range(0, len(plan), BATCH_SIZE)]
    loader = DataLoader(WindowDataset(plan), batch_size=None, sampler=places, num_workers=os.cpu_count() or 1)
    return BatchesOf([batch.numpy().copy() for batch in loader])
