"""A memory map that is told of random access, so that the kernel does not read ahead."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows through page faults, after MADV_RANDOM."""
    assert job.hdf5 is not None
    windows, offset = job.empty(len(starts)), job.offset()
    with job.hdf5.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    rows = np.ndarray(job.shape, job.dtype, buffer=mapped, offset=offset)
    for place, start in enumerate(starts.tolist()):
        windows[place] = rows[start : start + job.length]
    return windows
