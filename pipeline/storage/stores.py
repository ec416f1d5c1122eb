"""Zarr stores that know their URL: opened with the credentials of the machine that they are on, and with retries."""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, unquote

from zarr.storage import FsspecStore, ManagedMemoryStore, ObjectStore

from pipeline.errors import InputError, OpenError
from pipeline.storage.credentials import profile_options
from pipeline.storage.locations import BUCKETS, MEMORY, WEB, plain, say_failure

if TYPE_CHECKING:
    from zarr.abc.store import Store

    from pipeline.storage.locations import Url

_BACKOFF = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 3}
_RETRIES = {"max_retries": 10, "retry_timeout": timedelta(seconds=25), "backoff": _BACKOFF}
"""Of answers of 429 and 5xx, connections that fail, and bodies that end early; the task is run again after that."""
_TIMEOUTS = {"connect_timeout": "5s", "timeout": "10min", "read_timeout": "10s"}
"""A whole request may take long, where many share a slow line; silence may not."""
_SENDING = {"read_timeout": "60s"}
"""While bytes are sent, the server is silent."""
_HURRY = {"max_retries": 6, "retry_timeout": timedelta(seconds=8)}, {"connect_timeout": "3s", "read_timeout": "5s"}
"""For the first request: a store that is not there is known within seconds."""
_CLIENT_OPTIONS = {
    *("allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type", "default_headers"),
    *("http1_only", "http2_keep_alive_interval", "http2_keep_alive_timeout", "http2_keep_alive_while_idle"),
    *("http2_only", "pool_idle_timeout", "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes"),
    *("proxy_url", "randomize_addresses", "read_timeout", "root_certificate", "timeout", "user_agent"),
}
"""Options of obstore's connection, which it takes apart from those of the store: there they end in a panic."""
_CLOUDS = ("AWS_", "AZURE_", "GOOGLE_")
"""Variables by which a store may become another."""
_ALIASES = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "anon": "skip_signature",
    "endpoint_url": "endpoint",
}
"""Options of S3 as s3fs and botocore call them."""


def open_store(url: Url, *, read_only: bool) -> Store:
    """Open the store whose root is a URL; nothing is asked of it yet.

    Picklable; on another machine, credentials that are not among the URL's options come from where that machine keeps
    them.

    Raises
    ------
    OpenError
        If the library for it is missing, or refuses.
    InputError
        If it does not know an option, or a web server is to be written to.
    """
    if url.scheme == MEMORY:
        return MemoryUrlStore(url, read_only=read_only)
    if url.scheme in WEB and not read_only:
        raise InputError(f"web servers are read from; {url} is to be written; write to s3://, gs://, az:// or a path")
    if url.scheme in (*BUCKETS.values(), *WEB):
        return UrlStore(url, read_only=read_only)
    return _open_fsspec(url, read_only=read_only)


_user = 0
"""The process that has first used obstore, which has one pool of threads; 0: none yet."""


class UrlStore(ObjectStore[Any]):
    """An object store, or a folder of a web server, rooted at a URL.

    Pickled as its URL and options: what else it needs, each machine has for itself.
    """

    def __init__(self, url: Url, *, read_only: bool, hurry: bool = False) -> None:
        super().__init__(_connect(url, read_only=read_only, hurry=hurry), read_only=read_only)
        self.url = url

    @property
    def store(self) -> Any:
        """What obstore made of the URL.

        Raises
        ------
        InputError
            In a forked child of a process that has used obstore: its threads are the parent's, and would never answer.
        """
        global _user  # noqa: PLW0603
        _user = _user or os.getpid()
        if _user != os.getpid():
            raise InputError(
                f"{self.url} cannot be used in this forked process, whose parent has used an object store; start it "
                "with multiprocessing.get_context('spawn')"
            )
        return self._store

    @store.setter
    def store(self, store: Any) -> None:
        self._store = store

    def hurried(self) -> Self:
        """Return the same store, to be read from, which gives up within seconds."""
        return type(self)(self.url, read_only=True, hurry=True)

    @property
    def supports_listing(self) -> bool:
        """Not of a web server."""
        return self.url.scheme not in WEB

    def with_read_only(self, read_only: bool = False) -> Self:
        """See `zarr.abc.store.Store`."""
        return type(self)(self.url, read_only=read_only)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self.url, self.read_only)

    def __str__(self) -> str:
        return str(self.url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.url)!r})"


