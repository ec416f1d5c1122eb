"""What is still open when Python ends: ended while all modules are whole, so that nothing is said about it."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 (registers before this module does)
import contextlib
import itertools
import threading
import weakref
from typing import Protocol


class Closable(Protocol):
    """What ends when it is closed, such as a generator."""

    def close(self) -> object:
        """End; once more does nothing."""


_numbers = itertools.count()
_open: weakref.WeakValueDictionary[int, Closable] = weakref.WeakValueDictionary()
_ending = threading.Event()


def close_at_exit(opened: Closable) -> None:
    """Close a generator, or what is like one, when the main thread ends, if it is still open, those begun last first.

    Python would close it later, when what its `finally` clauses call may be gone, and print what they raise.
    """
    _open[next(_numbers)] = opened


def is_ending() -> bool:
    """Whether the main thread has ended, after which no thread pool takes work."""
    return _ending.is_set()


def _close_all() -> None:
    _ending.set()
    for opened in reversed(list(_open.values())):
        # Another thread may be in it. No one is left who could act on what it raises.
        with contextlib.suppress(Exception):
            opened.close()


# `atexit` comes too late: before it, Python waits until the pools of `concurrent.futures.thread`, which registers like
# this when it is imported, have done all that they were asked for. What was registered last is called first.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
