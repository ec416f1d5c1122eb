"""Which web pages may ask a dashboard for something: its own alone, so that no other site reads it."""

from __future__ import annotations

from typing import Any

import dask
import distributed

_ORIGINS = "distributed.scheduler.dashboard.bokeh-application.allow_websocket_origin"


def guard_dashboards(client: distributed.Client) -> None:
    """Have the scheduler and all workers, later ones too, of a running cluster refuse what `make_gate` does."""
    guard, gate = make_gate()
    client.run_on_scheduler(guard)
    client.register_plugin(gate)


def make_gate() -> tuple[Any, Any]:
    """Make what has a node's dashboard refuse requests that other sites have sent.

    Dask takes websockets from pages of any origin. And a name that leads to loopback makes a page of anybody's one of
    the dashboard's own (DNS rebinding). Loopback is let in with any port, as `ssh -L` may give it another one, and so
    are the hosts that Dask's setting names, such as that of a proxy.

    Returns
    -------
    tuple
        A function of the scheduler, and a plugin of workers. Both are sent whole, since what is made within a function
        is: this package need not be there.
    """
    given = dask.config.get(_ORIGINS, None) or []
    # Dask's own value, which takes all.
    hosts = [str(each).partition(":")[0].lower() for each in given if each != "*"]
    guard = _make_guard(hosts, _ORIGINS)

    class Gate(distributed.WorkerPlugin):  # type: ignore[misc]
        name = "dashboard-gate"

        def setup(self, worker: Any) -> None:
            guard(worker)

    return guard, Gate()


def _make_guard(hosts: list[str], setting: str) -> Any:  # noqa: C901 (all that is sent)
    """Make a function of a scheduler or worker."""

    def guard(dask_scheduler: Any) -> None:  # noqa: C901
        import ipaddress
        import socket
        from urllib.parse import urlsplit

        from tornado.web import RequestHandler

        own = {*hosts, "localhost", socket.gethostname().lower()}
        application = dask_scheduler.http_application
        find_handler = application.find_handler

        def read_host(address: str) -> str:
            try:
                return urlsplit(address).hostname or ""
            except ValueError:
                return ""

        def is_loopback(host: str) -> bool:
            try:
                return host == "localhost" or ipaddress.ip_address(host).is_loopback
            except ValueError:
                return False

        def is_own(host: str) -> bool:
            """Whether a request meant this server: a bare address is nobody's name for it."""
            try:
                ipaddress.ip_address(host)
            except ValueError:
                return host in own
            return True

        def find_foreign(request: Any) -> str | None:
            """Return the host of somebody else that a request names."""
            served = str(request.headers.get("Host", "")).lower()
            if not is_own(read_host(f"//{served}")):
                return served
            origin = str(request.headers.get("Origin", "")).lower()
            host = read_host(origin)
            # `null` has no host.
            fits = not origin or is_loopback(host) or host in hosts or (host and urlsplit(origin).netloc == served)
            return None if fits else origin

        class Refusal(RequestHandler):
            def prepare(self) -> None:
                self.set_status(403)
                self.set_header("Content-Type", "text/plain")
                self.finish(f"{find_foreign(self.request)!a} is not this dashboard; allow its host by {setting}\n")

        def find_allowed(request: Any, **kwargs: Any) -> Any:
            if find_foreign(request) is None:
                return find_handler(request, **kwargs)
            return application.get_handler_delegate(request, Refusal)

        application.find_handler = find_allowed

    return guard
