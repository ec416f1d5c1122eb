"""Every value in force, and where it came from: a flag, the environment, a file, or built in."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import msgspec
from dask.utils import parse_timedelta

from pipeline.cluster.connect import no_workers_timeout
from pipeline.cluster.resolve import Choice, Deployment, choose_cluster, plan_deployment
from pipeline.cluster.security import address_encryption
from pipeline.cluster.spec import key_lines, merged_settings
from pipeline.formatting import format_size
from pipeline.memory import budget, parse_size
from pipeline.redaction import without_secrets
from pipeline.runtime.progress import VARIABLE, read_setting
from pipeline.storage.concurrency import concurrency
from pipeline.storage.zarrconfig import FUSED_PIPELINE, user_setting

_BUILT_IN = "built in"
_DASK = (
    "distributed.scheduler.no-workers-timeout",
    "distributed.scheduler.allowed-failures",
    "distributed.comm.require-encryption",
    "distributed.comm.tls.ca-file",
    *(f"distributed.comm.tls.{role}.{part}" for role in ("client", "scheduler", "worker") for part in ("cert", "key")),
    "temporary-directory",
)
"""Settings of Dask that are shown whoever set them; of the others those that somebody set."""
_MADE_BY = {"workers": ("n_workers", "processes"), "threads": ("threads_per_worker", "cores", "processes", "nthreads")}
"""Keywords of a cluster's class that a flag sets."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A value, without secrets, and who set it."""

    value: Any
    origin: str


def collect_settings(
    where: Mapping[str, Any], told: Mapping[str, str], *, memory: str | None, variables: Collection[str]
) -> dict[str, Setting]:
    """Every value in force, by its dotted name; nothing is started, and no scheduler asked.

    Parameters
    ----------
    where
        Keywords of `connect`.
    told
        Flag or environment variable that gave each of them, and `memory`.
    memory
        Most that a run may hold, such as "8GB"; None for the machine's own limits.
    variables
        Environment variables that set an option.

    Raises
    ------
    InputError, OpenError
        As `connect` does.
    """
    choice = choose_cluster(where.get("cluster"), {key: value for key, value in where.items() if key != "cluster"})
    found = dict(_file_settings(where, told, choice))
    with dask.config.set(merged_settings(choice.settings)):
        if choice.scheduler is None:
            deployment = plan_deployment(choice)
            found |= _deployment_settings(choice, deployment, told)
        else:
            found |= _scheduler_settings(choice, told)
        allowed = budget(None if memory is None else parse_size(memory))
        found["memory.budget"] = Setting(format_size(allowed.nbytes), told["memory"] if memory else allowed.source)
        found |= _dask_settings(choice)
    found |= _zarr_settings()
    shown = read_setting()
    found["progress"] = Setting("automatic" if shown is None else shown, _BUILT_IN if shown is None else VARIABLE)
    found |= _variable_settings(variables)
    return {name: Setting(without_secrets(name, each.value), each.origin) for name, each in found.items()}


def _file_settings(where: Mapping[str, Any], told: Mapping[str, str], choice: Choice) -> Iterator[tuple[str, Setting]]:
    path = where.get("cluster")
    if path is not None:
        yield "cluster.file", Setting(str(path), told["cluster"])
    elif Path("cluster.yaml").exists():
        yield "cluster.file", Setting("cluster.yaml", "the working directory")
    else:
        yield "cluster.file", Setting(None, _BUILT_IN)
    origin = told.get("insecure") or (_line(choice, "insecure") if choice.spec.insecure else _BUILT_IN)
    yield "cluster.insecure", Setting(choice.insecure, origin)


def _scheduler_settings(choice: Choice, told: Mapping[str, str]) -> dict[str, Setting]:
    key = "scheduler-file" if choice.is_file else "scheduler-address"
    told_by = told.get(key.replace("-", "_")) or choice.scheduler_origin
    if told_by == choice.origin:
        told_by = _line(choice, key)
    made = {f"cluster.{key}": Setting(choice.scheduler, told_by)}
    if not choice.is_file:
        encryption = address_encryption(str(choice.scheduler), insecure=choice.insecure)
        made["cluster.encryption"] = Setting(encryption.value, _BUILT_IN)
    return made


