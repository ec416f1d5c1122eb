"""`cluster.yaml` to a Dask client."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
import multiprocessing
import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import dask
import distributed
import distributed.utils
from dask.system import CPU_COUNT
from tornado.ioloop import PeriodicCallback

from pipeline.clusterfile import Spec, check_keys, merged_settings, one_line, read_spec
from pipeline.dashboard import Worker, can_defer_pages, dashboard_link, defer_pages
from pipeline.errors import InputError, OpenError, PipelineError
from pipeline.memory import budget
from pipeline.signals import kill_workers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

__all__ = ["check_client", "connect", "dashboard_link"]

_CLUSTERS = {
    "dask.distributed": ("LocalCluster",),
}
"""Classes that `module` and `class` may name; nothing else is ever imported."""

_DEFAULTS: dict[str, Any] = {
    "n_workers": 1,
    "processes": False,
    "memory_limit": 0,
    "dashboard_address": "127.0.0.1:8787",
    "worker_dashboard_address": "127.0.0.1:0",
}
"""`kwargs` of a LocalCluster where the file leaves them out: one process, reachable from this host alone."""

_LOG_LEVEL = "DASK_LOGGING__DISTRIBUTED"
_SWEPT = "ignore::UserWarning:multiprocessing.resource_tracker"
_LOOPBACK = "127.0.0.1:0"
_MIN_THREADS = 2
"""One that reads while another copies; many reads are in flight, whatever the number of threads."""
_CONNECT_SECONDS = 10
_WORKER_SECONDS = 60
_CLOSE_SECONDS = 10
_REPLACE_SECONDS = 1
_GONE = (distributed.Status.closed, distributed.Status.failed)
_NO_WORKERS = "distributed.scheduler.no-workers-timeout"
_NO_WORKERS_MINUTES = 5
"""How long tasks wait for a worker where Dask's settings let them wait for ever."""


@contextmanager
def connect(cluster: str | Path | None = None, **overrides: Any) -> Iterator[distributed.Client]:
    """Start the cluster that a `cluster.yaml` describes, or connect to it, and make it the active one.

    The link of its dashboard goes to stderr. At the end everything that was started here is closed, and Dask's
    settings are as before.

    Parameters
    ----------
    cluster
        The file. None: `./cluster.yaml` if it is there, else one worker in this process, whose number of threads is
        the number of cores, at least 2.
    **overrides
        They go over the file's `kwargs`, such as `n_workers=2, processes=True`. `scheduler_address` takes the place
        of the file's cluster; `silence_logs=False` lets Dask's log lines through.

    Yields
    ------
    distributed.Client
        The active client, until the block ends.

    Raises
    ------
    InputError
        If a key or a value of the file or of `overrides` cannot be used.
    NotFoundError
        If the named file is absent.
    OpenError
        If the file cannot be parsed, the cluster does not start, or the scheduler does not answer within 10 seconds.

    Examples
    --------
    >>> with connect(dashboard_address=None) as client:
    ...     client.submit(sum, [1, 2]).result()
    3
    """
    spec, settings, origin = read_spec(cluster)
    overrides = dict(overrides)
    level = overrides.pop("silence_logs", spec.kwargs.get("silence_logs", logging.CRITICAL))
    address = overrides.pop("scheduler_address", None)
    if address is None:
        address = spec.scheduler_address
    else:
        spec = Spec(version=1)
    if address is not None and (overrides or spec.describes_cluster):
        raise InputError(
            f"a cluster that runs already cannot be configured; got a scheduler-address and {origin} or arguments "
            "that describe a cluster; drop one of the two"
        )
    with ExitStack() as stack:
        # The client sets `scheduler`, too, and leaves it so when it cannot connect.
        stack.enter_context(dask.config.set(merged_settings(settings) | {"scheduler": "dask.distributed"}))
        if level:
            stack.enter_context(distributed.utils.silence_logging_cmgr(level))
        if address is None:
            target = _start(stack, spec, overrides, level, origin)
            client = distributed.Client(target, set_as_default=True)
        else:
            client = _reach(address)
        stack.callback(_close, client)
        if link := dashboard_link(client):
            sys.stderr.write(f"dashboard: {link}\n")
        yield client


