"""np.memmap: each window copied into its place of one array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows through page faults, with the kernel's read-ahead."""
    windows, rows = job.empty(len(starts)), job.memmap()
    for place, start in enumerate(starts.tolist()):
        windows[place] = rows[start : start + job.length]
    return windows
