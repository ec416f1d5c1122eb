"""What a `./cluster.yaml` may say that nobody named: sizes and times, and nothing that runs code or lets others in.

Whoever changes into a folder has not read what lies there. A file that is named, by `--cluster FILE` or
`connect(FILE)`, may say all that `clusterfile` knows.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.storage.trust import find_stranger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MODULES = ("dask.distributed", "dask_jobqueue")
_CLASSES_ELSEWHERE = ("SSHCluster", "KubeCluster", "GatewayCluster")
"""Their hosts get the user's code and data, and what they send back is unpickled here."""
_KWARGS = {
    *("n_workers", "threads_per_worker", "processes", "memory_limit", "silence_logs"),
    *("dashboard_address", "worker_dashboard_address", "scheduler_port"),
    *("queue", "account", "project", "cores", "memory", "walltime", "job_name", "job_cpu", "job_mem", "death_timeout"),
    *("interface", "log_directory", "local_directory", "shared_temp_directory"),
}
_SETTINGS = (
    *("array", "dataframe", "optimization", "temporary-directory", "scheduler-address"),
    *("distributed.comm.retry", "distributed.comm.timeouts"),
    *(f"distributed.scheduler.{name}" for name in ("allowed-failures", "bandwidth", "idle-timeout", "worker-ttl")),
    *(f"distributed.scheduler.{name}" for name in ("no-workers-timeout", "worker-saturation", "work-stealing")),
    *(f"distributed.worker.{name}" for name in ("lifetime", "memory", "profile", "connections")),
)
"""Settings of Dask, with all below them. Others name modules to import, commands, certificates or listeners."""
_LEVELS = {"debug", "info", "warn", "warning", "error", "critical", "fatal"}


def check_owner(path: Path) -> None:
    """Refuse a file that is found, unless it and its folder can be written by the user, and root, alone.

    Raises
    ------
    InputError
        If somebody else could have written it.
    """
    for place in (path, path.absolute().parent, path.resolve().parent):
        for status in {os.stat(place), os.lstat(place)}:  # noqa: PTH116 (of a link, both)
            if fault := find_stranger(status):
                raise InputError(
                    f"{path} is not used: {place if place != path else 'it'} {fault}; pass --cluster {path} "
                    f"(connect({str(path)!r})) if you trust it, or work in another folder"
                )


def check_content(content: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    """Refuse keys that run code, or lower security, in a file that nobody named.

    Parameters
    ----------
    content
        Keys and values of the file, of the types that they must have.
    settings
        Those of them that are Dask's.

    Raises
    ------
    InputError
        If there is such a key.
    """
    for key in _find_unsafe(content, settings):
        nearest = difflib.get_close_matches(key.removeprefix("kwargs."), _KWARGS, n=1, cutoff=0.8)
        raise InputError(
            f"{key} in {path} can run code or let others in, and nobody named the file; "
            f"{f'did you mean {nearest[0]!r}? Else ' if nearest else ''}pass --cluster {path} "
            f"(connect({str(path)!r})) if you trust it"
        )


def _find_unsafe(content: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    if content.get("insecure"):
        yield "insecure: true"
    if content.get("module") not in (None, *_MODULES):
        yield f"module {content['module']}"
    if content.get("class") in _CLASSES_ELSEWHERE:
        yield f"class {content['class']}"
    for key, value in content.get("kwargs", {}).items():
        if key.replace("-", "_") not in _KWARGS or isinstance(value, Mapping | list):
            yield f"kwargs.{key}"
    for name, value in _leaves(settings):
        if name.startswith("logging."):
            if str(value).lower() not in _LEVELS:
                yield name
        elif not any(name == known or name.startswith(f"{known}.") for known in _SETTINGS):
            yield name


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """List all values by their dotted names, which Dask spells with hyphens or underscores."""
    for key, value in settings.items():
        name = above + str(key).replace("_", "-")
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value