def check_client(client: distributed.Client) -> None:
    """Refuse a client whose workers live in this process under a memory limit.

    Such a worker measures the whole process: the caller's own array would pause it for ever.

    Parameters
    ----------
    client
        A synchronous client, such as `distributed.get_client()` gives.

    Raises
    ------
    InputError
        If a worker of this process has a memory limit.
    """
    in_process = client.scheduler.address.startswith("inproc://") or not getattr(client.cluster, "processes", True)
    if in_process:
        for worker in client.scheduler_info(n_workers=-1)["workers"].values():
            _check_no_limit(worker["memory_limit"])


def _check_no_limit(limit: Any) -> None:
    if limit not in (0, None, "0"):
        raise InputError(
            "workers in the process of their client must have no memory limit, or the result would pause them; "
            f"got memory_limit={limit!r}; set memory_limit=0, or processes=True"
        )


def _start(stack: ExitStack, spec: Spec, overrides: dict[str, Any], level: Any, origin: str) -> Any:
    """Start the cluster of `spec`; `stack` closes it."""
    module, name = spec.module or "dask.distributed", spec.class_ or "LocalCluster"
    if name not in _CLUSTERS.get(module, ()):
        allowed = ", ".join(f"{each}.{name}" for each, names in _CLUSTERS.items() for name in names)
        raise InputError(f"module and class name a known cluster; got {module}.{name} in {origin}; use {allowed}")
    factory = getattr(importlib.import_module(module), name)
    kwargs = _local_kwargs(spec.kwargs, overrides, spec.workers, origin) | {"silence_logs": level}
    # The children that Python starts while it imports the main script would start children of their own, and so on.
    if kwargs["processes"] and getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)
    deferred = can_defer_pages() and not kwargs.get("scheduler_kwargs")
    if deferred:
        kwargs["scheduler_kwargs"] = {"dashboard": False}
    if not kwargs["processes"]:
        kwargs["worker_class"] = Worker
    patience = dask.config.get(_NO_WORKERS) or f"{_NO_WORKERS_MINUTES} minutes"
    try:
        with dask.config.set({_NO_WORKERS: patience}):
            cluster = _make_interruptibly(stack, factory, kwargs)
    except Exception as error:
        raise _start_error(error, origin) from error
    if deferred:
        defer_pages(cluster.scheduler, "scheduler")
    if spec.adapt:
        cluster.adapt(minimum=spec.adapt.minimum, maximum=spec.adapt.maximum)
    elif spec.scale:
        cluster.scale(spec.workers)
    if kwargs["processes"] and not spec.adapt:
        again = PeriodicCallback(partial(_replace_lost, cluster), 1000 * _REPLACE_SECONDS)
        # Of those that the cluster stops when it closes.
        cluster.periodic_callbacks["replace-lost"] = again
        cluster.loop.add_callback(again.start)
    return cluster


