"""Pictures: what is in their artists, and that they are drawn quickly whatever the number of windows."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

from matplotlib import pyplot as plt

import pipeline
from pipeline.plan.plots import draw_runs, plot_split, plot_starts
from pipeline.runtime.report import Run
from pipeline.runtime.tasks import Receipt


@pytest.fixture(autouse=True)
def _closed():
    yield
    for number in plt.get_fignums():
        # Drawn, so that what cannot be laid out is a warning, hence an error.
        plt.figure(number).canvas.draw()
    plt.close("all")


@pytest.fixture
def plan(samples):
    matrix = pipeline.open_matrix(samples / "A.zarr")
    return pipeline.plan_windows(matrix, pipeline.draw_starts(2000, length=16, count=500, seed=0), length=16)


def steps(ax):
    """Heights and edges of each histogram."""
    return [patch.get_data() for patch in ax.patches if hasattr(patch, "get_data")]


def test_a_plan_is_drawn_as_bytes_by_rows(plan):
    ax = plan.plot()
    asked, read = steps(ax)
    # KiB.
    assert asked.values.sum() * 1024 == pytest.approx(plan.nbytes)
    assert read.values.sum() * 1024 == pytest.approx(plan.chunk.nbytes_read)
    expected, _ = np.histogram(plan.starts, bins=asked.edges)
    np.testing.assert_allclose(asked.values * 1024, expected * plan.window_nbytes)
    assert ax.get_ylabel() == "KiB per 20 rows"
    assert "250 chunks of 8 rows" in ax.get_xlabel()
    assert ax.get_title(loc="left") == f"500 windows of 16 rows, amplification {plan.chunk.amplification:.2f}"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["asked for", "read"]


def test_a_decoded_chunk_is_in_one_run_of_rows(tmp_path):
    matrix = pipeline.create_matrix("random:1000x4", tmp_path / "C.zarr", compress="zstd", chunk_rows=64)
    plan = pipeline.plan_windows(matrix, [0, 10, 64, 130, 900], length=8)
    edges, asked, read = plan.spread(bins=50)
    assert edges.tolist() == [*range(0, 1000, 64), 1000]
    assert asked.tolist() == [2 * 256, 256, 256, *[0] * 11, 256, 0]
    np.testing.assert_allclose(read, (asked > 0) * 64 * 32)


def test_axes_of_ones_own(plan):
    _, (left, right) = plt.subplots(1, 2)
    assert plan.plot(ax=right) is right
    assert not left.patches
    assert len(plt.get_fignums()) == 1


def test_millions_of_windows_are_drawn_at_once(tmp_path):
    np.lib.format.open_memmap(tmp_path / "A.npy", "w+", np.uint8, (50_000_000, 1))[-1] = 1
    matrix = pipeline.open_matrix(tmp_path / "A.npy")
    starts = np.random.default_rng(0).integers(0, matrix.rows - 16, 3_000_000)
    plan = pipeline.plan_windows(matrix, starts, length=16)
    begin = time.process_time()
    ax = plan.plot()
    plot_starts(starts, rows=matrix.rows, length=16)
    assert ax.get_xlabel() == "row of the matrix (read in place)"
    assert time.process_time() - begin < 5
    assert max(len(each.values) for each in steps(ax)) <= 100


def test_starts_are_marked_one_by_one_and_gaps_stay_white():
    ax = plot_starts([5, 500, 700], rows=1000, length=20, within=[[0, 300], [500, 900]])
    (band,) = steps(ax)
    covered = band.values > np.asarray(band.baseline)
    np.testing.assert_array_equal(covered, [row < 300 or 500 <= row < 900 for row in range(1000)])
    (marks,) = ax.collections
    boxes = [path.get_extents() for path in marks.get_paths()]
    assert [(box.x0, box.width) for box in boxes] == [(5, 20), (500, 20), (700, 20)]
    assert ax.get_yticklabels()[0].get_text() == "700 rows, 70%\n3 windows"


def test_many_starts_are_a_density():
    starts = np.repeat([10, 900], [300, 600])
    ax = plot_starts(starts, rows=1000, length=20)
    assert not ax.collections
    density = steps(ax)[1]
    heights = density.values - density.baseline
    assert heights.max() == pytest.approx(2 * heights[4])
    assert (heights > 0).sum() == 2


def test_a_split_has_a_lane_for_each_part():
    ax = plot_split(10_000, (0.8, 0.1, 0.1), length=16, count=50, by="order", within=[[0, 4000], [5000, 10_000]])
    names = [label.get_text().splitlines() for label in ax.get_yticklabels()]
    assert names == [
        ["train", "7,200 rows, 72%", "50 windows"],
        ["validation", "900 rows, 9%", "50 windows"],
        ["test", "900 rows, 9%", "50 windows"],
    ]
    spans = [
        (each.edges[:-1][each.values > each.baseline].min(), each.edges[1:][each.values > each.baseline].max())
        for each in steps(ax)
    ]
    assert spans == [(0, 8200), (8200, 9100), (9100, 10_000)]
    assert all(
        first <= path.get_extents().x0 < stop
        for (first, stop), marks in zip(spans, ax.collections, strict=True)
        for path in marks.get_paths()
    )


def test_names_of_starts_and_intervals_agree():
    with pytest.raises(pipeline.InputError, match="same names"):
        plot_starts({"a": [1]}, rows=10, length=2, within={"b": [[0, 5]]})


def test_a_report_is_drawn(plan, tmp_path):
    with pipeline.Report() as report:
        pipeline.gather(plan)
        pipeline.store(plan, tmp_path / "W.zarr")
    above, below = report.plot()
    assert [label.get_text() for label in above.get_yticklabels()] == ["gather", "store"]
    widths = sum(bar.get_width() for bar in above.patches)
    assert widths == pytest.approx(sum(sum(run.stages().values()) for run in report.runs), rel=0.01)
    (rate,) = steps(below)
    assert (rate.values * 1e6 * np.diff(rate.edges)).sum() == pytest.approx(2 * plan.nbytes, rel=1e-6)
    assert below.get_xlim() == pytest.approx((0, report.seconds))


def test_rates_of_several_runs():
    curves = {"gather": ([1.0, 2.0], [0.0, 5e6]), "store": ([3.0, 5.0], [0.0, 20e6])}
    stages = {"gather": {"read": 1.0}, "store": {"read": 1.0, "write": 2.0, "idle": 1.0}}
    _, below = draw_runs(stages, curves, seconds=5.0, axes=None)
    rate = steps(below)[0]
    middles = (rate.edges[1:] + rate.edges[:-1]) / 2
    np.testing.assert_allclose(
        rate.values, np.where(middles < 1, 0, np.where(middles < 2, 5, np.where(middles < 3, 0, 10))), atol=1e-9
    )
    assert [text.get_text() for text in below.texts] == ["gather: 5 MB/s", "store: 10 MB/s"]


def test_nothing_to_draw():
    with pipeline.Report() as report:
        pass
    with pytest.raises(pipeline.InputError, match="nothing was"):
        report.plot()


def test_without_matplotlib(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(pipeline.InputError, match="pip install matplotlib"):
        plan.plot()


def test_a_curve_stays_short(monkeypatch):
    """A million tasks are as many as a plan may have; most of what comes at once is one moment."""
    now = 0.0
    monkeypatch.setattr("pipeline.runtime.report.time", SimpleNamespace(perf_counter=lambda: now))
    run = Run("gather", threads=2, repetition=1.0, pulled=False)
    run.tasks, run.units, run.nbytes = 100_000, 100_000, 800_000
    for number in range(100_000):
        now = (number // 5 + 1) / 10
        run.task_done(Receipt(number, 1, 8, 0.01))
    assert len(run.times) < 2500
    assert run.delivered[-1] == 800_000
    # The rate is the same all the time.
    np.testing.assert_allclose(
        np.interp(np.arange(0, 2000, 100), run.times, run.delivered), np.arange(0, 2000, 100) * 400, rtol=0.02, atol=500
    )
