"""Progress on stderr: a bar on a terminal, a plain line every ten seconds elsewhere; a line when a run stalls."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from pipeline.capacity import active_client, count_threads, measure_workers
from pipeline.memory import held_nbytes
from pipeline.report import Watch
from pipeline.sizes import count_of, format_size

if TYPE_CHECKING:
    from pipeline.tasks import Receipt

_SECONDS = 10.0
_BAR_SECONDS = 5.0
"""How often the bar tells of memory: a scheduler that is asked lists all of its workers."""
_STALL_SECONDS = 60.0
"""A run stalls when no task has finished for so long, and for several times the longest task."""
_STALL_TASKS = 4


class ShownWatch(Watch):
    """A watch that shows what it counts, from `begin` until the `with` block ends."""

    def __init__(self, unit: str, *, quiet: bool) -> None:
        super().__init__()
        self._unit = unit
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._client: Any = None
        self._at_once = 1
        self._last: tuple[float, float]
        """When a task finished last, or the run began: by the clock that never goes back, and by the wall's."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def begin(self, tasks: int, units: int, nbytes: int) -> None:
        """Start to show progress."""
        super().begin(tasks, units, nbytes)
        if self._quiet:
            return
        # The thread that tells has none of its own where the caller's is of a context.
        self._client = active_client()
        self._at_once = count_threads(self._client)
        self._last = time.perf_counter(), time.time()
        if sys.stderr.isatty():
            self._bar = tqdm(total=units, unit=f" {self._unit}", file=sys.stderr, dynamic_ncols=True, leave=False)
        self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)
        self._thread.start()

    def task_done(self, receipt: Receipt) -> None:
        """Count one finished task, and move the bar."""
        super().task_done(receipt)
        self._last = time.perf_counter(), time.time()
        if self._bar is not None:
            self._bar.update(receipt.units)

    def task_kept(self, units: int) -> None:
        """Count a task that an earlier run had finished, and move the bar."""
        super().task_kept(units)
        if self._bar is not None:
            # Its pace is that of this run.
            self._bar.initial += units
            self._bar.update(units)

    def task_retried(self, words: str) -> None:
        """Count a task that is run again, and say why."""
        super().task_retried(words)
        self.say(words)

    def say(self, line: str) -> None:
        """Tell the user, unless all is to be quiet."""
        if not self._quiet:
            self._write(line)

    def _tell(self) -> None:
        told = None
        pause = _SECONDS if self._bar is None else min(_SECONDS, _BAR_SECONDS)
        while not self._ended.wait(pause):
            if self._bar is None:
                self._write(f"{self._progress()}, {self._memory()}")
            else:
                self._bar.set_postfix_str(self._memory())
            last = self._last
            silent = time.perf_counter() - last[0]
            left = self.tasks - self.kept_tasks - self.done_tasks
            if left and told != last and silent > max(_STALL_SECONDS, _STALL_TASKS * self.longest_seconds):
                told = last
                since = time.strftime("%H:%M:%S", time.localtime(last[1]))
                self._write(
                    f"stalled: no task has finished for {silent:.0f} s, since {since}; "
                    f"{count_of(min(left, self._at_once), 'task')} under way, {left:,} not done; look at the storage "
                    f"and at the dashboard"
                )

    def _progress(self) -> str:
        passed = time.perf_counter() - self.started
        # What an earlier run had done tells nothing of this one's pace.
        own = self.done_units - self.kept_units
        left = f"{passed * (self.units - self.done_units) / own:.0f} s left" if own else "time left not known yet"
        return (
            f"{self.done_units:,} of {self.units:,} {self._unit} ({self.done_units / self.units:.0%}), "
            f"{self.done_tasks + self.kept_tasks:,} of {self.tasks:,} tasks, "
            f"{format_size(self.nbytes * own / self.units / passed)}/s, {left}"
        )

    def _memory(self) -> str:
        """Memory of this process and its descendants, and of workers that are none."""
        workers, nbytes = measure_workers(self._client)
        own = f"{format_size(held_nbytes())} of memory"
        return f"{own} here, {format_size(nbytes)} in {count_of(workers, 'worker')}" if workers else own

    def _write(self, line: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {line}"
        if self._bar is None:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        else:
            self._bar.write(line, file=sys.stderr)
