"""Workers that cannot start, and why: a process that ends before it has a worker seldom says so where one looks."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import tempfile
from contextlib import contextmanager, suppress
from multiprocessing import spawn
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, Self

import distributed

from pipeline.cluster import dashboard

if TYPE_CHECKING:
    from collections.abc import Iterator

UNGUARDED = 83
"""Exit code of a child whose main script starts a cluster while it is imported."""
_GUARD = (
    "worker processes import the main script before they start, so it may connect only below "
    "`if __name__ == '__main__':`; this one connects on import; add that line, or set processes: false"
)
_BOOTSTRAPPING = "bootstrapping phase"
"""In what Python itself says of such a script."""
_TRIAL_SECONDS = 30
_ERROR = re.compile(r"([A-Za-z_][\w.]*\.)?[A-Z]\w*(Error|Exception|Interrupt|Exit|Warning)\b(:.*)?")
_COMPLAINT = re.compile(r"not found|[Nn]o such|[Dd]enied|cannot|[Ee]rror|failed")
_KILLED = 255
"""Exit code that stands for a signal that nobody knows, and for an interpreter that is not there."""
_WRAPPED = "failed to start"
_SAFE_PATH = "PYTHONSAFEPATH"
_starting: list[None] = []
"""An entry for each block of `safe_path` that has set the variable."""
_REMOTE = "distributed.deploy.ssh"
"""Logger that gets what hosts say while they start."""


@contextmanager
def safe_path() -> Iterator[None]:
    """Start Python within the block without the working directory on its path, where `python -c` has it first.

    Python's modules for child processes begin so: a `socket.py` beside the data would run. The variable is not left to
    other children of this process, whose scripts may import their neighbours.
    """
    if os.environ.get(_SAFE_PATH) and not _starting:
        yield
        return
    _starting.append(None)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        _starting.pop()
        if not _starting:
            os.environ.pop(_SAFE_PATH, None)


class WorkerStartError(RuntimeError):
    """A worker could not be made or started; in words, since what it raised need not survive the way here."""


class WorkerEndedError(RuntimeError):
    """A process ended before it had a worker.

    Parameters
    ----------
    exitcode
        Of the process; negative: a signal.
    """

    def __init__(self, exitcode: int) -> None:
        super().__init__(exitcode)
        self.exitcode = exitcode


class Worker(dashboard.Worker):
    """A worker in a process of its own that says why it cannot start, and makes its dashboard when somebody looks.

    Dask sends what is raised to the nanny without its cause. It names a worker's kind by the name of the class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except Exception as error:
            raise WorkerStartError(say_cause(error)) from error

    async def __aenter__(self) -> Self:
        try:
            return await super().__aenter__()  # type: ignore[no-any-return]
        except Exception as error:
            raise WorkerStartError(say_cause(error)) from error


