"""Reports of the verbs: each as facts, in words, and as numbers, for `--json`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.formatting import count_of, format_size
from pipeline.runtime.report import STAGES, loss_facts, name_limit, rerun_numbers, say_filled, share_seconds
from pipeline.storage.filesystem import count_free
from pipeline.storage.locations import Url

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline.matrix.matrix import Matrix
    from pipeline.matrix.opening import MatrixGroup
    from pipeline.runtime.report import Watch
    from pipeline.sinks.create import Creation
    from pipeline.sinks.gather import Gathering, GroupGathering
    from pipeline.sinks.store import Storing
    from pipeline.storage.locations import Location

type Report = tuple[dict[str, str], dict[str, Any]]
"""Facts and numbers."""

_MOST_SHOWN = 20
"""Problems that are said in words."""


class Measures(NamedTuple):
    """What is measured around a run; times are seconds of one clock."""

    begin: float
    """The verb began to open and plan."""
    ready: float
    """It began to start the cluster."""
    started: float
    """The work began."""
    ended: float
    peak_nbytes: int
    """Memory, at its peak."""
    dashboard: str | None

    @property
    def work_seconds(self) -> float:
        """Wall clock of the work."""
        return self.ended - self.started


def report_dry_run(creation: Creation) -> Report:
    """Say what making a matrix would cost."""
    free = _free_nbytes(creation.dest)
    numbers = {
        "nbytes_read": creation.nbytes_read,
        "nbytes_written": creation.nbytes_written,
        "files": creation.files,
        "tasks": creation.tasks,
        "task_nbytes": creation.task_nbytes,
        "disk_free": free,
        "referred_files": creation.referred,
    }
    return creation.facts() | {"disk": _say_free(free)}, numbers


def report_creation(creation: Creation, matrix: Matrix, watch: Watch, measures: Measures) -> Report:
    """Say what was made, and what it took."""
    numbers = {
        "path": matrix.path,
        "shape": list(matrix.shape),
        "dtype": matrix.dtype.name,
        "nbytes": matrix.nbytes,
        "nbytes_read": watch.nbytes_read,
        "referred_files": creation.referred,
        **_tasks(watch),
        **_seconds(watch, measures),
        **_resources(matrix.nbytes * watch.own_share, measures),
    }
    referred = {name: words for name, words in creation.facts().items() if name == "refers to"}
    return matrix.facts() | referred | _resumed(watch) | loss_facts(watch.losses) | _run_facts(numbers), numbers


def report_matrix(matrix: Matrix | MatrixGroup, length: int) -> Report:
    """Say what a matrix is, or several, and what a window of it costs."""
    # Who reads `--help` need not wait for the classes.
    return _report_group(matrix, length) if _is_group(matrix) else _report_single(matrix, length)


def _report_single(matrix: Any, length: int) -> Report:
    layout = matrix.layout
    wanted = length * matrix.row_nbytes
    nbytes_read = wanted
    if layout.reader == "decoded":
        # A window at a random start touches 1 + (length - 1) / chunk_rows chunks on average.
        nbytes_read = round((1 + (length - 1) / layout.chunk_rows) * layout.chunk_rows * matrix.row_nbytes)
    present, total, stored = matrix.count_files()
    problem = matrix.find_problem() if present < total else ""
    numbers = {
        "path": matrix.path,
        "shape": list(matrix.shape),
        "dtype": matrix.dtype.name,
        "byteorder": layout.byteorder,
        "chunk_rows": layout.chunk_rows,
        "shard_rows": layout.shard_rows,
        "codecs": list(layout.codecs),
        "reader": layout.reader,
        "files_present": present,
        "files": total,
        "first_problem": problem or None,
        "nbytes": matrix.nbytes,
        "nbytes_stored": stored,
        "length": length,
        "window_nbytes": wanted,
        "window_nbytes_read": nbytes_read,
        "window_amplification": nbytes_read / wanted,
        "parts": None if matrix.parts is None else matrix.parts.tolist(),
        "scaling": matrix.scaling or None,
    }
    kind = "shards" if layout.shard_rows else "chunks" if matrix.array is not None else "files"
    facts = matrix.facts() | {
        "present": f"{present:,} of {total:,} {kind}{_say_absent(present, total, problem)}",
        "on disk": f"{format_size(stored)} ({stored / matrix.nbytes:.2f} of the size in memory)",
        f"a window of {length}": f"{format_size(wanted)}, reads {format_size(nbytes_read)} on average, "
        f"amplification {nbytes_read / wanted:.2f}",
    }
    if matrix.array is None:
        facts["create"] = (
            f"would add checksums for every 64 KiB, compression and object stores, for {format_size(matrix.nbytes)} "
            f"of disk before compression; for windows alone it does not pay: they cost the same bytes in place"
        )
    return {"matrix": matrix.path, **facts}, numbers


def _say_absent(present: int, total: int, problem: str) -> str:
    """Say what to do about files that are absent, and which is the first that is not right; empty where none is."""
    if present == total:
        return ""
    first = f", the first problem: {problem.removesuffix(' is absent')}" if problem else ""
    return (
        f"; {total - present:,} absent{first}; restore what was lost, or, where nothing was ever written there, "
        f"read the fill value with --missing-chunks fill (missing_chunks=)"
    )


def _report_group(group: Any, length: int) -> Report:
    facts = {"matrix": group.path, **group.facts()}
    told = {name: _report_single(each, length)[1] for name, each in group.members.items()}
    for name, each in told.items():
        facts[name] += (
            f"; present {each['files_present']:,} of {each['files']:,} files"
            f"{_say_absent(each['files_present'], each['files'], each['first_problem'] or '')}; a window of {length}: "
            f"{format_size(each['window_nbytes'])}, reads {format_size(each['window_nbytes_read'])}"
        )
    numbers = {
        "path": group.path,
        "rows": group.rows,
        "nbytes": group.nbytes,
        "length": length,
        "parts": None if group.parts is None else group.parts.tolist(),
        "members": told,
    }
    return facts, numbers


def say_scaling(matrix: Matrix | MatrixGroup) -> Iterator[str]:
    """Say what a run does not do to the values that it delivers, a line for each matrix of which that is to be said."""
    for each in _matrices(matrix):
        if each.scaling:
            yield f"{each.path} has {each.scaling}"


def report_plan(sink: Gathering | GroupGathering | Storing) -> Report:
    """Say what a run would do and cost."""
    planned, peak = sink.plan, sink.footprint().peak_nbytes
    numbers: dict[str, Any] = {
        "windows": len(planned),
        "length": planned.length,
        "nbytes_wanted": planned.nbytes,
        **_shapes(sink),
        "result_nbytes": sink.nbytes,
        "crossings": planned.crossings(),
        "orders": {
            cost.order: {
                "tasks": cost.tasks,
                "chunks": cost.chunks,
                "nbytes_read": cost.nbytes_read,
                "amplification": cost.amplification,
                "spans": cost.scratch_nbytes > 0,
                "requests": cost.requests,
            }
            for cost in (planned.chunk, planned.request)
        },
        "order": sink.cost.order,
        "peak_memory": peak,
        "disk_needed": 0,
    }
    facts = planned.facts() | {"this run": f"order {sink.cost.order}", "peak memory": f"about {format_size(peak)}"}
    if isinstance(sink.out, Path | Url):
        free = _free_nbytes(sink.out)
        numbers |= {"disk_needed": sink.nbytes, "disk_free": free}
        facts["disk"] = f"{format_size(sink.nbytes)} for {sink.out}; {_say_free(free)}"
    else:
        facts["disk"] = "none: the array is not kept; name a file with --out"
    return facts, numbers


def report_run(
    matrix: Matrix | MatrixGroup,
    sink: Gathering | GroupGathering | Storing,
    watch: Watch,
    measures: Measures,
    *,
    threads: int,
) -> Report:
    """Say what a run did, and what limited it.

    Parameters
    ----------
    threads
        Tasks that could run at once.
    """
    planned = sink.plan
    # How an earlier run read what it finished is not known.
    earlier = not watch.tasks or watch.kept_tasks > 0
    layouts = [each.layout for each in _matrices(matrix)]
    all_checked = all(each.checked for each in layouts)
    checked = all_checked and not earlier
    own = planned.nbytes * watch.own_share
    amplification = watch.nbytes_read / own if own else None
    shares = share_seconds(watch)
    limit, advice = name_limit(
        watch,
        threads=threads,
        seconds=measures.work_seconds,
        amplification=amplification or 1.0,
        repetition=sink.cost.nbytes_read / planned.chunk.nbytes_read,
    )
    numbers = {
        "matrix": matrix.path,
        "windows": len(planned),
        "length": planned.length,
        "out": None if sink.out is None else str(sink.out),
        **_shapes(sink),
        "nbytes_delivered": sink.nbytes,
        "nbytes_read": watch.nbytes_read,
        "amplification": amplification,
        "checked_reads": checked,
        "crossings": planned.crossings(),
        "nonfinite": watch.nonfinite,
        "filled_coordinates": watch.filled,
        **_tasks(watch),
        **_seconds(watch, measures),
        "shares": shares,
        "limit": limit,
        **_resources(own, measures),
    }
    facts = {
        "windows": f"{len(planned):,} of {planned.length:,} rows out of {matrix.path}",
        "result": f"{_say_results(sink)}, {format_size(sink.nbytes)}",
        "kept": str(sink.out) if sink.out is not None else "nothing; name a file with --out to keep the windows",
        "read": "nothing"
        if amplification is None
        else f"{format_size(watch.nbytes_read)}, amplification {amplification:.2f}",
        "reads": "checked, but for what was finished before" if earlier else "checked",
    }
    if not all_checked:
        bare = [each.path for each in _matrices(matrix) if not each.layout.checksums]
        verb = "has" if len(bare) == 1 else "have"
        way_out = f"{', '.join(bare)} {verb} no checksums" if bare else "--check-reads does"
        facts["reads"] = f"not checked; {way_out}"
    if crossings := planned.facts().get("crossings"):
        facts["crossings"] = crossings
    if watch.nonfinite:
        facts["not finite"] = f"{count_of(watch.nonfinite, 'value')} of the result: NaN or infinite"
    if watch.filled:
        facts["filled"] = say_filled(watch.filled)
    facts["limit"] = f"{limit}; {advice}" if advice else limit
    facts["shares"] = ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items())
    return facts | _resumed(watch) | loss_facts(watch.losses) | _run_facts(numbers), numbers


def _is_group(whole: Any) -> bool:
    """Whether it is a matrix or plan of several arrays."""
    return hasattr(whole, "members")


def _matrices(matrix: Any) -> list[Matrix]:
    return list(matrix.members.values()) if _is_group(matrix) else [matrix]


def _shapes(sink: Gathering | GroupGathering | Storing) -> dict[str, Any]:
    """Shape of the result, or of each array by its name."""
    shapes = {name: [len(sink.plan), *each.shape] for name, each in sink.results.items()}
    return {"result_shapes": shapes} if _is_group(sink.plan) else {"result_shape": next(iter(shapes.values()))}


def _say_results(sink: Gathering | GroupGathering | Storing) -> str:
    named = _is_group(sink.plan)
    words = []
    for name, each in sink.results.items():
        shape = ", ".join(f"{size:,}" for size in (len(sink.plan), *each.shape))
        words.append(f"{name + ' ' if named else ''}({shape}) {each.dtype}")
    return "; ".join(words)


def add_measures(report: Report, watch: Watch, measures: Measures) -> Report:
    """Add to the report of a run that reads what it took."""
    facts, numbers = report
    numbers = {
        **numbers,
        "tasks": watch.done_tasks,
        **rerun_numbers(watch),
        **_seconds(watch, measures),
        **_resources(watch.nbytes_read, measures),
    }
    return facts | loss_facts(watch.losses) | _run_facts(numbers), numbers


def say_problems(problems: Sequence[object]) -> Iterator[str]:
    """Yield a line for each problem, up to some, and one for those that follow."""
    for problem in problems[:_MOST_SHOWN]:
        yield " ".join(str(problem).split())
    if len(problems) > _MOST_SHOWN:
        yield f"and {len(problems) - _MOST_SHOWN:,} more; --json lists all"


def align_facts(facts: dict[str, str]) -> str:
    """Write facts in two columns.

    Examples
    --------
    >>> print(align_facts({"rate": "9 MB/s", "seconds": "1.00"}))
    rate     9 MB/s
    seconds  1.00
    """
    width = max(map(len, facts))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in facts.items())


def _tasks(watch: Watch) -> dict[str, Any]:
    return {
        "tasks": watch.done_tasks,
        "tasks_kept": watch.kept_tasks,
        **rerun_numbers(watch),
        "finished_before": watch.tasks == 0,
        "file_system_lacks": watch.lacking or None,
    }


def _seconds(watch: Watch, measures: Measures) -> dict[str, float]:
    """Seconds of the wall clock by stage; reading, applying and writing are summed over tasks that run side by side."""
    return {
        "seconds": measures.ended - measures.begin,
        "plan_seconds": measures.ready - measures.begin,
        "startup_seconds": measures.started - measures.ready,
        "work_seconds": measures.work_seconds,
        "read_seconds": watch.read_seconds,
        "decode_seconds": watch.decode_seconds,
        "apply_seconds": watch.apply_seconds,
        "write_seconds": watch.write_seconds,
    }


def _resources(nbytes: float, measures: Measures) -> dict[str, Any]:
    """What was used; `nbytes` of this run alone."""
    return {
        "bytes_per_second": nbytes / measures.work_seconds if nbytes else None,
        "peak_memory": measures.peak_nbytes,
        "dashboard": measures.dashboard,
    }


def _resumed(watch: Watch) -> dict[str, str]:
    """Say what an earlier run had done of this one, and what the output's file system did not."""
    facts = {"file system": watch.lacking} if watch.lacking else {}
    if not watch.tasks:
        facts["resumed"] = "nothing was left to do: the output of this very request is there, finished"
    elif watch.kept_tasks:
        facts["resumed"] = f"{watch.kept_tasks:,} of {count_of(watch.tasks, 'task')} were finished before"
    return facts


def _run_facts(numbers: dict[str, Any]) -> dict[str, str]:
    stages = {"open and plan": "plan", "start the cluster": "startup", "work": "work"}
    clock = ", ".join(f"{word} {numbers[f'{key}_seconds']:.2f}" for word, key in stages.items())
    tasks = ", ".join(f"{stage} {numbers[f'{stage}_seconds']:.2f}" for stage in STAGES)
    again = f", {numbers['retries']:,} run again" if numbers["retries"] else ""
    rate = numbers["bytes_per_second"]
    return {
        "seconds": f"{numbers['seconds']:.2f}: {clock}",
        "in tasks": f"{count_of(numbers['tasks'], 'task')}{again}, summed seconds: {tasks}",
        **({"rate": f"{rate / 1e6:,.0f} MB/s"} if rate else {}),
        "peak memory": format_size(numbers["peak_memory"]),
        "dashboard": f"{numbers['dashboard'] or 'none'} while it ran",
    }


def _free_nbytes(location: Location) -> int | None:
    """Room where an output goes; None on an object store."""
    return count_free(location.parent) if isinstance(location, Path) else None


def _say_free(free: int | None) -> str:
    return "object stores do not tell what is free" if free is None else f"{format_size(free)} free"
