"""Progress: what a batch job's log and a terminal say of rate, time and memory."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import re
import sys
import termios
import threading
import types

import distributed
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import pipeline
from pipeline.runtime import progress
from pipeline.runtime.report import Watch
from pipeline.runtime.resources import measure_workers
from pipeline.runtime.tasks import Receipt


class Stream(io.StringIO):
    """Standard error that is a terminal, or none, and says when a line is complete."""

    def __init__(self, *, tty):
        super().__init__()
        self.written = threading.Event()
        self.isatty = lambda: tty

    def write(self, text):
        if "\n" in text or "memory" in text:
            self.written.set()
        return super().write(text)


@pytest.fixture
def fast(monkeypatch):
    """Make progress as fast as it can be, on a stream; in the test itself, since pytest has its own until then."""

    def make(*, tty):
        made = Stream(tty=tty)
        monkeypatch.setattr(sys, "stderr", made)
        monkeypatch.setattr(progress, "_SECONDS", 0.001)
        monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
        return made

    return make


def test_pace_is_that_of_this_run(fast):
    """An earlier one had done half of it: that took no time of this one."""
    stream = fast(tty=False)
    with progress.ShownWatch("windows", quiet=False) as watch:
        watch.begin(8, 800, 8_000_000)
        for _ in range(4):
            watch.task_kept(100)
        watch.started -= 10
        watch.task_done(Receipt(4, 100, 900, 0.1))
        stream.written.clear()
        assert stream.written.wait(10)
        stream.written.clear()
        assert stream.written.wait(10)
    line = stream.getvalue().splitlines()[-1]
    # 1 MB in ten seconds; three times as much is left.
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d 500 of 800 windows \(62%\), 5 of 8 tasks, 9\d\.\d KiB/s, 30 s left, [\d.]+ [MG]iB of memory",
        line,
    )


def test_memory_is_what_is_held_now(fast):
    stream = fast(tty=False)
    held = []

    def said():
        stream.written.clear()
        assert stream.written.wait(10)
        stream.written.clear()
        assert stream.written.wait(10)
        number, unit = stream.getvalue().splitlines()[-1].split(", ")[-1].removesuffix(" of memory").split()
        return float(number) * {"MiB": 1, "GiB": 1024}[unit]

    with progress.ShownWatch("windows", quiet=False) as watch:
        watch.begin(8, 800, 800)
        before = said()
        held.append(np.ones(600 * 2**17))
        # Services that other tests have started are children, too, and may grow.
        assert 580 <= said() - before <= 760


def test_bar_tells_of_memory(fast):
    stream = fast(tty=True)
    with progress.ShownWatch("windows", quiet=False) as watch:
        watch.begin(8, 800, 800)
        watch.task_done(Receipt(0, 100, 900, 0.1))
        assert stream.written.wait(10)
    assert re.search(
        r"\d windows/s, [\d.]+ [MG]iB of memory\]|\? windows/s, [\d.]+ [MG]iB of memory\]", stream.getvalue()
    )
    assert "\n" not in stream.getvalue()


def test_pace_of_the_bar_is_that_of_this_run(fast):
    stream = fast(tty=True)
    with progress.ShownWatch("windows", quiet=False) as watch:
        watch.begin(2, 1_000_001, 800)
        watch.task_kept(1_000_000)
        watch._progress._bar.start_t -= 10
        watch.task_done(Receipt(0, 1, 900, 0.1))
        watch._progress._bar.refresh()
        assert re.search(r"1000001/1000001 .* 10.\d\d windows|1000001/1000001 .*1\d\.\d\ds/ windows", stream.getvalue())


def test_workers_elsewhere_are_told_apart(fast, monkeypatch):
    stream = fast(tty=False)
    monkeypatch.setattr(progress, "measure_workers", lambda client: (12, 34 * 2**30))
    with progress.ShownWatch("windows", quiet=False) as watch:
        watch.begin(8, 800, 800)
        assert stream.written.wait(10)
    assert stream.getvalue().splitlines()[0].endswith(" of memory here, 34.0 GiB in 12 workers")


def test_workers_that_we_did_not_start():
    keywords = {"n_workers": 2, "processes": False, "protocol": "tcp", "host": "127.0.0.1", "memory_limit": 0}
    with distributed.LocalCluster(
        **keywords, dashboard_address="127.0.0.1:0", worker_dashboard_address="127.0.0.1:0"
    ) as cluster:
        with distributed.Client(cluster, set_as_default=False) as client:
            # They are in the tree of this process, and count as its own.
            assert measure_workers(client) == (0, 0)
        with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
            workers, nbytes = measure_workers(client)
            assert workers == 2
            assert 2 * 10e6 < nbytes < 2 * 4e9
        # Not known, and nothing that a run should end for.
        assert measure_workers(client) == (0, 0)
    assert measure_workers(None) == (0, 0)


def plan_of(samples, **options):
    return pipeline.plan_windows(
        pipeline.open_matrix(samples / "A.zarr"), list(range(0, 1900, 10)), length=16, **options
    )


def gather_group(samples, folder, **options):
    group = pipeline.open_matrix({"x": samples / "A.zarr", "y": samples / "A.npy"})
    return pipeline.gather(pipeline.plan_windows(group, list(range(0, 1900, 10)), length=16), **options)


CALLS = {
    "gather": (lambda samples, folder, **options: pipeline.gather(plan_of(samples), **options), "0/190", "windows"),
    "gather-npy": (
        lambda samples, folder, **options: pipeline.gather(plan_of(samples), out=folder / "w.npy", **options),
        "0/190",
        "windows",
    ),
    "gather-group": (gather_group, "0/380", "windows"),
    "store": (
        lambda samples, folder, **options: pipeline.store(plan_of(samples), folder / "w.zarr", **options),
        "0/190",
        "windows",
    ),
    "create_matrix": (
        lambda samples, folder, **options: pipeline.create_matrix(samples / "A.npy", folder / "B.zarr", **options),
        "0/2000",
        "rows",
    ),
    "verify": (lambda samples, folder, **options: pipeline.verify(samples / "A.zarr", **options), "0/8", "ranges"),
    "write_manifest": (
        lambda samples, folder, **options: pipeline.write_manifest(samples / "A.npy", folder / "m.json", **options),
        "0/1",
        "ranges",
    ),
}


@pytest.fixture(params=CALLS)
def call(request, samples, tmp_path):
    """A public function that reads, what its bar shows first, and the unit."""
    function, first, unit = CALLS[request.param]
    return lambda **options: function(samples, tmp_path, **options), first, unit


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv(progress.VARIABLE, raising=False)


def test_every_function_that_reads_shows_one_bar_on_a_terminal(call, fast):
    function, first, unit = call
    stream = fast(tty=True)
    function()
    shown = stream.getvalue()
    # As it is drawn first; later it has the memory, too.
    assert shown.count(f"| {first} [00:00<?, ? {unit}/s]") == 1
    # It is removed at the end.
    assert "\n" not in shown
    assert shown.endswith("\r")
    assert not any(thread.name == "progress" for thread in threading.enumerate())


@pytest.mark.parametrize("size", [(24, 100), (0, 0)])
def test_a_real_terminal(samples, monkeypatch, size):
    """Also one that does not tell its size."""
    parent, child = os.openpty()
    termios.tcsetwinsize(child, size)
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    with monkeypatch.context() as patch, os.fdopen(child, "w") as terminal:
        patch.setattr(sys, "stderr", terminal)
        pipeline.gather(plan_of(samples))
    shown = b""
    with contextlib.suppress(OSError):  # How a terminal ends on Linux.
        while piece := os.read(parent, 65536):
            shown += piece
    os.close(parent)
    assert shown.count(b"| 0/190 [") == 1
    assert shown.endswith(b"\r")


def mute_logger(patch):
    patch.setattr(logging.getLogger("pipeline"), "level", logging.WARNING)


def mute_all(patch):
    patch.setattr(logging.root.manager, "disable", logging.INFO)


MUTED = {
    "argument": lambda patch: {"progress": False},
    "argument over variable": lambda patch: patch.setenv("PIPELINE_PROGRESS", "1") or {"progress": False},
    "variable": lambda patch: patch.setenv("PIPELINE_PROGRESS", "off"),
    "level": mute_logger,
    "all logging": mute_all,
    "a child": lambda patch: patch.setattr(multiprocessing, "parent_process", object),
    "a task": lambda patch: patch.setattr(progress, "is_in_task", lambda: True),
    "a short run": lambda patch: patch.setattr(progress, "_DELAY_SECONDS", 1e6),
}


@pytest.mark.parametrize("how", MUTED)
def test_a_terminal_is_left_alone(call, fast, monkeypatch, how):
    function, _, _ = call
    stream = fast(tty=True)
    function(**(MUTED[how](monkeypatch) or {}))
    assert stream.getvalue() == ""


@pytest.mark.parametrize("how", ["level", "all logging", "a child"])
@pytest.mark.parametrize("asked", [{"progress": True}, {}])
def test_who_asks_for_progress_gets_it(samples, fast, monkeypatch, how, asked):
    stream = fast(tty=True)
    MUTED[how](monkeypatch)
    if not asked:
        monkeypatch.setenv("PIPELINE_PROGRESS", "yes")
    pipeline.gather(plan_of(samples), **asked)
    assert "| 0/190 [" in stream.getvalue()


def test_a_redirected_run_is_silent(call, fast, capfd):
    function, _, _ = call
    stream = fast(tty=False)
    function()
    assert stream.getvalue() == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("stderr", ["none", "closed"])
def test_without_stderr(samples, monkeypatch, stderr):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", None if stderr == "none" else closed)
    assert pipeline.gather(plan_of(samples)).shape == (190, 16, 20)
    assert pipeline.gather(plan_of(samples), progress=True).shape == (190, 16, 20)


def test_redirected_progress_that_is_asked_for_comes_in_lines(samples, fast):
    stream = fast(tty=False)

    def wait(block):
        # Not for the window that is tried before the run.
        assert len(block) == 1 or stream.written.wait(10)
        return block

    pipeline.gather(plan_of(samples), apply=wait, progress=True)
    assert re.match(r"\d\d:\d\d:\d\d 0 of 190 windows \(0%\), 0 of ", stream.getvalue())


def test_a_bar_is_there_before_the_first_task_is_done(samples, fast, monkeypatch):
    stream = fast(tty=True)
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.2)
    monkeypatch.setattr(progress, "_SECONDS", 1e6)
    drawn = threading.Event()
    write = stream.write
    monkeypatch.setattr(stream, "write", lambda text: (write(text), "0/190" in text and drawn.set()))

    def wait(block):
        assert len(block) == 1 or drawn.wait(10)
        return block

    pipeline.gather(plan_of(samples), apply=wait)
    assert drawn.is_set()
    assert stream.getvalue().endswith("\r")


def test_a_line_before_the_bar_leaves_no_bar(fast, monkeypatch):
    """To write one draws the bar, which is then removed as any other."""
    stream = fast(tty=True)
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 1e6)
    with progress.ShownWatch("windows", quiet=False) as watch:
        watch.begin(8, 800, 800)
        watch.say("a line")
    shown = stream.getvalue()
    assert re.search(r"\d\d:\d\d:\d\d a line\n", shown)
    assert re.search(r"(^|\r) *\r$", shown)


@pytest.mark.parametrize("wrong", ["yes", 1, "", [True]])
def test_what_is_neither_true_nor_false(call, wrong):
    function, _, _ = call
    with pytest.raises(pipeline.InputError, match="progress is True or False"):
        function(progress=wrong)


def test_a_variable_that_is_neither(call, monkeypatch, tmp_path):
    function, _, _ = call
    monkeypatch.setenv("PIPELINE_PROGRESS", "maybe")
    with pytest.raises(pipeline.InputError, match="PIPELINE_PROGRESS is 'maybe'; set it to 1 or 0"):
        function()
    assert list(tmp_path.iterdir()) == []
    function(progress=False)


@pytest.mark.parametrize("client", [False, True])
def test_the_bar_follows_finished_tasks(samples, tmp_path, fast, monkeypatch, client):
    stream, moved = fast(tty=True), []
    advance = progress.Progress.advance
    monkeypatch.setattr(
        progress.Progress, "advance", lambda self, units, kept: (moved.append(units), advance(self, units, kept=kept))
    )
    with pipeline.connect(dashboard_address=None) if client else contextlib.nullcontext():
        pipeline.create_matrix(samples / "A.npy", tmp_path / "B.zarr", shard_rows=256)
    assert sum(moved) == 2000
    assert len(moved) > 4
    assert "| 0/2000 [" in stream.getvalue()


@pytest.mark.parametrize("function", ["gather", "npy", "store", "create_matrix", "verify"])
def test_without_a_cluster_each_task_moves_the_bar(samples, tmp_path, fast, monkeypatch, function):
    """Not only the group of tasks whose results Dask's own scheduler hands over together."""
    stream, events = fast(tty=True), []
    monkeypatch.setattr("pipeline.runtime.runner._TOGETHER", 1000)
    move, done = progress.Progress._move, Watch.task_done
    monkeypatch.setattr(
        progress.Progress,
        "_move",
        lambda self, units, **options: (events.append(("moved", units)), move(self, units, **options))[1],
    )
    monkeypatch.setattr(Watch, "task_done", lambda self, receipt: (events.append(("done", 0)), done(self, receipt))[1])
    matrix = pipeline.open_matrix(samples / "A.zarr")
    plan = pipeline.plan_windows(matrix, list(range(0, 1900, 10)), length=16)
    monkeypatch.setattr(type(plan), "fit_tasks", lambda self, **_: 20)
    calls = {
        "gather": lambda: pipeline.gather(plan),
        "npy": lambda: pipeline.gather(plan, out=tmp_path / "w.npy"),
        "store": lambda: pipeline.store(plan, tmp_path / "w.zarr"),
        "create_matrix": lambda: pipeline.create_matrix(samples / "A.npy", tmp_path / "B.zarr", shard_rows=256),
        "verify": lambda: pipeline.verify(samples / "A.zarr"),
    }
    calls[function]()
    total = {"gather": 190, "npy": 190, "store": 190, "create_matrix": 2000, "verify": 8}[function]
    assert sum(units for _, units in events) == total
    # All of them moved before the first result was handed over.
    first = events.index(("done", 0))
    assert sum(units for _, units in events[:first]) == total
    assert "%|" in stream.getvalue()


