"""Which cluster it is: the words of the caller, then the environment, then the file, then what is built in."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask

from pipeline.arguments import check_flag, check_path, check_whole, show
from pipeline.cluster.jobqueue import job_kwargs
from pipeline.cluster.local import local_kwargs
from pipeline.cluster.registry import load_class, name_class
from pipeline.cluster.services import service_kwargs, starts_workers
from pipeline.cluster.spec import Adapt, Scale, Spec, read_spec
from pipeline.cluster.ssh import ssh_kwargs
from pipeline.errors import InputError, OpenError
from pipeline.storage.trust import read_document

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.cluster.security import Encryption

_ADDRESS_VARIABLE = "DASK_SCHEDULER_ADDRESS"
_FILE_SECONDS = 60
"""How long a scheduler that is being started may take to write its file."""
_TORN_SECONDS = 2
"""How long that may be half written."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was said of a cluster."""

    spec: Spec
    settings: Mapping[str, Any]
    """Dask's, in the file."""
    origin: str
    """Names the file in messages."""
    overrides: dict[str, Any]
    """Keywords of the cluster's class, from the caller."""
    workers: int | None
    threads: int | None
    """Of a worker."""
    insecure: bool
    level: Any
    """Of Dask's log lines that are let through; falsy: all."""
    scheduler: str | None
    """Address of one that runs already, or the file where it stands."""
    is_file: bool
    scheduler_origin: str
    """Who named it."""

    def scheduler_address(self) -> str | None:
        """Return the address of a scheduler that runs already, None where a cluster is to be started.

        Raises
        ------
        OpenError
            If the file where it should stand does not appear, or holds none.
        """
        if self.scheduler is None or not self.is_file:
            return self.scheduler
        return _read_address(Path(self.scheduler).expanduser())


@dataclass(frozen=True, slots=True)
class Deployment:
    """A cluster to start."""

    module: str
    name: str
    """Of its class."""
    kwargs: dict[str, Any]
    encryption: Encryption
    scale: Scale | None
    adapt: Adapt | None


def choose_cluster(cluster: str | Path | None, overrides: dict[str, Any]) -> Choice:
    """Put together what the caller, the environment and a cluster file say; parameters and errors as of `connect`."""
    spec, settings, origin = read_spec(None if cluster is None else check_path("cluster", cluster))
    rest = dict(overrides)
    level = rest.pop("silence_logs", spec.kwargs.get("silence_logs", logging.CRITICAL))
    known = logging.getLevelNamesMapping()
    if not (isinstance(level, int | None) or (isinstance(level, str) and level.upper() in known)):
        raise InputError(f"silence_logs is False, or a level of logging; got {show(level)}; correct it")
    workers, threads = (_count(rest.pop(name, None), name) for name in ("workers", "threads"))
    insecure = check_flag("insecure", rest.pop("insecure", False)) or spec.insecure
    named = {key: rest.pop(key, None) for key in ("scheduler_address", "scheduler_file")}
    for key, value in named.items():
        if value is not None:
            check_path(key, value)
    scheduler, is_file, teller = _find_scheduler(named, spec, origin, file_named=cluster is not None)
    configured = [*rest, *(name for name, value in (("workers", workers), ("threads", threads)) if value is not None)]
    if teller == origin and spec.describes_cluster:
        configured.append(f"{origin}, which describes one")
    if scheduler is not None and configured:
        raise InputError(
            f"a cluster that runs already cannot be configured; got scheduler-address {scheduler} from {teller}, and "
            f"{', '.join(configured)}; drop one of the two"
        )
    return Choice(
        Spec(version=1, insecure=insecure) if scheduler is not None else spec,
        settings, origin, rest, workers, threads, insecure, level, scheduler, is_file, teller,
    )  # fmt: skip


def _find_scheduler(
    named: dict[str, Any], spec: Spec, origin: str, *, file_named: bool
) -> tuple[str | None, bool, str]:
    """Find a scheduler that runs already: its address or file, which of the two, and who named it."""
    own = {"scheduler_address": spec.scheduler_address, "scheduler_file": spec.scheduler_file}
    # Empty counts as not set.
    configured = dask.config.get("scheduler-address", None) or None
    environment = dask.config.get("scheduler-address", None, config=dask.config.collect_env()) or None
    candidates: list[tuple[dict[str, Any], str]] = [(named, "the arguments")]
    if not file_named:
        candidates.append(({"scheduler_address": environment}, _ADDRESS_VARIABLE))
    candidates.append((own, origin))
    if not spec.describes_cluster:
        candidates.append(({"scheduler_address": configured}, "Dask's configuration"))
    for given, teller in candidates:
        found = {key: value for key, value in given.items() if value is not None}
        if len(found) == 2:
            raise InputError(
                f"a scheduler is named by its address or by its file; got both from {teller}; drop one of the two"
            )
        for key, value in found.items():
            return str(value), key == "scheduler_file", teller
    return None, False, ""


