"""The life of this process: what a forked child must not use of its parent, and what is closed at exit.

Threads do not survive a fork, and a child that waits for one waits for ever.

Python resets its own locks, zarr and fsspec their event loops. This module resets what a child inherits of Dask and
distributed, and calls what other modules of this package register.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 (registers before this module does)
import contextlib
import itertools
import os
import sys
import threading
import weakref
from contextlib import suppress
from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

DISTRIBUTED = ("dask.distributed", "distributed")
"""Names of Dask's setting `scheduler` that mean the active client."""

_inherited: list[Any] = []
"""Clients, clusters and servers of the parent: one that is freed would take sockets out of the epoll instance that the
parent still uses."""


def after_fork[F: Callable[[], object]](reset: F) -> F:
    """Decorate a function that every forked child calls before anything else, where a system can fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=reset)
    return reset


def renewed[L](lock: L) -> L:
    """Return a lock or condition that is free in every forked child, whatever thread held it at the fork."""
    after_fork(lock._at_fork_reinit)  # type: ignore[attr-defined] # noqa: SLF001 (as the standard library does)
    return lock


@after_fork
def _reset_dask() -> None:
    """Have Dask start threads of its own, and forget the parent's clients and clusters without closing them."""
    # What is not imported has no state. A lock that another thread held is held for ever.
    for module, name in (
        ("dask.config", "config_lock"),
        ("distributed.gc", "_gc_diagnosis_lock"),
        ("distributed.profile", "lock"),
        ("distributed.threadpoolexecutor", "threads_lock"),
        ("distributed.worker", "_cache_lock"),
    ):
        with suppress(AttributeError):
            getattr(sys.modules.get(module), name)._at_fork_reinit()  # noqa: SLF001
    if sync := sys.modules.get("zarr.core.sync"):
        sync.__dict__["_lock"] = None
    if threaded := sys.modules.get("dask.threaded"):
        pools = {"default_pool": None, "pools_lock": threading.Lock(), "main_thread": threading.current_thread()}
        vars(threaded).update(pools)
        threaded.pools.clear()
    if config := sys.modules.get("dask.config"):
        _reset_settings(config.config)
    if "distributed" in sys.modules:
        _reset_distributed()


def _reset_settings(settings: dict[str, Any]) -> None:
    """Drop a pool and a scheduler that are the parent's."""
    settings.pop("pool", None)
    scheduler = settings.get("scheduler")
    named = isinstance(scheduler, str) and scheduler.lower() not in DISTRIBUTED
    if not named and not isinstance(scheduler, FunctionType):
        settings.pop("scheduler", None)


def _reset_distributed() -> None:
    import distributed
    from distributed import client, utils
    from distributed.comm import inproc

    utils.LoopRunner._lock = threading.Lock()  # noqa: SLF001
    inproc.global_manager.lock = threading.Lock()
    utils._offload_executor = type(utils._offload_executor)(1, thread_name_prefix="Dask-Offload")  # noqa: SLF001
    servers = (distributed.Scheduler, distributed.Worker, distributed.Nanny)
    kept = [each for kind in servers for each in kind._instances]  # noqa: SLF001
    clients = list(distributed.Client._instances)  # noqa: SLF001
    clusters = [*distributed.SpecCluster._instances, *(each.cluster for each in clients if each.cluster)]  # noqa: SLF001
    _inherited.extend([*kept, *clients, *clusters])
    for each in clients:
        each.status = "closed"
    for cluster in clusters:
        # Those of other packages may know no such status.
        with suppress(Exception):
            cluster.shutdown_on_close = False
        with suppress(Exception):
            cluster.status = distributed.Status.closed
    client._global_clients.clear()  # noqa: SLF001
    client._current_client.set(None)  # noqa: SLF001
    _keep_processes()


def _has_dead_threads() -> bool:
    """Whether threads of Dask are a parent's, which forked before this module was imported."""
    threads = set(getattr(getattr(sys.modules.get("dask.threaded"), "default_pool", None), "_threads", ()))
    if "distributed" in sys.modules:
        from distributed.utils import LoopRunner

        loops = [getattr(runner, "_loop_thread", None) for _, runner in LoopRunner._all_loops.values()]  # noqa: SLF001
        threads.update(loop._thread for loop in loops if loop is not None)  # noqa: SLF001
    return any(not thread.is_alive() for thread in threads)


def _keep_processes() -> None:
    """Leave processes, folders and connections of the parent as they are when this process ends."""
    import weakref
    from multiprocessing import process

    process._children.clear()  # type: ignore[attr-defined] # noqa: SLF001
    for finalizer, call in list(weakref.finalize._registry.items()):  # type: ignore[attr-defined] # noqa: SLF001
        if getattr(call.func, "__module__", "").partition(".")[0] == "distributed":
            finalizer.detach()


if _has_dead_threads():
    _reset_dask()


class Closable(Protocol):
    """What ends when it is closed, such as a generator."""

    def close(self) -> object:
        """End; once more does nothing."""


_numbers = itertools.count()
_open: weakref.WeakValueDictionary[int, Closable] = weakref.WeakValueDictionary()
_ending = threading.Event()


def close_at_exit(opened: Closable) -> None:
    """Close a generator, or what is like one, when the main thread ends, if it is still open, those begun last first.

    Python would close it later, when what its `finally` clauses call may be gone, and print what they raise.
    """
    _open[next(_numbers)] = opened


def is_ending() -> bool:
    """Whether the main thread has ended, after which no thread pool takes work."""
    return _ending.is_set()


def _close_all() -> None:
    _ending.set()
    for opened in reversed(list(_open.values())):
        # Another thread may be in it. No one is left who could act on what it raises.
        with contextlib.suppress(Exception):
            opened.close()


# `atexit` comes too late: before it, Python waits until the pools of `concurrent.futures.thread`, which registers like
# this when it is imported, have done all that they were asked for. What was registered last is called first.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
