"""Libraries that read the plain Zarr array: zarr, zarrs, Dask and tensorstore."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pipeline.formatting import MIB

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.job import Job

_ZARRS_THREADS = max(8, os.cpu_count() or 1)
_DASK_CHUNK_NBYTES = 128 * MIB
"""As Dask's documentation recommends."""


def zarr_loop(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Slice each window, and copy it to its place in one array, in zarr's default codec pipeline."""
    return job.copy_windows(_open_zarr(job), starts)


def zarr_oindex(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Index all rows of all windows at once, in zarr's default codec pipeline."""
    return job.index_windows(_open_zarr(job).oindex, starts)


def zarr_oindex_fused(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Index all rows of all windows at once, in FusedCodecPipeline, which zarr has but does not use by default."""
    with _codec_pipeline("zarr.core.codec_pipeline.FusedCodecPipeline"):
        return zarr_oindex(job, starts)


def zarrs_oindex(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Index all rows of all windows at once; zarrs leaves rows that are not consecutive to zarr's own pipeline."""
    with _codec_pipeline("zarrs.ZarrsCodecPipeline"):
        return zarr_oindex(job, starts)


def zarrs_threads(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Slice each window, the only index that zarrs serves itself, on several threads."""
    windows = job.empty(len(starts))
    with _codec_pipeline("zarrs.ZarrsCodecPipeline"), ThreadPoolExecutor(_ZARRS_THREADS) as pool:
        array = _open_zarr(job)

        def read_window(place: int, start: int) -> None:
            windows[place] = array[start : start + job.length]

        list(pool.map(read_window, range(len(starts)), starts.tolist()))
    return windows


def dask_indexing(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Index all rows of all windows of the HDF5 data set at once, on Dask's threads; of Zarr if it is compressed."""
    import dask.array

    if job.scenario.compressed:
        return job.index_windows(dask.array.from_zarr(str(job.zarr)), starts)
    step = max(1, _DASK_CHUNK_NBYTES // job.scenario.row_nbytes)
    with job.dataset() as dataset:
        return job.index_windows(dask.array.from_array(dataset, chunks=(step, -1)), starts)


def ts_batch(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read each window in one `ts.Batch`, and copy it to its place in one array."""
    import tensorstore as ts

    array, windows = _open_tensorstore(job), job.empty(len(starts))
    with ts.Batch() as batch:
        reads = [array[start : start + job.length].read(batch=batch) for start in starts.tolist()]
    for place, future in enumerate(reads):
        windows[place] = future.result()
    return windows


def ts_index(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Index all rows of all windows at once."""
    return job.index_windows(_open_tensorstore(job), starts)


def _codec_pipeline(path: str) -> AbstractContextManager[Any]:
    import zarr

    setting: AbstractContextManager[Any] = zarr.config.set({"codec_pipeline.path": path})
    return setting


def _open_zarr(job: Job) -> Any:
    import zarr

    return zarr.open_array(job.zarr, mode="r")


def _open_tensorstore(job: Job) -> Any:
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(job.zarr)}}
    return ts.open(spec, open=True, read=True).result()
