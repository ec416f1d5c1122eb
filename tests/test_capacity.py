"""How many tasks are under way at once."""

from __future__ import annotations

import pytest

from pipeline.errors import BudgetError
from pipeline.formatting import MIB
from pipeline.memory import Budget
from pipeline.runtime import resources as capacity


@pytest.fixture
def ten_gib(monkeypatch):
    monkeypatch.setattr(capacity, "budget", lambda limit: Budget(limit or 10240 * MIB, "a limit"))
    monkeypatch.setattr(capacity, "held_nbytes", lambda: 0)


@pytest.mark.usefixtures("ten_gib")
@pytest.mark.parametrize(
    ("threads", "limit", "enough", "at_once", "peak"),
    [
        (2, None, None, 4, 464),
        (64, None, None, 50, 10064),
        (64, None, 1024 * MIB, 4, 864),
        (64, None, 100 * MIB, 1, 264),
        (64, 2048 * MIB, 1024 * MIB, 9, 1864),
        (2, 264 * MIB, None, 1, 264),
    ],
)
def test_memory_bounds_the_tasks_that_are_under_way(threads, limit, enough, at_once, peak):
    footprint = capacity.fit_memory(200 * MIB, limit, threads=threads, what="a task", enough=enough)
    assert (footprint.at_once, footprint.peak_nbytes) == (at_once, peak * MIB)
    assert footprint.fits >= footprint.at_once
    assert (footprint.fits == footprint.at_once) == (at_once < 2 * threads)


@pytest.mark.usefixtures("ten_gib")
def test_what_a_process_holds_already_does_not_slow_its_runs(monkeypatch):
    monkeypatch.setattr(capacity, "held_nbytes", lambda: 3072 * MIB)
    footprint = capacity.fit_memory(200 * MIB, None, threads=64, what="a task", enough=1024 * MIB)
    assert (footprint.at_once, footprint.peak_nbytes) == (4, (3072 + 864) * MIB)


@pytest.mark.usefixtures("ten_gib")
def test_what_does_not_fit_is_refused():
    with pytest.raises(BudgetError) as caught:
        capacity.fit_memory(200 * MIB, 263 * MIB, threads=2, what="one task")
    assert str(caught.value) == (
        "not enough memory: the run needs 264 MiB (0 B held already, 64.0 MiB to run with, 200 MiB for one task), "
        "a limit allows 263 MiB; raise the limit"
    )


@pytest.mark.usefixtures("ten_gib")
@pytest.mark.parametrize(
    ("limit", "advice"), [(100, "write it to disk"), (74, "write it to disk"), (73, "raise the limit")]
)
def test_only_what_helps_is_advised(limit, advice):
    """64 MiB to run with and a task of 10 MiB are needed wherever the result goes."""
    with pytest.raises(BudgetError, match=f"500 MiB for the array, 10.0 MiB for a task.*; {advice}$"):
        capacity.fit_memory(
            10 * MIB, limit * MIB, threads=2, what="the array", held=500 * MIB, way_out="write it to disk"
        )
