"""What a name means: a path of this machine, or a URL of a store elsewhere; its secrets are in no text.

`pipeline.storage.stores` opens what lies at a URL.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pipeline.arguments import check_mapping, check_path
from pipeline.errors import InputError, OpenError, OutputExistsError, PipelineError
from pipeline.redaction import scrub

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    # SELF from x import Location, Url


type Location = Path | Url

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
BUCKETS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "azure": "az",
    "abfs": "abfs",
    "abfss": "abfss",
}
"""Schemes of object stores, and how obstore spells them."""
WEB = ("http", "https")
MEMORY = "memory"
_FINAL = re.compile(r"\b4(?!08|29)\d\d [A-Z]|^no credentials|package|not (implemented|supported)", re.IGNORECASE)
"""Of what a store says: answers that stay the same."""
_SAID = 300
_METADATA_HOSTS = ("://169.254.169.254", "://169.254.170.2", "://metadata.google.internal")
"""Where machines of a cloud get their credentials from."""


@dataclass(frozen=True, slots=True)
class Url:
    """A place in a store that is not on this machine's disks. Picklable, options and all.

    Its text, as of every URL in a message, has neither user nor password nor query; `repr` neither.

    Examples
    --------
    >>> url = locate("https://me:secret@example.org/data/A.zarr?signature=abc")
    >>> print(url)
    https://example.org/data/A.zarr
    >>> url.name, url.suffix, str(url.child("windows")), str(url.parent)
    ('A.zarr', '.zarr', 'https://example.org/data/A.zarr/windows', 'https://example.org/data')
    """

    scheme: str
    host: str
    """Host, bucket, container, or name of a store in memory."""
    path: str
    """Below it, without slashes at its ends; may be empty."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    """What the store's own library takes: region, endpoint, credentials."""
    user: str = field(default="", repr=False)
    """`name:password` of a server that asks for it."""
    query: str = field(default="", repr=False)
    """Of a web server, sent with each request."""

    @property
    def name(self) -> str:
        """Last part of the path; of the host, where there is none."""
        return self.path.rpartition("/")[2] or self.host

    @property
    def suffix(self) -> str:
        """Such as `.zarr`; as of a path."""
        return Path(self.name).suffix

    @property
    def parent(self) -> Url:
        """What it lies in."""
        return replace(self, path=self.path.rpartition("/")[0])

    def child(self, name: str) -> Url:
        """What lies in it under a name, which may have slashes."""
        return replace(self, path=f"{self.path}/{name}".strip("/"))

    def with_name(self, name: str) -> Url:
        """Return its neighbour of another name; InputError where it is all of a store."""
        if not self.path:
            raise InputError(f"what is written lies below a bucket; got {self}; add a name to it")
        return self.parent.child(name)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}/{self.path}".rstrip("/")


def locate(name: str | os.PathLike[str] | Url, options: Mapping[str, Any] | None = None) -> Location:
    """Tell a path from a URL; `file://` is a path.

    Parameters
    ----------
    options
        What the library of the store takes: region, endpoint, credentials.

    Raises
    ------
    InputError
        If no library knows the scheme, the URL cannot be used, or options come with a path.

    Examples
    --------
    >>> locate("A.h5::data"), locate("file:///data/A.zarr")
    (PosixPath('A.h5::data'), PosixPath('/data/A.zarr'))
    >>> locate("s3://bucket/A.zarr").name
    'A.zarr'
    """
    if options is not None:
        check_mapping("storage_options", options)
    if isinstance(name, Url):
        return name if options is None else replace(name, options=dict(options))
    check_path("a path", name)
    found = None if isinstance(name, os.PathLike) else _URL.fullmatch(name)
    scheme = found[1].lower() if found else "file"
    if scheme == "file":
        if options:
            raise InputError(f"storage_options are for URLs; {name} is a path; drop them")
        return Path(name) if found is None else Path(unquote(urlsplit(f"file://{found[2]}").path))
    assert found is not None
    return _parse(scheme, found[2], dict(options or {}))


def _parse(scheme: str, rest: str, options: dict[str, Any]) -> Url:
    _check_scheme(scheme)
    if scheme in WEB:
        # What is never sent names nothing.
        rest = rest.partition("#")[0]
    rest, _, query = rest.partition("?")
    host, _, path = rest.partition("/")
    user, _, host = host.rpartition("@")
    if not re.fullmatch(r"\[[^]]*\](:\d*)?|[^:]*(:\d*)?", host):
        # A password that holds a slash: nothing of it may be quoted.
        raise InputError(f"what follows {scheme}:// is a host or a bucket; got something with a colon; write / as %2F")
    if scheme in BUCKETS and user and ":" not in user:
        # The container of an Azure account.
        user, host = "", f"{user}@{host}"
    url = Url(BUCKETS.get(scheme, scheme), host, path.strip("/"), options, user, query)
    if not host:
        raise InputError(f"a URL names a host or a bucket; {url} does not; write it such as s3://bucket/A.zarr")
    if scheme in BUCKETS and (user or query):
        raise InputError(
            f"a URL of {scheme} has no password and no query; that of {url} has; give credentials in storage_options "
            "or in the environment"
        )
    if scheme not in WEB and not {"", ".", ".."}.isdisjoint(url.path.split("/") if url.path else ()):
        raise InputError(f"the parts of a URL are names; {url} has one that is empty or made of dots; write it plainly")
    return url


