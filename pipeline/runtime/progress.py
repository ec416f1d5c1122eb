"""Progress on stderr: a bar on a terminal or in a notebook, a plain line every ten seconds elsewhere; stalls, too."""

from __future__ import annotations

import contextvars
import logging
import multiprocessing
import os
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

from dask.callbacks import Callback

from pipeline.arguments import check_flag
from pipeline.errors import InputError
from pipeline.formatting import count_of, format_size
from pipeline.memory import held_nbytes
from pipeline.redaction import plain_words
from pipeline.runtime.report import Watch, watched
from pipeline.runtime.resources import active_client, count_threads, is_in_task, measure_workers
from pipeline.runtime.tasks import Receipt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tqdm import tqdm

type Form = Literal["bar", "lines", "nothing"]

VARIABLE = "PIPELINE_PROGRESS"
"""Of the environment: whether to show progress."""
_WORDS: dict[str, bool | None] = {"": None}
_WORDS |= dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True)
_WORDS |= dict.fromkeys(("0", "false", "f", "no", "n", "off"), False)
_SECONDS = 10.0
_BAR_SECONDS = 5.0
"""How often the bar tells of memory: a scheduler that is asked lists all of its workers."""
_DELAY_SECONDS = 0.5
"""A run that ends sooner shows no bar."""
_STALL_SECONDS = 60.0
"""A run stalls when no task has finished for so long, and for several times the longest task."""
_STALL_TASKS = 4


@contextmanager
def shown(verb: str, unit: str, *, progress: bool | None, repetition: float = 1.0) -> Iterator[Watch]:
    """Yield a watch for the run of a public function in the block, as `watched` does, and show its progress.

    Parameters
    ----------
    unit
        What the watch counts, in the plural.
    progress
        As of `gather`.

    Raises
    ------
    InputError
        If `progress`, or the variable of the environment, is neither true nor false.
    """
    form = choose_form(progress)
    with watched(verb, repetition=repetition) as watch, Progress(watch, unit, form):
        yield watch


def choose_form(progress: bool | None, *, lines: bool = False) -> Form:
    """Tell how progress is shown: the argument decides, else the environment, else the level of logging.

    Parameters
    ----------
    progress
        None: automatic.
    lines
        Whether automatic is a line every ten seconds where there is no terminal and no notebook; else it is nothing.
    """
    wanted = read_setting() if progress is None else check_flag("progress", progress)
    if wanted is None and not lines and _is_muted():
        wanted = False
    if wanted is False:
        return "nothing"
    if _is_terminal() or _is_notebook():
        return "bar"
    return "lines" if wanted or lines else "nothing"


def read_setting() -> bool | None:
    """Whether the environment asks for progress; None where it does not say."""
    word = os.environ.get(VARIABLE, "")
    if word.strip().lower() not in _WORDS:
        raise InputError(f"the environment variable {VARIABLE} is {word!r}; set it to 1 or 0, or unset it")
    return _WORDS[word.strip().lower()]


def _is_muted() -> bool:
    """Whether the user wants less than information of this package, or many processes share one stderr."""
    logger = logging.getLogger("pipeline")
    quiet = logger.disabled or logger.level > logging.INFO or logger.manager.disable >= logging.INFO
    return quiet or multiprocessing.parent_process() is not None or is_in_task()


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:
        # It is closed.
        return False


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


