"""Part of a row: columns chosen and values cast, by every reader, into every sink, beside plain NumPy."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from functools import partial

import dask
import numpy as np
import obstore.store
import pytest
import xarray
import zarr
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import ObjectStore

import pipeline
from pipeline import memory
from pipeline.errors import IntegrityError
from pipeline.plan import plan
from pipeline.readers import choose as readers
from pipeline.readers import ranged
from pipeline.runtime import placement as placing
from pipeline.runtime.tasks import prepare_work, read_slabs, read_windows
from pipeline.storage import preads
from tests.layouts import LAYOUTS, READERS, ROWS, distinct, open_layout, stack

VALUES = distinct()
LENGTH = 7
STARTS = [200, 3, 3, 40, 44, 111, 204, 0, 9]
SLICES = st.builds(slice, *(st.none() | st.integers(-5, 5) for _ in range(2)), st.sampled_from([None, 1, 2, -1, -2]))
COLUMNS = (
    st.none()
    | SLICES.filter(lambda cut: len(range(5)[cut]))
    | st.lists(st.integers(-5, 4), min_size=1, max_size=8)
    | st.builds(slice, st.integers(0, 2), st.integers(3, 5))
)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for name, (_, write) in LAYOUTS.items():
        write(folder / f"{name}.zarr", VALUES)
    return folder


@pytest.fixture(scope="module")
def matrices(layouts):
    return {name: open_layout(layouts, name) for name in READERS}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder with `A.npy`, rows of 40,000 bytes, and of it `A.zarr`, shards of 16 rows, inner chunks of 4."""
    folder = tmp_path_factory.mktemp("wide")
    np.save(folder / "A.npy", distinct(100, (5000,)))
    pipeline.create_matrix(folder / "A.npy", folder / "A.zarr", shard_rows=16, chunk_rows=4)
    return folder


def chosen(values, columns, dtype):
    picked = values if columns is None else values[:, columns]
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(picked if dtype is None else picked.astype(dtype))


def read_all(planned, order):
    """Every window, as tasks of one order deliver them, and the bytes that they read."""
    work, out, nbytes = prepare_work(planned, None), np.empty((len(planned), *planned.window_shape), planned.dtype), 0
    for task in planned.tasks(order):
        nbytes += read_windows(work, task, out, task.places).nbytes_read
    return out, nbytes


@pytest.mark.parametrize("name", READERS)
def test_every_reader_delivers_part_of_a_row(matrices, name):
    for columns, dtype, starts in [
        (slice(1, 3), None, STARTS),
        ([-1, 0, 0], "f4", STARTS),
        (slice(None, None, -2), "f4", range(20, 180)),
        (slice(0, 5), None, range(20, 180)),
    ]:
        planned = pipeline.plan_windows(matrices[name], list(starts), length=LENGTH, columns=columns, dtype=dtype)
        expected = stack(chosen(VALUES, columns, dtype), starts, LENGTH)
        assert planned.nbytes == expected.nbytes
        assert planned.window_shape == expected.shape[1:]
        np.testing.assert_array_equal(pipeline.gather(planned), expected, strict=True)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(READERS)),
    columns=COLUMNS,
    dtype=st.sampled_from([None, "f4", "c16"]),
    starts=st.lists(st.integers(0, ROWS - LENGTH), min_size=1, max_size=30)
    | st.integers(0, 100).map(lambda first: list(range(first, first + 90))),
    small=st.booleans(),
    order=st.sampled_from(["chunk", "request"]),
)
def test_any_part_of_any_rows(layouts, name, columns, dtype, starts, small, order):
    """`small`: no gap is so small that it is read with what it parts, so that parts of rows are read alone."""
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(plan, "GAP_NBYTES", 0)
            patch.setattr(plan, "JOINED_NBYTES", 0)
            patch.setattr(ranged, "JOINED_NBYTES", 0)
        matrix = open_layout(layouts, name)
        planned = pipeline.plan_windows(matrix, starts, length=LENGTH, columns=columns, dtype=dtype)
        got, nbytes = read_all(planned, order)
        np.testing.assert_array_equal(got, stack(chosen(VALUES, columns, dtype), starts, LENGTH), strict=True)
        if matrix.layout.reader != "decoded":
            # Checksums between chunks are read with them, and not counted.
            checksums = 4 * len(starts) * (LENGTH + 70) * matrix.layout.chunk_checksum
            assert 0 <= nbytes - planned.cost(order).nbytes_read <= checksums
        again = pipeline.plan_windows(matrix, starts, length=LENGTH, columns=planned.columns, dtype=planned.dtype)
        assert again == planned
        if name in {"default", "npy", "zstd"}:
            work, [task] = prepare_work(planned, None), planned.tasks(order)
            parts = [(block.copy(), numbers) for block, numbers, _ in read_slabs(work, task)]
            for block, numbers in parts:
                np.testing.assert_array_equal(block, got[task.places[numbers]], strict=True)
            assert sorted(np.concatenate([numbers for _, numbers in parts])) == list(range(len(starts)))


