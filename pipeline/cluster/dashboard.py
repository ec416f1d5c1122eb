"""The dashboard: where it is found, and its pages, which a cluster in this process makes when somebody looks."""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import dask
import distributed
from distributed.comm import get_address_host
from distributed.deploy import Cluster
from distributed.utils import format_dashboard_link
from tornado.httputil import HTTPServerConnectionDelegate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tornado.httputil import HTTPConnection, HTTPMessageDelegate

_LOOPBACK = "127.0.0.1"
_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 (what others listen on)
_LINK = "distributed.dashboard.link"
_PLAIN_LINK = "{scheme}://{host}:{port}/status"
"""Dask's own value of it; any other one is how the user's site serves dashboards, such as JupyterHub's proxy."""
_SUBMIT_HOSTS = ("SLURM_SUBMIT_HOST", "PBS_O_HOST", "SGE_O_HOST", "LSB_SUB_HOST")
"""Where a batch job was submitted, by the batch systems that tell."""
_PROBE_SECONDS = 1


class _FirstRequest(HTTPServerConnectionDelegate):
    """Stands in for the HTTP application of a scheduler or worker until the first request, whatever it asks for."""

    def __init__(self, node: Any, kind: Literal["scheduler", "worker"], prefix: str) -> None:
        self._node = node
        self._kind = kind
        self._prefix = prefix

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        """Make the pages, which lets the application take this request and all later ones."""
        application, server = self._node.http_application, self._node.http_server
        server.request_callback = application
        pages = importlib.import_module(f"distributed.dashboard.{self._kind}")
        pages.connect(application, server, self._node, prefix=self._prefix)
        delegate: HTTPMessageDelegate = application.start_request(server_conn, request_conn)
        return delegate


def can_defer_pages() -> bool:
    """Whether pages can be made later; where bokeh is absent, Dask has a page that says so."""
    return find_spec("bokeh") is not None


def defer_pages(node: Any, kind: Literal["scheduler", "worker"], *, prefix: str = "/") -> None:
    """Make the pages of a node that was started without a dashboard when its HTTP server gets its first request.

    Importing bokeh takes a third of what a small run takes, and few runs are looked at. No history is lost: Dask's
    pages begin to record when they are opened.
    """
    node.http_server.request_callback = _FirstRequest(node, kind, prefix)


class Worker(distributed.Worker):  # type: ignore[misc]
    """A worker of this process whose dashboard is made when somebody looks.

    Dask names a worker's kind and looks up its settings by the name of the class.
    """

    def __init__(self, *args: Any, dashboard: bool = False, http_prefix: str = "/", **kwargs: Any) -> None:
        self._pages_prefix = http_prefix if dashboard and can_defer_pages() else None
        eager = dashboard and self._pages_prefix is None
        super().__init__(*args, dashboard=eager, http_prefix=http_prefix, **kwargs)

    async def start_unsafe(self) -> Self:
        """Start as every worker does."""
        await super().start_unsafe()
        if self._pages_prefix is not None:
            defer_pages(self, "worker", prefix=self._pages_prefix)
        return self


class Address(NamedTuple):
    """Where a dashboard is found."""

    link: str
    tunnel: str | None
    """The `ssh` command that brings its port to the machine of whoever reads this, where that is needed."""


class _Links(str):  # noqa: SLOT000 (there is one)
    """Dask's setting of links, for a cluster of which it is known where its dashboards listen.

    Dask guesses that from the nodes' addresses, for its clients, its clusters and what a notebook shows of both.
    Nothing listens there where a dashboard is on loopback alone.
    """

    hosts: frozenset[str]
    """What Dask takes for the host of a dashboard."""
    port: int | None
    """Of the scheduler's dashboard."""
    link: str
    """Of it; empty where it has none."""
    setting: str
    """What was set before: another such, or a template."""
    is_local: bool
    """Whether all nodes are on this machine, and their dashboards on its loopback."""

    def format(self, *args: object, **variables: object) -> str:
        """Return the link of a host and a port, as Dask asks for it."""
        if variables.get("host") in self.hosts:
            if variables.get("port") == self.port:
                return self.link
            if self.is_local:
                variables["host"] = _LOOPBACK
        return self.setting.format(*args, **variables)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        # Workers get Dask's settings, and know nothing of this.
        return str, (str(self),)


