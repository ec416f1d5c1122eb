"""h5py: each window read straight into its place of one array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from pipeline.bench.scenarios import DATASET

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows with `read_direct`, which makes no array of its own."""
    windows = job.empty(len(starts))
    with h5py.File(job.hdf5) as file:
        dataset = file[DATASET]
        for place, start in enumerate(starts.tolist()):
            dataset.read_direct(windows, np.s_[start : start + job.length], np.s_[place])
    return windows
