"""Bytes of files that are read together: cut, gathered into tasks, and read by them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.formatting import MIB
from pipeline.integrity.manifest import RANGE_NBYTES
from pipeline.runtime.preflight import FolderSight, survey_workers
from pipeline.runtime.resources import active_client, count_threads, fit_memory
from pipeline.runtime.runner import run_tasks
from pipeline.runtime.tasks import name_tasks
from pipeline.storage.base import Folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pipeline.runtime.report import Watch
    from pipeline.runtime.tasks import Receipt
    from pipeline.storage.base import Storage

_TASK_NBYTES = 64 * MIB
_TASK_FILES = 1000
_TASK_MEMORY = 64 * MIB
"""Buffers of a task: of a store, all that it reads may be under way at once."""


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
    """Run tasks, `function(*about, ranges, number)` each, and yield what each found beside its receipt.

    Parameters
    ----------
    about
        The storage first.
    """
    threads = count_threads(active_client())
    footprint = fit_memory(_TASK_MEMORY, None, threads=threads, what="one task of verify")
    parts = list(_batch(ranges))
    folders = [FolderSight(about[0].root, written=False)] if isinstance(about[0], Folder) else []
    survey = survey_workers(folders, say=watch.say)
    tasks = name_tasks("verify", survey.guard(function), ((*about, part, number) for number, part in enumerate(parts)))
    watch.begin(len(parts), len(ranges), sum(each.nbytes for each in ranges))
    span = ("pipeline", "verify")
    for receipt, found in run_tasks(tasks, at_once=survey.bound(footprint.fits), span=span, watch=watch):
        watch.task_done(receipt)
        yield found


def each_range[T](storage: Storage, ranges: list[Range], function: Callable[[Storage, Range], T]) -> Iterator[T]:
    """Call a function for each range, side by side where the storage takes long to answer; results in order."""
    if storage.at_once == 1 or len(ranges) == 1:
        yield from (function(storage, each) for each in ranges)
        return
    with ThreadPoolExecutor(storage.at_once) as threads:
        yield from threads.map(partial(function, storage), ranges)


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
