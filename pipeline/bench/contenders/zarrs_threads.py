"""zarrs below zarr: each window sliced, on several threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import zarr

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


PIPELINE = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
_THREADS = max(8, os.cpu_count() or 1)


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows with slices, the only index that zarrs itself serves."""
    windows = job.empty(len(starts))
    with zarr.config.set(PIPELINE):
        array = zarr.open_array(job.zarr, mode="r")

        def place_window(place: int, start: int) -> None:
            windows[place] = array[start : start + job.length]

        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(place_window, range(len(starts)), starts.tolist()):
                pass
    return windows
