"""Dask's performance report of a run: one HTML file, complete in itself."""

from __future__ import annotations

import html
import os
import re
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, OpenError, OutputExistsError
from pipeline.redaction import plain_words, scrub
from pipeline.runtime.resources import active_client
from pipeline.storage.filesystem import may_write, move_file, pinned
from pipeline.storage.locations import check_apart
from pipeline.storage.trust import check_own, read_document

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_MARK = '<meta name="generator" content="random-windows">'
"""Says that we wrote it, so that another run may replace it."""
_MARK_WITHIN = 1024
_REMOTE = re.compile(r'\s*<link\b[^>]*\bhref="(?:https?:)?//[^>]*>')
"""What Dask's page would load from the network: its icon."""
_SECONDS = 120
"""How long the scheduler may take for it; 20,000 tasks take it a second, and 5 MB."""
_FAILED_SECONDS = 5
"""The same after a failed run, which ends soon."""


def check_report(path: str, inputs: Iterable[str | Path]) -> Path:
    """Return where a report goes, before a run begins.

    Parameters
    ----------
    inputs
        Files and folders that it must lie apart from.

    Raises
    ------
    InputError
        If it is not named .html.
    OpenError
        If its folder is absent, or cannot be written.
    OutputExistsError
        If something is there that is no report of ours, or if it lies inside of what is read or written.
    """
    place = Path(path).absolute()
    if place.suffix not in (".html", ".htm"):
        raise InputError(f"a performance report is a web page; got {path}; name it .html")
    if not place.parent.is_dir():
        raise OpenError(f"a performance report goes into a folder that is there; {place.parent} is not; make it first")
    if not may_write(place.parent):
        raise OpenError(
            f"a performance report goes into a folder that can be written; {place.parent} cannot; change its mode"
        )
    if os.path.lexists(place) and not _is_ours(place):
        raise OutputExistsError(f"only a performance report of ours is replaced; {path} is none; name another")
    check_apart(place, inputs)
    return place


@contextmanager
def performance_report(path: Path | None) -> Iterator[None]:
    """Save a report of what the active client's cluster does in the block, also where that fails.

    It appears when it is complete, in place of an earlier one. A report that cannot be had is told of on stderr, and
    fails nothing: the run's own output is what counts. An interrupted run has none, so that it ends at once.

    Parameters
    ----------
    path
        As `check_report` gives it; None: no report.
    """
    client = active_client()
    if path is None or client is None:
        yield
        return
    with pinned(path.parent) as parent:
        place, begin = parent / path.name, time.time()
        try:
            count = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.monitor.count)
            # From now on the scheduler keeps what its tasks do.
            client.get_task_stream(start=0, stop=0)
        except Exception as error:  # noqa: BLE001 (a scheduler answers what it likes)
            _complain(path, error)
            yield
            return
        try:
            yield
        except Exception:
            # Perhaps because the scheduler does not answer.
            _save(client, place, path, begin, count, seconds=_FAILED_SECONDS)
            raise
        _save(client, place, path, begin, count, seconds=_SECONDS)


def _save(client: Any, place: Path, path: Path, begin: float, count: int, *, seconds: float) -> None:
    try:
        page = client.sync(
            client.scheduler.performance_report,
            start=begin,
            last_count=count,
            code=html.escape(scrub(" ".join(["pipeline", *sys.argv[1:]]))),
            mode="inline",
            callback_timeout=seconds,
        )
        page = _REMOTE.sub("", page).replace("<head>", f"<head>\n    {_MARK}", 1)
        _put(page, place)
    except Exception as error:  # noqa: BLE001 (see `performance_report`)
        _complain(path, error)


def _put(page: str, place: Path) -> None:
    partial = place.with_name(f"{place.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(page)
        # Somebody may have put something else there since the run began.
        if os.path.lexists(place) and not _is_ours(place):
            raise FileExistsError("what is there is not a performance report of this program")
        move_file(partial, place)
    finally:
        partial.unlink(missing_ok=True)


def _complain(path: Path, error: Exception) -> None:
    words = " ".join(scrub(f"{type(error).__name__}: {error}").split())[:300]
    sys.stderr.write(plain_words(f"no performance report in {path}: {words}") + "\n")


def _is_ours(path: Path) -> bool:
    """Whether a report that this program wrote, owned by this user, is at `path`."""
    try:
        check_own(path, deep=False, published=True)
        return _MARK.encode() in read_document(path)[:_MARK_WITHIN]
    except OSError:
        return False
