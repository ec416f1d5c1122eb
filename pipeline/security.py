"""Who can reach what is listened on or spoken to: this machine alone, or others over TLS, unless the user says so."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask
from distributed.comm.addressing import get_address_host, parse_address
from distributed.security import Security
from distributed.utils import clean_dashboard_address, get_ip_interface

from pipeline.arguments import show
from pipeline.errors import InputError, NotFoundError, OpenError

_ENCRYPTED = ("tls", "wss", "gateway", "inproc")
"""Schemes that need no more; `inproc` leaves no process."""
_CERTIFICATES = "distributed.comm.tls"
_DASHBOARD_CERTIFICATE = "distributed.scheduler.dashboard.tls.cert"
_ROLES = ("scheduler", "worker", "client")
_ALLOW = "allow it by --insecure (insecure=True; insecure: true in a cluster file)"


class Encryption(Enum):
    """How the connections of a cluster are kept from others."""

    LOOPBACK = "none is needed, nothing leaves this machine"
    CONFIGURED = "TLS, with the certificates that Dask's configuration names"
    TEMPORARY = "TLS, with certificates made for this cluster"
    SERVICE = "as the service has it"
    NONE = "none, by your word"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback; one that is not known here is not."""
    if not host:
        return False
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def _is_known(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return True


def is_plain(address: str, *, loopback: bool) -> bool:
    """Whether what is sent to an address is not encrypted, and goes to this machine's loopback, or to elsewhere."""
    return parse_address(address)[0] not in _ENCRYPTED and is_loopback(get_address_host(address)) is loopback


def listens_on_loopback(options: dict[str, Any]) -> bool:
    """Whether `host` or `interface` of a server is loopback; without either it listens on all interfaces.

    Raises
    ------
    InputError
        If the interface is none of this machine's.
    """
    host, interface = options.get("host"), options.get("interface")
    if host is None and interface is not None:
        try:
            host = get_ip_interface(interface)
        except ValueError as error:
            raise InputError(f"an interface is one of this machine's; got {error}; correct it") from None
    return host is not None and is_loopback(str(host).rpartition("://")[2].partition(":")[0])


def check_address(address: str, *, insecure: bool) -> None:
    """Refuse a scheduler that is spoken to over the network in plain, or over TLS without a certificate.

    Raises
    ------
    InputError
        If it is so.
    NotFoundError
        If a certificate that Dask's configuration names is absent.
    """
    try:
        scheme, _ = parse_address(address)
        host = get_address_host(address)
    except (ValueError, OSError):
        # Not an address, or of nobody: Dask says so when it connects.
        return
    if scheme not in _ENCRYPTED and not insecure and not _is_known(host):
        # It may be known a moment later, when Dask asks.
        raise InputError(
            f"a scheduler's host has an address, which tells whether others can listen; got {address}, whose name is "
            f"not known here; correct it, or {_ALLOW}"
        )
    if scheme in ("tls", "wss"):
        _check_certificates(address)
    elif scheme not in _ENCRYPTED and not insecure and not is_loopback(host):
        raise InputError(
            f"a scheduler that is not on this machine's loopback is spoken to over TLS; got {address}; start it with "
            f"certificates and name it tls://, reach it through ssh -L, or {_ALLOW}"
        )


def address_encryption(address: str, *, insecure: bool) -> Encryption:
    """Tell how the connection to a scheduler that runs already is kept from others; errors as of `check_address`."""
    check_address(address, insecure=insecure)
    if address.startswith(("tls://", "wss://")):
        return Encryption.CONFIGURED
    with suppress(ValueError, OSError):
        if is_plain(address, loopback=True):
            return Encryption.LOOPBACK
    return Encryption.NONE if insecure else Encryption.SERVICE


def _check_certificates(address: str) -> None:
    if dask.config.get("distributed.client.security-loader", None):
        return
    security = Security()
    names = {"ca-file": security.tls_ca_file, "client.cert": security.tls_client_cert}
    if missing := [f"{_CERTIFICATES}.{name}" for name, value in names.items() if not value]:
        raise InputError(
            f"a scheduler over TLS asks for a certificate; got {address}, and no {' and '.join(missing)} in Dask's "
            f"configuration; set them, in a cluster file or in Dask's own"
        )
    for name, value in names.items() | {("client.key", security.tls_client_key)}:
        if value and "\n" not in value and not Path(value).exists():
            raise NotFoundError(
                f"a certificate that Dask's configuration names must exist; got {value} as {_CERTIFICATES}.{name}; "
                "correct it"
            )


def check_dashboard(address: Any, *, insecure: bool) -> None:
    """Refuse a dashboard that others can reach without TLS.

    Raises
    ------
    InputError
        If it is so, or the address is none.
    """
    if not isinstance(address, str | int | list | tuple | None):
        raise InputError(f"a dashboard's address is HOST:PORT; got {show(address)}; write '127.0.0.1:8787'")
    if insecure or address in (None, False) or dask.config.get(_DASHBOARD_CERTIFICATE, None):
        return
    try:
        remote = not all(is_loopback(each["address"]) for each in clean_dashboard_address(address))
    except Exception:  # noqa: BLE001 (Dask takes numbers, texts and lists of them, and fails in many ways)
        raise InputError(f"a dashboard's address is HOST:PORT; got {show(address)}; write '127.0.0.1:8787'") from None
    if remote:
        raise InputError(
            f"a dashboard is on loopback, where ssh -L reaches it, or has TLS ({_DASHBOARD_CERTIFICATE}); got "
            f"{show(address)}; write '127.0.0.1:8787', or {_ALLOW}"
        )


def without_dashboard(options: dict[str, Any], address: str) -> dict[str, Any]:
    """Options of a server, on loopback where its dashboard is off: Dask still serves HTTP, else on all interfaces."""
    if options["dashboard_address"] in (None, False):
        return options | {"dashboard_address": address, "dashboard": False}
    return options


def check_protocol(protocol: str | None, *, insecure: bool) -> None:
    """Refuse a protocol without encryption for a cluster of several machines; InputError."""
    if protocol is not None and not insecure and protocol.partition("://")[0] not in _ENCRYPTED:
        raise InputError(f"machines speak TLS with each other; got protocol {protocol!r}; drop it, or {_ALLOW}")


def refuse_plain(what: str) -> InputError:
    """Word the error for a service whose connections cannot be encrypted from here."""
    return InputError(f"machines speak TLS with each other; got {what}; {_ALLOW}")


def given_encryption(security: Any) -> Encryption | None:
    """Tell what the keyword `security` of a cluster asks for: certificates of the caller, or temporary ones."""
    if isinstance(security, Security):
        return Encryption.CONFIGURED
    return Encryption.TEMPORARY if security is True else None


def choose_encryption(*, insecure: bool) -> Encryption:
    """Tell how a cluster of several machines is kept from others: certificates of the user first.

    Raises
    ------
    OpenError
        If temporary certificates are needed, and the package that makes them is absent.
    """
    security = Security()
    if security.tls_ca_file and all(getattr(security, f"tls_{role}_cert") for role in _ROLES):
        return Encryption.CONFIGURED
    if insecure:
        return Encryption.NONE
    if find_spec("cryptography") is None:
        raise OpenError(
            "certificates for a cluster of several machines are made by cryptography; it is not installed; "
            f"pip install cryptography, name your own in {_CERTIFICATES}, or {_ALLOW}"
        )
    return Encryption.TEMPORARY


def make_security(encryption: Encryption) -> Security | None:
    """Certificates of a cluster: the user's, or temporary ones, as text; None where none are used."""
    match encryption:
        case Encryption.CONFIGURED:
            security = Security(require_encryption=True)
            for role in _ROLES:
                # A key may stand in the certificate's file; commands of Dask ask for its name all the same.
                key = getattr(security, f"tls_{role}_key") or getattr(security, f"tls_{role}_cert")
                setattr(security, f"tls_{role}_key", key)
            return security
        case Encryption.TEMPORARY:
            return Security.temporary()
    return None


def files_in(folder: str, security: Security) -> tuple[dict[str, str], dict[str, str]]:
    """Files below `folder` for certificates and keys that are text.

    Returns
    -------
    tuple
        Contents by file name, and paths by Dask's setting; of files that are there already, the paths alone.
    """
    values = {"ca-file": security.tls_ca_file}
    for role in _ROLES:
        values |= {f"{role}.{part}": getattr(security, f"tls_{role}_{part}") for part in ("cert", "key")}
    contents: dict[str, str] = {}
    paths = {}
    for name, value in values.items():
        path = value
        if "\n" in value:
            # A temporary certificate serves all roles, and is its own authority.
            file = next((known for known, content in contents.items() if content == value), f"{name}.pem")
            contents[file] = value
            path = f"{folder}/{file}"
        paths[f"{_CERTIFICATES}.{name}"] = path
    return contents, paths


def point_to(security: Security, paths: dict[str, str]) -> None:
    """Have `security` name files in the place of texts; `paths` by Dask's setting."""
    for setting, path in paths.items():
        setattr(security, "tls_" + setting.removeprefix(f"{_CERTIFICATES}.").replace(".", "_").replace("-", "_"), path)
