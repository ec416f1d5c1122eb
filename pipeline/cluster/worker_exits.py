"""How the processes of workers end, as their nannies see it, who tell the clients of the cluster."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import distributed

EXITS = "worker-exits"
"""Topic of the scheduler's events."""


def watch_exits(client: distributed.Client) -> None:
    """Let each nanny of a cluster of ours, later ones, too, say how a process of its worker has ended.

    It is no use to threads, which have no nanny, and nothing that a run needs.
    """
    with suppress(Exception):
        client.register_plugin(make_exit_watch())


def make_exit_watch() -> Any:
    """Make a plugin of nannies that is sent whole: this package need not be there."""
    return _make_watch(EXITS)


def _make_watch(topic: str) -> Any:

    class ExitWatch(distributed.NannyPlugin):  # type: ignore[misc]
        name = topic

        def setup(self, nanny: Any) -> None:
            import platform
            from pathlib import Path

            handle = nanny._on_worker_exit_sync  # noqa: SLF001 (Dask only logs it)
            seen = []

            def count_kills() -> int:
                """Processes that the kernel of this host has ended for want of memory, since it began."""
                try:
                    lines = Path("/proc/vmstat").read_text().splitlines()
                except OSError:
                    lines = []
                return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

            def say_exit(exitcode: int) -> None:
                seen.append(count_kills())
                worker, status = nanny.worker_address, nanny.status.name
                if exitcode and worker and status == "running":
                    event = {
                        "worker": worker,
                        "host": platform.node(),
                        "exitcode": exitcode,
                        "short_of_memory": seen[-1] > seen[-2],
                    }
                    try:
                        nanny.log_event(topic, event)
                    finally:
                        handle(exitcode)
                else:
                    handle(exitcode)

            seen.append(count_kills())
            nanny._on_worker_exit_sync = say_exit  # noqa: SLF001
            if nanny.process is not None:
                # One that runs already.
                nanny.process.on_exit = say_exit

    return ExitWatch()