@pytest.mark.parametrize("dtype", [None, "f4"])
@pytest.mark.parametrize("starts", [[1, 33, 70], list(range(40, 80))])
@pytest.mark.parametrize("name", ["A.npy", "A.zarr"])
def test_local_files_are_read_by_range_where_that_is_less(wide, monkeypatch, name, starts, dtype):
    values, read = np.load(wide / "A.npy"), []
    preadv = os.preadv
    monkeypatch.setattr(preads.os, "preadv", lambda *arguments: read.append(preadv(*arguments)) or read[-1])
    planned = partial(pipeline.plan_windows, pipeline.open_matrix(wide / name), starts, length=6, dtype=dtype)
    few, most = planned(columns=slice(70, 90)), planned(columns=slice(0, 4500))
    index = 0 if name == "A.npy" else 4 * 16 + 4
    for plan_, row_nbytes in ((few, 160), (most, 40_000)):
        read.clear()
        got, nbytes = read_all(plan_, "chunk")
        np.testing.assert_array_equal(got, stack(chosen(values, plan_.columns, dtype), starts, 6), strict=True)
        tasks = [{int(start) + row for start in task.starts for row in range(6)} for task in plan_.tasks("chunk")]
        between = sum(read) - sum(map(len, tasks)) * row_nbytes
        assert 0 <= between <= (row_nbytes == 40_000) * 4 * index
        assert nbytes == sum(read) + sum(len({row // 16 for row in rows}) for rows in tasks) * index
        assert nbytes - between == plan_.chunk.nbytes_read
    assert "reads them alone" in repr(few)
    assert "reads whole rows" in repr(most)


@pytest.mark.parametrize("gap", ["more", "less"])
def test_stores_are_asked_for_ranges_where_that_is_less(wide, monkeypatch, gap):
    """Between two rows' parts lie 39,840 bytes: more, or less, than are read with what they part."""
    if gap == "more":
        monkeypatch.setattr(plan, "JOINED_NBYTES", 20_000)
        monkeypatch.setattr(ranged, "JOINED_NBYTES", 20_000)
    store = ObjectStore(obstore.store.LocalStore(wide / "A.zarr"), read_only=True)
    matrix = pipeline.open_matrix(zarr.open_array(store, mode="r"))
    assert matrix.layout.reader == "ranged"
    starts = [1, 2, 33, 70]
    planned = pipeline.plan_windows(matrix, starts, length=6, columns=slice(70, 90))
    got, nbytes = read_all(planned, "chunk")
    np.testing.assert_array_equal(got, stack(np.load(wide / "A.npy")[:, 70:90], starts, 6), strict=True)
    assert 0 <= nbytes - planned.chunk.nbytes_read <= (gap == "less") * 4 * planned.chunk.chunks
    assert (nbytes < 20 * 160 + 1000) == (gap == "more")


def test_a_store_is_asked_once_for_each_row(wide, monkeypatch):
    monkeypatch.setattr(plan, "JOINED_NBYTES", 20_000)
    monkeypatch.setattr(ranged, "JOINED_NBYTES", 20_000)
    store = ObjectStore(obstore.store.LocalStore(wide / "A.zarr"), read_only=True)
    matrix = pipeline.open_matrix(zarr.open_array(store, mode="r"))
    asked = []
    fetch = type(matrix.layout.files).fetch
    monkeypatch.setattr(
        type(matrix.layout.files), "fetch", lambda self, *where: asked.append(where) or fetch(self, *where)
    )
    planned = pipeline.plan_windows(matrix, [1, 2, 33], length=6, columns=slice(70, 90))
    read_all(planned, "chunk")
    shards = 2
    assert len(asked) == 13 == planned.chunk.requests - shards


def test_tasks_are_cut_by_what_they_read(wide):
    matrix = pipeline.open_matrix(wide / "A.npy")
    starts = np.tile(np.arange(90), 400)
    whole = pipeline.plan_windows(matrix, starts, length=10)
    few = pipeline.plan_windows(matrix, starts, length=10, columns=[0, 4999])
    assert few.task_windows == whole.task_windows
    assert few.block_nbytes < 5_000 * 20
    assert few.chunk.amplification > 1
    alone = pipeline.plan_windows(matrix, starts, length=10, columns=slice(0, 2))
    assert whole.task_windows < alone.task_windows <= plan.BLOCK_NBYTES // (10 * 4096)
    wider = pipeline.plan_windows(matrix, starts, length=10, dtype="c16")
    assert wider.task_windows == whole.task_windows // 2
    assert wider.nbytes == 2 * whole.nbytes


@pytest.mark.parametrize(
    "columns",
    [[], slice(3, 3), [5], [-6], [1.0], ["a"], [True, False], 3, [[1]], slice("a", None), slice(None, None, 0), [[1], [2, 3]], {1: 2}],
    ids=str,
)  # fmt: skip
def test_columns_that_are_none(matrices, columns):
    with pytest.raises(pipeline.InputError, match="columns (are|have)"):
        pipeline.plan_windows(matrices["npy"], STARTS, length=LENGTH, columns=columns)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (slice(0, 6), "columns 0:6 lie outside the 5 columns"),
        (slice(0, 200), "columns 0:200 lie outside"),
        (slice(-6, None), "columns -6: lie outside"),
        (slice(None, -6), "columns :-6 lie outside"),
        (slice(7, 9), "columns 7:9 lie outside"),
        (slice(0, np.int64(7), 2), "columns 0:7:2 lie outside"),
        (slice(6, None, -1), "columns 6::-1 lie outside"),
        (slice(None, -7, -1), "columns :-7:-1 lie outside"),
        (slice(0, 2**70), "lie outside"),
    ],
    ids=str,
)
def test_a_slice_is_not_clipped(cli, matrices, layouts, columns, words):
    """From Python and the command line alike: fewer columns than were asked for would go unnoticed."""
    with pytest.raises(pipeline.InputError, match=re.escape(words)):
        pipeline.plan_windows(matrices["npy"], STARTS, length=LENGTH, columns=columns)
    text = re.search(r"columns (\S+) ", words)
    if text:
        said = cli("plan", layouts / "default.zarr", "--length", LENGTH, "--columns", text[1])
        assert said.code == 2
        assert words in said.err


@pytest.mark.parametrize("columns", [slice(-5, 5), slice(0, 5, 4), slice(4, -6, -1), slice(5, None, -2)], ids=str)
def test_a_slice_may_reach_to_both_ends(matrices, columns):
    planned = pipeline.plan_windows(matrices["npy"], list(STARTS), length=LENGTH, columns=columns)
    np.testing.assert_array_equal(pipeline.gather(planned), stack(chosen(VALUES, columns, None), STARTS, LENGTH))


def test_what_has_no_columns_and_what_cannot_be_cast(tmp_path):
    np.save(tmp_path / "y.npy", np.arange(20))
    matrix = pipeline.open_matrix(tmp_path / "y.npy")
    with pytest.raises(pipeline.InputError, match="each row of this matrix is one value"):
        pipeline.plan_windows(matrix, [3], length=2, columns=[0])
    for dtype in ("bool", "u1", "U3", "longdouble", "nonsense"):
        with pytest.raises(pipeline.InputError, match="dtype|cast"):
            pipeline.plan_windows(matrix, [3], length=2, dtype=dtype)
    got = pipeline.gather(pipeline.plan_windows(matrix, [3], length=2, dtype=">i2"))
    np.testing.assert_array_equal(got, np.array([[3, 4]], "i2"), strict=True)


@pytest.mark.parametrize(
    ("dtype", "cast", "value", "fine"),
    [("i8", "i2", 40_000, -32_768), ("i8", "f4", 2**24 + 1, 2**24), ("f8", "f4", 1e39, np.inf), ("c16", "c8", 1e39j, np.nan)],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["npy", "zstd"])
@pytest.mark.parametrize("starts", [[20, 90], list(range(40))], ids=["apart", "dense"])
def test_a_value_that_a_cast_would_lose_is_an_error(tmp_path, layout, starts, dtype, cast, value, fine):
    values = np.ones((120, 4), dtype)
    values[[3, 93], 1] = fine
    # Nobody asks for these two.
    values[[95, 96], 1] = value
    if layout == "zstd":
        np.save(tmp_path / "B.npy", values)
        pipeline.create_matrix(tmp_path / "B.npy", tmp_path / "A.npy.zarr", compress="zstd", chunk_rows=30)
        path = tmp_path / "A.npy.zarr"
    else:
        path = tmp_path / "A.npy"
        np.save(path, values)
    planned = pipeline.plan_windows(pipeline.open_matrix(path), starts, length=5, dtype=cast)
    np.testing.assert_array_equal(pipeline.gather(planned), stack(chosen(values, None, cast), starts, 5), strict=True)
    lossy = pipeline.plan_windows(pipeline.open_matrix(path), [*starts, 91], length=5, dtype=cast)
    with pytest.raises(IntegrityError, match=f"row 95 has .*, which {np.dtype(cast)} does not hold") as raised:
        pipeline.gather(lossy)
    assert "windows that start at rows" in str(raised.value.__notes__)
    elsewhere = pipeline.plan_windows(pipeline.open_matrix(path), [*starts, 91], length=5, dtype=cast, columns=[0, 3])
    assert pipeline.gather(elsewhere).max() == 1


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=True, dashboard_address="127.0.0.1:0", host="127.0.0.1"
    ) as cluster:
        yield cluster


