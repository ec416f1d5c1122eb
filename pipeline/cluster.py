"""`cluster.yaml` to a Dask client."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
import logging
import math
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import dask
import distributed
import distributed.utils
import msgspec
import yaml
from dask.system import CPU_COUNT

from pipeline.errors import InputError, NotFoundError, OpenError, PipelineError
from pipeline.memory import budget

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

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

_LOOPBACK = "127.0.0.1:0"
_MIN_THREADS = 4
"""Reads in flight keep a disk busy, whatever the number of cores."""
_OPEN_SETTINGS = {"logging", "environ", "pre-spawn-environ", "resources", "default-task-durations"}
"""Dask's settings whose keys are the user's own."""
_CONNECT_SECONDS = 10
_WORKER_SECONDS = 60
_CLOSE_SECONDS = 10

_Count = Annotated[int, msgspec.Meta(ge=1)]


class _Scale(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    n: _Count | None = None
    workers: _Count | None = None
    jobs: _Count | None = None


class _Adapt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    maximum: _Count
    minimum: Annotated[int, msgspec.Meta(ge=0)] = 0


class _Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of a `cluster.yaml` beside Dask's own settings."""

    version: Literal[1]
    module: str | None = None
    class_: str | None = msgspec.field(default=None, name="class")
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    scale: _Scale | None = None
    adapt: _Adapt | None = None
    scheduler_address: str | None = msgspec.field(default=None, name="scheduler-address")


@contextmanager
def connect(cluster: str | Path | None = None, **overrides: Any) -> Iterator[distributed.Client]:
    """Start the cluster that a `cluster.yaml` describes, or connect to it, and make it the active one.

    The link of its dashboard goes to stderr. At the end everything that was started here is closed, and Dask's
    settings are as before.

    Parameters
    ----------
    cluster
        The file. None: `./cluster.yaml` if it is there, else one worker in this process, whose number of threads is
        the number of cores, at least 4.
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
    spec, settings, origin = _read_spec(cluster)
    overrides = dict(overrides)
    level = overrides.pop("silence_logs", spec.kwargs.get("silence_logs", logging.CRITICAL))
    address = overrides.pop("scheduler_address", None)
    if address is None:
        address = spec.scheduler_address
    else:
        spec = _Spec(version=1)
    if address is not None and (overrides or any((spec.module, spec.class_, spec.kwargs, spec.scale, spec.adapt))):
        raise InputError(
            f"a cluster that runs already cannot be configured; got a scheduler-address and {origin} or arguments "
            "that describe a cluster; drop one of the two"
        )
    with ExitStack() as stack:
        # The client sets `scheduler`, too, and leaves it so when it cannot connect.
        stack.enter_context(dask.config.set(_merged(settings) | {"scheduler": "dask.distributed"}))
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


def _read_spec(cluster: str | Path | None) -> tuple[_Spec, dict[str, Any], str]:
    """Spec, Dask's settings, and the name of the file for messages."""
    if cluster is None and not Path("cluster.yaml").exists():
        return _Spec(version=1), {}, "the default cluster"
    path = Path("cluster.yaml" if cluster is None else cluster)
    content = _parse(path)
    fields = [field.encode_name for field in msgspec.structs.fields(_Spec)]
    known = dask.config.config | {"logging": {}}
    _check_keys(content, [*fields, *known], str(path))
    settings = {key: value for key, value in content.items() if key not in fields}
    _check_settings(settings, known, str(path))
    for key, struct in (("scale", _Scale), ("adapt", _Adapt)):
        if isinstance(content.get(key), dict):
            _check_keys(content[key], struct.__struct_fields__, f"{key} in {path}")
    try:
        spec = msgspec.convert({key: value for key, value in content.items() if key in fields}, _Spec)
    except msgspec.ValidationError as error:
        raise InputError(
            f"a cluster file has the keys and types of the cluster.yaml that comes with this package; got {path}: "
            f"{error}; correct it"
        ) from None
    scales = [] if spec.scale is None else [each for each in msgspec.structs.astuple(spec.scale) if each is not None]
    wrong = spec.scale is not None and (len(scales) != 1 or spec.adapt is not None)
    if wrong or (spec.adapt is not None and spec.adapt.minimum > spec.adapt.maximum):
        raise InputError(
            f"a cluster scales by one number or between two; got {content.get('scale')!r} and "
            f"{content.get('adapt')!r} in {path}; write "
            "scale: {workers: 4}, or adapt: {minimum: 1, maximum: 4}"
        )
    return spec, settings, str(path)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, of which YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice in one mapping."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise _DuplicateKeyError(key.value, key.start_mark.line + 1)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _DuplicateKeyError(Exception):
    """Key and line."""


