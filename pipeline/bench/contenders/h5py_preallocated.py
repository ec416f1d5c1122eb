"""h5py: each window sliced, and copied into its place of one array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py

from pipeline.bench.scenarios import DATASET

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows with `dataset[start:stop]`."""
    windows = job.empty(len(starts))
    with h5py.File(job.hdf5) as file:
        dataset = file[DATASET]
        for place, start in enumerate(starts.tolist()):
            windows[place] = dataset[start : start + job.length]
    return windows
