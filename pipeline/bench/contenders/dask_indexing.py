"""dask.array: all rows of all windows in one indexing operation, on Dask's threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array

from pipeline.bench.scenarios import DATASET

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job

_CHUNK_NBYTES = 128 * 2**20
"""What Dask's documentation advises."""


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows from the HDF5 data set, as Dask's documentation does; from Zarr where there is none."""
    rows = job.row_indices(starts)
    if job.hdf5 is None:
        windows: NDArray[Any] = dask.array.from_zarr(str(job.zarr))[rows].compute(scheduler="threads")
    else:
        import h5py

        step = max(1, _CHUNK_NBYTES // (job.shape[1] * job.dtype.itemsize))
        with h5py.File(job.hdf5) as file:
            matrix = dask.array.from_array(file[DATASET], chunks=(step, -1))
            windows = matrix[rows].compute(scheduler="threads")
    return windows.reshape(len(starts), job.length, -1)
