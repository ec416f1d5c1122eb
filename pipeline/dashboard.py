"""The dashboard of a cluster that runs in this process: pages made when somebody looks, and their address."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Self

import distributed
import distributed.utils
from tornado.httputil import HTTPServerConnectionDelegate

if TYPE_CHECKING:
    from tornado.httputil import HTTPConnection, HTTPMessageDelegate


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


def dashboard_link(client: distributed.Client) -> str | None:
    """Address of the client's dashboard as it can be opened from this machine, or None where it has none."""
    scheduler = getattr(client.cluster, "scheduler", None)
    if not isinstance(scheduler, distributed.Scheduler):
        return client.dashboard_link  # type: ignore[no-any-return]
    server = scheduler.http_server
    # Without the dashboard, also where bokeh is absent, the server still serves other pages.
    if not scheduler.http_application.applications and not isinstance(server.request_callback, _FirstRequest):
        return None
    # Dask's own link names this host's outer address even where the dashboard listens on loopback alone.
    host = "127.0.0.1" if server.address in ("0.0.0.0", "::") else server.address  # noqa: S104
    return str(distributed.utils.format_dashboard_link(host, server.port))