@pytest.fixture
def processes(cluster):
    with Client(cluster):
        yield


@pytest.mark.parametrize("name", ["shards", "shards@objects", "zstd", "columns"])
def test_every_sink(matrices, tmp_path, name):
    given = {"columns": [4, 1, 1], "dtype": "f4"}
    planned = pipeline.plan_windows(matrices[name], STARTS, length=LENGTH, **given)
    expected = stack(chosen(VALUES, *given.values()), STARTS, LENGTH)
    same = partial(np.testing.assert_array_equal, strict=True)
    same(pipeline.gather(planned, out=tmp_path / "w.npy"), expected)
    same(np.load(tmp_path / "w.npy"), expected)
    same(pipeline.gather(planned, out=np.empty_like(expected)), expected)
    same(pipeline.store(planned, tmp_path / "w.zarr")["windows"][:], expected)
    ordered = pipeline.store(planned, tmp_path / "o.zarr", order="chunk")
    same(ordered["windows"][:], expected[ordered["places"][:]])
    assert pipeline.verify(tmp_path / "o.zarr") == []
    for places, block in dask.compute(*pipeline.build_tasks(planned), scheduler="sync"):
        same(block, expected[places])
    seen = []
    sums = pipeline.gather(planned, apply=lambda block: seen.append(block.dtype) or block.sum(axis=1))
    same(sums, expected.sum(axis=1))
    assert set(seen) == {np.dtype("f4")}
    with pytest.raises(pipeline.InputError, match="float32"):
        pipeline.gather(planned, out=np.empty(expected.shape))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", ["npy", "shards", "zstd"])
