"""zarr: all rows of all windows in one `oindex`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows in the default codec pipeline."""
    array = zarr.open_array(job.zarr, mode="r")
    windows: NDArray[Any] = np.asarray(array.oindex[job.row_indices(starts)])
    return windows.reshape(len(starts), job.length, -1)
