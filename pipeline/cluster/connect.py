"""A cluster, started or reached, and a client of it."""

from __future__ import annotations

import asyncio
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import distributed
import distributed.utils
from dask.utils import parse_timedelta
from distributed.comm import connect as connect_to

from pipeline.cluster.dashboard import dashboard_link, right_links, say_dashboard
from pipeline.cluster.jobqueue import count_processes, start_jobs
from pipeline.cluster.launch import launch, open_workers
from pipeline.cluster.local import start_local
from pipeline.cluster.origins import guard_dashboards
from pipeline.cluster.registry import load_class
from pipeline.cluster.resolve import Choice, Deployment, choose_cluster, plan_deployment
from pipeline.cluster.security import Encryption, check_address, warn_of_plain
from pipeline.cluster.spec import NO_FILE, merged_settings, one_line
from pipeline.cluster.ssh import START_SECONDS, start_ssh
from pipeline.cluster.startup import last_error, name_cause, remote_lines
from pipeline.cluster.worker_exits import watch_exits
from pipeline.errors import InputError, OpenError, PipelineError
from pipeline.formatting import count_of
from pipeline.process import close_at_exit
from pipeline.redaction import plain_words

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["await_worker", "connect", "dashboard_link"]

_CONNECT_SECONDS = 10
_WORKER_SECONDS = 60
"""How long a scheduler that runs already may be without a worker, where Dask's settings do not say."""
_CLOSE_SECONDS = 10
_SILENT_SECONDS = 5
"""Of waiting for a worker before a line says so."""
_NO_WORKERS = "distributed.scheduler.no-workers-timeout"
_NO_WORKERS_MINUTES = 5
"""How long the tasks of a cluster of ours wait for a worker where Dask's settings let them wait for ever."""


_connections: set[Connection] = set()
"""Those that are open: each is held, since its client stays the active one when its caller drops it."""


class Connection:
    """A cluster that was started or reached, and its client, until `close` or the end of a `with` block.

    Made by `connect`. One that is never closed is closed when Python ends.
    """

    def __init__(self, client: distributed.Client, stack: ExitStack) -> None:
        self.client = client
        self._stack = stack
        self._home = os.getpid()
        _connections.add(self)
        close_at_exit(self)

    @property
    def dashboard_link(self) -> str | None:
        """Address of the dashboard; None without one."""
        return dashboard_link(self.client)

    def close(self) -> None:
        """Close what `connect` started, and restore Dask's settings; nothing happens the second time."""
        self.__exit__(None, None, None)

    def __enter__(self) -> distributed.Client:
        return self.client

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _connections.discard(self)
        stack = self._stack.pop_all()
        # A forked child has a copy, and its parent has the cluster.
        if self._home == os.getpid():
            stack.__exit__(kind, error, traceback)

    def __repr__(self) -> str:
        if self.client.status != "running":
            return f"<{type(self).__name__}: {self.client.status}>"
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        threads = sum(worker["nthreads"] for worker in workers)
        link = f", dashboard {self.dashboard_link}" if self.dashboard_link else ""
        return f"<{type(self).__name__}: {count_of(len(workers), 'worker')}, {count_of(threads, 'thread')}{link}>"