def test_runs_of_other_threads_do_not_move_the_bar(samples, fast):
    fast(tty=True)
    plan = plan_of(samples)
    with progress.ShownWatch("windows", quiet=False) as watch:
        watch.begin(8, 800, 800)
        other = threading.Thread(target=lambda: pipeline.gather(plan, progress=False))
        other.start()
        other.join()
        assert watch._progress._bar.n == 0
    # Nor is a run seen once its own has ended.
    assert watch._progress._seeing._callback not in type(watch._progress._seeing).active


def test_what_an_earlier_run_finished_counts(samples, tmp_path, fast):
    stream = fast(tty=True)
    with progress.ShownWatch("windows", quiet=False) as watch:
        watch.begin(2, 200, 800)
        watch.task_kept(100)
        watch._progress._bar.refresh()
        assert "100/200" in stream.getvalue()


def test_batches_show_none(samples, fast):
    stream = fast(tty=True)
    with pipeline.iter_batches(plan_of(samples), 64) as batches:
        assert sum(len(batch) for batch in batches) == 190
    assert stream.getvalue() == ""


class ZMQInteractiveShell:
    """As a notebook's kernel has."""


class Shell(ZMQInteractiveShell):
    """As some services derive from it."""


class TerminalInteractiveShell:
    """As IPython in a terminal has, whose stderr may be redirected."""


