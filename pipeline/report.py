"""What a run did: counted while it goes, said when it ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.tasks import Receipt


@dataclass(slots=True)
class Watch:
    """Counts finished tasks; a subclass may show them. Called from the client's thread only."""

    tasks: int = 0
    units: int = 0
    """What there is to do in all: windows of a run, rows of a matrix to be created."""
    nbytes: int = 0
    """Bytes of the output."""
    done_tasks: int = 0
    done_units: int = 0
    nbytes_read: int = 0
    read_seconds: float = 0.0
    """Summed over tasks, as the other seconds: more than the wall clock's where tasks run side by side."""
    apply_seconds: float = 0.0
    write_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def begin(self, tasks: int, units: int, nbytes: int) -> None:
        """Learn what there is to do, before the first task runs."""
        self.tasks, self.units, self.nbytes = tasks, units, nbytes
        self.started = time.perf_counter()

    def task_done(self, receipt: Receipt) -> None:
        """Count one finished task."""
        self.done_tasks += 1
        self.done_units += receipt.units
        self.nbytes_read += receipt.nbytes_read
        self.read_seconds += receipt.read_seconds
        self.apply_seconds += receipt.apply_seconds
        self.write_seconds += receipt.write_seconds
