"""An HTTP proxy on loopback, in front of a real server: it counts what is asked, and makes trouble on schedule.

    with proxied("http://127.0.0.1:5000") as proxy:
        proxy.latency = 0.01                            # seconds before each answer
        proxy.trouble("error", method="GET", key=r"c/", skip=2, times=3)    # the third to the fifth GET of a chunk
        ... requests to proxy.url ...
        assert proxy.count(method="GET") == 5
        assert proxy.nbytes(method="GET") == 4096       # of the answers' bodies
        proxy.reset()                                   # forget requests and troubles

It runs on threads of this process, so that a test sees and changes it at once.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal["error", "stall", "cut", "drop", "lose", "corrupt"]

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


@dataclass(frozen=True)
class Asked:
    """One request, and what the client was told."""

    method: str
    key: str
    """The path, such as `/bucket/A.zarr/c/0/0`, and what follows a `?`; percent signs resolved."""
    range: str | None
    """Such as `bytes=0-131`; None where the whole is asked for."""
    status: int
    """0 where there was no answer."""
    sent: int
    """Bytes of the request's body."""
    nbytes: int
    """Bytes of the answer's body that were passed on."""
    begin: float
    end: float
    """When the request and when its answer was there; of `time.monotonic()`."""


@dataclass
class Trouble:
    """What goes wrong with some of the requests, in their order of arrival."""

    kind: Kind
    method: str
    key: re.Pattern[str]
    skip: int
    times: int
    amount: float
    met: int = 0
    """Requests that it fits, those that it skipped among them."""
    done: int = 0
    """Requests that it struck."""


@dataclass
class Proxy:
    """See the module; made by `proxied`."""

    url: str
    latency: float = 0.0
    """Seconds that each answer is held back."""
    bandwidth: float = 0.0
    """Bytes a second of one answer's body; 0: as fast as they come."""
    asked: list[Asked] = field(default_factory=list)
    """Requests in the order in which they were answered."""
    peak: int = 0
    """Most requests that were under way at once."""
    _troubles: list[Trouble] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closing: threading.Event = field(default_factory=threading.Event)
    _under_way: int = 0

    def trouble(
        self, kind: Kind, *, method: str = "", key: str = "", skip: int = 0, times: int = 1, amount: float = 0
    ) -> Trouble:
        """Let requests fail that fit `method` and `key`, a regular expression: after `skip` of them, `times` times.

        Parameters
        ----------
        kind
            `error`: the answer has the status `amount`, or 500, and the server is not asked. `stall`: no answer for
            `amount` seconds, or until the proxy ends; then the connection ends. `cut`: the body ends after `amount`
            bytes, or half of them, less than its Content-Length says. `drop`: the connection ends at once. `lose`: the
            server does what it was asked, and the connection ends without an answer. `corrupt`: the byte at `amount`
            of the body, or in its middle, comes inverted.
        """
        made = Trouble(kind, method, re.compile(key), skip, times, amount)
        with self._lock:
            self._troubles.append(made)
        return made

    def reset(self) -> None:
        """Forget all requests and troubles."""
        with self._lock:
            self.asked.clear()
            self._troubles.clear()
            self.peak = self._under_way

    def fitting(self, method: str = "", key: str = "") -> list[Asked]:
        """Requests of a method whose key holds the regular expression."""
        with self._lock:
            return [each for each in self.asked if method in ("", each.method) and re.search(key, each.key)]

    def count(self, method: str = "", key: str = "") -> int:
        """Requests; see `fitting`."""
        return len(self.fitting(method, key))

    def nbytes(self, method: str = "", key: str = "") -> int:
        """Bytes of the answers' bodies; see `fitting`."""
        return sum(each.nbytes for each in self.fitting(method, key))

    def _struck(self, method: str, key: str) -> Trouble | None:
        """First trouble that strikes this request; each that fits counts it."""
        found = None
        with self._lock:
            for each in self._troubles:
                if each.method in ("", method) and each.key.search(key):
                    each.met += 1
                    if found is None and each.met > each.skip and each.done < each.times:
                        each.done += 1
                        found = each
        return found


