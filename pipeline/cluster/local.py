"""A cluster on this machine: threads of this process, or processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from contextlib import suppress
from functools import partial
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import dask
import distributed
from dask.system import CPU_COUNT
from distributed.protocol.pickle import dumps
from tornado.ioloop import PeriodicCallback

from pipeline.arguments import check_flag, check_whole, show
from pipeline.cluster.dashboard import Worker, can_defer_pages, defer_pages
from pipeline.cluster.launch import launch
from pipeline.cluster.origins import make_gate
from pipeline.cluster.registry import check_keys, keywords_of, mapping_of
from pipeline.cluster.security import (
    Encryption,
    check_dashboard,
    check_interface,
    check_protocol,
    choose_encryption,
    make_security,
    without_dashboard,
)
from pipeline.cluster.startup import UNGUARDED, Nanny, safe_path
from pipeline.cluster.worker_exits import make_exit_watch
from pipeline.errors import InputError
from pipeline.memory import budget
from pipeline.storage.trust import private_folder

if TYPE_CHECKING:
    from contextlib import ExitStack

LOCAL_DEFAULTS: dict[str, Any] = {
    "n_workers": 1,
    "processes": False,
    "memory_limit": 0,
    "dashboard_address": "127.0.0.1:8787",
    "worker_dashboard_address": "127.0.0.1:0",
}
"""`kwargs` of a LocalCluster where the file leaves them out: one process, reachable from this host alone."""

_LISTENING = {"protocol", "host", "interface", "port", "security"}
_LOG_LEVEL = "DASK_LOGGING__DISTRIBUTED"
_SWEPT = "ignore::UserWarning:multiprocessing.resource_tracker"
_LOOPBACK = "127.0.0.1:0"
_MIN_THREADS = 2
"""One that reads while another copies; many reads are in flight, whatever the number of threads."""
_REPLACE_SECONDS = 1
_GONE = (distributed.Status.closed, distributed.Status.failed)


def local_kwargs(
    given: dict[str, Any], overrides: dict[str, Any], workers: int | None, origin: str, *, insecure: bool
) -> tuple[dict[str, Any], Encryption]:
    """Keywords of a LocalCluster: defaults, then the file, then `overrides`; and how it is kept from others.

    Parameters
    ----------
    workers
        Those that it scales to, None where the file says nothing of it.
    origin
        Names the file in messages.

    Raises
    ------
    InputError
        If a keyword or its value cannot be used, or others could reach the cluster in plain.
    """
    known = keywords_of(distributed.LocalCluster, distributed.Nanny, distributed.Worker) - {"worker_class"}
    check_keys(given, sorted(known), f"kwargs in {origin}")
    check_keys(overrides, sorted(known), "the arguments")
    _check_scheduler(given, origin)
    _check_scheduler(overrides, "the arguments")
    workers = workers or 1
    kwargs = LOCAL_DEFAULTS | given | overrides
    processes = kwargs["processes"]
    check_flag("processes", processes)
    for key, least in (("n_workers", 0 if workers > 1 else 1), ("threads_per_worker", 1)):
        kwargs[key] = check_whole(key, kwargs.get(key, least), least=least)
    workers = max(workers, kwargs["n_workers"])
    if "threads_per_worker" not in given | overrides:
        kwargs["threads_per_worker"] = math.ceil(max(_MIN_THREADS, CPU_COUNT) / workers)

    # A limit that was written for the other kind of worker says nothing about this one.
    switched = processes != given.get("processes", LOCAL_DEFAULTS["processes"])
    limit = (overrides if switched else given | overrides).get("memory_limit", "auto")
    if not isinstance(limit, str | int | float | None):
        raise InputError(f"memory_limit is a number of bytes, or text such as 8GB; got {show(limit)}; correct it")
    if limit == "auto":
        limit = budget().nbytes // workers if processes else 0
    if not processes:
        check_no_limit(limit)
    kwargs["memory_limit"] = limit

    for key in ("dashboard_address", "worker_dashboard_address"):
        check_dashboard(kwargs[key], insecure=insecure)
    # Without an address Dask still serves HTTP, on all interfaces.
    served = {"dashboard_address": kwargs["dashboard_address"]} | (kwargs.get("scheduler_kwargs") or {})
    if served["dashboard_address"] in (None, False):
        off = without_dashboard(served, _LOOPBACK)
        kwargs |= {"dashboard_address": _LOOPBACK, "scheduler_kwargs": off}
    kwargs["worker_dashboard_address"] = kwargs["worker_dashboard_address"] or _LOOPBACK
    return _encrypted(kwargs, insecure=insecure)


def _check_scheduler(options: dict[str, Any], origin: str) -> None:
    """Refuse keywords of the scheduler alone that say where it listens, and how; InputError."""
    if own := mapping_of(options, "scheduler_kwargs", origin).keys() & _LISTENING:
        raise InputError(
            "who can reach a cluster is said for its scheduler and workers alike; got "
            f"{', '.join(sorted(own))} in scheduler_kwargs in {origin}; write the kwargs of the LocalCluster itself, "
            "with scheduler_port for port"
        )


def _encrypted(kwargs: dict[str, Any], *, insecure: bool) -> tuple[dict[str, Any], Encryption]:
    """Keep what leaves this process from others, those on this machine included."""
    served = kwargs | (kwargs.get("scheduler_kwargs") or {})
    check_dashboard(served["dashboard_address"], insecure=insecure)
    own = any(kwargs.get(key) for key in ("protocol", "security", "host", "interface", "scheduler_port"))
    if not kwargs["processes"] and not own:
        # Also where Dask's settings ask for encryption: nothing is sent.
        return kwargs | {"protocol": "inproc://"}, Encryption.IN_PROCESS
    check_interface(kwargs.get("interface"))
    check_protocol(kwargs.get("protocol"), insecure=insecure)
    encryption = choose_encryption(kwargs.get("security"), insecure=insecure)
    return kwargs if encryption is Encryption.NONE else {"protocol": "tls://"} | kwargs, encryption


def check_no_limit(limit: Any) -> None:
    """Refuse a memory limit for workers of this process; InputError."""
    if limit not in (0, None, "0"):
        raise InputError(
            "workers in the process of their client must have no memory limit, or the result would pause them; "
            f"got memory_limit={show(limit)}; set memory_limit=0, or processes=True"
        )


def start_local(
    stack: ExitStack, kwargs: dict[str, Any], encryption: Encryption, *, level: Any, replace: bool, guarded: bool
) -> Any:
    """Start a LocalCluster, which `stack` closes.

    Parameters
    ----------
    kwargs, encryption
        What `local_kwargs` gave.
    level
        Of Dask's log lines that are let through; falsy: all.
    replace
        Whether processes that end for good are started anew.
    guarded
        Whether dashboards refuse requests of other sites.
    """
    kwargs = kwargs | {"silence_logs": level, "security": make_security(encryption, kwargs.get("security"))}
    # The children that Python starts while it imports the main script would start children of their own, and so on.
    if kwargs["processes"] and getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(UNGUARDED)
    if kwargs["processes"] and multiprocessing.current_process().daemon:
        raise InputError(
            "processes=True cannot start workers in a daemonic process, such as those of multiprocessing.Pool; set "
            "processes=False, or start this process by concurrent.futures.ProcessPoolExecutor"
        )
    if not dask.config.get("temporary-directory", None):
        # Dask's own folder is first on the path of all its processes, and whoever uses it first on a machine owns it.
        stack.enter_context(dask.config.set({"temporary-directory": str(private_folder())}))
    deferred = can_defer_pages() and not kwargs.get("scheduler_kwargs")
    served: dict[str, Any] = {"dashboard": False} if deferred else dict(kwargs.get("scheduler_kwargs") or {})
    kwargs["scheduler_kwargs"] = served | {"plugins": [*served.get("plugins", ()), _NodePlugins(guarded=guarded)]}
    if kwargs["processes"]:
        kwargs["worker_class"] = Nanny
        _keep_processes_quiet(stack, level)
    else:
        kwargs["worker_class"] = Worker
    cluster = launch(stack, distributed.LocalCluster, kwargs, shielded=kwargs["processes"])
    if deferred:
        defer_pages(cluster.scheduler, "scheduler")
    if kwargs["processes"] and replace:
        again = PeriodicCallback(partial(_replace_lost, cluster), 1000 * _REPLACE_SECONDS)
        # Of those that the cluster stops when it closes.
        cluster.periodic_callbacks["replace-lost"] = again
        cluster.loop.add_callback(again.start)
    return cluster


class _NodePlugins(distributed.SchedulerPlugin):  # type: ignore[misc]
    """Gives nodes their plugins as they come: at a cluster that runs already each takes a round trip to all of them."""

    name = "node-plugins"

    def __init__(self, *, guarded: bool) -> None:
        self._guarded = guarded

    async def start(self, scheduler: distributed.Scheduler) -> None:
        watch = make_exit_watch()
        scheduler.nanny_plugins[watch.name] = dumps(watch)
        if self._guarded:
            guard, gate = make_gate()
            guard(scheduler)
            scheduler.worker_plugins[gate.name] = dumps(gate)


def _keep_processes_quiet(stack: ExitStack, level: Any) -> None:
    """See to it that processes to be started say nothing when they end, or are killed."""
    if level and _LOG_LEVEL not in os.environ:
        # A worker that closes lets go of `silence_logs` too early. Dask leaves the variable in our environment.
        stack.callback(os.environ.pop, _LOG_LEVEL, None)
        stack.enter_context(dask.config.set({f"distributed.nanny.pre-spawn-environ.{_LOG_LEVEL}": str(level)}))
    # What sweeps behind processes that were killed tells of each semaphore. It starts here, and not in the thread that
    # blocks SIGINT, since it would let that through again.
    sys.warnoptions.append(_SWEPT)
    try:
        with safe_path():
            resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(_SWEPT)


async def _replace_lost(cluster: Any) -> None:
    """Start workers anew whose nanny has gone, too.

    A nanny restarts a process that dies, and goes itself where the process leaves in order, or cannot start.
    """
    for name, nanny in list(cluster.workers.items()):
        if nanny.status in _GONE:
            del cluster.workers[name]
    if cluster.worker_spec.keys() - cluster.workers.keys():
        with suppress(Exception):
            await cluster._correct_state()  # noqa: SLF001 (`Cluster.scale` drops its errors into the log)
