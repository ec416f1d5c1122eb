"""Tasks that failed: which are run again, and when; what is said of the others; a scheduler that does not answer."""

from __future__ import annotations

import errno
import random
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipeline.errors import BudgetError, DiskSpaceError, IncompleteError, InputError, PipelineError
from pipeline.formatting import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dask.delayed import Delayed

_PAUSES = (1.0, 4.0, 15.0)
"""Seconds before each try after the first. A store's own requests were tried again for some seconds before."""
_SPREAD = 0.5
"""Part of a pause that is left to chance, so that tasks that failed together do not come back together."""
_PASSING = {
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOTCONN", "EPIPE"),
    )
    if hasattr(errno, name)
}
"""What a disk that is mounted over a network raises while its server is away; not EIO, the word of a broken one."""
_ASK_SECONDS = 15
"""How often a scheduler is asked for a sign of life while no task ends."""
_ANSWER_SECONDS = 10
_SILENT_SECONDS = 40
"""With what a last question and the end of the run take, a scheduler that has gone is noticed within a minute. One that
has work to do for 1,000 workers is silent for seconds."""
_TELL_SECONDS = 10


def may_pass(failure: BaseException) -> bool:
    """Whether what a task raised may be gone a while later: what a network does, never what data or arguments do."""
    if isinstance(failure, InputError | BudgetError | DiskSpaceError | IncompleteError):
        return False
    return any(
        getattr(error, "passing", False)
        or isinstance(error, ConnectionError | TimeoutError)
        or (isinstance(error, OSError) and error.errno in _PASSING)
        for error in _causes(failure)
    )


def _causes(failure: BaseException) -> Iterator[BaseException]:
    """Yield an exception, and those that it was raised from."""
    error: BaseException | None = failure
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__


class Retries:
    """Tasks that wait to be run again, each a few times, after growing pauses, while others go on.

    Parameters
    ----------
    tell
        Told in words of each.
    """

    waiting: dict[Any, tuple[float, Delayed]]
    """By key: when it is due, and the task."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.waiting = {}
        self._tell = tell
        self._tries: Counter[Any] = Counter()

    def postpone(self, task: Delayed, failure: BaseException) -> bool:
        """Let a task wait that has failed; False if it will not be run again."""
        tries = self._tries[task.key]
        if tries >= len(_PAUSES) or not may_pass(failure):
            return False
        self._tries[task.key] += 1
        pause = _PAUSES[tries] * (1 + _SPREAD * (random.random() - 0.5))  # noqa: S311 (no secret)
        self.waiting[task.key] = (time.monotonic() + pause, task)
        words = " ".join(str(failure).split())[:300] or type(failure).__name__
        self._tell(
            f"{name_task(task.key)} is run again in {pause:.1f} s, try {tries + 2} of {len(_PAUSES) + 1}: {words}"
        )
        return True

    def pause(self) -> float | None:
        """Return the seconds until the next task is due; None where none waits."""
        if not self.waiting:
            return None
        return max(0.0, min(due for due, _ in self.waiting.values()) - time.monotonic())

    def due(self) -> list[Delayed]:
        """Take out the tasks whose pause is over."""
        now = time.monotonic()
        ready = [key for key, (due, _) in self.waiting.items() if due <= now]
        return [self.waiting.pop(key)[1] for key in ready]


class Watchdog:
    """Notices a scheduler that is there and does not answer: stopped, or behind a network that has gone."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._heard = time.monotonic()

    def heard(self) -> None:
        """Note a sign of life."""
        self._heard = time.monotonic()

    def look(self) -> None:
        """Ask for a sign of life where there was none for a while.

        Raises
        ------
        IncompleteError
            If there was none for too long.
        """
        if time.monotonic() - self._heard < _ASK_SECONDS:
            return
        scheduler = self._client.scheduler
        with suppress(OSError, TimeoutError):
            self._client.sync(scheduler.identity, n_workers=0, callback_timeout=_ANSWER_SECONDS)
            self.heard()
        silent = time.monotonic() - self._heard
        if silent > _SILENT_SECONDS:
            raise IncompleteError(
                f"a scheduler answers while tasks run; {scheduler.address} has not for {silent:.0f} s; look at its "
                f"process and at the network, or go on with another"
            )

    def pause(self) -> float:
        """Return the seconds until it is time to look."""
        return max(0.1, _ASK_SECONDS - (time.monotonic() - self._heard))


def task_error(client: Any, key: Any, failure: BaseException) -> BaseException:
    """Return what a task raised, or, where Dask gave it up, our word for that."""
    from distributed.client import FutureCancelledError
    from distributed.scheduler import NoValidWorkerError, NoWorkerError

    error: PipelineError
    match failure:
        case NoWorkerError() | NoValidWorkerError():
            error = IncompleteError(
                f"a task finds a worker; {name_task(key)} waited {failure.timeout:g} s for one; start workers, and "
                f"look at the logs of those that ended"
            )
        case PipelineError():
            return failure
        case MemoryError():
            error = BudgetError(
                f"a task fits its worker's memory; {name_task(key)} found none: {failure or 'it ran out'}; give "
                f"workers more, or have it hold less"
            )
        case _ if isinstance(failure, FutureCancelledError) or client.status != "running":
            reason = getattr(failure, "reason", None) or type(failure).__name__
            error = IncompleteError(
                f"the scheduler stays until every task is done; {name_task(key)} was cancelled: {reason}; look at the "
                f"scheduler's log, and start it anew"
            )
        case _:
            return failure
    error.__cause__ = failure
    return error


def killed_error(client: Any, killed: list[Any], undone: str, *, since: float) -> PipelineError:
    """Name tasks, each of which was alone on the last workers that it lost, and tell whether they lacked memory.

    Parameters
    ----------
    since
        When the run began, by the wall's clock.
    """
    names = ", ".join(name_task(error.task) for error in killed)
    last = killed[-1]
    times = last.allowed_failures + 1
    stopped: Any = ()
    with suppress(Exception):
        stopped = client.sync(client.scheduler.events, topic="worker-restart-memory", callback_timeout=_TELL_SECONDS)
    # A worker that was being ended when it was given the task is the last that the task lost, and none of these.
    held = [event["rss"] for at, event in stopped if at >= since]
    if held:
        return BudgetError(
            f"a task fits its worker's memory; {names} held {format_size(held[-1])} and more, its memory_limit is "
            f"{format_size(last.last_worker.memory_limit)}, {undone}; raise memory_limit in cluster.yaml, or have it "
            f"hold less"
        )
    return IncompleteError(
        f"every task is done; {undone}, and {names} ended {times} workers each, where no other task ran; look at what "
        f"it calls, and at the workers' and the kernel's logs"
    )


def stopped_error() -> IncompleteError:
    """Return what ends a run that its caller has left."""
    return IncompleteError("a run goes on while its caller waits for it; this one was left; begin it anew")


def name_task(key: Any) -> str:
    """Stage and number of a task."""
    stage, number = key if isinstance(key, tuple) else (key, "")
    return f"{stage.rpartition('-')[0]} {number}" if number != "" else str(stage)
