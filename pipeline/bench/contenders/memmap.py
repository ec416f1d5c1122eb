"""np.memmap of the contiguous HDF5 data set, and a plain copy of its file."""

from __future__ import annotations

import mmap
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bench.job import WindowsOf, split_batches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.job import Job


def loop(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Copy each window to its place in one array; the kernel reads ahead."""
    return job.copy_windows(job.memmap(), starts)


def loop_random(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Copy each window to its place in one array; MADV_RANDOM turns the kernel's read-ahead off."""
    with job.hdf5.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return job.copy_windows(np.ndarray(job.shape, job.dtype, buffer=mapped, offset=job.offset()), starts)


def gather(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Index all rows of all windows at once, by row numbers of shape (n, length)."""
    windows: NDArray[Any] = np.asarray(job.memmap())[starts[:, None] + np.arange(job.length)]
    return windows


def batches(job: Job, starts: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Copy each window to its place in one array a batch."""
    rows = job.memmap()
    return [job.copy_windows(rows, part) for part in split_batches(starts)]


def copy_file(job: Job, starts: NDArray[np.int64]) -> WindowsOf:
    """Run `cp` on the HDF5 file, then `sync` on the copy: what `create` does, without chunks and checksums."""
    path = job.scratch / "A.h5"
    subprocess.run(["cp", str(job.hdf5), str(path)], check=True)  # noqa: S603, S607
    subprocess.run(["sync", str(path)], check=True)  # noqa: S603, S607
    return WindowsOf(np.memmap(path, job.dtype, mode="r", offset=job.offset(), shape=job.shape), starts, job.length)