def _local_kwargs(given: dict[str, Any], overrides: dict[str, Any], workers: int, origin: str) -> dict[str, Any]:
    """Keywords of a LocalCluster: defaults, then the file, then `overrides`; `workers`: those that it scales to."""
    kinds = (distributed.LocalCluster, distributed.Nanny, distributed.Worker)
    known = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}
    known -= {"self", "asynchronous", "loop", "kwargs", "worker_kwargs", "worker_class"}
    check_keys(given, sorted(known), f"kwargs in {origin}")
    check_keys(overrides, sorted(known), "the arguments")
    kwargs = _DEFAULTS | given | overrides
    processes = kwargs["processes"]
    if not isinstance(processes, bool):
        raise InputError(f"processes is true or false; got {processes!r}; correct it")
    for key, least in (("n_workers", 0 if workers > 1 else 1), ("threads_per_worker", 1)):
        value = kwargs.setdefault(key, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{key} is a whole number, at least {least}; got {value!r}; correct it")
    workers = max(workers, kwargs["n_workers"])
    if "threads_per_worker" not in given | overrides:
        kwargs["threads_per_worker"] = math.ceil(max(_MIN_THREADS, CPU_COUNT) / workers)

    # A limit that was written for the other kind of worker says nothing about this one.
    switched = processes != given.get("processes", _DEFAULTS["processes"])
    limit = (overrides if switched else given | overrides).get("memory_limit", "auto")
    if limit == "auto":
        limit = budget().nbytes // workers if processes else 0
    if not processes:
        _check_no_limit(limit)
    kwargs["memory_limit"] = limit

    # Without an address Dask still serves HTTP, on all interfaces.
    if kwargs["dashboard_address"] is None:
        off = (kwargs.get("scheduler_kwargs") or {}) | {"dashboard": False}
        kwargs |= {"dashboard_address": _LOOPBACK, "scheduler_kwargs": off}
    kwargs["worker_dashboard_address"] = kwargs["worker_dashboard_address"] or _LOOPBACK
    return kwargs


def _start_error(error: Exception, origin: str) -> PipelineError:
    if "Nanny failed to start" in str(error):
        return OpenError(
            "worker processes import the main script before they start, so it may connect only below "
            "`if __name__ == '__main__':`; got workers that ended at once; add that line, or set processes: false"
        )
    kind = InputError if isinstance(error, TypeError | ValueError) else OpenError
    return kind(f"the cluster must start; got {one_line(error)}; check the kwargs of {origin}")


def _make_interruptibly(stack: ExitStack, factory: Any, kwargs: dict[str, Any]) -> Any:
    """Make a cluster in a thread of its own, so that Ctrl-C interrupts the caller, never a start half way.

    `stack` closes it.
    """
    if kwargs["processes"]:
        _keep_processes_quiet(stack, kwargs["silence_logs"])
    with ThreadPoolExecutor(1, "start", _block_sigint if kwargs["processes"] else None) as starter:
        starting = starter.submit(_make, factory, kwargs)
        stack.push(lambda kind, *_: _close_started(starting, hurry=kind is not None))
        try:
            return starting.result()
        except Exception:
            raise
        except BaseException:
            # Let it end soon.
            kill_workers()
            raise


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
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(_SWEPT)


def _make(factory: Any, kwargs: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        # Where a port is taken Dask takes another, whose link is printed, and drops a socket.
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        warnings.filterwarnings("ignore", message="unclosed <socket", category=ResourceWarning)
        return factory(**kwargs)


def _block_sigint() -> None:
    """Keep Ctrl-C from worker processes, those of later restarts and scaling among them.

    They are spawned by threads that this one starts, and both inherit its signal mask.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


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


def _reach(address: str) -> distributed.Client:
    before = _active()
    try:
        client = distributed.Client(address, timeout=_CONNECT_SECONDS, set_as_default=True)
    except Exception as error:
        # Some errors leave a client behind that is active and can do nothing.
        if (after := _active()) is not before:
            _close(after)
        kind = InputError if isinstance(error, TypeError | ValueError) else OpenError
        raise kind(
            f"a scheduler must answer within {_CONNECT_SECONDS} s; got {one_line(error)} at {address}; start it, or "
            "correct scheduler-address"
        ) from error
    try:
        client.wait_for_workers(1, timeout=_WORKER_SECONDS)
    except TimeoutError as error:
        _close(client)
        raise OpenError(
            f"a cluster must have a worker within {_WORKER_SECONDS} s; got none at {address}; start a dask worker"
        ) from error
    return client


def _active() -> Any:
    try:
        return distributed.default_client()
    except ValueError:
        return None


def _close(client: distributed.Client) -> None:
    # Results are safe by now, and an exception of the body must not be covered.
    with suppress(Exception):
        client.close(timeout=_CLOSE_SECONDS)


def _close_started(starting: Future[Any], *, hurry: bool) -> None:
    # Its thread has ended.
    with suppress(Exception):
        cluster = starting.result()
        if hurry:
            cluster.sync(_drop_workers, cluster)
        cluster.close(timeout=_CLOSE_SECONDS)


async def _drop_workers(cluster: Any) -> None:
    """Close workers without waiting for the tasks that they run."""
    cluster.worker_spec.clear()
    workers = list(cluster.workers.values())
    in_process = {"timeout": 0, "executor_wait": False}
    nanny = {"timeout": 1}
    each = (worker.close(**in_process if isinstance(worker, distributed.Worker) else nanny) for worker in workers)
    await asyncio.gather(*each, return_exceptions=True)
