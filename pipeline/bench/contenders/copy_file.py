"""`cp` of the file that `create` makes a matrix of, then `sync` of the copy: no checksums, no chunks."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bench.scenarios import WindowsOf

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> Any:
    """Copy; windows of the copy are read after the clock."""
    path = job.scratch() / "A.h5"
    subprocess.run(["cp", str(job.hdf5), str(path)], check=True)  # noqa: S603, S607
    subprocess.run(["sync", str(path)], check=True)  # noqa: S603, S607
    return WindowsOf(np.memmap(path, job.dtype, mode="r", offset=job.offset(), shape=job.shape), starts, job.length)
