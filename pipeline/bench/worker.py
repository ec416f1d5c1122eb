"""One read by one contender, in a process of its own: `python -m pipeline.bench.worker`, with an order on stdin."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bench.job import Job
from pipeline.bench.lineup import LINEUP, Contender
from pipeline.bench.page_cache import cached_share, drop_files, warm_files
from pipeline.bench.scenarios import Scenario
from pipeline.memory import PeakMemory, budget

if TYPE_CHECKING:
    from collections.abc import Callable

_UNCHECKED = {"limit_decode", "limit_memory"}
"""Contenders that deliver no windows."""
_WARM_SHARE = 0.5
"""Part of the memory that files may take to be read into the page cache as a whole."""


def main() -> None:
    """Read an order, and print one JSON object: the result of `run_once`, or `over` as its state."""
    order = json.loads(sys.stdin.read())
    contenders = {contender.key: contender for contender in LINEUP}
    job = Job(Scenario(**order["scenario"]), Path(order["folder"]), order["where"])
    _print(run_once(contenders[order["contender"]], job, cold=order["cold"], limit=order["limit"], over=_give_up))


def run_once(contender: Contender, job: Job, *, cold: bool, limit: float, over: Callable[[], None]) -> dict[str, Any]:
    """Read the windows once, time it, and check every value.

    Parameters
    ----------
    contender, job
        Who reads what.
    cold
        Drop the files from the page cache first. Otherwise, read them into it, or, if they are too large for the
        memory, read the windows once.
    limit
        Seconds after which `over` is called, on another thread.

    Returns
    -------
    dict
        `state` ("timed" or "wrong"); `seconds` if timed; `peak_memory` in bytes; `cached`: part of the files in the
        page cache when the clock started.
    """
    for name in contender.packages:
        importlib.import_module(name)
    starts = job.scenario.starts()
    paths = job.files(contender.files)
    with TemporaryDirectory(prefix="written-", dir=job.home) as scratch:
        job = replace(job, scratch=Path(scratch))
        with contender.session(job):
            # The first use imports, compiles and starts much: one window before the clock starts, for every contender.
            if job.scenario.task != "create":
                contender.read(job, starts[:1])
            # A virtual machine gets memory at the first touch, which can cost seconds, and soon gives it back: touch as
            # much as the result and a copy of it take, for every contender, and release it when the clock starts.
            touched = np.ones(2 * job.scenario.result_nbytes, np.uint8)
            if cold:
                drop_files(paths)
            elif sum(path.stat().st_size for path in paths) < _WARM_SHARE * budget().nbytes:
                warm_files(paths)
            else:
                contender.read(job, starts)
            cached = cached_share(paths)
            timer = threading.Timer(limit, over)
            timer.daemon = True
            del touched
            with PeakMemory() as peak:
                timer.start()
                begin = time.perf_counter()
                windows = contender.read(job, starts)
                seconds = time.perf_counter() - begin
                timer.cancel()
            right = contender.key in _UNCHECKED or job.scenario.is_right(windows, starts)
    result = {"state": "timed", "seconds": seconds} if right else {"state": "wrong"}
    return result | {"peak_memory": peak.nbytes, "cached": cached}


def _print(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def _give_up() -> None:
    _print({"state": "over"})
    os._exit(0)


if __name__ == "__main__":
    main()