def test_worker_processes_write_what_was_chosen(matrices, monkeypatch, name, large):
    if large:
        monkeypatch.setattr(placing, "_LARGE_NBYTES", 1)
    for columns, dtype in (([4, 1, 1], "f4"), (slice(1, 3), None)):
        planned = pipeline.plan_windows(matrices[name], STARTS, length=LENGTH, columns=columns, dtype=dtype)
        expected = stack(chosen(VALUES, columns, dtype), STARTS, LENGTH)
        np.testing.assert_array_equal(pipeline.gather(planned), expected, strict=True)


@pytest.mark.parametrize("sink", ["npy", "zarr"])
def test_what_was_finished_of_other_columns_is_another_request(matrices, tmp_path, sink):
    def run(**given):
        planned = pipeline.plan_windows(matrices["shards"], STARTS, length=LENGTH, **given)
        if sink == "npy":
            return pipeline.gather(planned, out=tmp_path / "w.npy", resume=True)
        return pipeline.store(planned, tmp_path / "w.zarr", resume=True)["windows"][:]

    first = run(columns=[1, 2])
    np.testing.assert_array_equal(run(columns=slice(1, 3)), first)
    for other in ({"columns": [2, 1]}, {"columns": [1, 2], "dtype": "f4"}, {"columns": slice(2, 4)}, {}):
        with pytest.raises(pipeline.OutputExistsError):
            run(**other)


