"""torch DataLoader, with one worker process for each core."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bench.contenders.ours import plan_job
from pipeline.bench.job import WindowsOf, split_batches
from pipeline.formatting import MIB
from pipeline.sinks.dataset import WindowDataset

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.job import Job


def memmap(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read batches of windows from np.memmap, and copy each to its place in one array."""
    # Workers hold several batches in shared memory, of which a container often has 64 MB in all.
    size = max(1, 8 * MIB // (job.length * job.scenario.row_nbytes))
    parts = [slice(first, min(first + size, len(starts))) for first in range(0, len(starts), size)]
    windows = job.empty(len(starts))
    loader = _loader(WindowsOf(job.memmap(), starts, job.length), parts)
    for part, batch in zip(parts, loader, strict=True):
        windows[part] = batch.numpy()
    return windows


def dataset(job: Job, starts: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Read batches from this project's data set, and copy each out of the shared memory of its worker."""
    places = [part.tolist() for part in split_batches(np.arange(len(starts)))]
    return [batch.numpy().copy() for batch in _loader(WindowDataset(plan_job(job, starts)), places)]


def _loader(dataset: Any, batches: list[Any]) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(dataset, batch_size=None, sampler=batches, num_workers=os.cpu_count() or 1)
