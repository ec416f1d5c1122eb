"""tensorstore: all rows of all windows in one indexing operation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.bench.contenders import tensorstore_batch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows with an array of row numbers."""
    rows: NDArray[Any] = tensorstore_batch.open_array(job)[job.row_indices(starts)].read().result()
    return rows.reshape(len(starts), job.length, -1)
