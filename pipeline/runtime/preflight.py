"""Workers in other processes, asked before a run what they see, what they have installed, and where they are."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import sys
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from pipeline.cluster.connect import await_worker
from pipeline.cluster.security import is_plain
from pipeline.errors import OpenError, PipelineError
from pipeline.formatting import count_of
from pipeline.runtime.resources import active_client, shares_memory
from pipeline.runtime.shared_memory import open_handle, share_memory
from pipeline.storage.filesystem import may_write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pipeline.runtime.shared_memory import Handle

_PACKAGE = "random-windows"
_DECIDING = {_PACKAGE: 3, "python": 2, "dask": 2, "distributed": 2, "zarr": 2, "numpy": 1}
"""Parts of a version that must be the same: tasks are pickled objects of these, and zarr writes what they make.

All of our own: a task of one release is no promise to another. Python's minor version is that of functions' bytecode.
"""
_COMPARED = ("numcodecs", "cloudpickle", "msgpack", "obstore")
"""Others, whose versions are told of where they differ."""
_ANSWER_SECONDS = 20
"""A worker that is busy with something that holds the interpreter answers late; one that hangs never does."""
_REACH_SECONDS = 3
_MOST_REACHED = 16
"""Hosts that are tried: a network lets a client through to all of its machines, or to none."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_OOM = Path("/proc/self/oom_score_adj")
_OOM_SCORE = 500
"""As if it held half of the memory that there is, in addition; a process may always raise its own."""
_MET = 64


class Sight(Protocol):
    """Something that a worker must see: a fingerprint, a folder, a claim. Picklable."""

    def look(self) -> str:
        """Look for it from this process: its name and what is wrong with it; empty where nothing is."""


@dataclass(frozen=True, slots=True)
class FolderSight:
    """A folder on a disk that a worker must be allowed to read, or to write."""

    path: str
    written: bool

    def look(self) -> str:
        """Say why the folder cannot be used."""
        if not os.path.isdir(self.path):  # noqa: PTH112
            return f"{self.path}: No such folder"
        if may_write(Path(self.path)) if self.written else os.access(self.path, os.R_OK | os.X_OK):
            return ""
        return f"{self.path}: it may not be {'written' if self.written else 'read'}"


@dataclass(frozen=True, slots=True)
class Terms:
    """What a worker must have in common with the client to do the tasks of a run. Plain data, sent with each task."""

    run: str
    versions: dict[str, str]
    sights: tuple[Sight, ...]
    boot: str
    """Tells the machine of the client."""

    def problem(self) -> str:
        """Say why this process cannot do the tasks; empty where it can."""
        if self.boot == _boot():
            _stand_in()
        own = find_versions()
        for name, parts in _DECIDING.items():
            # What is not installed, but found on a path, such as a source tree, has no version.
            wanted, found = self.versions.get(name), own.get(name)
            if wanted and found and wanted.split(".")[:parts] != found.split(".")[:parts]:
                return f"has {name} {found}, the client {wanted}; install the same"
        return next((f"does not see {words}" for sight in self.sights if (words := sight.look())), "")


class Answer(NamedTuple):
    """What a worker says of itself."""

    problem: str
    versions: dict[str, str]
    shares: bool
    """Whether it can write into memory of the client."""
    boot: str
    """Tells the machine that it is on."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of the workers of a run."""

    terms: Terms | None
    """What later ones must fulfil; None where all are in this process."""
    shares: bool
    """All can write into memory of this process."""
    same_host: bool
    """Some take memory of this machine."""
    reached: bool
    """This process can connect to them, so that results need not pass through the scheduler."""

    @property
    def in_process(self) -> bool:
        """All workers are threads of this process."""
        return self.terms is None

    def bound(self, at_once: int) -> int:
        """Limit tasks under way to those that this machine's memory allows, where some run on it."""
        return at_once if self.same_host else sys.maxsize

    def guard[**P, T](self, function: Callable[P, T]) -> Callable[P, T]:
        """Let a task's function look first whether its worker can do it, and name that where it fails."""
        return function if self.terms is None else partial(do_on_worker, self.terms, function)


IN_PROCESS = Survey(terms=None, shares=True, same_host=True, reached=False)

_met: dict[str, str] = {}
"""By the run, what is wrong with this process as its worker; the last few runs."""