def _deployment_settings(choice: Choice, deployment: Deployment, told: Mapping[str, str]) -> dict[str, Setting]:
    """Settings of a cluster that would be started."""
    named = choice.spec.module or choice.spec.class_
    origin = _line(choice, "class" if choice.spec.class_ else "module") if named else _BUILT_IN
    made = {"cluster.class": Setting(f"{deployment.module}.{deployment.name}", origin)}
    flags = {name: told[flag] for flag, names in _MADE_BY.items() if flag in told for name in names}
    given = dict(_leaves(choice.spec.kwargs))
    for path, value in _leaves(deployment.kwargs):
        if path[-1] in flags:
            origin = flags[path[-1]]
        elif path in given and given[path] == value:
            origin = _line(choice, "kwargs", *path)
        else:
            origin = _BUILT_IN
        made[f"cluster.kwargs.{'.'.join(path)}"] = Setting(value, origin)
    for key, value in (("scale", deployment.scale), ("adapt", deployment.adapt)):
        if value is not None:
            words = {name: number for name, number in msgspec.structs.asdict(value).items() if number is not None}
            made[f"cluster.{key}"] = Setting(
                words,
                told.get("workers") or (_line(choice, key) if getattr(choice.spec, key) is not None else _BUILT_IN),
            )
    made["cluster.encryption"] = Setting(deployment.encryption.value, _BUILT_IN)
    return made


def _leaves(values: Mapping[str, Any], *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, *above, str(key))
        else:
            yield (*above, str(key)), value


def _line(choice: Choice, *keys: str) -> str:
    """File and line of a key, or of the nearest above it that is there."""
    lines = key_lines(choice.origin)
    name = tuple(key.replace("_", "-") for key in keys)
    while name and name not in lines:
        name = name[:-1]
    return f"{choice.origin}, line {lines[name]}" if name else choice.origin


def _dask_settings(choice: Choice) -> dict[str, Setting]:
    """Settings of Dask that matter here, and those that somebody set."""
    layers: list[tuple[str | None, Mapping[str, Any]]] = [
        (str(path), content) for path, content in dask.config.collect_yaml(dask.config.paths, return_paths=True)
    ]
    layers.append((None, choice.settings))
    layers.append(("the environment, DASK_*", dask.config.collect_env()))
    origins: dict[tuple[str, ...], str] = {}
    for origin, content in layers:
        for path, _ in _leaves(content):
            name = tuple(key.replace("_", "-") for key in path)
            origins[name] = origin or _line(choice, *path)
    made = {}
    for name in dict.fromkeys([*(tuple(each.split(".")) for each in _DASK), *origins]):
        dotted = ".".join(name)
        made[f"dask.{dotted}"] = Setting(dask.config.get(dotted, None), origins.get(name, _BUILT_IN))
    timeout = "distributed.scheduler.no-workers-timeout"
    if made[f"dask.{timeout}"].value is None and choice.scheduler is None:
        made[f"dask.{timeout}"] = Setting(f"{parse_timedelta(no_workers_timeout()):g} s", _BUILT_IN)
    return made


def _zarr_settings() -> dict[str, Setting]:
    made = {}
    for name, value in (("async.concurrency", concurrency()), ("threading.max_workers", None)):
        given, variable = user_setting(name), "ZARR_" + name.upper().replace(".", "__")
        origin = f"the environment, {variable}" if variable in os.environ else "Zarr's configuration"
        made[f"zarr.{name}"] = Setting(value, _BUILT_IN) if given is None else Setting(given, origin)
    made["zarr.codec_pipeline.path"] = Setting(FUSED_PIPELINE, _BUILT_IN)
    return made


def _variable_settings(variables: Collection[str]) -> dict[str, Setting]:
    """Environment variables of ours."""
    return {
        f"environment.{name}": Setting(os.environ[name], "the environment")
        for name in sorted(variables)
        if name in os.environ
    }


def report_settings(settings: Mapping[str, Setting]) -> tuple[dict[str, str], dict[str, Any]]:
    """Words in two columns, the second with the origin, and numbers for a program."""
    shown = {name: f"{'-' if each.value is None else each.value}  ({each.origin})" for name, each in settings.items()}
    return shown, {name: {"value": each.value, "origin": each.origin} for name, each in settings.items()}