def test_whole_rows_are_the_request_that_they_were(matrices):
    every = {"columns": slice(None), "dtype": "f8"}
    plain = pipeline.plan_windows(matrices["shards"], STARTS, length=LENGTH)
    both = pipeline.plan_windows(matrices["shards"], STARTS, length=LENGTH, **every)
    assert both.selection.facts() == plain.selection.facts() == {}
    assert both == plain != pipeline.plan_windows(matrices["shards"], STARTS, length=LENGTH, columns=[0])
    assert readers.choose_reader(both.matrix, row=0, selection=both.selection).selection is None


def test_checked_reads_check_whole_chunks(wide, tmp_path):
    values = np.load(wide / "A.npy")
    matrix = pipeline.open_matrix(wide / "A.zarr", check_reads=True)
    planned = pipeline.plan_windows(matrix, [3, 50], length=6, columns=slice(70, 90))
    got, nbytes = read_all(planned, "chunk")
    np.testing.assert_array_equal(got, stack(values[:, 70:90], [3, 50], 6))
    assert nbytes > 2 * 6 * 40_000


@pytest.mark.parametrize(
    ("words", "columns"), [("1:4", slice(1, 4)), ("::2", slice(None, None, 2)), ("3, 0,-1", [3, 0, -1]), ("2", [2])]
)
def test_command_line(cli, layouts, tmp_path, words, columns):
    line = ["layouts/default.zarr", "--count", 20, "--length", LENGTH, "--columns", words, "--as-dtype", "float32"]
    line[0] = layouts / "default.zarr"
    said = cli("run", *line, "--out", "w.npy")
    assert said.code == 0, said.err
    starts = pipeline.draw_starts(ROWS, length=LENGTH, count=20, seed=0)
    expected = stack(chosen(VALUES, columns, "f4"), starts, LENGTH)
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), expected, strict=True)
    numbers = cli("plan", *line, "--json").numbers
    assert numbers["nbytes_wanted"] == numbers["result_nbytes"] == expected.nbytes
    assert "columns" in cli("plan", *line).out
    again = cli("run", *line[:-4], "--out", "w.npy", "--resume")
    assert again.code == 7


@pytest.mark.parametrize("words", ["", "a", "1:2:3:4", "1.5", "1:4,7", "5", ":0", "1,,2"])
def test_columns_on_the_command_line_that_are_none(cli, layouts, words):
    said = cli("run", layouts / "default.zarr", "--length", LENGTH, "--columns", words)
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1


def test_overflow_on_the_command_line(cli, tmp_path):
    np.save(tmp_path / "A.npy", np.array([[1, 2], [3, 2**40]]))
    said = cli("run", "A.npy", "--count", 1, "--length", 2, "--as-dtype", "int32", "--out", "w.npy")
    assert said.code == 4
    assert "row 1 has 1099511627776, which int32 does not hold" in said.err
    assert not (tmp_path / "w.npy").exists()
    assert cli("run", "A.npy", "--count", 1, "--length", 2, "--as-dtype", "uint8").code == 2


def write_dataset(path, version, **settings):
    """A data set of xarray, `A` (time, channel) with coordinates of both."""
    values = distinct(200, (6,), "i4")
    scaled = {"units": "mV", "scale_factor": 0.5, "add_offset": 10.0, "note": ["a", 1]} | settings
    dataset = xarray.Dataset(
        {"A": (("time", "channel"), values, scaled), "label": (("time",), np.arange(200))},
        {"time": ("time", np.arange(200) * 3, {"units": "seconds since 2000-01-01"}), "channel": [10, 20, 30, 40, 50, 60]},
    )  # fmt: skip
    dataset.to_zarr(path, zarr_format=version, consolidated=False)
    return values