def _parse(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.TagToken | yaml.AliasToken):
                line = token.start_mark.line + 1
                raise InputError(
                    f"a cluster file holds plain values; got a tag or an alias in {path}, line {line}; write it out"
                )
        content = yaml.load(text, Loader=_Loader)  # noqa: S506
    except _DuplicateKeyError as error:
        key, line = error.args
        raise InputError(
            f"a key stands once; got {key!r} twice in {path}, the second in line {line}; drop one"
        ) from None
    except FileNotFoundError:
        raise NotFoundError(f"the cluster file must exist; got {path}; correct its path, or leave it out") from None
    except (OSError, UnicodeDecodeError, RecursionError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, PipelineError):
            raise
        raise OpenError(f"a cluster file is readable YAML; got {path}: {_one_line(error)}; correct it") from None
    if not isinstance(content, dict):
        raise OpenError(
            f"a cluster file is a mapping of keys; got {type(content).__name__} in {path}; start from the "
            "cluster.yaml that comes with this package"
        )
    return content


def _check_keys(given: Collection[Any], known: Collection[str], where: str) -> None:
    for key in given:
        if str(key).replace("_", "-") not in {name.replace("_", "-") for name in known}:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise InputError(f"keys must be known; got {key!r} in {where}; did you mean {nearest!r}?")


def _check_settings(given: Mapping[Any, Any], known: Mapping[str, Any], where: str) -> None:
    """Compare Dask's settings with its defaults, level by level: Dask itself takes any key in silence."""
    for key, value in given.items():
        default = known[dask.config.canonical_name(key, known)]
        if not isinstance(default, Mapping):
            continue
        if not isinstance(value, Mapping):
            raise InputError(f"{key} in {where} is a mapping; got {value!r}; write {key}: {{setting: value}}")
        if key.replace("_", "-") not in _OPEN_SETTINGS:
            _check_keys(value, default, f"{key} in {where}")
            _check_settings(value, default, where)