def connect(cluster: str | Path | None = None, **overrides: Any) -> Connection:
    """Start the cluster that a `cluster.yaml` describes, or connect to one that runs, and make it the active one.

    The link of its dashboard goes to stderr first; then the cluster is waited for until it has a worker. `close`, or
    the end of a `with` block, closes everything that was started here, and restores Dask's settings.

    Parameters
    ----------
    cluster
        The file. None: the scheduler that the environment variable `DASK_SCHEDULER_ADDRESS` names; else
        `./cluster.yaml` if it is there; else the scheduler that Dask's own configuration names; else one worker in this
        process, whose number of threads is the number of cores, at least 2.
    **overrides
        `workers`: how many; two or more on this machine are processes, unless `processes=False` is given, too.
        `threads`: of each worker. `scheduler_address` or `scheduler_file`: a scheduler that runs already, in the place
        of the file's cluster. `insecure=True`: connections need not be encrypted, so that others can use them.
        `silence_logs=False` lets Dask's log lines through. All others are keywords of the cluster's class, and go over
        the file's `kwargs`, such as `n_workers=2, processes=True` or `walltime="01:00:00"`.

    Returns
    -------
    Connection
        Its `client`, which a `with` block is given, is the active client until it is closed.

    Raises
    ------
    InputError
        If a key or a value of the file or of `overrides` cannot be used, or others could read what leaves this machine.
    NotFoundError
        If the named file, or a certificate, is absent.
    OpenError
        If the file cannot be parsed, a package that the cluster needs is absent, the cluster does not start, the
        scheduler does not answer within 10 seconds, or no worker comes: to a cluster that is started here for as long
        as Dask's `distributed.scheduler.no-workers-timeout` says, by default 5 minutes.

    Examples
    --------
    >>> with connect(dashboard_address=None) as client:
    ...     client.submit(sum, [1, 2]).result()
    3

    Or without a block, such as in a notebook:

    >>> cluster = connect(dashboard_address=None, threads=2)
    >>> cluster
    <Connection: 1 worker, 2 threads>
    >>> cluster.close()
    """
    choice = choose_cluster(cluster, overrides)
    with ExitStack() as stack:
        # The client sets `scheduler`, too, and leaves it so when it cannot connect.
        stack.enter_context(dask.config.set(merged_settings(choice.settings) | {"scheduler": "dask.distributed"}))
        if choice.level:
            stack.enter_context(distributed.utils.silence_logging_cmgr(choice.level))
        patience = dask.config.get(_NO_WORKERS, None)
        address = choice.scheduler_address()
        if address is None:
            patience = no_workers_timeout()
            stack.enter_context(dask.config.set({_NO_WORKERS: patience}))
            deployment = plan_deployment(choice)
            target = _start(stack, choice, deployment)
            client = distributed.Client(target, set_as_default=True)
            if not isinstance(getattr(target, "scheduler", None), distributed.Scheduler):
                _set_patience(client, parse_timedelta(patience), temporary=START_SECONDS)
        else:
            check_address(address, insecure=choice.insecure)
            client = _reach(address)
            if warning := warn_of_plain(address, insecure=choice.insecure):
                sys.stderr.write(f"{plain_words(warning)}\n")
        stack.callback(_close, client)
        with _while_awaited():
            if address is None and deployment.name != "LocalCluster":
                _prepare_nodes(client, guarded=not choice.insecure and deployment.encryption is not Encryption.SERVICE)
            stack.enter_context(right_links(client))
            for line in say_dashboard(client, None if choice.origin == NO_FILE else choice.origin):
                sys.stderr.write(f"{plain_words(line)}\n")
        await_worker(client)
        return Connection(client, stack.pop_all())


@contextmanager
def _while_awaited() -> Iterator[None]:
    """Turn an error of a scheduler that no longer answers into an OpenError."""
    try:
        yield
    except PipelineError:
        raise
    except OSError as error:
        raise OpenError(
            f"a scheduler runs until its client ends; got {one_line(error)} while a first worker was awaited; "
            "look at its log, and start it anew"
        ) from error


def _prepare_nodes(client: distributed.Client, *, guarded: bool) -> None:
    """Set up the nodes of a cluster that this package started; a service guards its dashboards itself."""
    watch_exits(client)
    if guarded:
        guard_dashboards(client)


def no_workers_timeout() -> str:
    """How long tasks of a cluster that is started here wait for a worker, in Dask's words."""
    return str(dask.config.get(_NO_WORKERS, None) or f"{_NO_WORKERS_MINUTES} minutes")


def _start(stack: ExitStack, choice: Choice, deployment: Deployment) -> Any:
    """Start a cluster, which `stack` closes."""
    kwargs, encryption = deployment.kwargs, deployment.encryption
    scale, adapt = deployment.scale, deployment.adapt
    said: list[str] = []
    try:
        match deployment.module, deployment.name:
            case _, "LocalCluster":
                guarded = not choice.insecure
                cluster = start_local(
                    stack, kwargs, encryption, level=choice.level, replace=adapt is None, guarded=guarded
                )
            case _, "SSHCluster":
                with remote_lines() as said:
                    cluster = start_ssh(stack, kwargs, encryption, level=choice.level)
            case "dask_jobqueue", _:
                cluster = start_jobs(
                    stack, load_class(deployment.module, deployment.name), kwargs, encryption, level=choice.level
                )
            case _:
                cluster = launch(stack, load_class(deployment.module, deployment.name), kwargs, shielded=True)
        if adapt is not None:
            cluster.adapt(minimum=adapt.minimum, maximum=adapt.maximum)
        elif scale is not None:
            if isinstance(cluster, distributed.SpecCluster):
                each = count_processes(cluster) if deployment.module == "dask_jobqueue" and scale.jobs is None else 1
                open_workers(cluster, math.ceil(scale.number / each))
            else:
                cluster.scale(scale.number)
    except PipelineError:
        raise
    except Exception as error:
        raise _start_error(error, said, choice.origin) from error
    return cluster


