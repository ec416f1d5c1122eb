"""Every failure that a user can meet: one base class, an exit code each, and the built-in that a caller would catch."""

from __future__ import annotations

import errno
import re
from typing import override

from pipeline.redaction import plain_words, scrub

_SHORTAGE = re.compile(r"failed to map segment|cannot allocate memory|can't start new thread", re.IGNORECASE)
"""What the system's loader and threads say where there is no more memory, or no more address space."""


class PipelineError(Exception):
    """Base of every error that this package raises on purpose.

    The message is one line: the rule, what was got, the way out.
    """

    exit_code = 1
    """Exit code of the command line."""
    passing = False
    """Whether a task that raised it may succeed a while later: what a network, or a server that is busy, has caused."""

    def __init__(self, *args: object) -> None:
        # Whoever prints it, logs it or sends it on tells no password that a URL had.
        super().__init__(*(scrub(each) if isinstance(each, str) else each for each in args))

    @override
    def add_note(self, note: str, /) -> None:
        """See `BaseException.add_note`."""
        super().add_note(scrub(note))

    def __str__(self) -> str:
        # A name may have line breaks, and what a terminal obeys.
        return plain_words(super().__str__())

    def __reduce__(self) -> tuple[object, ...]:
        # As every exception, but said here: otherwise tblib, by which Dask sends them, fails on a MemoryError of ours.
        return type(self), self.args, self.__dict__


class InputError(PipelineError, ValueError):
    """An argument, a flag or a key of `cluster.yaml` with a value that cannot be used."""

    exit_code = 2


class OpenError(PipelineError, OSError):
    """A source, matrix, starts or cluster file that cannot be opened or parsed, or a cluster that cannot be reached."""

    exit_code = 3


class NotFoundError(OpenError, FileNotFoundError):
    """A named file or folder that is not there."""


class IntegrityError(PipelineError, RuntimeError):
    """Data that are not what their metadata promise, or an `apply` that breaks its contract."""

    exit_code = 4


class BudgetError(PipelineError, MemoryError):
    """The memory budget is too small for the request."""

    exit_code = 5


class DiskSpaceError(PipelineError, OSError):
    """The disk is too small for the output."""

    exit_code = 5


class IncompleteError(PipelineError, RuntimeError):
    """Tasks that failed for good: workers lost, scheduler gone."""

    exit_code = 6


class OutputExistsError(PipelineError, FileExistsError):
    """The output exists already, or another run's remains do."""

    exit_code = 7


def find_shortage(error: BaseException) -> BudgetError | None:
    """Return our error of a want of memory that an exception comes from, whatever library turned it into what.

    Examples
    --------
    >>> print(find_shortage(ImportError("x.so: failed to map segment from shared object")))
    not enough memory: x.so: failed to map segment from shared object; raise the limit (ulimit -v), or ask for less
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, BudgetError):
            return link
        short = isinstance(link, MemoryError) or (isinstance(link, OSError) and link.errno == errno.ENOMEM)
        if short or (isinstance(link, ImportError | OSError | RuntimeError) and _SHORTAGE.search(str(link))):
            found = _SHORTAGE.search(str(link))
            lines = [line.strip() for line in str(link).splitlines() if not found or _SHORTAGE.search(line)]
            words = next(filter(None, lines), type(link).__name__)
            return BudgetError(f"not enough memory: {words}; raise the limit (ulimit -v), or ask for less")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None
