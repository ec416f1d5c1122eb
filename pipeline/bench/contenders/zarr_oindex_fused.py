"""zarr: all rows of all windows in one `oindex`, in the codec pipeline without an event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import zarr

from pipeline.bench.contenders import zarr_oindex

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job


def read(job: Job, starts: NDArray[np.int64]) -> NDArray[Any]:
    """Read windows in FusedCodecPipeline, which zarr offers but does not choose."""
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"}):
        return zarr_oindex.read(job, starts)
