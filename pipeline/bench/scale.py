"""Measure what Dask itself costs for many tasks on many workers: `python -m pipeline.bench.scale --help`.

The plan, the tasks and their submission are those of a real run, but a task reads nothing. Scheduler and workers run in
processes of their own, over TCP on loopback. Workers share a few processes, so that a machine of two cores holds a
thousand of them; the measure is therefore the processor time of each part, not the clock alone.

An estimate for 100 TB (6.25 billion rows of 2000 float64), 10^9 windows of 16 rows (256 TB) and 1,000 workers:

- The plan holds 32 bytes a window: 32 GB, made in 4 minutes. If memory is too small, run several plans, each with a
  seed and an output of its own.
- 3.8 million tasks of 64 MiB are built while they are submitted; 16 bytes a window pass through the scheduler, which
  takes 1 to 2 ms a task (measured with 20 and with 1,000 simulated workers): at most 30 to 60 GB/s, 1 to 2 hours.
- The journal holds 76 bytes a task, the record 68 bytes a shard: 260 MB in the `zarr.json` of the result. Several
  smaller outputs are better.
- On S3 (0.0004 USD per 1,000 GET, 0.005 per 1,000 PUT in us-east-1) a million sparse windows are 1 to 2 million GETs,
  0.40 to 0.80 USD; `pipeline plan` shows the requests and the price of a plan.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distributed
import numpy as np

from pipeline.matrix.opening import open_matrix
from pipeline.plan.group import plan_windows
from pipeline.plan.starts import draw_starts
from pipeline.runtime.runner import run_tasks
from pipeline.runtime.tasks import Receipt, Work, name_tasks, prepare_work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pipeline.plan.plan import Plan, Task

_ROWS, _COLUMNS, _LENGTH = 2_000_000, 2_000, 16
_WORKERS_A_PROCESS = 250
_START_SECONDS = 300
_TICKS = os.sysconf("SC_CLK_TCK")


def simulate_run(tasks: int, *, workers: int, task_windows: int) -> dict[str, Any]:
    """Run tasks that read nothing, and measure what each part of the cluster uses.

    Parameters
    ----------
    tasks, workers
        Number of tasks, and of workers of one thread each.
    task_windows
        Windows of a task; their starts and places are sent with it.

    Returns
    -------
    dict
        Seconds of the run; for the client, the scheduler and all workers together, seconds of processor time and bytes
        by which memory grew.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plan = _plan_nothing(folder, tasks * task_windows)
        work = prepare_work(plan, None)
        scheduler, address = stack.enter_context(_started(folder, "scheduler"))
        groups = [min(_WORKERS_A_PROCESS, workers - first) for first in range(0, workers, _WORKERS_A_PROCESS)]
        started = [stack.enter_context(_started(folder, "workers", address, str(count)))[0] for count in groups]
        client = stack.enter_context(distributed.Client(address, set_as_default=True))
        client.wait_for_workers(workers, timeout=_START_SECONDS)
        parts = {"client": [os.getpid()], "scheduler": [scheduler], "workers": started}
        before = {name: _measure(pids) for name, pids in parts.items()}
        begin = time.perf_counter()
        first = 0.0
        for done, _ in enumerate(_run_nothing(plan, work, task_windows)):
            first = first if done else time.perf_counter() - begin
        seconds = time.perf_counter() - begin
        used = {name: (_measure(pids) - before[name]).tolist() for name, pids in parts.items()}
    return {
        "tasks": tasks,
        "workers": workers,
        "windows": len(plan),
        "seconds": seconds,
        "first_seconds": first,
        "tasks_per_second": tasks / seconds,
        "processor_seconds": {name: seconds for name, (seconds, _) in used.items()},
        # The scheduler runs on one core.
        "most_tasks_per_second": tasks / used["scheduler"][0],
        "grown": {name: int(nbytes) for name, (_, nbytes) in used.items()},
    }


def read_nothing(work: Work, task: Task) -> Receipt:
    """Replace the function that reads the windows of a task."""
    del work
    return Receipt(task.number, len(task.starts), 0, 0.0)


def _plan_nothing(folder: Path, windows: int) -> Plan:
    """Plan windows of a matrix of (2_000_000, 2000) float64, in a sparse file."""
    with (folder / "A.bin").open("wb") as file:
        file.truncate(_ROWS * _COLUMNS * 8)
    matrix = open_matrix(folder / "A.bin", dtype="float64", row_shape=(_COLUMNS,))
    return plan_windows(matrix, draw_starts(_ROWS, length=_LENGTH, count=windows, seed=0), length=_LENGTH)


def _run_nothing(plan: Plan, work: Work, task_windows: int) -> Iterator[Any]:
    named = name_tasks("read", read_nothing, ((work, task) for task in plan.tasks("chunk", windows=task_windows)))
    return run_tasks(named, at_once=sys.maxsize, span=("pipeline", "simulate"))


@contextmanager
def _started(folder: Path, *words: str) -> Iterator[tuple[int, str]]:
    """Start a part of the cluster; yield its process id and the line that it prints when it is ready."""
    command = [sys.executable, "-P", "-m", "pipeline.bench.scale", *words]
    settings = {"DASK_LOGGING__DISTRIBUTED": "critical", "DASK_TEMPORARY_DIRECTORY": str(folder)}
    with subprocess.Popen(  # noqa: S603 (this module)
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | settings
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.pid, process.stdout.readline().strip()
        finally:
            # The process ends with its input, also if this process is killed.
            process.stdin.close()
            process.wait()


def _measure(pids: list[int]) -> NDArray[np.float64]:
    """Return the processor seconds and the bytes of anonymous memory that processes use, (2,)."""
    seconds, nbytes = 0.0, 0
    for pid in pids:
        # The name of the process, in brackets, may contain spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / _TICKS
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        nbytes += sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))
    return np.array([seconds, nbytes])


async def _serve_scheduler() -> None:
    settings = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    async with distributed.Scheduler(**settings) as scheduler:
        print(scheduler.address, flush=True)  # noqa: T201 (read by `_started`)
        await _until_input_ends()
        await scheduler.close()


async def _serve_workers(address: str, count: int) -> None:
    settings = {"host": "127.0.0.1", "nthreads": 1, "memory_limit": 0, "dashboard": False}
    workers = [distributed.Worker(address, **settings) for _ in range(count)]
    await asyncio.gather(*(worker.start() for worker in workers))
    print(count, flush=True)  # noqa: T201 (read by `_started`)
    await _until_input_ends()
    await asyncio.gather(*(worker.close(timeout=1, nanny=False) for worker in workers), return_exceptions=True)


async def _until_input_ends() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def main() -> None:
    """Simulate a run, or be a part of one; print its numbers as JSON."""
    if sys.argv[1:2] == ["scheduler"]:
        asyncio.run(_serve_scheduler())
        return
    if sys.argv[1:2] == ["workers"]:
        asyncio.run(_serve_workers(sys.argv[2], int(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--windows", type=int, default=100, help="Windows of a task.")
    options = parser.parse_args()
    numbers = simulate_run(options.tasks, workers=options.workers, task_windows=options.windows)
    print(json.dumps(numbers, indent=1))  # noqa: T201 (the command line of this module)


if __name__ == "__main__":
    main()
