"""Workers on other hosts over SSH: what Dask's SSHCluster is told, and the certificates that are sent ahead of it."""

from __future__ import annotations

import asyncio
import secrets
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import dask
import distributed

from pipeline.cluster.launch import launch
from pipeline.cluster.registry import check_keys, keywords_of, mapping_of
from pipeline.cluster.security import (
    Encryption,
    check_dashboard,
    check_protocol,
    choose_encryption,
    files_in,
    guard_lines,
    is_loopback,
    make_security,
    without_dashboard,
)
from pipeline.errors import InputError
from pipeline.redaction import secret_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import ExitStack

START_SECONDS = 120
"""How long a scheduler waits for its cluster to be complete."""
_REMOVE_SECONDS = 10
_HURRY_SECONDS = 3
"""Of removing after Ctrl-C, which leaves little time."""
_COMMAND = "distributed.cli.dask_s"
_PIDS = "pids"
_RECORDER = "run"
_DEFAULTS: dict[str, dict[str, Any]] = {
    # Else a scheduler whose start is interrupted waits for ever; once it is reached the user's setting is back.
    "scheduler_options": {"dashboard_address": "127.0.0.1:8787", "idle_timeout": START_SECONDS},
    # Else a worker whose start is interrupted looks for its scheduler for ever.
    "worker_options": {"dashboard_address": "127.0.0.1:0", "death_timeout": 60},
}
_LOOPBACK = "127.0.0.1"
_SPOKEN = {
    # Dask learns the address of each process from its log, which the user's settings, or another cluster of this
    # process that keeps its workers quiet, may have turned off.
    "logging.distributed": "info",
    "distributed.nanny.pre-spawn-environ.DASK_LOGGING__DISTRIBUTED": "info",
}


def ssh_kwargs(
    kwargs: dict[str, Any], origin: str, *, threads: int | None, insecure: bool
) -> tuple[dict[str, Any], Encryption]:
    """Keywords of an SSHCluster, and how it is kept from others.

    Parameters
    ----------
    kwargs
        Of the file and the caller.
    origin
        Names the file in messages.
    threads
        Of each worker, None: as `worker_options` say.

    Raises
    ------
    InputError
        If a keyword is not known, hosts cannot reach each other, or others could in plain.
    """
    known = keywords_of(distributed.SSHCluster, distributed.SpecCluster) - {"security"}
    check_keys(kwargs, sorted(known), f"kwargs in {origin}")
    hosts = kwargs.get("hosts")
    if not isinstance(hosts, list) or len(hosts) < 2 or not all(isinstance(host, str) for host in hosts):
        raise InputError(
            f"an SSHCluster has a list of hosts, the scheduler's first, then one a worker; got {hosts!r} in {origin}; "
            "write hosts: [node1, node1, node2]"
        )
    options = kwargs.get("connect_options") or {}
    each = options if isinstance(options, list) else [options]
    for one in each:
        mapping_of({"connect_options": one}, "connect_options", origin)
    if isinstance(options, list) and len(options) != len(hosts):
        raise InputError(
            f"connect_options are for all hosts, or one for each; got {len(options)} for {len(hosts)} hosts in "
            f"{origin}; correct them"
        )
    here = all(is_loopback(host) for host in hosts)
    made = dict(kwargs)
    for name, defaults in _DEFAULTS.items():
        options = defaults | mapping_of(kwargs, name, origin)
        if options.get("host") is None and options.get("interface") is None:
            if not here:
                raise InputError(
                    f"hosts reach each other over a network interface that you name; got none in {name} of {origin}; "
                    "write interface: NAME there, as `ip -brief address` calls it on those hosts, or host: 0.0.0.0 for "
                    "all of them"
                )
            options["host"] = _LOOPBACK
        check_protocol(options.get("protocol"), insecure=insecure)
        check_dashboard(options["dashboard_address"], insecure=insecure)
        made[name] = without_dashboard(options, f"{_LOOPBACK}:0")
    if threads is not None:
        made["worker_options"]["nthreads"] = threads
    return made, choose_encryption(insecure=insecure)


