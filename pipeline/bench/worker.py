"""One contender, once, in a process of its own: `python -m pipeline.bench.worker` with an order on standard input."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bench.lineup import Contender, contender
from pipeline.bench.pages import cached_share, drop_files, warm_files
from pipeline.bench.scenarios import Job, Scenario
from pipeline.memory import PeakMemory, budget

if TYPE_CHECKING:
    from collections.abc import Callable

_CHECKED_LIMITS = {"limit_storage", "limit_store"}
"""The others give no windows."""
_WARM_SHARE = 0.5
"""Part of the memory that files may take to be warmed up as a whole."""


def main() -> None:
    """Take an order, and print one JSON object: `state`, and what belongs to it."""
    order = json.loads(sys.stdin.read())
    scenario = Scenario(**order["scenario"] | {"dtype": np.dtype(order["scenario"]["dtype"])})
    made = scenario.job(Path(order["folder"]))
    job = Job(scenario, made.hdf5, made.zarr, made.matrix, order["where"])
    _tell(run_once(contender(order["contender"]), job, cold=order["cold"], limit=order["limit"], over=_give_up))


def run_once(who: Contender, job: Job, *, cold: bool, limit: float, over: Callable[[], None]) -> dict[str, Any]:
    """Read the windows once, time it, and check every value.

    Parameters
    ----------
    who, job
        Who reads what.
    cold
        Whether the pages of the files are dropped before; else they are read once before, or, where the files are too
        large for the memory, the windows.
    limit
        Seconds after which `over` is called, on another thread.

    Returns
    -------
    dict
        `state` ("timed" or "wrong"), `seconds` where timed, `peak_memory` in bytes, `cached`: part of the files in
        memory when the clock started.
    """
    for name in who.needs:
        importlib.import_module(name)
    module: Any = importlib.import_module(f"pipeline.bench.contenders.{who.key}")
    starts = job.scenario.starts()
    paths = files_of(who, job)
    with TemporaryDirectory(prefix="written-", dir=job.zarr.parent) as folder, ExitStack() as session:
        job = replace(job, folder=Path(folder))
        if hasattr(module, "session"):
            session.enter_context(module.session(job))
        # Much is imported, compiled or started at the first use: one window, alike for all, before the clock.
        if job.scenario.task != "create":
            module.read(job, starts[:1])
        # A virtual machine gets its memory at the first touch, which can cost seconds, and gives it back soon: touch
        # what the result and one copy of it take, and let go of it as the clock starts, alike for all. Pages come
        # zeroed by the kernel within the clock, for all, too.
        touched = np.ones(2 * job.scenario.result_nbytes, np.uint8)
        if cold:
            drop_files(paths)
        elif sum(path.stat().st_size for path in paths) < _WARM_SHARE * budget().nbytes:
            warm_files(paths)
        else:
            # Not all of it fits: what these windows need does.
            module.read(job, starts)
        cached = cached_share(paths)
        timer = threading.Timer(limit, over)
        timer.daemon = True
        del touched
        with PeakMemory() as peak:
            timer.start()
            begin = time.perf_counter()
            windows = module.read(job, starts)
            seconds = time.perf_counter() - begin
            timer.cancel()
        checked = who.kind != "limit" or who.key in _CHECKED_LIMITS
        wrong = checked and not job.scenario.is_right(windows, starts)
    facts = {"peak_memory": peak.nbytes, "cached": cached}
    if wrong:
        return {"state": "wrong"} | facts
    return {"state": "timed", "seconds": seconds} | facts


def files_of(who: Contender, job: Job) -> list[Path]:
    """List the files that a contender reads."""
    root = {"hdf5": job.hdf5, "zarr": job.zarr, "matrix": job.matrix, "either": job.hdf5 or job.zarr, "nothing": None}
    chosen = root[who.reads]
    if chosen is None:
        return []
    return [chosen] if chosen.is_file() else sorted(path for path in chosen.rglob("*") if path.is_file())


def _tell(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def _give_up() -> None:
    _tell({"state": "over"})
    os._exit(0)


if __name__ == "__main__":
    main()
