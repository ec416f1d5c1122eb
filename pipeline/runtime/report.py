"""What a run did: counted while it goes, said when it ends."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from pipeline.errors import InputError
from pipeline.formatting import count_of, format_size, html_table, text_table
from pipeline.memory import PeakMemory
from pipeline.redaction import plain_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

    from pipeline.runtime.lost_workers import Loss
    from pipeline.runtime.tasks import Receipt

_LEAST_SECONDS = 0.2
"""A shorter run says nothing of what limited it."""
_IDLE = 0.5
_WASTE = 2.0
_RESOLUTION = 250
"""Moments that a curve keeps of the time so far; what comes between two is told with the first: bounded memory, and
results that come in one go are not a peak."""
_MOST_SHOWN = 6
"""Runs of a report that have a line of their own."""
STAGES = ("read", "decode", "apply", "write")
"""What a task does, in this order; `Watch` counts the seconds of each."""


class Listener(Protocol):
    """What hears of a watch's events once they are counted, such as to show them."""

    def begin(self) -> None:
        """It is known what there is to do."""

    def advance(self, units: int, *, kept: bool) -> None:
        """A task is finished; `kept`: by an earlier run."""


@dataclass(slots=True)
class Watch:
    """Counts finished tasks; a listener may show them. Called from the client's thread only."""

    tasks: int = 0
    units: int = 0
    """What there is to do in all: windows of a run, rows of a matrix to be created."""
    nbytes: int = 0
    """Bytes of all units, as they were asked for."""
    done_tasks: int = 0
    kept_tasks: int = 0
    """Finished by an earlier run, which this one resumed."""
    done_units: int = 0
    kept_units: int = 0
    """Of `done_units`, those of an earlier run."""
    nbytes_read: int = 0
    read_seconds: float = 0.0
    """Summed over tasks, as the other seconds: more than the wall clock's where tasks run side by side."""
    decode_seconds: float = 0.0
    apply_seconds: float = 0.0
    write_seconds: float = 0.0
    nonfinite: int = 0
    """Values that `apply` gave and that are NaN or infinite."""
    retries: int = 0
    """Times that a task was run again, after a failure that may pass."""
    longest_seconds: float = 0.0
    """Of the task that took longest."""
    filled: list[str] = field(default_factory=list)
    """Coordinates of which chunks were absent, and read as the fill value."""
    lacking: str = ""
    """What the output's file system refused, and was done another way or without."""
    losses: list[Loss] = field(default_factory=list)
    """Workers that went during the run."""
    started: float = field(default_factory=time.perf_counter)
    last: float | None = None
    """When a task of this run was done last."""
    listener: Listener | None = None

    @property
    def own_share(self) -> float:
        """Part of all units that this run delivered, and no earlier one; 0 to 1."""
        return (self.done_units - self.kept_units) / max(1, self.units)

    def begin(self, tasks: int, units: int, nbytes: int) -> None:
        """Learn what there is to do, before the first task runs."""
        self.tasks, self.units, self.nbytes = tasks, units, nbytes
        self.started = time.perf_counter()
        if self.listener is not None:
            self.listener.begin()

    def task_kept(self, units: int) -> None:
        """Count a task that an earlier run had finished."""
        self.kept_tasks += 1
        self.kept_units += units
        self.done_units += units
        if self.listener is not None:
            self.listener.advance(units, kept=True)

    def task_done(self, receipt: Receipt) -> None:
        """Count one finished task."""
        self.done_tasks += 1
        self.done_units += receipt.units
        self.nbytes_read += receipt.nbytes_read
        self.read_seconds += receipt.read_seconds
        self.decode_seconds += receipt.decode_seconds
        self.apply_seconds += receipt.apply_seconds
        self.write_seconds += receipt.write_seconds
        self.nonfinite += receipt.nonfinite
        self.longest_seconds = max(
            self.longest_seconds, sum(float(getattr(receipt, f"{stage}_seconds")) for stage in STAGES)
        )
        self.last = time.perf_counter()
        if self.listener is not None:
            self.listener.advance(receipt.units, kept=False)

    def task_retried(self, words: str) -> None:
        """Count a task that is run again; `words` say why."""
        del words
        self.retries += 1

    @property
    def workers_lost(self) -> list[str]:
        """Addresses of workers that were lost, once each time; not of those that were retired."""
        return [worker for worker, _ in {(each.worker, each.at): None for each in self.losses if not each.expected}]

    @property
    def tasks_rerun(self) -> int:
        """Times that a task was run again, since its worker went."""
        return sum(each.tasks for each in self.losses)

    def worker_lost(self, loss: Loss) -> None:
        """Count a worker that went, and log it, once for all groups of batches that it had tasks of."""
        known = loss.expected or any((loss.worker, loss.at) == (each.worker, each.at) for each in self.losses)
        self.losses.append(loss)
        if not known:
            self.log(str(loss))

    def log(self, line: str) -> None:
        """Tell whoever reads the log what happened, and when."""
        logging.getLogger("pipeline").warning("%s %s", time.strftime("%H:%M:%S"), plain_words(line))

    def say(self, line: str) -> None:
        """Tell the user what is worth knowing, though the run goes on."""
        warnings.warn(plain_words(line), stacklevel=2)