def _start_error(error: Exception, said: list[str], origin: str) -> PipelineError:
    kind = InputError if isinstance(error, TypeError | ValueError) else OpenError
    return kind(name_cause(error, said, origin))


def _reach(address: str) -> distributed.Client:
    before = _active()
    try:
        # In a thread, since a notebook's own has a loop that runs.
        with ThreadPoolExecutor(1) as executor:
            executor.submit(asyncio.run, _greet(address)).result()
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
    return client


async def _greet(address: str) -> None:
    """Let a scheduler answer once: Dask's client waits for ever for one that is connected to and says nothing."""
    arguments = distributed.Security().get_connection_args("client")
    async with asyncio.timeout(_CONNECT_SECONDS):
        comm = await connect_to(address, timeout=_CONNECT_SECONDS, **arguments)
    comm.abort()


def _set_patience(client: distributed.Client, seconds: float, *, temporary: float) -> None:
    """Tell the scheduler of a cluster of ours, which a service may have started, how long tasks wait for a worker.

    One that would end after `temporary` seconds without work, since nobody had reached it, does not do so any more.
    """
    idle = parse_timedelta(dask.config.get("distributed.scheduler.idle-timeout", None))

    # Sent whole: this package need not be there.
    def set_timeout(dask_scheduler: Any) -> None:
        dask_scheduler.no_workers_timeout = seconds
        if dask_scheduler.idle_timeout == temporary:
            dask_scheduler.idle_timeout = idle

    with suppress(Exception):
        client.run_on_scheduler(set_timeout)


def await_worker(client: distributed.Client) -> None:
    """Wait for a first worker: a run asks its workers what they see, and how many tasks they take.

    Raises
    ------
    OpenError
        If none comes in time: jobs that stay queued, or workers that end at once.
    """
    seconds = parse_timedelta(dask.config.get(_NO_WORKERS, None) or _WORKER_SECONDS)
    asking = None
    try:
        with _while_awaited():
            if client.scheduler_info(n_workers=1)["workers"]:
                return
            # A cluster that adapts starts workers for tasks alone.
            asking = client.submit(int, pure=False)
            with suppress(TimeoutError):
                client.wait_for_workers(1, timeout=min(_SILENT_SECONDS, seconds))
                return
            sys.stderr.write(f"waiting for a first worker, {seconds:g} s at most\n")
            with suppress(TimeoutError):
                client.wait_for_workers(1, timeout=max(0.1, seconds - _SILENT_SECONDS))
                return
    finally:
        if asking is not None:
            asking.release()
    raise OpenError(
        f"a cluster must have a worker within {seconds:g} s; got none {_where(client)}, or have it wait longer by "
        f"{_NO_WORKERS}"
    )


def _where(client: distributed.Client) -> str:
    """Say where workers should come from, and what to do."""
    jobs = [str(job.job_id) for job in getattr(client.cluster, "workers", {}).values() if getattr(job, "job_id", None)]
    if jobs:
        if words := _say_logs(client.cluster, jobs):
            return f"of the jobs {', '.join(jobs)}, the last of which says {words}; correct that"
        return (
            f"of the jobs {', '.join(jobs)}; see whether they are still queued, and what their logs say (log_directory "
            "among the kwargs says where these are)"
        )
    if client.cluster is not None:
        return f"of {type(client.cluster).__name__}; look at the workers' logs"
    return f"at {client.scheduler.address}; start a dask worker"


def _say_logs(cluster: Any, jobs: list[str]) -> str:
    """Find what jobs said last of an error, where their logs are known; empty otherwise."""
    folder = getattr(cluster._dummy_job, "log_directory", None)  # noqa: SLF001 (the class has its default from the job)
    lines: list[str] = []
    for path in sorted(Path(folder).glob("*")) if folder else []:
        if any(job in path.name for job in jobs):
            with suppress(OSError):
                lines += path.read_text(errors="replace").splitlines()
    return last_error(lines, strict=True)


def _active() -> Any:
    try:
        return distributed.default_client()
    except ValueError:
        return None


def _close(client: distributed.Client) -> None:
    # Results are safe by now, and an exception of the body must not be covered.
    with suppress(Exception):
        client.close(timeout=_CLOSE_SECONDS)
