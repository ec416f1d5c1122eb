"""np.memmap: all rows of all windows in one indexing operation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows with `rows[indices]`, indices of shape (n, length)."""
    windows: NDArray[Any] = np.asarray(job.memmap())[starts[:, None] + np.arange(job.length)]
    return windows
