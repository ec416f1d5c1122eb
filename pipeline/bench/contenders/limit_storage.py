"""Limit: the same byte ranges of the contiguous file, sorted, read by a bare pool of threads into one array."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


_THREADS = max(16, os.cpu_count() or 1)
_RUN = 64
"""Windows that a thread takes at a time."""


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows with `preadv`, all announced to the kernel first."""
    assert job.hdf5 is not None
    windows, base = job.empty(len(starts)), job.offset()
    row_nbytes = job.shape[1] * job.dtype.itemsize
    order = np.argsort(starts)
    fd = os.open(job.hdf5, os.O_RDONLY)

    def read_run(first: int) -> None:
        run = order[first : first + _RUN]
        ranges = [(place, base + start * row_nbytes) for place, start in zip(run, starts[run].tolist(), strict=True)]
        for _, offset in ranges:
            os.posix_fadvise(fd, offset, windows[0].nbytes, os.POSIX_FADV_WILLNEED)
        for place, offset in ranges:
            if os.preadv(fd, [windows[place]], offset) != windows[0].nbytes:
                raise OSError(f"a window is read in one call; {job.hdf5} at byte {offset} was not; run it again")

    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(read_run, range(0, len(starts), _RUN)):
                pass
    finally:
        os.close(fd)
    return windows
