"""dask.array: all rows of all windows in one indexing operation, on Dask's threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


_CHUNK_ROWS_NBYTES = 128 * 2**20
"""What Dask's documentation advises."""


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows from a memory map in chunks that Dask slices without copying; from Zarr where there is none."""
    if job.hdf5 is None:
        rows = dask.array.from_zarr(str(job.zarr))
    else:
        step = max(1, _CHUNK_ROWS_NBYTES // (job.shape[1] * job.dtype.itemsize))
        # A name of its own spares Dask from hashing the values.
        rows = dask.array.from_array(job.memmap(), chunks=(step, -1), name=False)
    windows: NDArray[Any] = rows[job.row_indices(starts)].compute(scheduler="threads")
    return windows.reshape(len(starts), job.length, -1)