class MemoryUrlStore(ManagedMemoryStore):
    """Keys in this process's memory, for tests: what was written under a URL is there until the process ends."""

    def __init__(self, url: Url, *, read_only: bool) -> None:
        super().__init__(url.host, path=url.path, read_only=read_only)
        self.url = url
        _KEPT.setdefault(url.host, self)

    def with_read_only(self, read_only: bool = False) -> Self:
        """See `zarr.abc.store.Store`."""
        return type(self)(self.url, read_only=read_only)

    def __reduce__(self) -> tuple[Any, ...]:
        return _recall, (type(self), self.url, self.read_only, os.getpid())


_KEPT: dict[str, MemoryUrlStore] = {}
"""One store of each name: Zarr forgets what nobody holds."""


def _reopen(kind: type[UrlStore], url: Url, read_only: bool) -> UrlStore:
    return _share(kind, url, read_only, frozenset(each for each in os.environ.items() if each[0].startswith(_CLOUDS)))


@lru_cache(maxsize=16)
def _share(kind: type[UrlStore], url: Url, read_only: bool, _: frozenset[tuple[str, str]]) -> UrlStore:
    """Open a store once for all tasks of a process: they have its connections in common."""
    return kind(url, read_only=read_only)


def _recall(kind: type[MemoryUrlStore], url: Url, read_only: bool, pid: int) -> MemoryUrlStore:
    if pid != os.getpid():
        raise InputError(f"memory:// is seen by one process alone; {url} came to another; use threads, or s3://")
    return kind(url, read_only=read_only)


def _connect(url: Url, *, read_only: bool, hurry: bool) -> Any:
    try:
        import obstore.store
        from obstore.exceptions import BaseError, UnknownConfigurationKeyError
    except ImportError as error:
        raise OpenError(
            f"{url.scheme}:// needs a package; obstore is not installed; pip install obstore botocore"
        ) from error
    options = dict(url.options)
    straight = {key: options.pop(key) for key in _CLIENT_OPTIONS & options.keys()}
    retries: dict[str, Any] = _RETRIES
    clients: dict[str, Any] = _TIMEOUTS if read_only else _TIMEOUTS | _SENDING
    if hurry:
        retries, clients = retries | _HURRY[0], clients | _HURRY[1]
    if url.scheme == "s3":
        options = profile_options({_ALIASES.get(key, key): value for key, value in options.items()}, str(url))
    endpoint = _endpoint(options)
    if endpoint and "://" not in endpoint:
        raise InputError(
            f"an endpoint begins with https:// or http://; that of {url} does not; correct AWS_ENDPOINT_URL, or the "
            "endpoint among its options"
        )
    if url.scheme == "http" or endpoint.startswith("http://"):
        # Whoever writes http:// means it.
        clients = clients | {"allow_http": "true"}
    if url.scheme in WEB and url.user:
        # Left to itself, obstore drops it.
        given = base64.b64encode(unquote(url.user).encode()).decode()
        clients = clients | {"default_headers": {"authorization": f"Basic {given}"}}
    settings: dict[str, Any] = {
        "client_options": clients | straight | dict(options.pop("client_options", {})),
        "retry_config": retries | dict(options.pop("retry_config", {})),
    }
    text = f"{url.scheme}://{url.host}/{quote(url.path)}"
    connect: Any = obstore.store.from_url
    if url.scheme in WEB:
        text = _address(replace(url, user=""))
        # As a web server all the same where a query, such as a signature, lets in who has it.
        connect = obstore.store.HTTPStore.from_url if url.query else connect
    try:
        return connect(text, **settings, **options)
    except (BaseError, TypeError, ValueError) as error:
        kind = InputError if isinstance(error, UnknownConfigurationKeyError | TypeError) else OpenError
        raise kind(f"a store can be opened; {url} cannot: {say_failure(error)}; check its options") from plain(error)


def _endpoint(options: dict[str, Any]) -> str:
    for name in ("aws_endpoint_url_s3", "endpoint", "aws_endpoint_url", "aws_endpoint"):
        if name in options:
            return str(options[name])
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _address(url: Url) -> str:
    """The whole URL, secrets and all: for a library, not for a message."""
    user = f"{url.user}@" if url.user else ""
    query = f"?{url.query}" if url.query else ""
    return f"{url.scheme}://{user}{url.host}/{url.path}{query}"


def _open_fsspec(url: Url, *, read_only: bool) -> Store:
    try:
        return FsspecStore.from_url(_address(url), dict(url.options), read_only=read_only)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise OpenError(f"{url.scheme}:// needs a package; {reason}; pip install it") from error
    except Exception as error:  # noqa: BLE001 (a file system raises what it likes)
        raise OpenError(f"a store can be opened; {url} cannot: {say_failure(error)}; check it") from plain(error)
