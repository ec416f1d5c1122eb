"""Limits: what the storage, the codec and the memory of this machine allow."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numcodecs import blosc

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.job import Job

_THREADS = max(16, os.cpu_count() or 1)
_RUN = 64
"""Windows that a thread reads at a time."""


def storage(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows of the contiguous file, sorted, by `preadv` on threads, after announcing them to the kernel."""
    windows, base = job.empty(len(starts)), job.offset()
    order = np.argsort(starts)
    fd = os.open(job.hdf5, os.O_RDONLY)

    def read_run(first: int) -> None:
        run = order[first : first + _RUN]
        offsets = (base + starts[run] * job.scenario.row_nbytes).tolist()
        for offset in offsets:
            os.posix_fadvise(fd, offset, windows[0].nbytes, os.POSIX_FADV_WILLNEED)
        for place, offset in zip(run, offsets, strict=True):
            if os.preadv(fd, [windows[place]], offset) != windows[0].nbytes:
                raise OSError(f"short read of {job.hdf5} at byte {offset}")

    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(read_run, range(0, len(starts), _RUN)))
    finally:
        os.close(fd)
    return windows


def store(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows as `storage` does, write them to one file, one call after the other, and flush it to the disk."""
    windows = storage(job, starts)
    path = job.scratch / f"{len(starts)}.bin"
    with path.open("wb", buffering=0) as file:
        left = memoryview(windows.reshape(-1).view(np.uint8))
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    return np.memmap(path, windows.dtype, mode="r", shape=windows.shape)


def decode(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read and decode each chunk that a window touches once, on all cores, by Blosc without Zarr; return no windows."""
    scenario = job.scenario
    chunk = scenario.chunk_rows
    touched = np.unique(np.concatenate([starts // chunk, (starts + job.length - 1) // chunk]))
    in_file = scenario.shard_rows // chunk or 1
    files, first = np.unique(touched // in_file, return_index=True)
    # Blosc releases the GIL, and is safe on several threads, only where it starts no threads itself.
    blosc.use_threads = False

    def decode_file(number: int, chunks: NDArray[np.int64]) -> None:
        buffer = np.empty(chunk * scenario.columns, job.dtype)
        with (job.zarr / "c" / str(number) / "0").open("rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            ranges = [(0, end)]
            if scenario.shard_rows:
                # A shard ends with an index, offset and size of each inner chunk, and the 4 bytes of its crc32c.
                index = os.pread(file.fileno(), 16 * in_file, end - 16 * in_file - 4)
                ranges = np.frombuffer(index, "<u8").reshape(-1, 2)[chunks % in_file].tolist()
            for offset, size in ranges:
                blosc.decompress(os.pread(file.fileno(), size, offset), buffer)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode_file, files.tolist(), np.split(touched, first[1:])))
    return job.empty(0)


def memory(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Fill an array of the windows' size on all cores; its values mean nothing."""
    windows = job.empty(len(starts))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda part: part.fill(1), np.array_split(windows, os.cpu_count() or 1)))
    return windows
