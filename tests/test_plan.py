"""The plan: every window in exactly one task, and costs that a count by hand agrees with."""

from __future__ import annotations

import time

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import pipeline
from pipeline.matrix.rows import count_touched
from pipeline.plan import plan as plan_module
from pipeline.plan.plan import cut_windows

pytestmark = pytest.mark.versions


def matrix_of(rows, row_shape=(2,), *, chunk=10, dtype="f8", **settings):
    """A matrix of metadata alone: planning reads nothing else."""
    return pipeline.open_matrix(
        zarr.create_array({}, shape=(rows, *row_shape), dtype=dtype, chunks=(chunk, *row_shape), **settings)
    )


@given(st.data())
def test_every_window_is_in_exactly_one_task(data):
    rows = data.draw(st.integers(1, 500))
    length = data.draw(st.integers(1, rows))
    starts = np.array(data.draw(st.lists(st.integers(0, rows - length), min_size=1, max_size=200)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_LEAST_BLOCK_NBYTES", 1)
        patch.setattr(plan_module, "_FEWEST_TASKS", data.draw(st.integers(1, 20)))
        plan = pipeline.plan_windows(matrix_of(rows), starts, length=length)
        for order in ("chunk", "request"):
            tasks = list(plan.tasks(order))
            assert [task.number for task in tasks] == list(range(plan.cost(order).tasks))
            places = np.concatenate([task.places for task in tasks])
            assert sorted(places) == list(range(len(starts)))
            np.testing.assert_array_equal(np.concatenate([task.starts for task in tasks]), starts[places])
            assert all(len(task.starts) == plan.task_windows for task in tasks[:-1])
        np.testing.assert_array_equal(plan.sorted_starts, np.sort(starts))
        np.testing.assert_array_equal(np.concatenate([t.places for t in plan.tasks("request")]), np.arange(len(starts)))
        np.testing.assert_array_equal(plan.sorted_places, np.argsort(starts, kind="stable"))


@given(st.data())
def test_chunks_are_counted_as_by_hand(data):
    rows = data.draw(st.integers(1, 200))
    length = data.draw(st.integers(1, rows))
    starts = data.draw(st.lists(st.integers(0, rows - length), min_size=1, max_size=60))
    task, unit = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 50))
    expected = 0
    for first in range(0, len(starts), task):
        expected += len({row // unit for s in starts[first : first + task] for row in range(s, s + length)})
    counted = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_STRETCH", data.draw(st.integers(1, 100)))
        for tasks in plan_module._stretches(np.array(starts), task):
            counted += count_touched(np.sort(tasks, axis=1), length, unit)
    assert counted == expected


def test_costs_of_decoded_chunks():
    matrix = matrix_of(1000, chunk=100)
    plan = pipeline.plan_windows(matrix, [0, 500, 99, 10], length=10)
    assert matrix.layout.reader == "decoded"
    # Chunks 0, 1 and 5, of 100 rows of 16 bytes.
    assert plan.chunk.chunks == 3
    assert plan.chunk.nbytes_read == 3 * 1600
    assert plan.nbytes == 4 * 160
    assert plan.chunk.amplification == 7.5


def test_the_plan_says_when_request_order_costs_more():
    starts = np.random.default_rng(0).integers(0, 99_000, 5000)
    plan = pipeline.plan_windows(matrix_of(100_000, (500,), chunk=1000), starts, length=16)
    assert plan.request.nbytes_read > 2 * plan.chunk.nbytes_read
    assert "store (order chunk)" in repr(plan)
    assert "<table" in plan._repr_html_()


def test_request_order_reads_a_chunk_once_a_task_even_from_shuffled_starts():
    plan = pipeline.plan_windows(matrix_of(1000, chunk=100), [950, 0, 950, 1, 960], length=10)
    assert plan.request.chunks == plan.chunk.chunks == 2


@pytest.mark.parametrize(
    ("count", "window_nbytes", "tasks"),
    [
        (10_000, 256_000, 39),
        (1, 256_000, 1),
        (10_000_000, 128, 20),
        (100, 2**30, 100),
        (100, 1, 1),
        (625, 32_000, 5),
        (2000, 256_000, 16),
    ],
)
def test_tasks_are_few_and_bounded(count, window_nbytes, tasks):
    cut = cut_windows(count, window_nbytes)
    assert -(-count // cut) == tasks
    assert cut == 1 or cut * window_nbytes <= 64 * 2**20


def test_more_threads_get_more_tasks(monkeypatch):
    starts = np.random.default_rng(0).integers(0, 1000, 500)
    monkeypatch.setattr(plan_module, "_LEAST_BLOCK_NBYTES", 10 * 16 * 16)
    plan = pipeline.plan_windows(matrix_of(1016), starts, length=16)
    assert (plan.window_nbytes, plan.chunk.tasks) == (16 * 16, 16)
    for threads, tasks in ((1, 16), (8, 16), (20, 39), (100, 50)):
        cut = list(plan.tasks("chunk", windows=plan.fit_tasks(threads=threads, placed=True)))
        assert len(cut) == tasks
        assert max(len(task.starts) for task in cut) <= plan.task_windows
        np.testing.assert_array_equal(np.sort(np.concatenate([task.places for task in cut])), np.arange(500))


@pytest.mark.parametrize(("rows", "placed", "tasks"), [(10**9, True, 20), (10**9, False, 39), (10**5, True, 39)])
def test_tasks_that_hold_no_block_are_longer(rows, placed, tasks):
    starts = np.random.default_rng(0).integers(0, rows - 16, 10_000)
    plan = pipeline.plan_windows(matrix_of(rows, (2000,), chunk=10**4, compressors=None), starts, length=16)
    windows = plan.fit_tasks(threads=4, placed=placed)
    assert -(-len(plan) // windows) == tasks
    assert windows * plan.window_nbytes <= (128 if placed else 64) * 2**20


def test_a_key_that_would_overflow_is_not_used():
    rows = 2**60
    starts = np.array([rows - 16, 5, rows - 16, 0])
    ordered, places = plan_module._sort(starts, rows)
    assert ordered.tolist() == [0, 5, rows - 16, rows - 16]
    assert places.tolist() == [3, 1, 0, 2]


def test_ten_million_starts():
    """Within reach of interactive use: the bound is ten times what it takes, and no measurement."""
    matrix = matrix_of(2_000_000, (2000,), chunk=256)
    starts = pipeline.draw_starts(matrix.rows, length=16, count=10_000_000, seed=0)
    begin = time.perf_counter()
    plan = pipeline.plan_windows(matrix, starts, length=16)
    assert time.perf_counter() - begin < 30
    assert len(plan) == 10_000_000
    assert plan.chunk.chunks >= 7813


def test_a_plan_is_a_frozen_value():
    matrix = matrix_of(100)
    given_starts = np.array([3, 1])
    plan = pipeline.plan_windows(matrix, given_starts, length=2, memory="1GB")
    given_starts[0] = 50
    assert plan.starts.tolist() == [3, 1]
    assert plan == pipeline.plan_windows(matrix, [3, 1], length=2, memory=10**9)
    assert plan != pipeline.plan_windows(matrix, [3, 2], length=2, memory=10**9)
    with pytest.raises(AttributeError):
        plan.length = 3
    with pytest.raises(ValueError, match="read-only"):
        plan.sorted_starts[0] = 3


@pytest.mark.parametrize("length", [0, -1, 101, 2.0, True])
def test_bad_length(length):
    with pytest.raises(pipeline.InputError, match=r"give 1 to 100"):
        pipeline.plan_windows(matrix_of(100), [0], length=length)


@pytest.mark.parametrize("memory", ["", "-1GB", "8XB", 0, -5])
def test_bad_memory(memory):
    with pytest.raises(pipeline.InputError, match="8GB"):
        pipeline.plan_windows(matrix_of(100), [0], length=1, memory=memory)


def test_a_plan_travels(tmp_path):
    import pickle

    np.save(tmp_path / "A.npy", np.arange(40.0).reshape(20, 2))
    matrix = pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr")
    plan = pipeline.plan_windows(matrix, [3, 1], length=2)
    assert pickle.loads(pickle.dumps(plan)) == plan


@given(st.data())
def test_rows_read_are_counted_as_by_hand(data):
    rows = data.draw(st.integers(1, 300))
    length = data.draw(st.integers(1, rows))
    starts = data.draw(st.lists(st.integers(0, rows - length), min_size=1, max_size=60))
    task, gap = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 5))
    expected = 0
    for first in range(0, len(starts), task):
        ordered = sorted(starts[first : first + task])
        spans = [[start, start + length] for start in ordered[:1]]
        for start in ordered[1:]:
            if start <= spans[-1][1] + gap:
                spans[-1][1] = start + length
            else:
                spans.append([start, start + length])
        dense = 4 * len(spans) <= len(ordered)
        expected += sum(stop - start for start, stop in spans) if dense else length * len(ordered)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "GAP_NBYTES", gap * 8)
        stretches = plan_module._stretches(np.array(starts), task)
        counted = sum(plan_module._count_rows(np.sort(tasks, axis=1), length, 8)[0] for tasks in stretches)
    assert counted == expected