class Nanny(distributed.Nanny):  # type: ignore[misc]
    """A nanny that knows how the process ended that it could not start."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"worker_class": Worker} | kwargs)
        # What a worker's own children have on their path is for the user to say.
        self.env.setdefault(_SAFE_PATH, os.environ.get(_SAFE_PATH, ""))
        self._exitcode: int | None = None

    async def instantiate(self) -> distributed.Status:
        """Start a process as every nanny does, without the working directory on its path."""
        with safe_path():
            return await super().instantiate()

    def _on_worker_exit_sync(self, exitcode: int) -> None:
        self._exitcode = exitcode
        super()._on_worker_exit_sync(exitcode)

    async def start_unsafe(self) -> Self:
        """Start as every nanny does."""
        try:
            return await super().start_unsafe()  # type: ignore[no-any-return]
        except Exception as error:
            said = any(isinstance(each, WorkerStartError) for each in _chain(error))
            if said or self._exitcode is None:
                raise
            raise WorkerEndedError(self._exitcode) from error


def name_cause(error: BaseException, said: list[str], origin: str) -> str:
    """Tell in one line why a cluster did not start, and what to do.

    Parameters
    ----------
    said
        Lines of processes on other hosts.
    origin
        Names the file of the cluster.
    """
    causes = list(_chain(error))
    for each in causes:
        if isinstance(each, WorkerStartError):
            return f"a worker could not start: {each}; check the kwargs of {origin}"
        if isinstance(each, WorkerEndedError):
            cause = _name_end(each.exitcode)
            return cause if cause == _GUARD else f"{cause}; check the kwargs of {origin}"
    if "Worker failed to start" in str(causes[-1]):
        words = last_error(said)
        return (
            f"a process on a host ended before it was up{f': {words}' if words else ', and said nothing'}; correct "
            f"remote_python or scheduler_options, worker_options in {origin}"
        )
    return f"the cluster did not start: {say_cause(error)}; check the kwargs of {origin}"


def _name_end(exitcode: int) -> str:
    if exitcode == UNGUARDED:
        return _GUARD
    python = os.fsdecode(spawn.get_executable())
    if not os.access(python, os.X_OK):
        return f"a worker process could not start: there is no interpreter {python}"
    if exitcode < 0:
        name = str(-exitcode)
        with suppress(ValueError):
            name = signal.Signals(-exitcode).name
        short = ", as the kernel does where memory is short" if -exitcode == signal.SIGKILL else ""
        return f"a worker process was killed by {name} while it started{short}"
    text = _try_start()
    if _BOOTSTRAPPING in text:
        return _GUARD
    words = last_error(text.splitlines())
    return f"a worker process ended with exit code {exitcode} while it started{f': {words}' if words else ''}"


def say_cause(error: BaseException) -> str:
    """Write what a start failed of, and where that was raised, if not in Dask."""
    causes = list(_chain(error))
    # Dask says of each that it failed; the first that says something else is meant for its reader.
    root = next((each for each in causes if _WRAPPED not in str(each)), causes[-1])
    words = " ".join(str(root).split())
    said = f"{type(root).__name__}: {words}" if words else type(root).__name__
    frames = extract_tb(root.__traceback__)
    own = [each for each in frames if "site-packages" not in each.filename and not each.filename.startswith("<")]
    if frames and own and own[-1] is frames[-1] and not _is_ours(own[-1].filename):
        said += f" ({Path(own[-1].filename).name}, line {own[-1].lineno})"
    return said


def last_error(lines: list[str], *, strict: bool = False) -> str:
    """Find the line that names an error in what a process said, or its last where none does; empty without any.

    Parameters
    ----------
    strict
        Whether it has to name an error.

    Examples
    --------
    >>> last_error(["Traceback (most recent call last):", '  File "a.py", line 1', "ValueError: no", "at 12:00 bye"])
    'ValueError: no'
    >>> last_error(["sh: 1: /no/python: not found"])
    'sh: 1: /no/python: not found'
    """
    full = [" ".join(line.split()) for line in lines if line.strip()]
    for pattern in (_ERROR.fullmatch, _COMPLAINT.search):
        if found := [line for line in full if pattern(line)]:
            return found[-1][:300]
    return full[-1][:300] if full and not strict else ""


@contextmanager
def remote_lines() -> Iterator[list[str]]:
    """Yield a list that gets what the processes of an SSHCluster say while they start."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    collector, logger = Collector(logging.INFO), logging.getLogger(_REMOTE)
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(collector)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, and those that it was raised from."""
    following: BaseException | None = error
    seen: set[int] = set()
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__


def _is_ours(filename: str) -> bool:
    return Path(filename).parent == Path(__file__).parent


def _try_start() -> str:
    """Start a process as Dask does, and return what it says before it does anything: it imports the main script."""
    process = multiprocessing.get_context("spawn").Process(target=_do_nothing, daemon=True)
    with tempfile.TemporaryFile() as said:
        kept = os.dup(2)
        try:
            # What other threads say meanwhile is lost: a few milliseconds, of a run that has failed.
            os.dup2(said.fileno(), 2)
            process.start()
        except Exception as error:  # noqa: BLE001 (that is what was looked for)
            return say_cause(error)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        process.join(_TRIAL_SECONDS)
        process.kill()
        process.join()
        process.close()
        said.seek(0)
        return said.read().decode(errors="replace")


def _do_nothing() -> None:
    pass
