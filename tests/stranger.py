"""Another user of this machine, without a certificate, who tries whatever listens: `python stranger.py PORT...`.

Prints one JSON object, by port: the schemes by which a server of Dask answered, and "http" where a page was served.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

UID = 12345
"""Nobody's; taken on where root runs this."""
_SECONDS = 3
_SCHEMES = ("tcp", "tls")


def intrude(ports, *, files=()):
    """Let the stranger try loopback ports: what answered, by port; and which of the files it could read, at "files"."""
    command = [sys.executable, __file__, json.dumps([str(file) for file in files]), *map(str, sorted(ports))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    return {int(port): set(schemes) for port, schemes in found["ports"].items()}, found["files"]


async def _ask_dask(scheme, port, security):
    """Have a scheduler, worker or nanny say who it is, which whoever may do may run code there, too."""
    from distributed.comm import connect

    with suppress(Exception):
        async with asyncio.timeout(_SECONDS):
            comm = await connect(
                f"{scheme}://127.0.0.1:{port}", timeout=_SECONDS, **security.get_connection_args("client")
            )
            await comm.write({"op": "identity", "reply": True})
            answer = await comm.read()
            comm.abort()
            return scheme if answer["type"] else None
    return None


async def _ask_http(port):
    with suppress(OSError, TimeoutError):
        # The first request has Dask make its pages.
        async with asyncio.timeout(10 * _SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            line = await reader.readline()
            writer.close()
            return "http" if line.startswith(b"HTTP/") else None
    return None


async def _try(ports, plain, stranger):
    tries = [(port, _ask_dask(each, port, stranger if each == "tls" else plain)) for port in ports for each in _SCHEMES]
    tries += [(port, _ask_http(port)) for port in ports]
    answers = await asyncio.gather(*(work for _, work in tries))
    found = {port: [] for port in ports}
    for (port, _), answer in zip(tries, answers, strict=True):
        found[port] += [answer] if answer else []
    return found


def _is_readable(file):
    try:
        with Path(file).open("rb") as opened:
            opened.read(1)
    except OSError:
        return False
    return True


def main(files, *ports):
    """Give up root, if that is who we are, and try everything."""
    import distributed

    stranger = distributed.Security.temporary()
    plain = distributed.Security(require_encryption=False)
    # Reads certificates, and imports what is imported late.
    stranger.get_connection_args("client")
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(UID)
        os.setuid(UID)
        os.chdir("/")
    found = asyncio.run(_try(list(map(int, ports)), plain, stranger))
    print(json.dumps({"ports": found, "files": [file for file in json.loads(files) if _is_readable(file)]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