@pytest.mark.parametrize("version", [2, 3])
def test_attributes_and_coordinates_travel(tmp_path, version):
    values = write_dataset(tmp_path / "S.zarr", version)
    matrix = pipeline.open_matrix(tmp_path / "S.zarr" / "A")
    planned = pipeline.plan_windows(matrix, [50, 3, 3, 180], length=5, columns=[4, 0], dtype="f4")
    starts = np.array([50, 3, 3, 180])
    for order in ("request", "chunk"):
        pipeline.store(planned, tmp_path / f"{order}.zarr", order=order)
        assert pipeline.verify(tmp_path / f"{order}.zarr") == []
        with xarray.open_zarr(tmp_path / f"{order}.zarr", consolidated=False) as result:
            sequence = starts if order == "request" else np.sort(starts)
            assert result.windows.dims == ("window", "row", "channel")
            assert result.windows.channel.values.tolist() == [50, 10]
            assert {"time", "channel"} == set(result.windows.coords)
            seconds = (sequence[:, None] + np.arange(5)) * 3
            np.testing.assert_array_equal(
                result.time.values, np.datetime64("2000-01-01", "ns") + seconds * np.timedelta64(1, "s")
            )
            assert result.windows.attrs == {"units": "mV", "note": ["a", 1]}
            # The attributes speak of the values as stored, so that xarray, which applies them, gets what they mean.
            stacked = stack(values[:, [4, 0]], sequence, 5)
            np.testing.assert_array_equal(result.windows.values, stacked * 0.5 + 10)
    group = pipeline.store(planned, tmp_path / "sums.zarr", apply=lambda block: block.sum(axis=(1, 2)))
    assert set(group.array_keys()) == {"windows", "starts", "time"}
    assert set(group["windows"].attrs) == {"coordinates"}
    with xarray.open_zarr(tmp_path / "sums.zarr", consolidated=False) as result:
        assert result.time.shape == (4, 5)
        assert "time" in result.coords


@pytest.mark.parametrize("damage", ["absent", "garbage"])
def test_a_coordinate_that_cannot_be_read_is_no_zeros(tmp_path, damage):
    write_dataset(tmp_path / "S.zarr", 3)
    [chunk] = (tmp_path / "S.zarr" / "time" / "c").iterdir()
    if damage == "absent":
        chunk.unlink()
    else:
        chunk.write_bytes(b"garbage")
    planned = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "S.zarr" / "A"), [50, 3], length=5)
    with pytest.raises(IntegrityError, match="the coordinate time beside .*restore it, or allow"):
        pipeline.store(planned, tmp_path / "w.zarr")
    assert not (tmp_path / "w.zarr").exists()
    if damage == "absent":
        filled = pipeline.open_matrix(tmp_path / "S.zarr" / "A", missing_chunks="fill")
        result = pipeline.store(pipeline.plan_windows(filled, [50, 3], length=5), tmp_path / "w.zarr")
        assert not result["time"][:].any()


def test_coordinates_are_in_the_budget(tmp_path, monkeypatch):
    group = zarr.create_group(tmp_path / "S.zarr")
    rows = 4_000_000
    group.create_array("x", shape=(rows,), dtype="i1", chunks=(rows,), dimension_names=["time"])[:] = 1
    group.create_array("time", shape=(rows,), dtype="f8", chunks=(rows,), dimension_names=["time"])[:] = 1
    limit = memory.held_nbytes() + 16 * 2**20
    planned = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "S.zarr" / "x"), [5], length=5, memory=limit)
    # What the values above took may have been given back since.
    monkeypatch.setattr("pipeline.matrix.attributes.held_nbytes", lambda: limit - 16 * 2**20)
    with pytest.raises(pipeline.BudgetError, match="coordinate time"):
        pipeline.store(planned, tmp_path / "w.zarr")


def test_windows_of_windows_open_in_xarray(tmp_path):
    """Names that a result gives to dimensions are no names of the next one's source."""
    np.save(tmp_path / "A.npy", distinct(100, (6, 2)))
    matrix = pipeline.open_matrix(tmp_path / "A.npy")
    pipeline.store(pipeline.plan_windows(matrix, range(50), length=4), tmp_path / "w.zarr")
    again = pipeline.open_matrix(tmp_path / "w.zarr" / "windows")
    result = pipeline.store(pipeline.plan_windows(again, [3, 40], length=2), tmp_path / "v.zarr")
    assert result["windows"].metadata.dimension_names == ("window", "row", "column_0", "column_1", "column_2")
    with xarray.open_zarr(tmp_path / "v.zarr", consolidated=False) as opened:
        assert opened.windows.shape == (2, 2, 4, 6, 2)


