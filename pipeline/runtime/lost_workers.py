"""Workers that a cluster loses during a run: heard from its scheduler, which runs their tasks again without a word."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.cluster.worker_exits import EXITS
from pipeline.formatting import count_of, format_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_REMOVALS, _MEMORY = "all", "worker-restart-memory"
"""Topics of the scheduler's events: what concerns all, such as a worker's end; and nannies that end a worker."""
_CAUSE_SECONDS = 2
"""How long a cause may come after the loss. Its nanny knows when the process is gone, the scheduler its connection."""
_SETTLE_SECONDS = 0.2
"""How long a better cause may come after the first: why a nanny has sent a signal, after which one it was."""
_ASK_SECONDS = 2
_MOST_CAUSES = 64
_KILLED = 255
"""What stands for a signal that nobody knows."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker that went while it had to do with a run."""

    worker: str
    """Its address."""
    at: float
    """When, by the scheduler's clock."""
    tasks: int
    """Of the run, that other workers do now."""
    cause: str
    """How it ended."""
    expected: bool = False
    """It was retired: nothing is wrong."""

    def __str__(self) -> str:
        again = f"; {count_of(self.tasks, 'task')} run again" if self.tasks else ""
        return f"worker {self.worker} was lost: {self.cause}{again}"


class Observer(Protocol):
    """Observer of the run, called when its state changes."""

    def task_retried(self, words: str) -> None:
        """Take note of a task that is run again after a failure that may pass; `words` say why."""

    def worker_lost(self, loss: Loss) -> None:
        """Take note of a worker that went, and of the tasks that are run again."""


class Unobserved:
    """An observer who takes no note."""

    def task_retried(self, words: str) -> None:
        """See `Observer.task_retried`."""

    def worker_lost(self, loss: Loss) -> None:
        """See `Observer.worker_lost`."""


class Losses:
    """Workers that are lost while the tasks of one run are under way.

    Parameters
    ----------
    owns
        Whether a task is of the run, and not done; called from another thread.
    heard
        Called from another thread as soon as a worker is gone; how it ended is known a little later.
    """

    def __init__(self, client: Any, owns: Callable[[Any], bool], heard: Callable[[], None]) -> None:
        self._owns, self._heard = owns, heard
        self._told: SimpleQueue[Loss] = SimpleQueue()
        self._begun = self._taken = 0
        with _lock:
            if client not in _streams:
                _streams[client] = _Stream(client)
            self._stream = _streams[client]
        self._stream.add(self)

    def take(self, *, wait: bool = False) -> list[Loss]:
        """Return those of which all is known that will be; `wait` for the others, too."""
        losses = []
        deadline = time.monotonic() + 2 * _CAUSE_SECONDS
        with suppress(Empty):
            while not self._told.empty() or (wait and self._taken < self._begun):
                losses.append(self._told.get(timeout=max(0.01, deadline - time.monotonic())))
                self._taken += 1
        return losses

    def close(self) -> None:
        """Listen no more."""
        self._stream.remove(self)

    def begin(self, keys: set[Any]) -> int:
        """Count the tasks of the run among those that a lost worker had; what became of it follows by `end`."""
        self._begun += 1
        tasks = sum(map(self._owns, keys))
        self._heard()
        return tasks

    def end(self, loss: Loss) -> None:
        """Take a loss of which all is known."""
        self._told.put(loss)
        self._heard()


