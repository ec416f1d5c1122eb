"""Intervals of rows, and how they are split into parts that share no row."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline
from pipeline.plan.rowfiles import load_intervals

pytestmark = pytest.mark.versions


def rows_of(intervals):
    return [row for first, stop in np.asarray(intervals).tolist() for row in range(first, stop)]


@given(st.data())
def test_every_split_keeps_its_promise(data):
    rows = data.draw(st.integers(20, 600))
    length = data.draw(st.integers(1, 6))
    cuts = sorted(data.draw(st.sets(st.integers(0, rows), min_size=2, max_size=9)))
    spans = [[first, stop] for first, stop in pairwise(cuts) if data.draw(st.booleans())] or [[0, rows]]
    within = data.draw(st.permutations(spans))
    fractions = data.draw(st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5), (1.0,), (0.2, 0.3), (0.05, 0.9)]))
    by = data.draw(st.sampled_from(["blocks", "intervals", "order"]))
    seed = data.draw(st.integers(0, 5))
    block_rows = data.draw(st.none() | st.integers(length, 40)) if by == "blocks" else None
    given_ = {"length": length, "seed": seed, "by": by, "within": within, "block_rows": block_rows}
    try:
        split = pipeline.split_rows(rows, fractions, **given_)
    except pipeline.InputError:
        # Some part would hold no window.
        assert len(fractions) > 1 or max(stop - first for first, stop in spans) < length
        return
    assert len(split) == len(fractions)
    for part, again in zip(split, pipeline.split_rows(rows, fractions, **given_), strict=True):
        np.testing.assert_array_equal(part, again, strict=True)
        assert part.dtype == np.int64
        assert (part[:, 0] < part[:, 1]).all()
        assert (part[1:, 0] >= part[:-1, 1]).all()
        # No interval of a part crosses a border.
        assert all(any(first <= a and b <= stop for first, stop in spans) for a, b in part.tolist())
        assert max(stop - first for first, stop in part.tolist()) >= length
    owned = [row for part in split for row in rows_of(part)]
    assert len(set(owned)) == len(owned), "parts share a row"
    total = rows_of(spans)
    assert set(owned) <= set(total)
    if sum(fractions) == 1:
        assert sorted(owned) == sorted(total)
    if by != "intervals":
        # Of a block at most: blocks have less than twice the rows that they should have, but for short intervals.
        few = int(len(total) * min(fractions)) // 4
        least = block_rows or max(length, min(64 * length, few))
        most = 2 * least if by == "blocks" else 1
        for part, fraction in zip(split, fractions, strict=True):
            assert abs(len(rows_of(part)) - fraction * len(total)) <= most
    drawn = [pipeline.draw_starts(rows, length=length, count=20, seed=1, within=part) for part in split]
    touched = [{row + k for row in starts.tolist() for k in range(length)} for starts in drawn]
    assert all(not one & other for number, one in enumerate(touched) for other in touched[:number])


def test_seeds_split_differently_and_order_takes_none():
    one, other = (pipeline.split_rows(100_000, (0.8, 0.2), length=16, seed=seed) for seed in (0, 1))
    assert one[0].tolist() != other[0].tolist()
    first, last = pipeline.split_rows(1000, (0.75, 0.25), length=16, by="order", within=[[600, 1000], [0, 400]])
    assert first.tolist() == [[0, 400], [600, 800]]
    assert last.tolist() == [[800, 1000]]


def test_few_windows_are_lost_at_the_borders():
    parts = pipeline.split_rows(2_000_000, {"train": 0.8, "validation": 0.1, "test": 0.1}, length=16)
    assert list(parts) == ["train", "validation", "test"]
    for part, fraction in zip(parts.values(), (0.8, 0.1, 0.1), strict=True):
        sizes = part[:, 1] - part[:, 0]
        assert abs(sizes.sum() - fraction * 2_000_000) < 2048
        assert (sizes - 15).sum() > 0.98 * sizes.sum()


def test_whole_recordings_stay_together():
    recordings = [[0, 100], [100, 150], [200, 420], [420, 425], [500, 580]]
    dealt = set()
    for seed in range(30):
        split = pipeline.split_rows(600, (0.6, 0.2, 0.2), length=16, by="intervals", within=recordings, seed=seed)
        assert sorted(each for part in split for each in part.tolist()) == recordings
        assert all((part[:, 1] - part[:, 0]).max() >= 16 for part in split)
        dealt.add(str([part.tolist() for part in split]))
    assert len(dealt) > 3


def test_fractions_below_one_leave_rows_over():
    for by in ("blocks", "order"):
        kept = pipeline.split_rows(10_000, (0.1,), length=4, by=by)
        assert abs(len(rows_of(kept[0])) - 1000) <= 512


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fractions": ()}, "fractions are positive"),
        ({"fractions": (0.5, 0.0)}, "got (0.5, 0.0)"),
        ({"fractions": (0.5, -0.1)}, "positive"),
        ({"fractions": (0.8, 0.3)}, "at most 1"),
        ({"fractions": (float("nan"),)}, "nan"),
        ({"fractions": ("much",)}, "much"),
        ({"by": "chance"}, "'chance'"),
        ({"by": "order", "block_rows": 10}, "block_rows is of a split by blocks"),
        ({"block_rows": 3}, "block_rows is at least 4; got 3"),
        ({"rows": 10**12, "block_rows": 99_999}, "too many, more than 10,000,000 of 1,000,000,000,000 rows; give"),
        ({"seed": -1}, "seed is at least 0"),
        ({"length": 101}, "length 101 for 100 rows"),
        ({"within": [[0, 3], [5, 8]]}, "longest has 3 rows"),
        ({"within": [[0, 60], [50, 80]]}, "do not overlap"),
        ({"by": "intervals"}, "part 1 of 100 rows"),
        ({"fractions": {"train": 0.99, "test": 0.01}}, "part test"),
        ({"fractions": {"train": 0.99, "test": 0.01}, "by": "order"}, "none of 4 rows"),
    ],
)
def test_bad_splits(options, words):
    arguments = {"rows": 100, "fractions": (0.5, 0.5), "length": 4} | options
    with pytest.raises(pipeline.InputError) as caught:
        pipeline.split_rows(**arguments)
    assert words in str(caught.value)


def test_intervals_from_files(tmp_path):
    np.save(tmp_path / "i.npy", np.array([[0, 5], [7, 9]]))
    (tmp_path / "i.txt").write_text("0 5\n7\t9\n")
    for name in ("i.npy", "i.txt"):
        np.testing.assert_array_equal(load_intervals(tmp_path / name).values, [[0, 5], [7, 9]])


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("0 5\n7\n", pipeline.OpenError, "line 2: '7' is not an interval"),
        ("", pipeline.OpenError, "no intervals"),
        ("0,5\n", pipeline.OpenError, "line 1: '0,5' is not a whole number"),
        (f"0 {2**64}\n", pipeline.InputError, str(2**64)),
        (None, pipeline.NotFoundError, "i.txt"),
    ],
)
def test_bad_interval_files(tmp_path, content, error, words):
    if content is not None:
        (tmp_path / "i.txt").write_text(content)
    with pytest.raises(error, match=words):
        load_intervals(tmp_path / "i.txt")