def do_on_worker[**P, T](terms: Terms, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Do a task where this process fulfils the terms of its run, at which it looks once.

    Raises
    ------
    OpenError
        Naming this worker, and what it does not see or have.
    """
    _check_terms(terms)
    try:
        return function(*arguments, **keywords)
    except PipelineError as error:
        error.add_note(f"on worker {own_name()}")
        raise


def _check_terms(terms: Terms) -> None:
    problem = _met.get(terms.run)
    if problem is None:
        problem = _met[terms.run] = terms.problem()
        while len(_met) > _MET:
            _met.pop(next(iter(_met)), None)
    if problem:
        raise _refusal(problem, [own_name()])


def own_name() -> str:
    """Address of the worker that runs this, else the process."""
    if "distributed" in sys.modules:
        from distributed import get_worker

        with suppress(ValueError):
            return str(get_worker().address)
    return f"process {platform.node()}"


def survey_workers(sights: Iterable[Sight] = (), *, say: Callable[[str], None], reach: bool = False) -> Survey:
    """Ask every worker of the active client, by one request to each, whether it can do the tasks of a run.

    Parameters
    ----------
    sights
        What each must see.
    say
        Takes a line that the user should read.
    reach
        Whether results are to come straight from the workers, so that it is tried to connect to them.

    Raises
    ------
    OpenError
        If one does not see something, lacks this package, or has another version of what must be the same; if none
        comes in time.
    """
    client = active_client()
    if client is not None and client.status == "running":
        await_worker(client)
    if shares_memory(client):
        return IN_PROCESS
    terms = Terms(uuid.uuid4().hex, find_versions(), tuple(sights), _boot())
    if client is None:
        return Survey(terms, shares=False, same_host=True, reached=False)
    probe = share_memory((1,), np.dtype("u1"))
    try:
        replies = _ask(client, terms, None if probe is None else probe.handle)
    except TimeoutError:
        say(
            f"workers did not answer within {_ANSWER_SECONDS} s: what they see is found out by their tasks; look at "
            "the dashboard"
        )
        return Survey(terms, shares=False, same_host=True, reached=False)
    finally:
        if probe is not None:
            probe.close(0)
    answers = _judge(replies)
    for line in _tell_differences(terms.versions, answers):
        say(line)
    shares = bool(answers) and all(answer.shares for answer in answers.values())
    survey = Survey(
        terms, shares=shares, same_host=any(answer.boot == _boot() for answer in answers.values()), reached=False
    )
    if shares or not reach:
        return survey
    unreached = client.sync(_find_unreached, client, list(answers))
    if unreached:
        say(f"results pass through the scheduler, which takes longer: this machine cannot connect to {unreached}")
    return Survey(terms, shares=False, same_host=survey.same_host, reached=not unreached)


async def answer(terms: Terms, probe: Handle | None) -> Answer:
    """Answer for a worker, in a thread of its own: a disk or store may take long, or hang."""
    return await asyncio.to_thread(_answer, terms, probe)


def _answer(terms: Terms, probe: Handle | None) -> Answer:
    shares = False
    if probe is not None:
        with open_handle(probe) as writer:
            shares = writer is not None
    return Answer(terms.problem(), find_versions(), shares, _boot())


def _ask(client: Any, terms: Terms, probe: Handle | None) -> dict[str, Any]:
    """Return what each worker answers, or the exception that it raised."""
    replies: dict[str, Any] = client.sync(
        client._run,  # noqa: SLF001 (`Client.run` has no timeout)
        answer,
        terms,
        probe,
        on_error="return",
        callback_timeout=_ANSWER_SECONDS,
    )
    return replies


def _judge(replies: dict[str, Any]) -> dict[str, Answer]:
    """Return the answers of workers that can do the tasks; those that went meanwhile are left out."""
    problems: dict[str, list[str]] = {}
    answers = {}
    for worker, reply in replies.items():
        if isinstance(reply, Answer):
            answers[worker] = reply
            if reply.problem:
                problems.setdefault(reply.problem, []).append(worker)
        elif isinstance(reply, ImportError):
            words = " ".join(str(reply).split())
            own = f"; install {_PACKAGE}" if (reply.name or "").partition(".")[0] == __name__.partition(".")[0] else ""
            problems.setdefault(f"lacks a package: {words}{own or '; install it'}", []).append(worker)
        elif not isinstance(reply, OSError):
            words = " ".join(f"{type(reply).__name__}: {reply}".split())[:300]
            problems.setdefault(f"failed: {words}; look at its log", []).append(worker)
    if problems:
        problem, workers = next(iter(problems.items()))
        raise _refusal(problem, workers, len(replies))
    return answers


def _refusal(problem: str, workers: list[str], count: int | None = None) -> OpenError:
    what, _, way_out = problem.partition("; ")
    several = f" ({len(workers):,} of {count_of(count, 'worker')})" if count and count > 1 else ""
    way_out = way_out or "let it see the same files, at the same path, or take workers that do"
    return OpenError(
        f"a worker sees what its tasks read and write, with the client's packages; {workers[0]}{several} {what}; "
        f"{way_out}"
    )


def _tell_differences(own: dict[str, str], answers: dict[str, Answer]) -> list[str]:
    """Say which versions differ that may."""
    found = Counter(
        (name, wanted, has)
        for answer in answers.values()
        for name, wanted in own.items()
        if (has := answer.versions.get(name, "none")) != wanted
    )
    if not found:
        return []
    words = ", ".join(f"{name} {has} ({wanted} here)" for name, wanted, has in sorted(found))
    return [f"versions on {count_of(max(found.values()), 'worker')} differ from those here: {words}"]


async def _find_unreached(client: Any, workers: list[str]) -> str:
    """Return a worker that this process cannot connect to; empty where there is none."""
    from distributed.comm import get_address_host

    # A tunnel leads to the scheduler alone: nobody said that data may travel in plain beside it.
    tunnelled = is_plain(client.scheduler.address, loopback=True)

    async def reach(worker: str) -> bool:
        if tunnelled and is_plain(worker, loopback=False):
            return False
        try:
            comm = await asyncio.wait_for(client.rpc.connect(worker), _REACH_SECONDS)
        except Exception:  # noqa: BLE001 (whatever it is, results cannot come that way)
            return False
        client.rpc.reuse(worker, comm)
        return True

    hosts = {get_address_host(worker): worker for worker in workers}
    tried = list(hosts.values())[:_MOST_REACHED]
    reached = await asyncio.gather(*map(reach, tried))
    return next((worker for worker, yes in zip(tried, reached, strict=True) if not yes), "")


@cache
def find_versions() -> dict[str, str]:
    """Versions of what tasks depend on, as far as it is installed here."""
    versions = {"python": platform.python_version()}
    for name in (*_DECIDING, *_COMPARED):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.setdefault(name, importlib.metadata.version(name))
    return versions


def _stand_in() -> None:
    """Let the kernel, where it is short of memory, end this worker, whose tasks are run again, before its client."""
    with suppress(OSError, ValueError):
        if int(_OOM.read_text()) < _OOM_SCORE:
            _OOM.write_text(str(_OOM_SCORE))


def _boot() -> str:
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return platform.node()
