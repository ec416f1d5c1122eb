"""Who can reach what is listened on or spoken to: holders of a certificate alone, unless the user says so.

Loopback is no boundary between the users of one machine: whoever can connect to a scheduler or worker runs code there.
"""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import dask
from distributed.comm.addressing import get_address_host, parse_address
from distributed.security import Security
from distributed.utils import clean_dashboard_address, get_ip_interface

from pipeline.arguments import show
from pipeline.errors import InputError, NotFoundError

_ENCRYPTED = ("tls", "wss", "gateway", "inproc")
"""Schemes that need no more; `inproc` leaves no process."""
_CERTIFICATES = "distributed.comm.tls"
_DASHBOARD_CERTIFICATE = "distributed.scheduler.dashboard.tls.cert"
_ROLES = ("scheduler", "worker", "client")
_ALLOW = "allow it by --insecure (insecure=True; insecure: true in a cluster file)"

_OWN_PATH = "export PYTHONSAFEPATH=1"
_OWN_SCRATCH = (
    'own="${TMPDIR:-/tmp}/random-windows-$(id -u)"; mkdir -m 700 "$own" 2>/dev/null || true; '
    'test -O "$own" -a ! -L "$own" || own=$(mktemp -d); export DASK_TEMPORARY_DIRECTORY="$own"'
)


def guard_lines() -> list[str]:
    """Lines of a shell script that keep files of others off the path of the Python that follows.

    `python -m` puts the working directory first, and Dask its folder for temporary files, whoever made that.
    """
    return [_OWN_PATH] if dask.config.get("temporary-directory", None) else [_OWN_PATH, _OWN_SCRATCH]


class Encryption(Enum):
    """How the connections of a cluster are kept from others."""

    IN_PROCESS = "none is needed, nothing leaves this process"
    LOOPBACK = "none, every user of this machine can connect"
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


def check_interface(interface: str | None) -> None:
    """Refuse an interface that is none of this machine's; InputError."""
    if interface is None:
        return
    try:
        get_ip_interface(interface)
    except ValueError as error:
        raise InputError(f"an interface is one of this machine's; got {error}; correct it") from None


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
    if _is_local_plain(address):
        return Encryption.LOOPBACK
    return Encryption.NONE if insecure else Encryption.SERVICE


def _is_local_plain(address: str) -> bool:
    with suppress(ValueError, OSError):
        return is_plain(address, loopback=True)
    return False


def warn_of_plain(address: str, *, insecure: bool) -> str | None:
    """Tell what it means to connect to a scheduler on this machine that speaks plain TCP; None where it does not."""
    if insecure or not _is_local_plain(address):
        return None
    return (
        f"{address} speaks plain TCP: every user of this machine can run code in its workers, as their owner; start it "
        "with certificates and name it tls://, or silence this line by --insecure (insecure=True)"
    )


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
    """Refuse a protocol without encryption; InputError."""
    if protocol is not None and not insecure and protocol.partition("://")[0] not in _ENCRYPTED:
        raise InputError(f"protocol {protocol!r} is not encrypted; drop it, or {_ALLOW}")


def refuse_plain(what: str) -> InputError:
    """Word the error for a service whose connections cannot be encrypted from here."""
    return InputError(f"machines speak TLS with each other; got {what}; {_ALLOW}")


def choose_encryption(given: Any = None, *, insecure: bool) -> Encryption:
    """Tell how a cluster is kept from others: certificates of the caller or the user first, then temporary ones.

    Parameters
    ----------
    given
        The keyword `security` of the cluster's class.

    Raises
    ------
    InputError
        If `given` is neither certificates nor true or false.
    """
    if isinstance(given, Security):
        return Encryption.CONFIGURED
    if given not in (None, True, False):
        raise InputError(f"security is true or a distributed.Security; got {type(given).__name__}; leave it out")
    if given:
        return Encryption.TEMPORARY
    security = Security()
    if security.tls_ca_file and all(getattr(security, f"tls_{role}_cert") for role in _ROLES):
        return Encryption.CONFIGURED
    return Encryption.NONE if insecure else Encryption.TEMPORARY


def make_security(encryption: Encryption, given: Any = None) -> Security | None:
    """Certificates of a cluster: those given or the user's, or temporary ones, as text; None where none are used."""
    if isinstance(given, Security):
        return given
    match encryption:
        case Encryption.CONFIGURED:
            security = Security(require_encryption=True)
            for role in _ROLES:
                # A key may stand in the certificate's file; commands of Dask ask for its name all the same.
                key = getattr(security, f"tls_{role}_key") or getattr(security, f"tls_{role}_cert")
                setattr(security, f"tls_{role}_key", key)
            return security
        case Encryption.TEMPORARY:
            return _make_temporary()
    return None


def _make_temporary() -> Security:
    """Make one certificate for all roles, which is its own authority, as Dask's `Security.temporary` does.

    Its key lies on an elliptic curve: it is made in 0.2 ms, where RSA takes Dask 0.1 to 0.9 s.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "random-windows")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # The clocks of hosts may differ.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=365))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    roles = {f"tls_{role}_{part}": value for role in _ROLES for part, value in (("cert", certificate), ("key", text))}
    return Security(require_encryption=True, tls_ca_file=certificate, **roles)


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
