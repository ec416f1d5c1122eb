"""Where tasks run: on which scheduler, how many at once, and in how much memory."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dask import config as dask_config
from dask import local, threaded
from dask.base import get_scheduler

from pipeline.arguments import check_whole
from pipeline.errors import BudgetError, IncompleteError, InputError
from pipeline.formatting import MIB, format_size
from pipeline.memory import Budget, budget, held_nbytes, resident_nbytes
from pipeline.process import DISTRIBUTED

_ASK_SECONDS = 3
_OWN_NBYTES = 64 * MIB
"""What the interpreter grows by while it runs: a cluster's threads, buffers, the code of what is imported late."""

_UNLIMITED = Budget(sys.maxsize, "")


def active_client() -> Any:
    """Return the active `distributed.Client`, or None where tasks run on a scheduler of Dask's own."""
    # Inside of a task the cluster's threads may all be waiting, this one among them: use Dask's own scheduler.
    if "distributed" not in sys.modules or is_in_task():
        return None
    from distributed import Client

    if dask_config.get("scheduler", None) not in (None, *DISTRIBUTED):
        return None
    try:
        client = Client.current()
    except ValueError:
        return None
    if client.scheduler is None and client.status != "closed":
        # It failed to start, and stays the active one all the same.
        return None
    if client.asynchronous:
        raise InputError("tasks run on a synchronous client; got an asynchronous one; call this from a plain thread")
    return client


def own_scheduler() -> Any:
    """Return the scheduler of Dask's own that computes tasks where there is no active client."""
    name = dask_config.get("scheduler", None)
    # A client that failed to start, and one that this process may not use, leave their name in Dask's settings.
    return threaded.get if name in (None, *DISTRIBUTED) else get_scheduler()


def is_in_task() -> bool:
    """Whether this thread does a task of a `distributed.Worker`."""
    if "distributed" in sys.modules:
        from distributed import get_worker

        with suppress(ValueError):
            get_worker()
            return True
    return False


def closed_error(client: Any) -> IncompleteError:
    """Return what is wrong where a client was closed under a run."""
    return IncompleteError(
        f"a run needs its client until it ends; it is {client.status}; read within `connect`, or close batches before"
    )


def shares_memory(client: Any) -> bool:
    """Whether tasks run in this process, so that they can write straight into an array of it."""
    if client is None:
        return own_scheduler() in (threaded.get, local.get_sync)
    if client.status != "running":
        raise closed_error(client)
    addresses = list(client.scheduler_info(n_workers=-1).get("workers", {}))
    return bool(addresses) and all(address.startswith("inproc://") for address in addresses)


def count_threads(client: Any) -> int:
    """Tasks that run at once."""
    if client is not None:
        threads: dict[str, int] = client.nthreads()
        return sum(threads.values()) or 1
    from dask.system import CPU_COUNT

    found = dask_config.get("num_workers", None)
    # Set in Python it may be text, which Dask's own threads would not take.
    number = int(found) if isinstance(found, str) and found.isdecimal() else found
    return CPU_COUNT if number is None else check_whole("num_workers of Dask's configuration", number, least=1)


def measure_workers(client: Any) -> tuple[int, int]:
    """Count the workers that no process of ours has started, and the bytes that they hold, as far as is known.

    Callable from any thread; the scheduler is asked, and not waited for.
    """
    if client is None:
        return 0, 0
    from distributed import LocalCluster

    if isinstance(client.cluster, LocalCluster):
        # They are descendants of this process.
        return 0, 0
    with suppress(Exception):
        known = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=_ASK_SECONDS)["workers"]
        return len(known), sum(worker["metrics"]["memory"] for worker in known.values())
    return 0, 0


@dataclass(frozen=True, slots=True)
class Footprint:
    """How much of a run is under way at once, and the memory that this takes."""

    at_once: int
    """Tasks that are under way, or whose results are not yet taken."""
    fits: int
    """Tasks that memory would allow, were there as many threads."""
    peak_nbytes: int
    """Memory of all processes of this run on this machine, at its peak."""


def fit_memory(
    task_nbytes: int,
    limit: int | None,
    *,
    threads: int,
    what: str,
    held: int = 0,
    touched: int = 0,
    enough: int | None = None,
    way_out: str = "raise the limit",
) -> Footprint:
    """Choose how many tasks are under way at once: two a thread, so that none waits, or as many as memory allows.

    Parameters
    ----------
    task_nbytes
        Memory of one task.
    limit
        Bytes that the user allows, None for the machine's own limits alone.
    threads
        Tasks that run at once.
    what
        Names the request in the error: the result, or else the task.
    held
        Bytes that are held all the while: the result.
    touched
        Bytes of a file or of the caller's array that the run fills: workers of this process count them, too.
    enough
        Bytes, beside what is held already, that more tasks at once should not pass where the user sets no limit.
    way_out
        Ends the error where the result is what is too large.

    Raises
    ------
    BudgetError
        If not even one task fits beside what is held.
    """
    allowed = budget(limit)
    before = held_nbytes() + held
    needed = before + _OWN_NBYTES + task_nbytes
    if needed > allowed.nbytes:
        parts = [f"{format_size(before - held)} held already", f"{format_size(_OWN_NBYTES)} to run with"]
        parts += [f"{format_size(held)} for {what}", f"{format_size(task_nbytes)} for a task"] if held else []
        parts += [] if held else [f"{format_size(task_nbytes)} for {what}"]
        # Where the rest alone is too much, it is of no use to put the result elsewhere.
        advice = way_out if needed - held <= allowed.nbytes else "raise the limit"
        raise BudgetError(
            f"not enough memory: the run needs {format_size(needed)} ({', '.join(parts)}), {allowed}; {advice}"
        )
    room = _worker_room(active_client())
    growth = needed - (before - held) + touched
    if growth > room.nbytes:
        raise BudgetError(
            f"not enough memory for the client's workers: {what} needs {format_size(growth)}, "
            f"{format_size(max(0, room.nbytes))} are left before {room.source} pauses them; start the client with "
            "memory_limit=0 or processes=True"
        )
    nbytes = min(allowed.nbytes, needed + room.nbytes - growth)
    most = nbytes if enough is None or limit is not None else min(nbytes, max(needed, before + enough))
    fits = 1 + (most - needed) // max(1, task_nbytes)
    at_once = min(2 * threads, fits)
    return Footprint(at_once, fits, needed + (min(at_once, threads) - 1) * task_nbytes)


def _worker_room(client: Any) -> Budget:
    """Tell what this process may grow by until a worker in it pauses, which measures all of the process.

    Paused for a result that its client holds, it would never go on.
    """
    if (
        client is None
        or client.status != "running"
        or not (client.scheduler.address.startswith("inproc://") or not getattr(client.cluster, "processes", True))
    ):
        return _UNLIMITED
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    least = min((limit for worker in workers if (limit := worker["memory_limit"])), default=0)
    fraction = dask_config.get("distributed.worker.memory.pause", 0.8)
    if not least or not fraction:
        return _UNLIMITED
    return Budget(int(least * fraction) - resident_nbytes(), f"memory_limit={format_size(least)}")
