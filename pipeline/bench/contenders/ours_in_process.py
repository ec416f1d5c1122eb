"""The project itself on one worker in this process, whatever cluster file lies about; its start is not timed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.bench.contenders.ours_threads import read
from pipeline.cluster.connect import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.bench.scenarios import Job

__all__ = ["read", "session"]


@contextmanager
def session(job: Job, **settings: Any) -> Iterator[None]:
    """Hold the cluster open around the clock."""
    file = job.scratch() / "cluster.yaml"
    file.write_text("version: 1\n", encoding="utf-8")
    with connect(file, dashboard_address="127.0.0.1:0", **settings):
        yield
