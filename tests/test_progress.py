"""Progress: what a batch job's log and a terminal say of rate, time and memory."""

from __future__ import annotations

import io
import re
import sys
import threading

import distributed
import numpy as np
import pytest

from pipeline import progress
from pipeline.capacity import measure_workers
from pipeline.tasks import Receipt


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
        watch._bar.start_t -= 10
        watch.task_done(Receipt(0, 1, 900, 0.1))
        watch._bar.refresh()
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
