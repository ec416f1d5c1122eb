"""h5py: each window sliced into a list, then one array of them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from pipeline.bench.scenarios import DATASET

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows with `dataset[start:stop]`."""
    with h5py.File(job.hdf5) as file:
        dataset = file[DATASET]
        found = np.concatenate([dataset[start : start + job.length] for start in starts.tolist()])
    return found.reshape(len(starts), job.length, -1)
