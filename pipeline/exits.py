"""What is still open when Python ends: ended while all modules are whole, so that nothing is said about it."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 (registers before this module does)
import contextlib
import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator

_numbers = itertools.count()
_open: weakref.WeakValueDictionary[int, Generator[Any, None, None]] = weakref.WeakValueDictionary()
_ending = threading.Event()


def close_at_exit(generator: Generator[Any, None, None]) -> None:
    """Close a generator when the main thread ends, if it is still open, those begun last first.

    Python would close it later, when what its `finally` clauses call may be gone, and print what they raise.
    """
    _open[next(_numbers)] = generator


def is_ending() -> bool:
    """Whether the main thread has ended, after which no thread pool takes work."""
    return _ending.is_set()


def _close_all() -> None:
    _ending.set()
    for generator in reversed(list(_open.values())):
        # Another thread may be in it. No one is left who could act on what it raises.
        with contextlib.suppress(Exception):
            generator.close()


# `atexit` comes too late: before it, Python waits until the pools of `concurrent.futures.thread`, which registers like
# this when it is imported, have done all that they were asked for. What was registered last is called first.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