class Run(Watch):
    """A watch that a `Report` keeps: also where its run took place, and when its bytes were delivered."""

    def __init__(self, verb: str, *, threads: int, repetition: float, pulled: bool) -> None:
        super().__init__()
        self.verb = verb
        """Such as "gather"."""
        self.threads = threads
        """Tasks that could run at once."""
        self.repetition = repetition
        """See `name_limit`."""
        self.pulled = pulled
        """Whether reading waits for a caller who takes results as it needs them."""
        self.entered = time.perf_counter()
        self.ended: float | None = None
        self.failed = ""
        """What kind of failure ended it; empty otherwise."""
        self.times = [self.entered]
        """When tasks were done, ascending."""
        self.delivered = [0.0]
        """Bytes of this run's own windows or rows by then, as they were asked for."""

    @property
    def seconds(self) -> float:
        """Wall clock of the run, so far."""
        return (self.ended or time.perf_counter()) - self.entered

    @property
    def own_nbytes(self) -> float:
        """Bytes of the windows or rows that this run delivered, and no earlier one."""
        return self.nbytes * self.own_share

    def task_done(self, receipt: Receipt) -> None:
        """Count one finished task, and note when it was."""
        super().task_done(receipt)
        now = time.perf_counter()
        if len(self.times) == 1 or now - self.times[-1] > (now - self.entered) / _RESOLUTION:
            self.times.append(now)
            self.delivered.append(0.0)
        self.delivered[-1] = self.own_nbytes

    def stages(self) -> dict[str, float]:
        """Seconds of each stage, summed over threads, and of threads that had nothing to do."""
        seconds = {stage: float(getattr(self, f"{stage}_seconds")) for stage in STAGES}
        return seconds | {"idle": max(0.0, self.threads * self.seconds - sum(seconds.values()))}

    def limit(self) -> tuple[str, str]:
        """Tell what limited it, and what would help; see `name_limit`."""
        amplification = self.nbytes_read / (self.own_nbytes or 1)
        limit, advice = name_limit(
            self,
            threads=self.threads,
            seconds=self.seconds,
            amplification=amplification,
            repetition=self.repetition,
        )
        if self.pulled and limit == "Dask":
            return "caller", "reading waited for what is done with the results"
        return limit, advice

    def numbers(self) -> dict[str, Any]:
        """Everything that was counted, as `--json` names it."""
        own = self.own_nbytes
        return {
            "verb": self.verb,
            "failed": self.failed or None,
            "seconds": self.seconds,
            "nbytes_delivered": round(own),
            "nbytes_read": self.nbytes_read,
            "amplification": self.nbytes_read / own if own else None,
            "bytes_per_second": own / self.seconds if own else None,
            "tasks": self.done_tasks,
            "tasks_kept": self.kept_tasks,
            **rerun_numbers(self),
            "nonfinite": self.nonfinite,
            "filled_coordinates": self.filled,
            "threads": self.threads,
            **{f"{stage}_seconds": getattr(self, f"{stage}_seconds") for stage in STAGES},
            "shares": share_seconds(self),
            "limit": self.limit()[0],
        }


