"""zarr: each window sliced, and copied into its place of one array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import zarr

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows with `array[start:stop]`, in the default codec pipeline."""
    array = zarr.open_array(job.zarr, mode="r")
    windows = job.empty(len(starts))
    for place, start in enumerate(starts.tolist()):
        windows[place] = array[start : start + job.length]
    return windows
