"""Clusters that a service runs for us: Kubernetes, Dask Gateway."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import dask

from pipeline.cluster.registry import OBJECTS, check_keys, keywords_of
from pipeline.cluster.security import Encryption, is_loopback, refuse_plain
from pipeline.errors import InputError

_THREADS = {
    "KubeCluster": "in worker_command: [dask-worker, --nthreads, '4']",
    "GatewayCluster": "as an option that the server offers, such as worker_cores",
}


def service_kwargs(
    factory: Any, kwargs: dict[str, Any], origin: str, *, threads: int | None, insecure: bool
) -> tuple[dict[str, Any], Encryption]:
    """Keywords of a cluster that a service runs, and how it is kept from others.

    Parameters
    ----------
    factory
        The cluster's class.
    kwargs
        Of the file and the caller.
    origin
        Names the file in messages.
    threads
        Of each worker; only None can be given.

    Raises
    ------
    InputError
        If a keyword is not known, or something travels in plain.
    """
    name = factory.__name__
    if threads is not None:
        raise InputError(f"threads of a {name} stand {_THREADS[name]}; got --threads {threads}; write it there")
    if name == "KubeCluster":
        check_keys(kwargs, sorted(keywords_of(*factory.__mro__)), f"kwargs in {origin}")
        if not insecure:
            raise refuse_plain("a KubeCluster, whose pods speak plain TCP: where a network policy keeps others out")
        # It draws on standard output.
        return {"quiet": True} | kwargs, Encryption.NONE
    # Further options are the server's own.
    if wrong := kwargs.keys() & OBJECTS:
        raise InputError(f"a cluster file gives plain values; got {min(wrong)!r} in kwargs in {origin}; drop it")
    address = urlsplit(str(kwargs.get("address") or dask.config.get("gateway.address", None) or ""))
    if address.scheme == "http" and not insecure and not is_loopback(address.hostname or ""):
        raise refuse_plain(f"a gateway at http://{address.netloc}: write https")
    return kwargs, Encryption.SERVICE


def starts_workers(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a cluster starts with workers where nothing says how many; most have none then."""
    start = dask.config.get("kubernetes.count.start", 0) if name == "KubeCluster" else 0
    return bool(kwargs.get("n_workers") or start)
