"""Rounds: each contender once a round, in a process of its own; medians, ranges and ratios of their seconds."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.bench.lineup import LINEUP, Contender
from pipeline.errors import BudgetError
from pipeline.formatting import format_size
from pipeline.memory import budget

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.bench.job import Job
    from pipeline.bench.scenarios import Scenario

_COPIES = 3
"""Results that a contender holds at most: its list of windows, the result, and what the check takes."""
_GRACE_SECONDS = 1800
"""For all that is not timed: imports, reading the files once, the check."""
_PATHS = ("cluster", "scheduler_file")
"""Keywords of `connect` that are paths."""


@dataclass(slots=True)
class Score:
    """What the rounds measured of one contender."""

    contender: Contender
    state: Literal["timed", "wrong", "over", "failed", "skipped"] = "timed"
    reason: str = ""
    """Why there are no seconds; empty if there are."""
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What the worker reported, by round, without the first round."""

    @property
    def seconds(self) -> list[float]:
        """Seconds of each round."""
        return [run["seconds"] for run in self.runs.values()]

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def peak_memory(self) -> int:
        """Most bytes of anonymous memory, over all rounds."""
        peaks: list[int] = [run["peak_memory"] for run in self.runs.values()]
        return max(peaks)


@dataclass(frozen=True, slots=True)
class Table:
    """All scores of one scenario."""

    scenario: Scenario
    cold: bool
    scores: list[Score]

    @property
    def title(self) -> str:
        """Name of the scenario, and state of the page cache."""
        return f"{self.scenario.name}, {'cold' if self.cold else 'warm'}"

    def ranked(self) -> list[Score]:
        """Scores that were timed, the fastest first, without limits."""
        timed = [score for score in self.scores if score.state == "timed" and score.contender.kind != "limit"]
        return sorted(timed, key=lambda score: score.median)

    def limits(self) -> list[Score]:
        """Limits that were timed."""
        return [score for score in self.scores if score.state == "timed" and score.contender.kind == "limit"]

    def untimed(self) -> list[Score]:
        """Scores without seconds: wrong, over the limit, failed or skipped."""
        return [score for score in self.scores if score.state != "timed"]

    def ratio(self, score: Score) -> float | None:
        """Median over rounds of its seconds divided by ours in the same round; None if ours was not timed."""
        ours = [ours.runs for ours in self.scores if ours.contender.kind == "ours"][-1]
        ratios = [run["seconds"] / ours[number]["seconds"] for number, run in score.runs.items() if number in ours]
        return statistics.median(ratios) if ratios else None

    def cached(self, score: Score) -> float:
        """Part of the files in the page cache when the clock started: most of the rounds if cold, else least."""
        shares: list[float] = [run["cached"] for run in score.runs.values()]
        return max(shares) if self.cold else min(shares)

    def numbers(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        scenario = self.scenario
        return {
            "scenario": scenario.name,
            "cold": self.cold,
            "shape": [scenario.rows, scenario.columns],
            "dtype": scenario.dtype,
            "windows": scenario.count,
            "length": scenario.length,
            "nbytes_wanted": scenario.timed_nbytes,
            "contenders": [self._row(score) for score in self.scores],
        }

    def _row(self, score: Score) -> dict[str, Any]:
        contender = score.contender
        row = {name: getattr(contender, name) for name in ("key", "label", "kind")}
        row |= {"state": score.state, "reason": score.reason, "seconds": score.seconds}
        if score.state == "timed":
            row |= {
                "median": score.median,
                "least": min(score.seconds),
                "most": max(score.seconds),
                "ratio": self.ratio(score),
                "bytes_per_second": self.scenario.timed_nbytes / score.median,
                "peak_memory": score.peak_memory,
                "cached": self.cached(score),
            }
        return row


def run_rounds(job: Job, *, rounds: int, cold: bool, limit: float, say: Callable[[str], None]) -> Table:
    """Let every contender read once a round, one after the other, and discard the first round.

    Parameters
    ----------
    job
        What is read, where its files are, and the user's cluster.
    rounds
        Rounds that count.
    cold
        Whether files are dropped from the page cache before each read.
    limit
        Seconds after which a contender is stopped, and left out of the following rounds.
    say
        Gets a line for each round.

    Raises
    ------
    BudgetError
        If three results do not fit in memory.
    """
    scenario, allowed = job.scenario, budget()
    if _COPIES * scenario.result_nbytes > allowed.nbytes:
        raise BudgetError(
            f"not enough memory: {scenario.name} needs {_COPIES} results of {format_size(scenario.result_nbytes)}, "
            f"{allowed}; give fewer --rows"
        )
    scores = []
    for contender in LINEUP:
        if scenario.task in contender.tasks:
            reason = contender.reason_to_skip(scenario, has_copy=job.zarr.exists(), has_cluster=bool(job.where))
            scores.append(Score(contender, "skipped", reason) if reason else Score(contender))
    table = Table(scenario, cold, scores)
    order = {
        "scenario": asdict(scenario),
        "folder": str(job.home),
        "cold": cold,
        "limit": limit,
        "where": {key: str(Path(value).absolute()) if key in _PATHS else value for key, value in job.where.items()},
    }
    for number in range(rounds + 1):
        say(f"{table.title}: round {number} of {rounds}" + ("" if number else ", to warm up"))
        for score in scores:
            if score.state == "timed":
                run = _run_worker(order | {"contender": score.contender.key})
                score.state = run["state"]
                reasons = {"wrong": "gave wrong values", "over": f"over {limit:g} s", "timed": ""}
                score.reason = run.get("reason", reasons.get(score.state, ""))
                if number and score.state == "timed":
                    score.runs[number] = run
    return table


def _run_worker(order: dict[str, Any]) -> dict[str, Any]:
    """Run one contender once; a failure is a result, not an error."""
    # Without -P a file of the working directory, such as zarr.py, would be imported in place of a package.
    command = [sys.executable, "-P", "-m", "pipeline.bench.worker"]
    timeout = _GRACE_SECONDS + order["limit"]
    try:
        done = subprocess.run(  # noqa: S603
            command, input=json.dumps(order), capture_output=True, text=True, check=False, timeout=timeout
        )
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"state": "failed", "reason": f"hung for {timeout:g} s"}
    except (IndexError, ValueError):
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"state": "failed", "reason": " ".join(last)[:200] or f"ended with exit code {done.returncode}"}
    return result
