"""A torch DataLoader over np.memmap, with a worker process for each core."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


class _Windows:
    """Map-style data set; a batch is read in one call of `__getitems__`."""

    def __init__(self, rows: NDArray[Any], starts: NDArray[np.int64], length: int) -> None:
        self._rows, self._starts, self._length = rows, starts, length

    def __len__(self) -> int:
        return len(self._starts)

    def __getitems__(self, places: list[int]) -> NDArray[Any]:
        return np.stack([self._rows[start : start + self._length] for start in self._starts[places].tolist()])


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows in batches, in request order."""
    import torch  # Loaded by the worker already: this file can be imported where torch is absent.
    from torch.utils.data import DataLoader

    # Shared memory holds some batches of each worker at a time; 64 MB is what a container often has.
    size = max(1, 8 * 2**20 // (job.length * job.shape[1] * job.dtype.itemsize))
    loader = DataLoader(
        _Windows(job.memmap(), starts, job.length),
        batch_size=size,
        shuffle=False,
        num_workers=os.cpu_count() or 1,
        collate_fn=torch.from_numpy,
    )
    windows, first = job.empty(len(starts)), 0
    for batch in loader:
        windows[first : first + len(batch)] = batch.numpy()
        first += len(batch)
    return windows
