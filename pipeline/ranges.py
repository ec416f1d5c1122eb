"""Bytes of files that are read together: cut, gathered into tasks, and read by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.capacity import active_client, count_threads, fit_memory
from pipeline.manifest import RANGE_NBYTES
from pipeline.runs import run_tasks
from pipeline.sizes import MIB
from pipeline.tasks import name_tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pipeline.report import Watch
    from pipeline.tasks import Receipt

_TASK_NBYTES = 64 * MIB
_TASK_FILES = 1000
_TASK_MEMORY = 32 * MIB
"""Buffers of a task: what it reads passes through them."""


class Range(NamedTuple):
    """Bytes that are read together."""

    key: str
    offset: int
    nbytes: int
    file_nbytes: int | None = None
    """Size that the file should have."""
    checksum: int | None = None
    """What it should have; None: the crc32c of each chunk tells."""


def cut_file(key: str, nbytes: int, step: int = RANGE_NBYTES) -> list[Range]:
    """Cut a file; one that is empty has one range, too."""
    return [Range(key, offset, min(step, nbytes - offset), nbytes) for offset in range(0, max(1, nbytes), step)]


def read_ranges[T](
    function: Callable[..., tuple[Receipt, T]], about: tuple[Any, ...], ranges: tuple[Range, ...], watch: Watch
) -> Iterator[T]:
    """Run tasks, `function(*about, ranges, number)` each, and yield what each found beside its receipt."""
    threads = count_threads(active_client())
    footprint = fit_memory(_TASK_MEMORY, None, threads=threads, what="one task of verify")
    tasks = name_tasks("verify", function, ((*about, part, number) for number, part in enumerate(_batch(ranges))))
    watch.begin(len(tasks), len(ranges), sum(each.nbytes for each in ranges))
    for receipt, found in run_tasks(tasks, at_once=footprint.at_once):
        watch.task_done(receipt)
        yield found


def _batch(ranges: Iterable[Range]) -> Iterator[tuple[Range, ...]]:
    """Cut ranges into tasks: some tens of megabytes each, or a thousand files."""
    batch: list[Range] = []
    nbytes = 0
    for each in ranges:
        if batch and (nbytes + each.nbytes > _TASK_NBYTES or len(batch) == _TASK_FILES):
            yield tuple(batch)
            batch, nbytes = [], 0
        batch.append(each)
        nbytes += each.nbytes
    if batch:
        yield tuple(batch)
