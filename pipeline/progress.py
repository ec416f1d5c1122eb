"""Progress on stderr: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from pipeline.report import Watch
from pipeline.sizes import format_size

if TYPE_CHECKING:
    from pipeline.tasks import Receipt

_SECONDS = 10.0


class ShownWatch(Watch):
    """A watch that shows what it counts, from `begin` until the `with` block ends."""

    def __init__(self, unit: str, *, quiet: bool) -> None:
        super().__init__()
        self._unit = unit
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

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
        if sys.stderr.isatty():
            self._bar = tqdm(total=units, unit=f" {self._unit}", file=sys.stderr, dynamic_ncols=True, leave=False)
        else:
            self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)
            self._thread.start()

    def task_done(self, receipt: Receipt) -> None:
        """Count one finished task, and move the bar."""
        super().task_done(receipt)
        if self._bar is not None:
            self._bar.update(receipt.units)

    def _tell(self) -> None:
        while not self._ended.wait(_SECONDS):
            passed = time.perf_counter() - self.started
            share = self.done_units / self.units
            left = f"{passed * (1 - share) / share:.0f} s left" if share else "time left not known yet"
            sys.stderr.write(
                f"{self.done_units:,} of {self.units:,} {self._unit} ({share:.0%}), "
                f"{self.done_tasks:,} of {self.tasks:,} tasks, {format_size(self.nbytes * share / passed)}/s, {left}\n"
            )
            sys.stderr.flush()
