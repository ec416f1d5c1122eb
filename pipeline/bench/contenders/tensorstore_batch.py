"""tensorstore: a read for each window, all in one `ts.Batch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorstore as ts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows, and copy each into its place when it has come."""
    array = open_array(job)
    windows = job.empty(len(starts))
    with ts.Batch() as batch:
        reads = [array[start : start + job.length].read(batch=batch) for start in starts.tolist()]
    for place, future in enumerate(reads):
        windows[place] = future.result()
    return windows


def open_array(job: Job) -> Any:
    """Open the Zarr array for reading."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(job.zarr)}}
    return ts.open(spec, open=True, read=True).result()