class Progress:
    """Context manager that shows what a watch counts, from its `begin` until the block ends."""

    def __init__(self, watch: Watch, unit: str, form: Form) -> None:
        self._watch = watch
        self._unit = unit
        self._form = form
        self._bar: tqdm[Any] | None = None
        self._drawing = threading.RLock()
        """Held while the bar changes: tqdm counts without a lock of its own."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._client: Any = None
        self._at_once = 1
        self._seen_tasks = self._seen_units = 0
        """Finished on a scheduler of Dask's own, which hands over results in groups; the watch has not counted them."""
        self._seeing = Callback(posttask=self._see)
        self._owner: int | None = None
        """Thread of the run, where Dask's own scheduler does it."""
        self._last: tuple[float, float]
        """When a task finished last, or the run began: by the clock that never goes back, and by the wall's."""

    def __enter__(self) -> Self:
        self._watch.listener = self
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.listener = None
        if self._owner is not None:
            self._seeing.unregister()
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def begin(self) -> None:
        """Start to show progress."""
        if self._form == "nothing":
            return
        # The thread that tells has none of its own where the caller's is of a context.
        self._client = active_client()
        self._at_once = count_threads(self._client)
        self._last = time.perf_counter(), time.time()
        if self._form == "bar":
            self._bar = _open_bar(self._watch.units, self._unit)
        if self._client is None:
            self._owner = threading.get_ident()
            self._seeing.register()
        # In the caller's context, by which a notebook knows the cell that is to show the bar.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._tell,), name="progress", daemon=True)
        self._thread.start()

    def advance(self, units: int, *, kept: bool) -> None:
        """Move the bar by a task; `kept`: an earlier run had finished it."""
        if kept:
            self._move(units, initial=units)
            return
        seen = min(units, self._seen_units)
        self._seen_units -= seen
        self._seen_tasks -= seen > 0
        self._move(units - seen)

    def _see(self, _key: object, result: object, *_: object) -> None:
        """Take notice of a task that is done, and that the watch will count with others: of this thread's run alone."""
        receipt = result[0] if isinstance(result, tuple) and result else result
        if isinstance(receipt, Receipt) and threading.get_ident() == self._owner:
            self._seen_tasks += 1
            self._seen_units += receipt.units
            self._move(receipt.units)

    def _move(self, units: int, *, initial: int = 0) -> None:
        """Move the bar; `initial`: units that count for nothing in its pace."""
        if not initial:
            self._last = time.perf_counter(), time.time()
        if self._bar is not None and units:
            with self._drawing:
                self._bar.initial += initial
                self._bar.update(units)

    def write(self, line: str) -> None:
        """Write a line, above the bar where there is one."""
        line = plain_words(f"{time.strftime('%H:%M:%S')} {line}")
        if self._bar is None:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        else:
            with self._drawing:
                # It draws the bar again, which is then there to be removed.
                self._bar.write(line, file=sys.stderr)
                self._bar.delay = 0.0

    def _tell(self) -> None:
        told = None
        if self._bar is not None and not self._ended.wait(_DELAY_SECONDS):
            with self._drawing:
                # A bar that no task has moved yet appears all the same.
                self._bar.update(0)
        pause = _SECONDS if self._bar is None else min(_SECONDS, _BAR_SECONDS)
        while not self._ended.wait(pause):
            memory = self._memory()
            if self._bar is None:
                self.write(f"{self._progress()}, {memory}")
            else:
                with self._drawing:
                    self._bar.set_postfix_str(memory)
            last, watch = self._last, self._watch
            silent = time.perf_counter() - last[0]
            left = watch.tasks - watch.kept_tasks - watch.done_tasks - self._seen_tasks
            if left and told != last and silent > max(_STALL_SECONDS, _STALL_TASKS * watch.longest_seconds):
                told = last
                since = time.strftime("%H:%M:%S", time.localtime(last[1]))
                self.write(
                    f"stalled: no task has finished for {silent:.0f} s, since {since}; "
                    f"{count_of(min(left, self._at_once), 'task')} under way, {left:,} not done; look at the storage "
                    f"and at the dashboard"
                )

    def _progress(self) -> str:
        watch = self._watch
        passed = time.perf_counter() - watch.started
        # What an earlier run had done tells nothing of this one's pace.
        done = watch.done_units + self._seen_units
        own = done - watch.kept_units
        left = f"{passed * (watch.units - done) / own:.0f} s left" if own else "time left not known yet"
        return (
            f"{done:,} of {watch.units:,} {self._unit} ({done / watch.units:.0%}), "
            f"{watch.done_tasks + watch.kept_tasks + self._seen_tasks:,} of {watch.tasks:,} tasks, "
            f"{format_size(watch.nbytes * own / watch.units / passed)}/s, {left}"
        )

    def _memory(self) -> str:
        """Memory of this process and its descendants, and of workers that are none."""
        workers, nbytes = measure_workers(self._client)
        own = f"{format_size(held_nbytes())} of memory"
        return f"{own} here, {format_size(nbytes)} in {count_of(workers, 'worker')}" if workers else own


class ShownWatch(Watch):
    """The watch of the command line: progress is shown, and what else there is to say; nothing where all is quiet."""

    def __init__(self, unit: str, *, quiet: bool, progress: bool | None = None) -> None:
        super().__init__()
        self._quiet = quiet
        self._progress = Progress(self, unit, choose_form(False if quiet else progress, lines=True))

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._progress.__exit__(*failure)

    def task_retried(self, words: str) -> None:
        """Count a task that is run again, and say why."""
        super().task_retried(words)
        self.say(words)

    def log(self, line: str) -> None:
        """Tell the user; each line has its time."""
        self.say(line)

    def say(self, line: str) -> None:
        """Tell the user, unless all is to be quiet."""
        if not self._quiet:
            self._progress.write(line)


def _open_bar(total: int, unit: str) -> tqdm[Any]:
    with warnings.catch_warnings():
        # In a notebook without ipywidgets tqdm would warn; its bar of text does as well.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    settings: dict[str, Any] = {"leave": False, "delay": _DELAY_SECONDS}
    # A terminal that does not tell its size, as in some containers, has no room at all to tqdm.
    settings |= {"dynamic_ncols": True} if _has_size() else {"ncols": 80, "nrows": 24}
    return tqdm(total=total, unit=f" {unit}", file=sys.stderr, **settings)


def _has_size() -> bool:
    """Whether stderr is no terminal, or one that tells its size."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).lines > 0
    except (OSError, ValueError):
        return True