class _Stream:
    """What the scheduler says to one client of workers that end, for all of its runs.

    It is heard in the client's loop.
    """

    def __init__(self, client: Any) -> None:
        self._client = weakref.ref(client)
        self._runs: list[Losses] = []
        self._open: dict[str, Callable[[], Awaitable[None]]] = {}
        """By the worker: what ends the wait for a cause."""
        self._causes: dict[str, str] = {}
        self._others: dict[str, Any] = {}
        """Handlers of the user's own, of the same topics."""

    def add(self, run: Losses) -> None:
        self._runs.append(run)
        client = self._client()
        if len(self._runs) > 1 or client is None:
            return
        handlers = getattr(client, "_event_handlers", {})
        for topic, hear in {_REMOVALS: self._hear_all, _MEMORY: self._hear_memory, EXITS: self._hear_exit}.items():
            known = handlers.get(topic)
            if not isinstance(known, _Handler):
                self._others[topic] = known
            with suppress(Exception):
                client.subscribe_topic(topic, _Handler(hear, self._others[topic]))

    def remove(self, run: Losses) -> None:
        with suppress(ValueError):
            self._runs.remove(run)
        client = self._client()
        if self._runs or client is None:
            return
        for topic, other in self._others.items():
            with suppress(Exception):
                if other is None:
                    client.unsubscribe_topic(topic)
                else:
                    client.subscribe_topic(topic, other)

    def _hear_all(self, at: float, event: dict[str, Any]) -> None:
        if event.get("action") != "remove-worker" or not self._runs:
            return
        worker, expected = event["worker"], bool(event["expected"])
        keys = set(event["processing-tasks"]) | set(event["lost-computed-tasks"])
        parts = [(run, run.begin(keys)) for run in list(self._runs)]

        async def settle() -> None:
            waiting, parts[:] = parts[:], []
            cause = "it was retired" if expected else self._causes.pop(worker, "")
            if waiting and not cause:
                cause = await self._ask(worker, str(event["stimulus_id"]))
            for run, tasks in waiting:
                run.end(Loss(worker, at, tasks, cause, expected))
            if self._open.get(worker) is settle:
                del self._open[worker]

        self._open[worker] = settle
        self._later(0 if expected else _SETTLE_SECONDS if worker in self._causes else _CAUSE_SECONDS, settle)

    def _hear_memory(self, _: float, event: dict[str, Any]) -> None:
        held = f"its nanny ended it, since it held {format_size(event['rss'])}, too near to its memory_limit"
        self._found(event["worker"], held)

    def _hear_exit(self, _: float, event: dict[str, Any]) -> None:
        if event["worker"] not in self._causes:
            self._found(event["worker"], _say_exit(event))

    def _found(self, worker: str, cause: str) -> None:
        if not self._runs:
            return
        self._causes[worker] = cause
        while len(self._causes) > _MOST_CAUSES:
            del self._causes[next(iter(self._causes))]
        if worker in self._open:
            self._later(_SETTLE_SECONDS, self._open[worker])

    async def _ask(self, worker: str, stimulus: str) -> str:
        """Find a cause that no nanny has told."""
        if stimulus.startswith("check-worker-ttl"):
            return "it gave no sign of life"
        reasons: list[Any] = []
        with suppress(Exception):
            async with asyncio.timeout(_ASK_SECONDS):
                events = await self._client().scheduler.events(topic=worker)  # type: ignore[union-attr]
            reasons = [said["reason"] for _, said in events if said.get("action") == "closing-worker"]
        return f"it closed ({reasons[-1]})" if reasons else "how it ended is not known; look at its log"

    def _later(self, seconds: float, settle: Callable[[], Awaitable[None]]) -> None:
        client = self._client()
        if client is not None:
            client.loop.call_later(seconds, settle)


@dataclass(frozen=True, slots=True)
class _Handler:
    """Of one topic: ours, and the user's own before it."""

    hear: Callable[[float, dict[str, Any]], None]
    other: Any

    def __call__(self, event: tuple[float, Any]) -> Any:
        at, content = event
        if isinstance(content, dict):
            with suppress(Exception):
                self.hear(at, content)
        return None if self.other is None else self.other(event)


_streams: weakref.WeakKeyDictionary[Any, _Stream] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _say_exit(event: dict[str, Any]) -> str:
    """Write how a process has ended."""
    code, host = event["exitcode"], event["host"]
    if code > 0:
        how = f"ended with exit code {code}" if code != _KILLED else "was killed by a signal"
    else:
        with suppress(ValueError):
            code = signal.Signals(-code).name
        how = f"was killed by {code}"
    short = ", and the kernel has ended a process there for want of memory" if event["short_of_memory"] else ""
    return f"its process on {host} {how}{short}"