class Report:
    """Context manager that collects what the functions of this package that read data did in its block.

    These are `gather`, `store`, `iter_batches`, `create_matrix`, `verify` and `write_manifest`. It counts what this
    thread calls, also inside of functions. Reports may be nested: each counts what its block did.
    In a notebook it shows itself as a table; it may be looked at while its block goes on.

    Attributes
    ----------
    runs : list of Run
        What was run, in this order.
    peak_memory : int
        Bytes that this process and its descendants held at their peak; see `PeakMemory`.

    Examples
    --------
    >>> import pipeline
    >>> folder = getfixture("tmp_path")
    >>> with pipeline.Report() as report:
    ...     matrix = pipeline.create_matrix("random:1000x20", folder / "A.zarr")
    ...     windows = pipeline.gather(pipeline.plan_windows(matrix, [7, 300], length=16))
    >>> [run.verb for run in report.runs], report.numbers()["runs"][1]["nbytes_delivered"]
    (['create_matrix', 'gather'], 5120)
    """

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._peak = PeakMemory()
        self._token: Token[tuple[Report, ...]] | None = None
        self._entered = 0.0
        self._ended: float | None = None

    def __enter__(self) -> Self:
        if self._token is not None:
            raise InputError("a report is of one block; got a second one within it; make another Report()")
        self.runs = []
        self._peak.__enter__()
        self._token = _reports.set((*_reports.get(), self))
        self._entered, self._ended = time.perf_counter(), None
        return self

    def __exit__(self, *failure: object) -> None:
        self._ended = time.perf_counter()
        if self._token is not None:
            _reports.reset(self._token)
            self._token = None
        self._peak.__exit__(*failure)

    @property
    def seconds(self) -> float:
        """Wall clock of the block, so far; 0 before it."""
        return (self._ended or time.perf_counter()) - self._entered if self._entered else 0.0

    @property
    def peak_memory(self) -> int:
        """Bytes that this process and its descendants held at their peak, so far."""
        return self._peak.nbytes

    def numbers(self) -> dict[str, Any]:
        """Return all that was counted, as plain numbers."""
        return {
            "seconds": self.seconds,
            "nbytes_delivered": round(sum(run.own_nbytes for run in self.runs)),
            "nbytes_read": sum(run.nbytes_read for run in self.runs),
            "tasks": sum(run.done_tasks for run in self.runs),
            "retries": sum(run.retries for run in self.runs),
            "workers_lost": sum(len(run.workers_lost) for run in self.runs),
            "tasks_rerun": sum(run.tasks_rerun for run in self.runs),
            "peak_memory": self.peak_memory,
            "runs": [run.numbers() for run in self.runs],
        }

    def facts(self) -> dict[str, str]:
        """What a person wants to know, as words."""
        numbers, longest = self.numbers(), max(self.runs, key=lambda run: run.seconds, default=None)
        if longest is None:
            return {"runs": "none: what gather, store, iter_batches and others do in the block is counted"}
        facts = {name: _say_run(run) for name, run in list(self.named().items())[:_MOST_SHOWN]}
        if len(self.runs) > _MOST_SHOWN:
            facts["more runs"] = f"{len(self.runs) - _MOST_SHOWN:,}; numbers() has all"
        facts["read"] = format_size(numbers["nbytes_read"])
        if numbers["nbytes_delivered"]:
            facts["read"] += f", amplification {numbers['nbytes_read'] / numbers['nbytes_delivered']:.2f}"
        again = f", {numbers['retries']:,} run again" if numbers["retries"] else ""
        kept = sum(run.kept_tasks for run in self.runs)
        facts["tasks"] = f"{numbers['tasks']:,}{again}" + (f", {kept:,} finished before" if kept else "")
        if filled := list(dict.fromkeys(name for run in self.runs for name in run.filled)):
            facts["filled"] = say_filled(filled)
        facts |= loss_facts([loss for run in self.runs for loss in run.losses])
        limit, advice = longest.limit()
        [name] = [name for name, run in self.named().items() if run is longest]
        facts["limit" if len(self.runs) == 1 else f"limit of {name}"] = f"{limit}; {advice}" if advice else limit
        facts["seconds"] = f"{self.seconds:.2f} in all, {sum(run.seconds for run in self.runs):.2f} in runs"
        facts["peak memory"] = format_size(self.peak_memory)
        return facts

    def named(self) -> dict[str, Run]:
        """Runs by names that differ: the verb, and a number where there are several of it."""
        counts, seen = Counter(run.verb for run in self.runs), Counter[str]()
        names = {}
        for run in self.runs:
            seen[run.verb] += 1
            names[run.verb if counts[run.verb] == 1 else f"{run.verb} {seen[run.verb]}"] = run
        return names

    def plot(self, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
        """Draw where the threads' time went in each run, and the rate over time.

        Parameters
        ----------
        axes
            Two axes of matplotlib, for the one and for the other. Default: of a new figure.

        Raises
        ------
        InputError
            If nothing was run, or matplotlib is not installed.
        """
        from pipeline.plan.plots import draw_runs

        if not self.runs:
            raise InputError("a report draws what was run; nothing was; call gather or store in its block")
        named = self.named()
        stages = {name: run.stages() for name, run in named.items()}
        curves = {}
        for name, run in named.items():
            # What comes after the last task, such as looking at what was written, is the run's time, too.
            moments = [*run.times, run.entered + run.seconds]
            curves[name] = [moment - self._entered for moment in moments], [*run.delivered, run.delivered[-1]]
        return draw_runs(stages, curves, seconds=self.seconds, axes=axes)

    def __repr__(self) -> str:
        return text_table("Report", self.facts())

    def _repr_html_(self) -> str:
        bars = {name: run.stages() for name, run in list(self.named().items())[:_MOST_SHOWN]}
        return html_table("Report", self.facts(), bars)


_reports: ContextVar[tuple[Report, ...]] = ContextVar("reports", default=())


@contextmanager
def watched(verb: str, *, repetition: float = 1.0, pulled: bool = False) -> Iterator[Watch]:
    """Yield a watch for the run in the block, which the reports around it keep.

    Parameters
    ----------
    verb
        Names the run.
    repetition
        See `name_limit`.
    pulled
        Whether a caller takes results as it needs them, for which reading waits.
    """
    reports = _reports.get()
    if not reports:
        yield Watch()
        return
    from pipeline.runtime.resources import active_client, count_threads

    run = Run(verb, threads=count_threads(active_client()), repetition=repetition, pulled=pulled)
    for report in reports:
        report.runs.append(run)
    try:
        yield run
    except GeneratorExit:
        # Batches that are left early are no failure.
        raise
    except BaseException as failure:
        run.failed = type(failure).__name__
        raise
    finally:
        run.ended = time.perf_counter()


def _say_run(run: Run) -> str:
    """Write what a run delivered in one line."""
    if run.failed:
        return f"failed after {run.seconds:.2f} s: {run.failed}"
    if not run.units:
        return f"nothing was left to do; {run.seconds:.2f} s"
    own, stages = run.own_nbytes, run.stages()
    whole = sum(stages.values()) or 1
    shares = ", ".join(f"{stage} {value / whole:.0%}" for stage, value in stages.items() if value > whole / 200)
    rate = f"{own / run.seconds / 1e6:,.0f} MB/s"
    return f"{format_size(own)} in {run.seconds:.2f} s, {rate}; {count_of(run.threads, 'thread')}: {shares}"


def say_filled(names: Sequence[str]) -> str:
    """Say which coordinates lack chunks."""
    return f"absent chunks of {', '.join(names)} (coordinates) are read as the fill value"


def rerun_numbers(watch: Watch) -> dict[str, int]:
    """How often tasks were run again, and workers lost, as `--json` names it."""
    return {
        "retries": watch.retries,
        "workers_lost": len(watch.workers_lost),
        "tasks_rerun": watch.tasks_rerun,
    }


def loss_facts(losses: list[Loss]) -> dict[str, str]:
    """Say which workers were lost, and the last of them how; nothing where there were none."""
    lost = {(each.worker, each.at): each.cause for each in losses if not each.expected}
    if not lost:
        return {}
    (worker, at), cause = max(lost.items(), key=lambda each: each[0][1])
    tasks = sum(each.tasks for each in losses)
    last = f"{worker} at {time.strftime('%H:%M:%S', time.localtime(at))}"
    return {"workers lost": f"{len(lost):,}, {count_of(tasks, 'task')} run again; the last: {last}, {cause}"}


def share_seconds(watch: Watch) -> dict[str, float]:
    """Part of the tasks' time that each stage took, 0 to 1."""
    seconds = {stage: float(getattr(watch, f"{stage}_seconds")) for stage in STAGES}
    busy = sum(seconds.values())
    return {stage: value / busy if busy else 0.0 for stage, value in seconds.items()}


def name_limit(
    watch: Watch, *, threads: int, seconds: float, amplification: float, repetition: float
) -> tuple[str, str]:
    """Tell what limited a run, and what would help.

    Parameters
    ----------
    threads
        Tasks that could run at once.
    seconds
        Wall clock of the work.
    amplification
        Bytes read divided by bytes that were asked for.
    repetition
        Bytes that the plan reads in the order of the run, divided by those of order `chunk`.

    Returns
    -------
    tuple of str
        The stage of the tasks that took most of the time: "storage", "decode", "apply" or "write"; "tasks": too few of
        them, or one that is much longer than the others; "checks": what comes before the first task and after the last
        one; "Dask": tasks came too slowly; or "unknown". And a line of advice, empty where there is none.
    """
    stages = {
        "storage": watch.read_seconds,
        "decode": watch.decode_seconds,
        "apply": watch.apply_seconds,
        "write": watch.write_seconds,
    }
    busy = sum(stages.values())
    if seconds < _LEAST_SECONDS or not busy:
        return "unknown", ""
    limit = max(stages, key=lambda stage: stages[stage])
    leads = stages[limit] >= _IDLE * busy
    if busy < _IDLE * threads * seconds:
        return _name_idleness(watch, limit if leads else "", busy, threads=threads, seconds=seconds)
    if not leads:
        return "unknown", ""
    if limit in ("storage", "decode") and repetition > _WASTE:
        return limit, "--order chunk reads each chunk once, and keeps the windows' places beside them"
    if limit == "storage" and amplification > _WASTE:
        return limit, "a matrix of shorter chunks, or not compressed, would read less"
    advice = {
        "storage": "",
        "decode": "more threads help where there are cores; a matrix that is not compressed needs no decoding",
        "apply": "more threads, or processes: true in cluster.yaml where the function holds the GIL",
        "write": "a faster disk for the output; an array in memory needs none",
    }
    return limit, advice[limit]


def _name_idleness(watch: Watch, stage: str, busy: float, *, threads: int, seconds: float) -> tuple[str, str]:
    """Tell why threads had nothing to do for most of a run, as `name_limit` does.

    Parameters
    ----------
    stage
        The one that took most of the tasks' time; empty where there is none.
    busy
        Seconds of all tasks.
    """
    working = seconds if watch.last is None else watch.last - watch.started
    if working < _IDLE * seconds:
        beside = f"{seconds - working:.1f} of {seconds:.1f} s"
        return "checks", f"{beside} passed before the first task and after the last one, when files are looked at"
    few = busy >= _IDLE * min(threads, max(1, watch.done_tasks)) * seconds
    if not few and watch.longest_seconds < _IDLE * seconds:
        return "Dask", "the threads waited for tasks: ask for more windows at once"
    advice = (
        f"{count_of(watch.done_tasks, 'task')} for {count_of(threads, 'thread')}, the longest "
        f"{watch.longest_seconds:.1f} s: more windows make more tasks"
    )
    # A device that is slow with few requests may be as slow with many; cores that are idle are there to be used.
    return (stage if stage in ("storage", "write") else "tasks"), advice