def _check_scheme(scheme: str) -> None:
    if scheme in BUCKETS or scheme in (*WEB, MEMORY):
        return
    from fsspec.registry import available_protocols, registry

    known = [*available_protocols(), *registry]
    if scheme not in known:
        near = difflib.get_close_matches(scheme, [*BUCKETS, *WEB, MEMORY, *known], 1)
        hint = f"did you mean {near[0]}://?" if near else "choose s3://, gs://, az://, https:// or a path"
        raise InputError(f"a URL begins with a scheme that is known; got {scheme}://; {hint}")


def say_failure(error: BaseException) -> str:
    """Say in a few words what a store raised, without keys, tokens, passwords or signatures.

    Examples
    --------
    >>> say_failure(OSError("Error performing GET https://h/A?sig=1 in 1ms, after 2 retries - HTTP error: gone"))
    'HTTP error: gone at https://h, after 2 retries'
    """
    kind, text = type(error).__name__, str(error)
    if any(host in text for host in _METADATA_HOSTS):
        # Where the libraries look last.
        return "no credentials were found: set them in the environment, a profile, or storage_options"
    if kind == "PermissionDeniedError":
        return "access is denied (403): no permission, or credentials that are not valid"
    if kind == "UnauthenticatedError":
        return "credentials are missing, or not accepted (401)"
    said, _, details = text.partition("\n\nDebug source")
    if asked := re.search(r"Error performing [A-Z]+ (\w+://[^/?\s]+)\S* in [^,\s]+(, after \d+ retries)?", said):
        what = said[asked.end() :].rpartition(" - ")[2].removeprefix("Server returned non-2xx status code: ")
        cause = re.search(r'(?:message|error): "([^"\n]*)"', details)
        if "kind: Timeout" in details:
            what = "no answer in time"
        elif cause and "kind: Connect" in details:
            what = f"no connection: {cause[1]}"
        said = f"{what} at {asked[1]}{asked[2] or ''}"
    # The document that S3 sends may name keys and tokens: its code says it all.
    said = re.sub(r"^Generic \w+ error: (?:Error performing \w+ request: )?", "", said)
    said = re.sub(r"<.*?<Code>(\w+)</Code>.*</\w+>", r"\1", said, flags=re.DOTALL)
    return " ".join(scrub(said).split())[:_SAID] or kind


class AccessError(OpenError):
    """A store that refuses: other credentials, or a permission, are needed."""


def store_error(rule: str, name: str, error: Exception) -> PipelineError:
    """Make our error of what a store raised; to be raised from `plain(error)`."""
    if isinstance(error, PipelineError):
        # Another one: it must not be its own cause.
        return type(error)(*error.args)
    refused = type(error).__name__ in {"PermissionDeniedError", "UnauthenticatedError"}
    refused = refused or isinstance(error, PermissionError)
    said = say_failure(error)
    made = (AccessError if refused else OpenError)(f"{rule}; {name} cannot: {said}; check the store")
    final = refused or isinstance(error, FileNotFoundError | NotImplementedError | io.UnsupportedOperation)
    final = final or _FINAL.search(said) is not None
    made.passing = is_store_failure(error) and not final
    return made


def is_store_failure(error: BaseException) -> bool:
    """Tell what a store raises, when it cannot be read, from what a codec does."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | TimeoutError) or package in {
        "obstore",
        "aiohttp",
        "botocore",
        "requests",
        "urllib3",
    }


def name_store(store: Any) -> str:
    """Text of a store, for messages and records, on one line and without secrets.

    Examples
    --------
    >>> name_store("object_store://HTTPStore('https://me:secret@example.org/A?signature=abc')")
    "object_store://HTTPStore('https://example.org/A')"
    """
    return " ".join(scrub(str(store)).split()).rstrip("/")


def plain(error: Exception) -> Exception:
    """What to raise an error from, so that a traceback tells no secrets: itself, if it is no store's and has none."""
    cause: BaseException | None = error
    while cause is not None and not is_store_failure(cause) and scrub(str(cause)) == str(cause):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else OpenError(f"{type(error).__name__}: {say_failure(error)}")


def check_apart(location: Location, inputs: Iterable[str | Path | Url]) -> None:
    """Raise OutputExistsError where an output is one of its inputs, lies inside of one, or holds one."""
    own = [_parts(each) for each in (location, location.with_name(location.name + ".partial"))]
    for source in map(locate, inputs):
        parts = _parts(source)
        for mine in own:
            shared = min(len(mine), len(parts))
            if mine[:shared] == parts[:shared]:
                raise OutputExistsError(
                    f"an output lies apart from its input; {location} and {source} do not; name another"
                )


def _parts(location: Location) -> tuple[str, ...]:
    """Names that lead to a place, from the top of what it lies in."""
    if isinstance(location, Path):
        return location.resolve().parts
    # Options may lead to another server of the same bucket: refused all the same.
    return (location.scheme, location.host, *filter(None, location.path.split("/")))
