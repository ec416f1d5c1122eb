"""The project itself on two worker processes; their start is not timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.bench.contenders import ours_in_process
from pipeline.bench.contenders.ours_threads import read

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pipeline.bench.scenarios import Job

__all__ = ["read", "session"]


def session(job: Job) -> AbstractContextManager[None]:
    """Hold the cluster open around the clock."""
    return ours_in_process.session(job, processes=True, n_workers=2)
