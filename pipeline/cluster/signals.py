"""Signals: the first unwinds, so that what is begun is left in order; the next ends at once, as does time."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_SECONDS = {signal.SIGINT: 4.0, signal.SIGTERM: 8.0}
"""How long unwinding may take."""
_WORKER = "Dask Worker process"
"""How distributed names its processes."""


class Terminated(BaseException):
    """SIGTERM: unwinds as Ctrl-C does."""


class Guard:
    """Context manager of the main thread that turns SIGINT into KeyboardInterrupt and SIGTERM into Terminated, once.

    A thread sees each signal even while the main one is in the hands of the system, of a lock, or of a task that cannot
    be stopped. After the second signal, or when the seconds for unwinding are over, it kills worker processes and ends
    this one, with 128 and the number of the first.

    Parameters
    ----------
    say
        Tells the user of an error; called once, by whichever thread ends the process.
    """

    interruption: BaseException | None
    """What the first signal raised; code that unwinds may add notes to it."""

    def __init__(self, say: Callable[[BaseException], None]) -> None:
        self.interruption = None
        self._tell = say
        self._told = False
        self._telling = threading.Lock()
        self._reader, self._writer = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    def __enter__(self) -> Self:
        self._writer.settimeout(0)
        self._stdout = os.dup(1)
        self._before = {number: signal.signal(number, self._unwind) for number in _SECONDS}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> None:
        if self.interruption is not None and isinstance(error, SystemExit):
            # All is in order. The interpreter's own end may take long, and would be by the signal itself, not by an
            # exit code, where that came while some library called `exec`.
            kill_workers()
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(error.code if isinstance(error.code, int) else 1)
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()
        os.close(self._stdout)

    def settle(self, error: BaseException) -> BaseException:
        """Tell what ends the run: once interrupted, whatever else fails while it unwinds counts for its notes alone."""
        if self.interruption is None or error is self.interruption:
            return error
        for note in getattr(error, "__notes__", []):
            self.interruption.add_note(note)
        return self.interruption

    def say(self, error: BaseException) -> None:
        """Tell the user of an error, unless one was told of already."""
        with self._telling:
            if not self._told:
                self._told = True
                self._tell(error)

    def _unwind(self, number: int, _frame: FrameType | None) -> None:
        if self.interruption is None:
            self.interruption = _interruption(number)
            # Raised where nothing may be raised, such as in a finalizer, it would be printed, and lost.
            sys.unraisablehook = lambda _: None
            # What libraries log while they are closed, or after, is no news.
            logging.disable(logging.CRITICAL)
            raise self.interruption

    def _watch(self) -> None:
        while received := self._reader.recv(1):
            if received[0] in _SECONDS:
                break
        else:
            return
        number = signal.Signals(received[0])
        self._reader.settimeout(_SECONDS[number])
        with suppress(TimeoutError):
            self._reader.recv(1)
        kill_workers()
        # The main thread may have put others in their places for a while.
        os.dup2(self._stdout, 1)
        sys.stdout, sys.stderr = sys.__stdout__ or sys.stdout, sys.__stderr__ or sys.stderr
        error = self.interruption or _interruption(number)
        if not hasattr(error, "__notes__"):
            error.add_note("if an output was begun, it lies beside its place, as .partial; run it again with --resume")
        with suppress(Exception):
            self.say(error)
        os._exit(128 + number)


def _interruption(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


def kill_workers() -> None:
    """Kill the worker processes that this one has started."""
    if "multiprocessing" not in sys.modules:
        return
    import multiprocessing

    for child in multiprocessing.active_children():
        if child.name.startswith(_WORKER):
            with suppress(Exception):
                child.kill()
