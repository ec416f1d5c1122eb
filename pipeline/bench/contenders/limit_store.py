"""Limit: windows read as by `limit_storage`, written to one file, one call after another, and flushed to the disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bench.contenders import limit_storage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read, write, flush; the file is looked at after the clock."""
    windows = limit_storage.read(job, starts)
    path = job.scratch() / f"{len(starts)}.bin"
    with path.open("wb", buffering=0) as file:
        left = memoryview(windows.reshape(-1).view(np.uint8))
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    written: NDArray[Any] = np.memmap(path, windows.dtype, mode="r", shape=windows.shape)
    return written