class _Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    content: bytes
    whole: int
    """What its Content-Length says."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    proxy: Proxy
    upstream: str

    def setup(self) -> None:
        super().setup()
        host = urlsplit(self.upstream)
        self.server_side = http.client.HTTPConnection(host.hostname or "", host.port, timeout=60)

    def finish(self) -> None:
        self.server_side.close()
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True  # The client has gone, or the proxy ends.

    def _pass_on(self) -> None:
        proxy, begin = self.proxy, time.monotonic()
        method, key = self.command, unquote(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert "chunked" not in self.headers.get("Transfer-Encoding", "")
        with proxy._lock:
            proxy._under_way += 1
            proxy.peak = max(proxy.peak, proxy._under_way)
        try:
            answer = self._answer(proxy._struck(method, key), body)
            if answer is None:
                self.close_connection = True
            status, nbytes = (answer.status, len(answer.content)) if answer else (0, 0)
            made = Asked(method, key, self.headers.get("Range"), status, len(body), nbytes, begin, time.monotonic())
            # Before the client has its answer, and looks here.
            with proxy._lock:
                proxy.asked.append(made)
            if answer:
                self._send(answer)
        finally:
            with proxy._lock:
                proxy._under_way -= 1

    def _answer(self, trouble: Trouble | None, body: bytes) -> _Answer | None:
        """What the client gets; None: no answer."""
        proxy, kind = self.proxy, trouble.kind if trouble else None
        if proxy.latency:
            proxy._closing.wait(proxy.latency)
        if kind in ("stall", "drop"):
            if kind == "stall":
                proxy._closing.wait(trouble.amount or None)
            return None
        if kind == "error":
            return _Answer(int(trouble.amount) or 500, [("Content-Type", "text/plain")], b"trouble", 7)
        self.server_side.request(
            self.command, self.path, body or None, {key: value for key, value in self.headers.items() if value}
        )
        got = self.server_side.getresponse()
        content = got.read()
        headers = [(key, value) for key, value in got.getheaders() if key.lower() not in _HOP]
        whole = len(content) if self.command != "HEAD" else int(got.getheader("Content-Length") or 0)
        if kind == "lose":
            return None
        if kind == "corrupt" and content:
            changed = bytearray(content)
            changed[int(trouble.amount) or len(content) // 2] ^= 0xFF
            content = bytes(changed)
        if kind == "cut":
            content = content[: int(trouble.amount) or len(content) // 2]
            self.close_connection = True
        return _Answer(got.status, headers, content, whole)

    def _send(self, answer: _Answer) -> None:
        self.send_response_only(answer.status)
        for key, value in answer.headers:
            self.send_header(key, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(answer.whole))
        self.end_headers()
        if self.proxy.bandwidth:
            self.proxy._closing.wait(len(answer.content) / self.proxy.bandwidth)
        if self.command != "HEAD":
            self.wfile.write(answer.content)
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


for _method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
    setattr(_Handler, f"do_{_method}", _Handler._pass_on)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[_Handler]) -> None:
        self.open: set[Any] = set()
        super().__init__(("127.0.0.1", 0), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)


@contextlib.contextmanager
def proxied(upstream: str) -> Iterator[Proxy]:
    """Pass on requests to the server at `upstream`, such as `http://127.0.0.1:5000`."""
    proxy = Proxy("")
    server = _Server(type("_Bound", (_Handler,), {"proxy": proxy, "upstream": upstream}))
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy._closing.set()
        server.shutdown()
        # Threads that wait for the next request of a connection that is kept open end with it.
        for request in list(server.open):
            with contextlib.suppress(OSError):
                request.shutdown(2)
        deadline = time.monotonic() + 5
        while server.open and time.monotonic() < deadline:
            time.sleep(0.01)
        server.server_close()
        thread.join()
