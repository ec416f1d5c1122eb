"""Sockets, as the kernel's tables list them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

LOOPBACK = {"0100007F"}
"""As the kernel writes it."""


def listening(*roots):
    """(host, port) of every TCP socket on which these processes, or else this one, or their children listen."""
    pids = list(roots) or [os.getpid()]
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            # A thread may end while it is looked at.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pids += map(int, (task / "children").read_text().split())
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not Path(table).exists():
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            host, port = words[1].split(":")
            if words[3] == "0A" and words[9] in inodes:
                found.add((host, int(port, 16)))
    return found
