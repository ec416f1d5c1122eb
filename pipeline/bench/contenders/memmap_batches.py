"""Batches by a loop over np.memmap, each window copied to its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.bench.scenarios import BATCH_SIZE, BatchesOf

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> BatchesOf:
    """Map, and copy."""
    rows, batches = job.memmap(), []
    for begin in range(0, len(starts), BATCH_SIZE):
        part = starts[begin : begin + BATCH_SIZE].tolist()
        batch = job.empty(len(part))
        for place, start in enumerate(part):
            batch[place] = rows[start : start + job.length]
        batches.append(batch)
    return BatchesOf(batches)