def _read_address(path: Path) -> str:
    """Read what `dask scheduler --scheduler-file` writes once it listens."""
    begin = time.monotonic()
    torn = begin + _TORN_SECONDS
    while True:
        try:
            return str(json.loads(read_document(path, follow=True))["address"])
        except FileNotFoundError:
            if time.monotonic() > begin + _FILE_SECONDS:
                raise OpenError(
                    f"a scheduler writes its file within {_FILE_SECONDS} s; got none at {path}; start one by dask "
                    f"scheduler --scheduler-file {path}, or correct the path"
                ) from None
            # What follows is half written, perhaps.
            torn = time.monotonic() + _TORN_SECONDS
        except (OSError, ValueError, LookupError, TypeError) as error:
            if not isinstance(error, ValueError) or time.monotonic() > torn:
                raise OpenError(
                    f"a scheduler's file is what dask scheduler --scheduler-file wrote; got {type(error).__name__}: "
                    f"{error} in {path}; correct the path"
                ) from None
        time.sleep(0.1)


def _count(value: Any, name: str) -> int | None:
    return None if value is None else check_whole(name, value, least=1)


def plan_deployment(choice: Choice) -> Deployment:
    """Say how the chosen cluster is started, and start nothing; Dask's settings are those of the choice.

    Raises
    ------
    InputError, OpenError
        As `connect` does.
    """
    spec, insecure = choice.spec, choice.insecure
    module, name = name_class(spec.module, spec.class_, choice.origin)
    scale, adapt = spec.scale, spec.adapt
    if choice.workers is not None:
        scale, adapt = Scale(workers=choice.workers), None
    if scale is not None and scale.jobs is not None and module != "dask_jobqueue":
        raise InputError(
            f"jobs are of a batch system; got scale: {{jobs: {scale.jobs}}} for a {name}; write scale: {{workers: "
            f"{scale.jobs}}}"
        )
    if name == "LocalCluster":
        return _plan_local(choice, scale, adapt)
    factory = load_class(module, name)
    kwargs = spec.kwargs | choice.overrides
    if module == "dask_jobqueue":
        kwargs, encryption = job_kwargs(
            factory, kwargs, choice.settings, choice.origin, threads=choice.threads, insecure=insecure
        )
        # Its own `n_workers` starts jobs whose failures are lost.
        if number := kwargs.pop("n_workers", None):
            scale = Scale(n=number) if scale is None and adapt is None else scale
    elif name == "SSHCluster":
        if scale is not None or adapt is not None:
            raise InputError(
                "an SSHCluster has a worker for each of its hosts but the first; got another number of them; list "
                "more hosts, or write n_workers in worker_options, of each host"
            )
        kwargs, encryption = ssh_kwargs(kwargs, choice.origin, threads=choice.threads, insecure=insecure)
    else:
        kwargs, encryption = service_kwargs(factory, kwargs, choice.origin, threads=choice.threads, insecure=insecure)
    if scale is None and adapt is None and name != "SSHCluster" and not starts_workers(name, kwargs):
        scale = Scale(n=1)
    return Deployment(module, name, kwargs, encryption, scale, adapt)


def _plan_local(choice: Choice, scale: Scale | None, adapt: Adapt | None) -> Deployment:
    spec, overrides = choice.spec, dict(choice.overrides)
    if choice.workers is not None:
        if "n_workers" in overrides:
            raise InputError("workers and n_workers are the same here; got both; drop one of the two")
        overrides["n_workers"] = choice.workers
        scale = None
        # Several in one process are threads of it, which one worker has, too.
        overrides.setdefault("processes", choice.workers > 1 or spec.kwargs.get("processes", False))
    if choice.threads is not None:
        overrides["threads_per_worker"] = choice.threads
    number = None if choice.workers is not None else spec.workers
    kwargs, encryption = local_kwargs(spec.kwargs, overrides, number, choice.origin, insecure=choice.insecure)
    return Deployment("dask.distributed", "LocalCluster", kwargs, encryption, scale, adapt)