def start_ssh(stack: ExitStack, kwargs: dict[str, Any], encryption: Encryption, *, level: Any) -> Any:
    """Start an SSHCluster, which `stack` closes.

    Certificates that are text are sent ahead to every host, into a folder that nobody else can enter, and removed at
    the end. Dask itself gives its settings to a host on a command line, which everybody there can read: they name
    files, and secrets are left out.

    Parameters
    ----------
    kwargs, encryption
        What `ssh_kwargs` gave.
    level
        Of Dask's log lines that are let through; falsy: all.
    """
    settings = dict.fromkeys(secret_settings(dask.config.config)) | _SPOKEN
    interrupted: Callable[[], None] | None = None
    security = make_security(encryption)
    if security is not None:
        folder = f"/tmp/random-windows-{secrets.token_hex(16)}"  # noqa: S108 (nobody can guess it)
        contents, paths = files_in(folder, security)
        if contents:
            remove = partial(_everywhere, kwargs, partial(_remove, folder))
            stack.callback(remove, seconds=_REMOVE_SECONDS)
            kwargs = kwargs | {"remote_python": _recorded(kwargs.get("remote_python"), folder)}
            _everywhere(kwargs, partial(_write, folder, contents | {_RECORDER: _recorder()}))
            interrupted = partial(remove, seconds=_HURRY_SECONDS)
        settings |= paths
        settings |= {"distributed.comm.require-encryption": True, "distributed.comm.default-scheme": "tls"}
    with dask.config.set(settings):
        made = kwargs | {"silence_logs": level, "security": security}
        return launch(stack, distributed.SSHCluster, made, shielded=True, interrupted=interrupted)


def _recorder() -> str:
    """Write a script that is Python afterwards."""
    return "\n".join((f'(umask 077; echo $$ >> "${{0%/*}}/{_PIDS}")', *guard_lines(), 'exec "$@"', ""))


def _recorded(python: str | list[str] | None, folder: str) -> str | list[str]:
    """Commands that start Python on the hosts, and leave its number in the folder, so that it can be ended."""
    if isinstance(python, list):
        return [f"sh {folder}/{_RECORDER} {each}" for each in python]
    return f"sh {folder}/{_RECORDER} {python or sys.executable}"


def _everywhere(
    kwargs: dict[str, Any], work: Callable[[Any], Coroutine[Any, Any, None]], *, seconds: float | None = None
) -> None:
    """Do `work` with a connection to each host; where it may take so many `seconds` no notice is taken of failures."""
    import asyncssh

    hosts, options = kwargs["hosts"], kwargs.get("connect_options") or {}
    each = options if isinstance(options, list) else [options] * len(hosts)

    async def visit(host: str, settings: dict[str, Any]) -> None:
        async with asyncio.timeout(seconds), asyncssh.connect(host, **settings) as connection:
            await work(connection)

    async def visit_all() -> None:
        visits = [visit(host, settings) for host, settings in dict(zip(hosts, each, strict=True)).items()]
        # A host that cannot be reached keeps no other's key there.
        await asyncio.gather(*visits, return_exceptions=seconds is not None)

    with suppress(*([] if seconds is None else [Exception])), ThreadPoolExecutor(1, "ssh") as thread:
        # The caller's own may have a loop that runs, as in a notebook.
        thread.submit(asyncio.run, visit_all()).result()


async def _write(folder: str, contents: dict[str, str], connection: Any) -> None:
    """Write files into a new folder, which nobody else can enter.

    Commands are in sight of all users of a host, and so is the folder's name from now on: whoever makes something of
    that name first ends the start, and no file is written where anything is. Two names may be one host, where the
    first has it all.
    """
    there = " && ".join(f"test {each} {folder}" for each in ("-d", "! -L", "-O"))
    made = await connection.run(f"umask 077; mkdir {folder} 2>/dev/null && echo new || {{ {there}; }}", check=True)
    for name, text in contents.items() if made.stdout.strip() else ():
        await connection.run(f"umask 077; set -C; cat > {folder}/{shlex.quote(name)}", input=text, check=True)


async def _remove(folder: str, connection: Any) -> None:
    # A number may be another's by now.
    end = f"ps -o args= -p $pid | grep -q {_COMMAND} && kill $pid"
    await connection.run(f"for pid in $(cat {folder}/{_PIDS}); do {end}; done 2>/dev/null; rm -rf {folder}", check=True)
