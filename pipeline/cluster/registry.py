"""Dask's deployments that a cluster file may name: their classes, and the keywords that these take."""

from __future__ import annotations

import difflib
import importlib
import inspect
import signal
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, OpenError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

_CLASSES = {
    "dask.distributed": ("LocalCluster", "SSHCluster"),
    "dask_jobqueue": (
        "HTCondorCluster",
        "LSFCluster",
        "MoabCluster",
        "OARCluster",
        "PBSCluster",
        "SGECluster",
        "SLURMCluster",
    ),
    "dask_kubernetes.operator": ("KubeCluster",),
    "dask_gateway": ("GatewayCluster",),
}
"""What `module` and `class` may name; nothing else is ever imported."""

_NEEDED = {"SSHCluster": "asyncssh"}
"""Packages that a class imports only when it starts."""

OBJECTS = {
    *("self", "args", "kwargs", "worker_kwargs", "job_kwargs", "base_class_kwargs", "asynchronous", "loop"),
    *("scheduler", "scheduler_cls", "worker", "workers", "worker_class", "job_cls"),
}
"""Parameters for what a file cannot hold; Dask would import some of them by any name."""


def name_class(module: str | None, name: str | None, origin: str) -> tuple[str, str]:
    """Complete and check `module` and `class` of a cluster file; a class alone says its module.

    Raises
    ------
    InputError
        If they name none of Dask's deployments.
    """
    if module is None:
        module = next((each for each, names in _CLASSES.items() if name in names), "dask.distributed")
    if name is None and module == "dask.distributed":
        name = "LocalCluster"
    if name not in _CLASSES.get(module, ()):
        known = [f"{each}.{one}" for each, names in _CLASSES.items() for one in names]
        nearest = difflib.get_close_matches(f"{module}.{name}", known, n=1, cutoff=0)[0]
        raise InputError(
            f"module and class name one of Dask's clusters; got {module}.{name or 'no class'} in {origin}; did you "
            f"mean {nearest!r}? Known are {', '.join(known)}"
        )
    return module, name


def load_class(module: str, name: str) -> Callable[..., Any]:
    """Import a cluster's class.

    Raises
    ------
    OpenError
        If its package, or one that it needs, is not installed, or cannot be imported.
    """
    for package in (module.partition(".")[0], _NEEDED.get(name, "dask")):
        if find_spec(package) is None:
            pip = package.replace("_", "-")
            raise OpenError(f"a {name} comes with {pip}; it is not installed; pip install {pip}")
    # dask_jobqueue has Ctrl-C end the process without a word, from its import on.
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        made: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OpenError(
            f"{module} is imported, from the main thread, and gives a {name}; got {error}; import it there first, or "
            f"pip install --upgrade {module.partition('.')[0].replace('_', '-')}"
        ) from error
    if signal.getsignal(signal.SIGINT) is not interrupt:
        signal.signal(signal.SIGINT, interrupt)
    return made


def keywords_of(*kinds: Callable[..., Any]) -> set[str]:
    """Keywords that classes or functions take, of those that a file can give."""
    made = [vars(kind).get("__init__", kind) if isinstance(kind, type) else kind for kind in kinds]
    signatures = [inspect.signature(each) for each in made]
    return {name for signature in signatures for name in signature.parameters} - OBJECTS


def mapping_of(kwargs: Mapping[str, Any], name: str, origin: str) -> dict[str, Any]:
    """Return a keyword that is a mapping, empty where it is not given; InputError where it is something else."""
    value = kwargs.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name} is a mapping of keywords; got {value!r} in {origin}; write {name}: {{key: value}}")
    return dict(value)


def check_keys(given: Collection[Any], known: Collection[str], where: str) -> None:
    """Raise InputError, with the nearest known key, for a key that is not known."""
    for key in given:
        if str(key).replace("_", "-") not in {name.replace("_", "-") for name in known}:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise InputError(f"keys must be known; got {key!r} in {where}; did you mean {nearest!r}?")