def _merged(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Top-level keys of Dask's config after `settings`: merged, since `dask.config.set` replaces whole subtrees."""
    chosen = _without(settings, dask.config.collect_env())
    merged: dict[str, Any] = dask.config.merge(dask.config.config, chosen)
    return {key: merged[key] for key in (dask.config.canonical_name(key, merged) for key in chosen)}


def _without(settings: Mapping[str, Any], winners: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` less the leaves that `winners` sets."""
    rest = {}
    for key, value in settings.items():
        name = dask.config.canonical_name(key, winners)
        if name not in winners:
            rest[key] = value
        elif isinstance(value, Mapping) and isinstance(winners[name], Mapping):
            rest[key] = _without(value, winners[name])
    return rest


def _start(stack: ExitStack, spec: _Spec, overrides: dict[str, Any], level: Any, origin: str) -> Any:
    """Start the cluster of `spec`; `stack` closes it."""
    module, name = spec.module or "dask.distributed", spec.class_ or "LocalCluster"
    if name not in _CLUSTERS.get(module, ()):
        allowed = ", ".join(f"{each}.{name}" for each, names in _CLUSTERS.items() for name in names)
        raise InputError(f"module and class name a known cluster; got {module}.{name} in {origin}; use {allowed}")
    factory = getattr(importlib.import_module(module), name)
    workers = (
        spec.adapt.maximum if spec.adapt else max(filter(None, msgspec.structs.astuple(spec.scale or _Scale(n=1))))
    )
    kwargs = _local_kwargs(spec.kwargs, overrides, workers, origin) | {"silence_logs": level}
    # The children that Python starts while it imports the main script would start children of their own, and so on.
    if kwargs["processes"] and getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)
    with _sigint_blocked(kwargs["processes"]):
        try:
            with warnings.catch_warnings():
                # Where a port is taken Dask takes another, whose link is printed, and drops a socket.
                warnings.filterwarnings("ignore", message="Port .* is already in use")
                warnings.filterwarnings("ignore", message="unclosed <socket", category=ResourceWarning)
                cluster = factory(**kwargs)
        except Exception as error:
            raise _start_error(error, origin) from error
        stack.push(lambda kind, *_: _close_cluster(cluster, hurry=kind is not None))
    if spec.adapt:
        cluster.adapt(minimum=spec.adapt.minimum, maximum=spec.adapt.maximum)
    elif spec.scale:
        cluster.scale(workers)
    return cluster


def _local_kwargs(given: dict[str, Any], overrides: dict[str, Any], workers: int, origin: str) -> dict[str, Any]:
    """Keywords of a LocalCluster: defaults, then the file, then `overrides`; `workers`: those that it scales to."""
    kinds = (distributed.LocalCluster, distributed.Nanny, distributed.Worker)
    known = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}
    known -= {"self", "asynchronous", "loop", "kwargs", "worker_kwargs", "worker_class"}
    _check_keys(given, sorted(known), f"kwargs in {origin}")
    _check_keys(overrides, sorted(known), "the arguments")
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
    return kind(f"the cluster must start; got {_one_line(error)}; check the kwargs of {origin}")


@contextmanager
def _sigint_blocked(wanted: bool) -> Iterator[None]:
    """Keep Ctrl-C from worker processes that start in this block or later, by restarts and scaling.

    They are spawned by threads that start in this block, and both inherit its signal mask. A Ctrl-C meanwhile comes
    at the end of the block.
    """
    if not wanted or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # It unblocks SIGINT once it has started, so it starts first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
            f"a scheduler must answer within {_CONNECT_SECONDS} s; got {_one_line(error)} at {address}; start it, or "
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


def _close_cluster(cluster: Any, *, hurry: bool) -> None:
    with suppress(Exception):
        if hurry:
            cluster.sync(_drop_workers, list(cluster.workers.values()))
        cluster.close(timeout=_CLOSE_SECONDS)


async def _drop_workers(workers: list[Any]) -> None:
    """Close workers without waiting for the tasks that they run."""
    in_process = {"timeout": 0, "executor_wait": False}
    nanny = {"timeout": 1}
    each = (worker.close(**in_process if isinstance(worker, distributed.Worker) else nanny) for worker in workers)
    await asyncio.gather(*each, return_exceptions=True)


def dashboard_link(client: distributed.Client) -> str | None:
    """Address of the client's dashboard as it can be opened from this machine, or None where it has none."""
    scheduler = getattr(client.cluster, "scheduler", None)
    if not isinstance(scheduler, distributed.Scheduler):
        return client.dashboard_link  # type: ignore[no-any-return]
    # Without the dashboard, also where bokeh is absent, the server still serves other pages.
    if not scheduler.http_application.applications:
        return None
    server = scheduler.http_server
    # Dask's own link names this host's outer address even where the dashboard listens on loopback alone.
    host = "127.0.0.1" if server.address in ("0.0.0.0", "::") else server.address  # noqa: S104
    return str(distributed.utils.format_dashboard_link(host, server.port))


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())
