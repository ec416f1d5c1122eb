"""Rounds: each contender once a round, in a process of its own; medians, ranges, ratios."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.bench.lineup import LINEUP, Contender
from pipeline.errors import BudgetError
from pipeline.formatting import format_size
from pipeline.memory import budget

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.bench.scenarios import Scenario

State = Literal["timed", "wrong", "over", "failed", "skipped"]

_COPIES = 3
"""Results that a contender holds at most: its list of windows, the result, and what a check takes."""
_GRACE_SECONDS = 1800
"""For all that is not timed: imports, reading the files once, the check."""
_PATHS = ("cluster", "scheduler_file")
"""Keywords of `connect` that a process in another folder would not find."""


@dataclass(slots=True)
class Score:
    """What the rounds found of one contender."""

    contender: Contender
    state: State = "timed"
    reason: str = ""
    """Why there are no seconds; empty where there are."""
    seconds: dict[int, float] = field(default_factory=dict)
    """By round; the first round is not among them."""
    peak_memory: int = 0
    """Most bytes of anonymous memory, over all rounds."""
    cached: float | None = None
    """Part of the files in memory when the clock started: the most of all rounds where cold, else the least."""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds.values())


@dataclass(frozen=True, slots=True)
class Table:
    """All scores of one scenario."""

    scenario: Scenario
    cold: bool
    scores: list[Score]

    def ranked(self) -> list[Score]:
        """Those that were timed, the fastest first, limits apart."""
        timed = [score for score in self.scores if score.state == "timed" and score.contender.kind != "limit"]
        return sorted(timed, key=lambda score: score.median)

    def limits(self) -> list[Score]:
        """Limits that were timed."""
        return [score for score in self.scores if score.state == "timed" and score.contender.kind == "limit"]

    def untimed(self) -> list[Score]:
        """Those without seconds: wrong, over the limit, failed or skipped."""
        return [score for score in self.scores if score.state != "timed"]

    def ratio(self, score: Score) -> float | None:
        """Median over rounds of its seconds divided by ours in the same round; None where ours was not timed."""
        ours = [each for each in self.scores if each.contender.kind == "ours"][-1]
        pairs = [value / ours.seconds[number] for number, value in score.seconds.items() if number in ours.seconds]
        return statistics.median(pairs) if pairs else None

    def numbers(self) -> dict[str, Any]:
        """What a program wants to know."""
        scenario = self.scenario
        return {
            "scenario": scenario.name,
            "cold": self.cold,
            "shape": [scenario.rows, scenario.columns],
            "dtype": scenario.dtype.name,
            "windows": scenario.count,
            "length": scenario.length,
            "nbytes_wanted": scenario.made_nbytes,
            "contenders": [self._row(score) for score in self.scores],
        }

    def _row(self, score: Score) -> dict[str, Any]:
        seconds = list(score.seconds.values())
        row: dict[str, Any] = {
            "key": score.contender.key,
            "label": score.contender.label,
            "kind": score.contender.kind,
            "state": score.state,
            "reason": score.reason,
            "seconds": seconds,
        }
        if seconds and score.state == "timed":
            row |= {
                "median": score.median,
                "least": min(seconds),
                "most": max(seconds),
                "ratio": self.ratio(score),
                "bytes_per_second": self.scenario.made_nbytes / score.median,
                "peak_memory": score.peak_memory,
                "cached": score.cached,
            }
        return row


def run_rounds(
    scenario: Scenario,
    folder: Path,
    *,
    rounds: int,
    cold: bool,
    limit: float,
    where: dict[str, Any],
    say: Callable[[str], None],
) -> Table:
    """Let every contender read once a round, one after the other, and throw the first round away.

    Parameters
    ----------
    scenario, folder
        What is read, and where its files are.
    rounds
        Rounds that count.
    limit
        Seconds after which a contender is stopped, and left out of the rounds that follow.
    where
        Keywords of `connect` for the contender that runs on a cluster.
    say
        Gets a line for each round.

    Raises
    ------
    BudgetError
        If three results do not fit the memory.
    """
    allowed = budget()
    if _COPIES * scenario.result_nbytes > allowed.nbytes:
        raise BudgetError(
            f"three results fit in memory; one of {scenario.name} takes {format_size(scenario.result_nbytes)}, "
            f"{allowed}; give fewer --rows"
        )
    scores = []
    copied = scenario.job(folder).zarr.exists()
    named = bool(where) or scenario.task != "clusters"
    for contender in (each for each in LINEUP if scenario.task in each.tasks):
        reason = contender.why_not(compressed=scenario.compressed, copied=copied, named=named)
        scores.append(Score(contender, "skipped", reason) if reason else Score(contender))
    order = {
        "scenario": asdict(scenario) | {"dtype": scenario.dtype.str},
        "folder": str(folder),
        "cold": cold,
        "limit": limit,
        "where": {key: str(Path(value).absolute()) if key in _PATHS else value for key, value in where.items()},
    }
    for number in range(rounds + 1):
        say(
            f"{scenario.name}, {'cold' if cold else 'warm'}: round {number} of {rounds}" + ", to warm up" * (not number)
        )
        for score in scores:
            if score.state == "timed":
                _record(score, _run_worker(order | {"contender": score.contender.key}), number, limit, cold=cold)
    return Table(scenario, cold, scores)


def _record(score: Score, result: dict[str, Any], number: int, limit: float, *, cold: bool) -> None:
    score.state = result["state"]
    if score.state == "timed":
        if number:
            score.seconds[number] = result["seconds"]
            score.peak_memory = max(score.peak_memory, result["peak_memory"])
            known = [result["cached"], *([] if score.cached is None else [score.cached])]
            score.cached = max(known) if cold else min(known)
        return
    words = {"wrong": "gave wrong values", "over": f"over {limit:g} s", "failed": result.get("reason", "")}
    score.reason = words[score.state]


def _run_worker(order: dict[str, Any]) -> dict[str, Any]:
    """Run one contender once; what goes wrong with it is its score, no error."""
    # Without -P a file of the working directory, such as zarr.py, would take a package's place.
    command = [sys.executable, "-P", "-m", "pipeline.bench.worker"]
    text = json.dumps(order)
    timeout = _GRACE_SECONDS + order["limit"]
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=timeout)  # noqa: S603
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"state": "failed", "reason": f"hung for {timeout:g} s"}
    except (IndexError, ValueError):
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"state": "failed", "reason": " ".join(last)[:200] or f"ended with exit code {done.returncode}"}
    return result


def machine_facts() -> dict[str, Any]:
    """Name the machine and the versions, for the report."""
    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = found[1] if found else model
    except OSError:
        pass
    versions = {}
    for name in ("numpy", "h5py", "zarr", "dask", "tensorstore", "zarrs", "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "cores": os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def machine_words(machine: dict[str, Any]) -> str:
    """One line of it for a person."""
    return f"{machine['cpu']}, {machine['cores']} cores, {format_size(machine['memory'])} RAM, {machine['system']}"


def table_lines(table: Table) -> list[str]:
    """Write a table for a terminal."""
    scenario = table.scenario
    lines = [
        f"{scenario.name}, {'cold' if table.cold else 'warm'}: {scenario.words()}",
        f"  {'':<30}{'median s':>9}  {'range':^17}{'MB/s':>8}{'times ours':>12}{'memory':>11}",
    ]
    for score in [*table.ranked(), *table.limits()]:
        seconds, ratio = score.seconds.values(), table.ratio(score)
        name = f"limit, {score.contender.label}" if score.contender.kind == "limit" else score.contender.label
        lines.append(
            f"{'>' if score.contender.kind == 'ours' else ' '} {name:<30}{score.median:>9.3f}  "
            f"{min(seconds):>7.3f} - {max(seconds):<7.3f}{scenario.made_nbytes / score.median / 1e6:>8,.0f}"
            f"{'' if ratio is None else format(ratio, '.2f'):>12}{format_size(score.peak_memory):>11}"
        )
    skipped: dict[str, list[str]] = {}
    for score in table.untimed():
        if score.state == "skipped":
            skipped.setdefault(score.reason, []).append(score.contender.label)
        else:
            lines.append(f"  {score.contender.label:<30}{score.state}: {score.reason}")
    lines += [f"  skipped, {reason}: {'; '.join(labels)}" for reason, labels in skipped.items()]
    stayed = [score for score in table.scores if score.state == "timed" and table.cold and (score.cached or 0) > 0.05]
    if stayed:
        worst = max(stayed, key=lambda score: score.cached or 0)
        lines.append(f"  not quite cold: {worst.cached:.0%} of the files stayed in memory ({worst.contender.label})")
    return lines
