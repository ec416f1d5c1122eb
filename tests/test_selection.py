"""Which windows `run` and `plan` take: a grid, within intervals, of a part of a split."""

from __future__ import annotations

import re

import numpy as np
import pytest
import zarr

import pipeline


@pytest.fixture
def run(cli, samples, values, tmp_path):
    """Run with these options, and return the starts of the windows that came back, which are checked."""

    def call(*options, matrix=samples / "A.zarr", length=16):
        out = tmp_path / "W.npy"
        said = cli("run", matrix, "--length", length, *options, "--out", out, "--overwrite", "--json", "-q")
        assert said.code == 0, said.err
        windows = np.load(out)
        starts = ((windows[:, 0, 0] - 1) / values.shape[1]).astype(int)
        np.testing.assert_array_equal(windows, np.stack([values[start : start + length] for start in starts]))
        return starts

    return call


def test_stride(run):
    np.testing.assert_array_equal(run("--stride", 100), np.arange(0, 1985, 100))


def test_within_a_file(run, tmp_path):
    (tmp_path / "intervals.txt").write_text("1500 1600\n0 40\n")
    starts = run("--within", "intervals.txt", "--count", 300)
    assert set(starts) <= {*range(25), *range(1500, 1585)}
    assert starts.min() < 25
    assert starts.max() >= 1500
    np.save(tmp_path / "intervals.npy", [[1500, 1600], [0, 40]])
    np.testing.assert_array_equal(
        run("--within", "intervals.npy", "--stride", 20), [0, 20, 1500, 1520, 1540, 1560, 1580]
    )


@pytest.mark.parametrize("by", ["blocks", "order"])
def test_parts_share_no_row_whatever_the_seed(run, by):
    touched = {}
    for seed, part in enumerate(["train", "validation", "test"]):
        starts = run("--split", "0.6,0.2,0.2", "--part", part, "--split-by", by, "--seed", seed, "--count", 500)
        touched[part] = set((starts[:, None] + np.arange(16)).ravel())
    assert not touched["train"] & touched["validation"]
    assert not touched["test"] & (touched["train"] | touched["validation"])
    # As from Python.
    split = pipeline.split_rows(2000, (0.6, 0.2, 0.2), length=16, by=by)
    drawn = pipeline.draw_starts(2000, length=16, count=500, seed=2, within=split[2])
    np.testing.assert_array_equal(
        run("--split", "0.6,0.2,0.2", "--part", 2, "--split-by", by, "--seed", 2, "--count", 500), drawn
    )


@pytest.mark.parametrize(
    ("words", "part"), [("val", "validation"), ("Valid", "validation"), ("tr", "train"), ("te", "test")]
)
def test_the_beginning_of_a_parts_name(run, words, part):
    split = ["--split", "0.6,0.2,0.2", "--count", 50]
    np.testing.assert_array_equal(run(*split, "--part", words), run(*split, "--part", part))


@pytest.mark.parametrize(
    ("fractions", "part"), [("0.6,0.2,0.2", "t"), ("0.6,0.2,0.2", ""), ("0.6,0.4", "val"), ("0.6,0.2,0.2", "values")]
)
def test_what_names_no_part_alone(cli, samples, fractions, part):
    said = cli("plan", samples / "A.zarr", "--split", fractions, "--part", part)
    assert said.code == 2
    assert f"got {part!r}; give one of train" in said.err


def test_windows_that_cross_parts(cli, values, tmp_path):
    """Said wherever windows are listed, with what draws none that do; of one matrix, and of several."""
    np.save(tmp_path / "a.npy", values[:30])
    np.save(tmp_path / "b.npy", values[30:100])
    zarr.create_group("G.zarr")
    for name in ("x", "y"):
        pipeline.create_matrix(["a.npy", "b.npy"], f"{name}.zarr")
        (tmp_path / f"{name}.zarr").rename(tmp_path / "G.zarr" / name)
    for matrix in ("G.zarr/x", "G.zarr"):
        for verb in ("plan", "run"):
            line = [verb, matrix, "--stride", 7]
            said = cli(*line)
            assert re.search(
                r"^crossings +2 windows cross .* --within parts \(within=matrix\.parts\) draws none",
                said.out,
                re.MULTILINE,
            )
            inside = cli(*line, "--within", "parts")
            assert inside.code == 0
            assert "crossings" not in inside.out
        plan = pipeline.plan_windows(pipeline.open_matrix(matrix), [20], length=16)
        assert "1 window crosses the border" in repr(plan)


def test_the_splits_seed_is_its_own(run):
    first, same, other = (
        set(run("--split", "0.5,0.5", "--part", "test", "--stride", 1, *more))
        for more in ([], ["--split-seed", 0], ["--split-seed", 1])
    )
    assert first == same != other


def test_whole_sources_go_to_parts(run, samples, values, tmp_path):
    for number, (first, stop) in enumerate([(0, 500), (500, 900), (900, 2000)]):
        np.save(tmp_path / f"{number}.npy", values[first:stop])
    matrix = tmp_path / "P.zarr"
    pipeline.create_matrix([tmp_path / f"{number}.npy" for number in range(3)], matrix)
    options = ["--within", "parts", "--split", "0.5,0.3,0.2", "--split-by", "intervals", "--stride", 1]
    parts = [run(*options, "--part", part, matrix=matrix) for part in (0, 1, 2)]
    # Each has one source, and all of it.
    assert sorted((starts.min(), starts.max()) for starts in parts) == [(0, 484), (500, 884), (900, 1984)]


def test_plan_takes_the_same_windows(cli, samples):
    said = cli(
        "plan",
        samples / "A.zarr",
        "--split",
        "0.8,0.2",
        "--part",
        "test",
        "--split-by",
        "order",
        "--stride",
        16,
        "--json",
    )
    assert said.numbers["windows"] == 400 // 16


def test_an_output_does_not_replace_the_intervals(cli, samples, tmp_path):
    np.save(tmp_path / "i.npy", [[0, 100]])
    said = cli("run", samples / "A.zarr", "--within", "i.npy", "--out", "i.npy", "--overwrite")
    assert said.code == 7
    np.testing.assert_array_equal(np.load(tmp_path / "i.npy"), [[0, 100]])