def test_a_fill_value_of_an_older_format_is_one_that_xarray_reads(tmp_path):
    array = zarr.create_array(
        tmp_path / "A.zarr",
        shape=(60, 2),
        dtype="f8",
        zarr_format=2,
        fill_value=None,
        attributes={"_FillValue": -9999.0},
    )
    array[:] = distinct(60, (2,))
    array[20] = -9999
    pipeline.store(
        pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.zarr"), [19], length=3), tmp_path / "w.zarr"
    )
    with xarray.open_zarr(tmp_path / "w.zarr", consolidated=False) as opened:
        assert np.isnan(opened.windows[0, 1]).all()
        assert opened.windows[0, 0].values.tolist() == [39, 40]


def test_windows_of_which_many_overlap_are_read_in_slabs(tmp_path, monkeypatch):
    """A long run of overlapping windows among many that lie apart: what is held stays within what the plan says."""
    values = np.lib.format.open_memmap(tmp_path / "A.npy", "w+", "f8", (12_000, 500))
    values[:] = np.arange(12_000.0)[:, None]
    starts = np.concatenate([np.arange(1000, 1800, 2), np.arange(2_000, 11_900, 40)])
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", 1)
    monkeypatch.setattr("pipeline.plan.plan._TASKS_PER_THREAD", 1)
    planned = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.npy"), starts, length=16, columns=[0, 499])
    with dask.config.set(scheduler="sync", num_workers=1):
        pipeline.gather(planned)
        tracemalloc.start()
        try:
            windows = pipeline.gather(planned)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    np.testing.assert_array_equal(windows, stack(values[:, [0, 499]], starts, 16))
    assert peak < planned.nbytes + planned.reading_nbytes


def test_coordinates_that_change_make_another_request(tmp_path):
    write_dataset(tmp_path / "S.zarr", 3)
    planned = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "S.zarr" / "A"), [50, 3], length=5)
    pipeline.store(planned, tmp_path / "w.zarr")
    assert pipeline.store(planned, tmp_path / "w.zarr", resume=True)["time"][0, 0] == 150
    zarr.open_array(tmp_path / "S.zarr" / "time")[3] = 1
    with pytest.raises(pipeline.OutputExistsError, match="of another request"):
        pipeline.store(planned, tmp_path / "w.zarr", resume=True)


def test_names_that_a_result_has_already_do_not_travel(tmp_path):
    group = zarr.create_group(tmp_path / "S.zarr")
    group.create_array("row", data=np.arange(20.0), dimension_names=["row"])
    group.create_array("window", data=np.arange(3.0), dimension_names=["window"])
    group.create_array("A", data=distinct(20, (3,)), dimension_names=["row", "window"])
    group.create_array("B", data=distinct(20, (2, 2)), dimension_names=["q", "y", "y"])
    for name, dims in (("A", ("window", "row", "column_0")), ("B", ("window", "row", "column_0", "column_1"))):
        planned = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "S.zarr" / name), [5, 3], length=2)
        result = pipeline.store(planned, tmp_path / f"{name}.zarr")
        assert set(result.array_keys()) == {"windows", "starts"}
        assert result["windows"].metadata.dimension_names == dims


def test_scaling_is_said_and_not_applied(cli, tmp_path):
    values = write_dataset(tmp_path / "S.zarr", 3, _Unsigned="true", valid_range=[0, 9])
    path = tmp_path / "S.zarr" / "A"
    words = 'scale_factor 0.5, add_offset 10.0, valid_range [0, 9], _Unsigned "true": not applied'
    for said in (cli("info", path).out, cli("plan", path, "--count", 3).out, repr(pipeline.open_matrix(path))):
        assert words in said
    said = cli("run", path, "--count", 3, "--out", "w.npy")
    assert said.err.count(words) == 1
    starts = pipeline.draw_starts(200, length=16, count=3, seed=0)
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), stack(values, starts, 16), strict=True)
    assert json.loads(cli("info", path, "--json").out)["scaling"].startswith("scale_factor")
    quiet = pipeline.open_matrix(tmp_path / "S.zarr" / "label")
    assert quiet.scaling == ""


