"""What a run did: counted while it goes, said when it ends."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.tasks import Receipt

_LEAST_SECONDS = 0.2
"""A shorter run says nothing of what limited it."""
_IDLE = 0.5
_WASTE = 2.0
STAGES = ("read", "decode", "apply", "write")
"""What a task does, in this order; `Watch` counts the seconds of each."""


@dataclass(slots=True)
class Watch:
    """Counts finished tasks; a subclass may show them. Called from the client's thread only."""

    tasks: int = 0
    units: int = 0
    """What there is to do in all: windows of a run, rows of a matrix to be created."""
    nbytes: int = 0
    """Bytes of all units, as they were asked for."""
    done_tasks: int = 0
    kept_tasks: int = 0
    """Finished by an earlier run, which this one resumed."""
    done_units: int = 0
    kept_units: int = 0
    """Of `done_units`, those of an earlier run."""
    nbytes_read: int = 0
    read_seconds: float = 0.0
    """Summed over tasks, as the other seconds: more than the wall clock's where tasks run side by side."""
    decode_seconds: float = 0.0
    apply_seconds: float = 0.0
    write_seconds: float = 0.0
    nonfinite: int = 0
    """Values that `apply` gave and that are NaN or infinite."""
    retries: int = 0
    """Times that a task was run again, after a failure that may pass."""
    started: float = field(default_factory=time.perf_counter)

    def begin(self, tasks: int, units: int, nbytes: int) -> None:
        """Learn what there is to do, before the first task runs."""
        self.tasks, self.units, self.nbytes = tasks, units, nbytes
        self.started = time.perf_counter()

    def task_kept(self, units: int) -> None:
        """Count a task that an earlier run had finished."""
        self.kept_tasks += 1
        self.kept_units += units
        self.done_units += units

    def task_done(self, receipt: Receipt) -> None:
        """Count one finished task."""
        self.done_tasks += 1
        self.done_units += receipt.units
        self.nbytes_read += receipt.nbytes_read
        self.read_seconds += receipt.read_seconds
        self.decode_seconds += receipt.decode_seconds
        self.apply_seconds += receipt.apply_seconds
        self.write_seconds += receipt.write_seconds
        self.nonfinite += receipt.nonfinite

    def task_retried(self, words: str) -> None:
        """Count a task that is run again; `words` say why."""
        del words
        self.retries += 1

    def say(self, line: str) -> None:
        """Tell the user what is worth knowing, though the run goes on."""
        warnings.warn(line, stacklevel=2)


def share_seconds(watch: Watch) -> dict[str, float]:
    """Part of the tasks' time that each stage took, 0 to 1."""
    seconds = {stage: float(getattr(watch, f"{stage}_seconds")) for stage in STAGES}
    busy = sum(seconds.values())
    return {stage: value / busy if busy else 0.0 for stage, value in seconds.items()}


def name_limit(
    watch: Watch, *, threads: int, seconds: float, amplification: float, repetition: float
) -> tuple[str, str]:
    """Tell what limited a run, and what would help.

    Parameters
    ----------
    threads
        Tasks that could run at once.
    seconds
        Wall clock of the work.
    amplification
        Bytes read divided by bytes that were asked for.
    repetition
        Bytes that the plan reads in the order of the run, divided by those of order `chunk`.

    Returns
    -------
    tuple of str
        "storage", "decode", "apply", "write", "Dask" or "unknown"; and a line of advice, empty where there is none.
    """
    stages = {
        "storage": watch.read_seconds,
        "decode": watch.decode_seconds,
        "apply": watch.apply_seconds,
        "write": watch.write_seconds,
    }
    busy = sum(stages.values())
    if seconds < _LEAST_SECONDS or not busy:
        return "unknown", ""
    if busy < _IDLE * threads * seconds:
        return "Dask", "the threads waited for tasks: ask for more windows at once"
    limit = max(stages, key=lambda stage: stages[stage])
    if stages[limit] < _IDLE * busy:
        return "unknown", ""
    if limit in ("storage", "decode") and repetition > _WASTE:
        return limit, "--order chunk reads each chunk once, and keeps the windows' places beside them"
    if limit == "storage" and amplification > _WASTE:
        return limit, "a matrix of shorter chunks, or not compressed, would read less"
    advice = {
        "storage": "",
        "decode": "more threads help where there are cores; a matrix that is not compressed needs no decoding",
        "apply": "more threads, or processes: true in cluster.yaml where the function holds the GIL",
        "write": "a faster disk for the output; an array in memory needs none",
    }
    return limit, advice[limit]
