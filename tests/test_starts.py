"""Where windows start."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline
from pipeline.plan.rowfiles import load_starts
from pipeline.plan.starts import check_starts


def test_the_seed_alone_decides():
    one = pipeline.draw_starts(2_000_000, length=16, count=10_000, seed=0)
    np.testing.assert_array_equal(one, pipeline.draw_starts(2_000_000, length=16, count=10_000, seed=0))
    assert (one != pipeline.draw_starts(2_000_000, length=16, count=10_000, seed=1)).any()
    assert one.dtype == np.int64
    assert one.shape == (10_000,)


@pytest.mark.parametrize("options", [{}, {"within": [[0, 20]]}, {"replace": False, "count": 17}])
def test_both_ends_are_reached_and_all_between_alike(options):
    starts = pipeline.draw_starts(20, **{"length": 4, "count": 17_000, "seed": 0} | options)
    values, counts = np.unique(starts, return_counts=True)
    np.testing.assert_array_equal(values, np.arange(17))
    if "replace" not in options:
        assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


@given(st.data())
def test_every_way_of_drawing_keeps_its_promise(data):
    rows = data.draw(st.integers(1, 300))
    length = data.draw(st.integers(1, rows))
    cuts = sorted(data.draw(st.sets(st.integers(0, rows), min_size=2, max_size=8)))
    intervals = [[first, stop] for first, stop in pairwise(cuts) if data.draw(st.booleans())]
    within = data.draw(st.permutations(intervals)) if intervals else None
    replace, overlap = data.draw(st.booleans()), data.draw(st.booleans())
    spans = intervals or [[0, rows]]
    choices = sum(max(0, stop - first - length + 1) for first, stop in spans)
    fit = sum((stop - first) // length for first, stop in spans)
    count = data.draw(st.integers(1, 60))
    possible = choices > 0 and (replace or count <= choices) and (overlap or count <= fit)
    if not overlap:
        possible = count <= fit and choices > 0

    def draw():
        return pipeline.draw_starts(
            rows, length=length, count=count, seed=1, replace=replace, overlap=overlap, within=within
        )

    if not possible:
        with pytest.raises(pipeline.InputError):
            draw()
        return
    starts = draw()
    assert starts.shape == (count,)
    assert starts.dtype == np.int64
    assert all(any(first <= start and start + length <= stop for first, stop in spans) for start in starts)
    if not replace:
        assert len(set(starts)) == count
    if not overlap:
        assert count == 1 or np.diff(np.sort(starts)).min() >= length


def test_disjoint_windows_are_uniform_over_their_arrangements():
    # Two windows of 2 rows in 5 rows: {0,2}, {0,3}, {1,3}.
    seen = [tuple(sorted(pipeline.draw_starts(5, length=2, count=2, seed=s, overlap=False))) for s in range(900)]
    arrangements, counts = np.unique(seen, axis=0, return_counts=True)
    assert arrangements.tolist() == [[0, 2], [0, 3], [1, 3]]
    assert abs(counts - 300).max() < 90


def test_disjoint_windows_that_fill_the_matrix():
    starts = pipeline.draw_starts(64, length=16, count=4, seed=3, overlap=False)
    assert sorted(starts) == [0, 16, 32, 48]


@given(st.data())
def test_a_grid_has_every_window_and_no_other(data):
    rows = data.draw(st.integers(1, 200))
    length, stride = data.draw(st.integers(1, rows)), data.draw(st.integers(1, 60))
    offset = data.draw(st.integers(0, 20))
    cuts = sorted(data.draw(st.sets(st.integers(0, rows), min_size=2, max_size=8)))
    spans = [[first, stop] for first, stop in pairwise(cuts) if data.draw(st.booleans())]
    within = data.draw(st.permutations(spans)) if spans else None
    wanted = [
        start
        for first, stop in spans or [[0, rows]]
        for start in range(first + offset, stop - length + 1)
        if (start - first - offset) % stride == 0
    ]
    if not wanted:
        with pytest.raises(pipeline.InputError, match=r"window"):
            pipeline.grid_starts(rows, length=length, stride=stride, within=within, offset=offset)
        return
    starts = pipeline.grid_starts(rows, length=length, stride=stride, within=within, offset=offset)
    np.testing.assert_array_equal(starts, np.array(wanted, np.int64), strict=True)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"stride": 0}, pipeline.InputError, "stride is at least 1"),
        ({"stride": 2.5}, pipeline.InputError, "got 2.5"),
        ({"offset": -1}, pipeline.InputError, "offset is at least 0"),
        ({"offset": 97}, pipeline.InputError, "offset 97 none of length 4"),
        ({"rows": 10**15, "stride": 1}, pipeline.BudgetError, "longer stride"),
    ],
)
def test_bad_grids(options, error, words):
    arguments = {"rows": 100, "length": 4, "stride": 4} | options
    with pytest.raises(error, match=words):
        pipeline.grid_starts(arguments.pop("rows"), **arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "length is at least 1; got 0"),
        ({"length": -3}, "got -3"),
        ({"length": 101}, "length 101 for 100 rows"),
        ({"length": 2.0}, "whole number; got 2.0"),
        ({"length": True}, "got True"),
        ({"count": 0}, "count is at least 1"),
        ({"seed": -1}, "seed is at least 0"),
        ({"rows": 0}, "rows is at least 1"),
        ({"replace": False, "count": 98}, "98 of 97"),
        ({"overlap": False, "count": 26}, "at most 25 fit"),
        ({"within": [[0, 3]]}, "longest has 3 rows"),
        ({"within": [[0, 101]]}, "100 rows"),
        ({"within": [[5, 5]]}, "not empty"),
        ({"within": [[0, 50], [49, 60]]}, "do not overlap"),
        ({"within": [0, 50]}, "shape"),
        ({"within": [[0.0, 50.0]]}, "float64"),
    ],
)
def test_bad_arguments(options, words):
    arguments = {"rows": 100, "length": 4, "count": 5, "seed": 0} | options
    with pytest.raises(pipeline.InputError, match=words.replace("[", r"\[")):
        pipeline.draw_starts(arguments.pop("rows"), **arguments)


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        ([-1, 3], "got -1 at place 0"),
        ([3, 85], "got 85 at place 1"),
        ([1.0], "float64"),
        ([True], "bool"),
        ([[1, 2]], "one-dimensional"),
        ([], "at least one"),
        (np.array([2**63], np.uint64), "9223372036854775808"),
        (["a"], "'a' at place 0"),
    ],
)
def test_bad_starts(starts, words):
    with pytest.raises(pipeline.InputError, match=words):
        check_starts(starts, rows=100, length=16)


@pytest.mark.parametrize("dtype", ["u1", "i4", "u8", "i8", ">i4"])
def test_starts_of_any_width_do_not_overflow(dtype):
    checked = check_starts(np.array([0, 250]).astype(dtype), rows=2_000_000, length=200_000)
    assert checked.dtype == np.int64
    assert (checked + 200_000).tolist() == [200_000, 200_250]
    assert not checked.flags.writeable


def test_starts_from_files(tmp_path, monkeypatch):
    np.save(tmp_path / "s.npy", np.array([3, 1], "u2"))
    (tmp_path / "s.txt").write_text("3\n1\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("3 1\n"))
    for path in (tmp_path / "s.npy", str(tmp_path / "s.txt"), "-"):
        np.testing.assert_array_equal(load_starts(path).values, [3, 1])


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("s.txt", b"start\n3\n", pipeline.OpenError),
        ("s.txt", b"1.5\n", pipeline.OpenError),
        ("s.txt", b"\xff\xfe1\n", pipeline.OpenError),
        ("s.txt", b"9223372036854775808\n", pipeline.InputError),
        ("s.npy", b"\x93NUMPY\x01", pipeline.OpenError),
        ("s.npy", b"", pipeline.OpenError),
        ("absent.txt", None, pipeline.NotFoundError),
    ],
)
def test_bad_files(tmp_path, name, content, error):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=name):
        load_starts(tmp_path / name)


def test_a_pickle_is_never_loaded(tmp_path):
    class Boom:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    np.save(tmp_path / "s.npy", np.array([Boom()], dtype=object), allow_pickle=True)
    with pytest.raises(pipeline.OpenError):
        load_starts(tmp_path / "s.npy")
    assert not (tmp_path / "ran").exists()
