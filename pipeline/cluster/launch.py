"""Starting and closing a cluster, whatever its class, so that Ctrl-C never leaves one half started."""

from __future__ import annotations

import asyncio
import inspect
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import distributed
from distributed.deploy.spec import ProcessInterface

from pipeline.cluster.signals import kill_workers

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from contextlib import ExitStack

_CLOSE_SECONDS = 10


def launch(
    stack: ExitStack,
    factory: Any,
    kwargs: dict[str, Any],
    *,
    shielded: bool,
    interrupted: Callable[[], None] | None = None,
) -> Any:
    """Make a cluster in a thread of its own, so that Ctrl-C interrupts the caller, never a start half way.

    Parameters
    ----------
    stack
        Closes the cluster.
    shielded
        Whether Ctrl-C, which reaches the whole process group, is kept from the processes that the cluster starts.
    interrupted
        Called after Ctrl-C while the start is still under way: removes what must not stay if that takes too long.
    """
    with ThreadPoolExecutor(1, "start", _block_sigint if shielded else None) as starter:
        starting = starter.submit(_make, factory, kwargs)
        stack.push(lambda kind, *_: _close_started(starting, hurry=kind is not None))
        try:
            return starting.result()
        except Exception:
            raise
        except BaseException:
            # Let it end soon.
            kill_workers()
            if interrupted is not None:
                interrupted()
            raise


def _make(factory: Any, kwargs: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        # Where a port is taken Dask takes another, whose link is printed, and drops a socket.
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        warnings.filterwarnings("ignore", message="unclosed <socket", category=ResourceWarning)
        return factory(**kwargs)


def open_workers(cluster: distributed.SpecCluster, number: int) -> None:
    """Start workers, or jobs, until there are `number`, and raise what fails: `Cluster.scale` drops it into the log."""

    async def start() -> None:
        while len(cluster.worker_spec) < number:
            cluster.worker_spec.update(cluster.new_worker_spec())
        try:
            await cluster._correct_state()  # noqa: SLF001
        except Exception:
            _settle_statuses(cluster)
            raise

    cluster.sync(start)


def _block_sigint() -> None:
    """Keep Ctrl-C from worker processes, those of later restarts and scaling among them.

    They are spawned by threads that this one starts, and both inherit its signal mask.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _close_started(starting: Future[Any], *, hurry: bool) -> None:
    # Its thread has ended.
    with suppress(Exception):
        cluster = starting.result()
        if hurry and isinstance(cluster, distributed.SpecCluster):
            cluster.sync(_drop_workers, cluster)
        timeout = {"timeout": _CLOSE_SECONDS} if "timeout" in inspect.signature(cluster.close).parameters else {}
        cluster.close(**timeout)


async def _drop_workers(cluster: Any) -> None:
    """Close workers without waiting for the tasks that they run."""
    cluster.worker_spec.clear()
    keywords: dict[type, dict[str, Any]] = {
        distributed.Worker: {"timeout": 0, "executor_wait": False},
        distributed.Nanny: {"timeout": 1},
    }
    closing = []
    for worker in cluster.workers.values():
        own = next((chosen for kind, chosen in keywords.items() if isinstance(worker, kind)), {})
        closing.append(worker.close(**own))
    await asyncio.gather(*closing, return_exceptions=True)
    _settle_statuses(cluster)


def _settle_statuses(cluster: distributed.SpecCluster) -> None:
    """Mark jobs that have ended, or never began, which they do not do: the cluster would not close for good."""
    for worker in cluster.workers.values():
        if isinstance(worker, ProcessInterface):
            worker.status = distributed.Status.failed
