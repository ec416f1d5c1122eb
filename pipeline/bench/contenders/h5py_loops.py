"""h5py: windows of a contiguous data set, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.job import Job


def concatenate(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Slice each window into a list, and concatenate the list."""
    with job.dataset() as dataset:
        windows = np.concatenate([dataset[start : start + job.length] for start in starts.tolist()])
    return windows.reshape(len(starts), job.length, -1)


def copy(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Slice each window, and copy it to its place in one array."""
    with job.dataset() as dataset:
        return job.copy_windows(dataset, starts)


def read_direct(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read each window into its place in one array, without an array of its own."""
    windows = job.empty(len(starts))
    with job.dataset() as dataset:
        for place, start in enumerate(starts.tolist()):
            dataset.read_direct(windows, np.s_[start : start + job.length], np.s_[place])
    return windows
