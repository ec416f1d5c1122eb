"""Limit: each chunk that a window touches read and decoded once, on all cores, its rows copied nowhere."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numcodecs import blosc

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Decode chunks with Blosc itself, without Zarr; the windows are not put together."""
    scenario = job.scenario
    chunk = scenario.chunk_rows
    touched = np.unique(np.concatenate([starts // chunk, (starts + job.length - 1) // chunk]))
    in_file = scenario.shard_rows // chunk or 1
    files, first = np.unique(touched // in_file, return_index=True)
    # Blosc lets go of the GIL, and is safe in threads, where it has none of its own.
    blosc.use_threads = False

    def decode_file(number: int, chunks: NDArray[np.int64]) -> None:
        fd = os.open(job.zarr / "c" / str(number) / "0", os.O_RDONLY)
        buffer = np.empty(chunk * job.shape[1], job.dtype)
        try:
            end = os.fstat(fd).st_size
            index = [(0, end)]
            if scenario.shard_rows:
                # At the shard's end: offset and size of each inner chunk, and the index's crc32c of 4 bytes.
                raw = os.pread(fd, 16 * in_file, end - 16 * in_file - 4)
                index = np.frombuffer(raw, "<u8").reshape(-1, 2)[chunks % in_file].tolist()
            for offset, size in index:
                blosc.decompress(os.pread(fd, size, offset), buffer)
        finally:
            os.close(fd)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode_file, files.tolist(), np.split(touched, first[1:])):
            pass
    return job.empty(0)