@contextmanager
def right_links(client: distributed.Client) -> Iterator[None]:
    """Let a client and its cluster, and what they show of themselves in a notebook, link to where dashboards listen."""
    setting, address = dask.config.get(_LINK), client.scheduler.address
    links = _Links(setting)
    links.setting = setting
    guess = address.partition("://")[2].partition("/")[0].partition(":")[0]
    links.hosts = frozenset({guess, get_address_host(address), *(["localhost"] if "inproc" in address else [])})
    links.port = client.scheduler_info(n_workers=0)["services"].get("dashboard")
    links.link = dashboard_link(client) or ""
    links.is_local = isinstance(client.cluster, distributed.LocalCluster)
    with dask.config.set({_LINK: links}):
        yield


def dashboard_link(client: distributed.Client) -> str | None:
    """Return the link of the client's dashboard, with the port that it took, or None where it has none.

    It is the one of `distributed.dashboard.link` where that is set. A dashboard that listens on another machine's
    loopback alone has the link that works through a tunnel.
    """
    address = locate_dashboard(client)
    return None if address is None else address.link


def say_dashboard(client: distributed.Client, cluster_file: str | None = None) -> list[str]:
    """Lines that tell where the dashboard is: its link, and how its port is reached from the user's own machine.

    The first names the cluster file that is in force, if there is one.
    """
    address = locate_dashboard(client)
    if address is None:
        return []
    tunnel = [] if address.tunnel is None else [f"from your own machine: {address.tunnel}"]
    return [f"dashboard: {address.link}{f' (cluster file: {cluster_file})' if cluster_file else ''}", *tunnel]


def locate_dashboard(client: distributed.Client) -> Address | None:
    """Find out where a client's dashboard is, and whether it is reached from here; None where it has none."""
    cluster = client.cluster
    if cluster is not None and getattr(type(cluster), "dashboard_link", None) is not Cluster.dashboard_link:
        # That of a gateway, or of a forwarded port.
        return Address(cluster.dashboard_link, None) if cluster.dashboard_link else None
    scheduler = getattr(cluster, "scheduler", None)
    here = isinstance(scheduler, distributed.Scheduler)
    host, port = _served_here(scheduler) if here else _served_elsewhere(client)
    if port is None:
        return None
    way = _way_here()
    if not here and not _is_link_set() and not _answers(host, port):
        # It listens on loopback alone.
        way += [] if _is_ours(host) else [host]
        host = _LOOPBACK
    return _describe(host, port, way)


def _served_here(scheduler: distributed.Scheduler) -> tuple[str, int | None]:
    """Return host and port of the dashboard of a scheduler in this process; no port where it has none."""
    server = scheduler.http_server
    # Without the dashboard, also where bokeh is absent, the server still serves other pages.
    is_there = scheduler.http_application.applications or isinstance(server.request_callback, _FirstRequest)
    # Dask's own link names this host's outer address even where the dashboard listens on loopback alone.
    return _LOOPBACK if server.address in _EVERYWHERE else server.address, server.port if is_there else None


def _served_elsewhere(client: distributed.Client) -> tuple[str, int | None]:
    """Return the host of a client's scheduler, and its dashboard's port; no port where it has none."""
    services = client.scheduler_info(n_workers=0)["services"]
    return get_address_host(client.scheduler.address), services.get("dashboard")


def _describe(host: str, port: int, way: list[str]) -> Address:
    """Give the link of what listens at `host` and `port` of the last machine of `way`, and the tunnel through them."""
    host = f"[{host}]" if ":" in host else host
    try:
        link = format_dashboard_link(host, port)
    except (KeyError, IndexError, ValueError):
        # A variable of the environment that the user's own link names is absent.
        link = f"http://{host}:{port}/status"
    if not way or _is_link_set():
        return Address(link, None)
    through = f"-J {','.join(way[:-1])} " if way[:-1] else ""
    plain = f"http://{_LOOPBACK}:{port}/status"
    return Address(link if host != _LOOPBACK else plain, f"ssh -L {port}:{host}:{port} {through}{way[-1]}")


def _is_link_set() -> bool:
    return bool(dask.config.get(_LINK) != _PLAIN_LINK)


def _way_here() -> list[str]:
    """Machines that the user goes through by `ssh` to reach this process, as far as is known; none where that is here.

    A batch job keeps the variables of the session that submitted it.
    """
    here = socket.gethostname()
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) == 4:
        entry = words[2]
        if not _is_ours(entry):
            return [entry, here]
        return [here if ipaddress.ip_address(entry).is_loopback else entry]
    submitted = next((os.environ[name] for name in _SUBMIT_HOSTS if os.environ.get(name)), None)
    if submitted is None:
        return []
    return [here] if submitted.split(".")[0] == here.split(".")[0] else [submitted, here]


def _is_ours(host: str) -> bool:
    """Whether an address or a name is one of this machine's."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_PROBE_SECONDS).close()
    except OSError:
        return False
    return True
