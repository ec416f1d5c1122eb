"""What `pipeline bench` prints."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.formatting import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.bench.rounds import Table

_NOTES = (
    "Timed: open, plan, allocate, read. Not timed: imports, start of the cluster, a first window. Each in its own",
    "process; rounds interleaved, the first thrown away; every value checked. Times ours: against this project on its",
    "cluster, round by round, the median. The memory is that of the whole process.",
)


def machine_facts() -> dict[str, Any]:
    """Return the machine, and the versions of the packages that were compared."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = found[1] if found else model
    versions = {}
    for name in ("numpy", "h5py", "zarr", "dask", "tensorstore", "zarrs", "torch"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "cpu": model,
        "cores": os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def describe_machine(machine: dict[str, Any]) -> str:
    """Describe the machine in one line."""
    return f"{machine['cpu']}, {machine['cores']} cores, {format_size(machine['memory'])} RAM, {machine['system']}"


def report_text(machine: dict[str, Any], tables: Sequence[Table]) -> str:
    """Write machine, tables and notes for a terminal."""
    lines = [describe_machine(machine)]
    for table in tables:
        lines += ["", *table_lines(table)]
    return "\n".join([*lines, "", *_NOTES])


def table_lines(table: Table) -> list[str]:
    """Write a table for a terminal."""
    lines = [
        f"{table.title}: {table.scenario.describe()}",
        f"  {'':<30}{'median s':>9}  {'range':^17}{'MB/s':>8}{'times ours':>12}{'memory':>11}",
    ]
    for score in [*table.ranked(), *table.limits()]:
        ratio, contender = table.ratio(score), score.contender
        name = f"limit, {contender.label}" if contender.kind == "limit" else contender.label
        lines.append(
            f"{'>' if contender.kind == 'ours' else ' '} {name:<30}{score.median:>9.3f}  "
            f"{min(score.seconds):>7.3f} - {max(score.seconds):<7.3f}"
            f"{table.scenario.timed_nbytes / score.median / 1e6:>8,.0f}"
            f"{'' if ratio is None else format(ratio, '.2f'):>12}{format_size(score.peak_memory):>11}"
        )
    skipped: dict[str, list[str]] = {}
    for score in table.untimed():
        if score.state == "skipped":
            skipped.setdefault(score.reason, []).append(score.contender.label)
        else:
            lines.append(f"  {score.contender.label:<30}{score.state}: {score.reason}")
    lines += [f"  skipped, {reason}: {'; '.join(labels)}" for reason, labels in skipped.items()]
    timed = [score for score in table.scores if score.state == "timed"]
    if table.cold and timed:
        worst = max(timed, key=table.cached)
        if (cached := table.cached(worst)) > 0.05:
            lines.append(f"  not quite cold: {cached:.0%} of the files stayed in memory ({worst.contender.label})")
    return lines