@pytest.mark.parametrize("version", [2, 3])
def test_the_fill_value_that_xarray_gives_to_all_floats_is_not_worth_a_word(tmp_path, version):
    floats = xarray.Dataset({"A": (("t", "c"), np.ones((9, 2)))})
    floats.to_zarr(tmp_path / "F.zarr", zarr_format=version, consolidated=False)
    assert pipeline.open_matrix(tmp_path / "F.zarr" / "A").scaling == ""


def test_a_matrix_made_of_zarr_keeps_its_attributes(tmp_path):
    write_dataset(tmp_path / "S.zarr", 3)
    source = zarr.open_array(tmp_path / "S.zarr" / "A")
    for axis in (0, 1):
        made = pipeline.create_matrix(tmp_path / "S.zarr" / "A", tmp_path / f"{axis}.zarr", axis=axis)
        attributes = made.array.attrs.asdict()
        assert attributes.pop("random-windows")
        assert attributes == source.attrs.asdict()
        assert made.array.metadata.dimension_names == (("time", "channel"), ("channel", "time"))[axis]
        assert pipeline.verify(tmp_path / f"{axis}.zarr") == []
    source.attrs["note"] = "another"
    with pytest.raises(pipeline.OutputExistsError, match="of another request"):
        pipeline.create_matrix(tmp_path / "S.zarr" / "A", tmp_path / "0.zarr", resume=True)


@pytest.mark.s3
def test_coordinates_go_to_a_bucket_and_come_from_one(bucket, tmp_path):
    values = write_dataset(tmp_path / "S.zarr", 3)
    planned = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "S.zarr" / "A"), [50, 3], length=5, columns=[4, 0])
    url = f"{bucket.url}/w.zarr"
    for settings_ in ({}, {"resume": True}):
        result = pipeline.store(planned, url, **settings_)
        assert set(result.array_keys()) == {"windows", "starts", "time", "channel"}
        assert result["time"][1].tolist() == [9, 12, 15, 18, 21]
        assert pipeline.verify(url) == []
    # A matrix in a bucket, of a group there: the result of one run is read by the next.
    matrix = pipeline.open_matrix(f"{url}/windows")
    again = pipeline.store(pipeline.plan_windows(matrix, [1], length=1), tmp_path / "again.zarr")
    assert again["channel"][:].tolist() == [50, 10]
    np.testing.assert_array_equal(again["windows"][0, 0], stack(values[:, [4, 0]], [3], 5)[0])
    whole = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "S.zarr" / "A"), [50, 3], length=5)
    stored = pipeline.store(whole, f"{bucket.url}/whole.zarr")
    assert stored["channel"][:].tolist() == [10, 20, 30, 40, 50, 60]


def test_columns_of_several_matrices_are_those_of_each(cli, tmp_path):
    x, y = distinct(50, (4,)), distinct(50, (2,), "i4")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    both = pipeline.open_matrix({"x": tmp_path / "x.npy", "y": tmp_path / "y.npy"})
    planned = pipeline.plan_windows(both, [3, 9], length=4, columns={"x": [3, 0]}, dtype={"y": "i8"})
    windows = pipeline.gather(planned)
    np.testing.assert_array_equal(windows["x"], stack(x[:, [3, 0]], [3, 9], 4), strict=True)
    np.testing.assert_array_equal(windows["y"], stack(y.astype("i8"), [3, 9], 4), strict=True)
    stored = pipeline.store(planned, tmp_path / "w.zarr")
    assert stored["x"].shape == (2, 4, 2)
    assert stored["y"].dtype == np.int64
    with pytest.raises(pipeline.InputError, match="columns of several arrays is a mapping"):
        pipeline.plan_windows(both, [3], length=4, columns=[0])
    group = zarr.create_group(tmp_path / "G.zarr")
    for name, values in (("x", x), ("y", y)):
        group.create_array(name, data=values)
    said = cli("run", "G.zarr", "--count", 3, "--length", 4, "--columns", "0")
    assert said.code == 2
    assert "--columns is for one matrix" in said.err
