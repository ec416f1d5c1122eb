"""Workers that are jobs of a batch system: what dask-jobqueue's clusters are told, beside the user's own settings."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask

from pipeline.cluster.launch import launch
from pipeline.cluster.registry import check_keys, keywords_of, mapping_of
from pipeline.cluster.security import (
    Encryption,
    check_dashboard,
    check_protocol,
    choose_encryption,
    files_in,
    guard_lines,
    make_security,
    point_to,
    without_dashboard,
)
from pipeline.cluster.spec import OPEN_SETTINGS
from pipeline.errors import InputError, OpenError
from pipeline.storage.filesystem import write_private

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import ExitStack

    from distributed import Security

_SCHEDULER_DASHBOARD = "127.0.0.1:8787"
_WORKER_DASHBOARD = "127.0.0.1:0"
_DASHBOARD_FLAG = "--dashboard-address"
_OF_OTHERS = ("jobqueue", "kubernetes", "gateway", "distributed.comm.tls")
"""Dask's settings that are for this process alone."""


def job_kwargs(
    factory: Any,
    kwargs: dict[str, Any],
    settings: Mapping[str, Any],
    origin: str,
    *,
    threads: int | None,
    insecure: bool,
) -> tuple[dict[str, Any], Encryption]:
    """Keywords of a dask-jobqueue cluster, and how it is kept from others.

    What a user's own `jobqueue.yaml` says stays in force: it is added to, or left alone.

    Parameters
    ----------
    factory
        The cluster's class.
    kwargs
        Of the file and the caller.
    settings
        Dask's settings in the cluster file: jobs get them, which Dask itself does not see to.
    origin
        Names the file in messages.
    threads
        Of each worker, None: as `cores` and `processes` say.

    Raises
    ------
    InputError
        If a keyword is not known, workers cannot reach the scheduler, or others could in plain.
    OpenError
        If jobs cannot be handed in from this machine.
    """
    job = factory.job_cls
    check_keys(kwargs, sorted(keywords_of(*factory.__mro__, *job.__mro__)), f"kwargs in {origin}")
    command = shlex.split(job.submit_command)[0]
    if shutil.which(command) is None:
        raise OpenError(
            f"a {factory.__name__} hands in jobs by {command}; it is not found here; run where it is, such as a login "
            "node"
        )
    section = f"jobqueue.{kwargs.get('config_name') or job.default_config_name()}"

    def in_force(*names: str) -> Any:
        """Value of the first keyword that somebody set; later names are older ones of the same."""
        found = [kwargs.get(name) for name in names]
        found += [dask.config.get(f"{section}.{name.replace('_', '-')}", None) for name in names]
        return next((value for value in found if value), None)

    made = dict(kwargs)
    if threads is not None:
        made["processes"] = in_force("processes") or 1
        made["cores"] = threads * made["processes"]
    own = {"scheduler_options": in_force("scheduler_options")}
    options = {"dashboard_address": _SCHEDULER_DASHBOARD} | mapping_of(own, "scheduler_options", origin)
    if not (options.get("host") or options.get("interface") or in_force("interface")):
        names = ", ".join(name for _, name in socket.if_nameindex())
        raise InputError(
            "jobs reach the scheduler, which runs here, over a network interface that you name; got none in "
            f"{origin} or jobqueue.yaml; write interface: NAME among the kwargs, one of {names}"
        )
    check_protocol(in_force("protocol"), insecure=insecure)
    check_protocol(options.get("protocol"), insecure=insecure)
    check_dashboard(options["dashboard_address"], insecure=insecure)
    options = without_dashboard(options, _WORKER_DASHBOARD)
    given = in_force("worker_extra_args", "extra") or []
    if not isinstance(given, list | tuple):
        raise InputError(
            f"worker_extra_args is a list of words; got {given!r} in {origin} or jobqueue.yaml; write [--lifetime, 1h]"
        )
    extra = [str(each) for each in given]
    asked = [each[1] for each in re.finditer(rf"{_DASHBOARD_FLAG}[= ]+(\S+)", " ".join(extra))]
    for address in asked:
        check_dashboard(address.strip("'\""), insecure=insecure)
    if not asked:
        extra += [_DASHBOARD_FLAG, _WORKER_DASHBOARD]
    made |= {"scheduler_options": options, "worker_extra_args": extra}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in _environment(settings)]
    made["job_script_prologue"] = [*(in_force("job_script_prologue", "env_extra") or []), *exports, *guard_lines()]
    return made, choose_encryption(kwargs.get("security"), insecure=insecure)


def start_jobs(stack: ExitStack, factory: Any, kwargs: dict[str, Any], encryption: Encryption, *, level: Any) -> Any:
    """Start a dask-jobqueue cluster without any job, which `stack` closes.

    Temporary certificates lie where every job can read them, and nobody else, until the end.

    Parameters
    ----------
    factory
        The cluster's class.
    kwargs, encryption
        What `job_kwargs` gave.
    level
        Of Dask's log lines that are let through; falsy: all.

    Raises
    ------
    OpenError
        If there is no place for the certificates.
    """
    security = make_security(encryption, kwargs.get("security"))
    if security is not None:
        section = f"jobqueue.{kwargs.get('config_name') or factory.job_cls.default_config_name()}"
        shared = kwargs.get("shared_temp_directory") or dask.config.get(f"{section}.shared-temp-directory", None)
        _write_certificates(stack, security, shared or "~")
    return launch(stack, factory, kwargs | {"silence_logs": level, "security": security}, shielded=True)


def count_processes(cluster: Any) -> int:
    """Workers of a job."""
    return int(cluster._dummy_job.worker_processes)  # noqa: SLF001 (the class has its default from the job)


def _write_certificates(stack: ExitStack, security: Security, shared: str) -> None:
    """Write what is text to files that `stack` removes, and have `security` name them."""
    try:
        # Nobody else may enter it.
        place = os.path.expandvars(Path(shared).expanduser())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".random-windows-", dir=place))
        contents, paths = files_in(folder, security)
        for name, text in contents.items():
            write_private(Path(folder) / name, text)
    except OSError as error:
        raise OpenError(
            f"temporary certificates lie in a folder that all jobs see; got {error}; name one as "
            "shared_temp_directory among the kwargs"
        ) from error
    point_to(security, paths)


def _environment(settings: Mapping[str, Any], *above: str) -> Iterator[tuple[str, str]]:
    """Variables that set Dask's settings in another process; an open mapping whole, since names lose their case."""
    for key, value in settings.items():
        path = (*above, str(key))
        if ".".join(path) in _OF_OTHERS:
            continue
        if isinstance(value, dict) and path[-1].replace("_", "-") not in OPEN_SETTINGS:
            yield from _environment(value, *path)
        else:
            yield "DASK_" + "__".join(path).upper().replace("-", "_"), repr(value)
