"""zarrs below zarr: all rows of all windows in one `oindex`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import zarr

from pipeline.bench.contenders import zarr_oindex, zarrs_threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows; zarrs hands rows that do not follow one another back to zarr's own pipeline."""
    with zarr.config.set(zarrs_threads.PIPELINE):
        return zarr_oindex.read(job, starts)