SHELLS = [(ZMQInteractiveShell(), True), (Shell(), True), (TerminalInteractiveShell(), False), (None, False)]


@pytest.mark.parametrize(("shell", "found"), SHELLS)
def test_which_shell_is_a_notebook(samples, fast, monkeypatch, shell, found):
    stream = fast(tty=False)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    pipeline.gather(plan_of(samples))
    assert ("| 0/190 [" in stream.getvalue()) == found


@pytest.mark.parametrize("variable", [None, "0"])
def test_a_notebook_shows_a_bar_and_no_warning(samples, tmp_path, monkeypatch, variable):
    """In a real kernel, whether ipywidgets is there or not."""
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    source = f"""
import warnings
warnings.simplefilter("always")
import pipeline, pipeline.runtime.progress
pipeline.runtime.progress._DELAY_SECONDS = 0.0
matrix = pipeline.open_matrix({str(samples / "A.zarr")!r})
plan = pipeline.plan_windows(matrix, list(range(0, 1900, 10)), length=16)
assert pipeline.gather(plan).shape == (190, 16, 20)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    environment = os.environ | ({} if variable is None else {progress.VARIABLE: variable})
    NotebookClient(notebook, timeout=120, kernel_name="python3", store_widget_state=False).execute(env=environment)
    outputs = notebook.cells[0].outputs
    text = "".join(output.get("text", "") for output in outputs)
    assert "Warning" not in text
    assert "IProgress" not in text
    if variable == "0":
        assert outputs == []
    else:
        assert "| 0/190 [" in text or any("widget" in kind for each in outputs for kind in each.get("data", {}))
