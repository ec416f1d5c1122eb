"""One contract: every layout, every scheduler and every sink gives the windows that NumPy gives."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import dask
import distributed
import numpy as np
import pytest
import xarray
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec

import pipeline
from pipeline.outputs import folder as staging
from pipeline.outputs.journal import Request
from pipeline.readers import choose as readers
from pipeline.readers import decoded as decoding
from pipeline.readers import runs as pieces
from pipeline.runtime.runner import open_run, writing
from tests.layouts import LAYOUTS, READERS, ROWS, distinct, open_layout, stack

STARTS = [0, 195, 3, 3, 100, 8, 9, 10, 7, 64, 31, 32, 60, 150, 151, 152, 1, 195, 16, 17]
LENGTH = 16


@pytest.fixture(autouse=True)
def no_client_of_another_test():
    with dask.config.set(scheduler="threads"):
        yield


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    """Every layout of the same values."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, (_, write) in LAYOUTS.items():
        write(folder / f"{name}.zarr", distinct())
    return folder


@pytest.fixture(params=READERS)
def matrix(request, matrices):
    return open_layout(matrices, request.param)


@pytest.fixture(scope="module")
def processes():
    with pipeline.connect(processes=True, n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        yield client


@contextlib.contextmanager
def scheduler(name, request):
    if name == "processes":
        client = request.getfixturevalue("processes")
        with client.as_current(), dask.config.set(scheduler="dask.distributed"):
            yield client
    elif name == "in-process":
        with pipeline.connect(dashboard_address=None) as client:
            yield client
    else:
        with dask.config.set(scheduler=name):
            yield None


@pytest.fixture(params=["synchronous", "threads", "in-process", "processes"])
def any_scheduler(request):
    with scheduler(request.param, request) as client:
        yield client


def test_the_layout_chooses_the_reader(matrices):
    assert {name: open_layout(matrices, name).layout.reader for name in READERS} == READERS


@pytest.fixture(params=["spans", "windows"])
def density(request, monkeypatch):
    """Rows so short make every request a dense one: the other way of reading has its turn, too."""
    if request.param == "windows":
        for module in ("plan.plan", "readers.runs"):
            monkeypatch.setattr(f"pipeline.{module}.is_dense", lambda joined: np.zeros(joined.shape[:-1], bool))


@pytest.mark.usefixtures("density")
def test_gather_of_every_layout(matrix):
    plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
    with dask.config.set(scheduler="synchronous"):
        windows = pipeline.gather(plan)
    np.testing.assert_array_equal(windows, stack(distinct(), STARTS, LENGTH), strict=True)


@pytest.mark.parametrize("order", ["request", "chunk"])
def test_store_of_every_layout(matrix, order, tmp_path):
    plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
    with dask.config.set(scheduler="synchronous"):
        result = pipeline.store(plan, tmp_path / "w.zarr", order=order)
    starts = np.array(STARTS)
    if order == "chunk":
        assert sorted(result["places"][:]) == list(range(len(STARTS)))
        starts = starts[result["places"][:]]
        assert (np.diff(starts) >= 0).all()
    np.testing.assert_array_equal(result["starts"][:], starts)
    np.testing.assert_array_equal(result["windows"][:], stack(distinct(), starts, LENGTH), strict=True)


@pytest.fixture
def cut_small(monkeypatch):
    """Many tasks from little data."""
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", 7)


@pytest.mark.usefixtures("cut_small")
@pytest.mark.parametrize("name", ["shards", "shards@objects", "zstd"])
def test_every_scheduler_and_sink(any_scheduler, name, matrices, tmp_path):
    matrix = open_layout(matrices, name)
    plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
    assert plan.chunk.tasks == 7
    expected = stack(distinct(), STARTS, LENGTH)
    np.testing.assert_array_equal(pipeline.gather(plan), expected, strict=True)
    given_array = np.empty_like(expected)
    assert pipeline.gather(plan, out=given_array) is given_array
    np.testing.assert_array_equal(given_array, expected)
    on_disk = pipeline.gather(plan, out=tmp_path / "w.npy")
    np.testing.assert_array_equal(on_disk, expected, strict=True)
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy", allow_pickle=False), expected, strict=True)
    means = pipeline.gather(plan, apply=row_means)
    np.testing.assert_array_equal(means, expected.mean(axis=1), strict=True)
    result = pipeline.store(plan, tmp_path / "w.zarr")
    np.testing.assert_array_equal(result["windows"][:], expected, strict=True)
    applied = pipeline.store(plan, tmp_path / "m.zarr", apply=row_means, order="chunk")
    np.testing.assert_array_equal(applied["windows"][:], expected.mean(axis=1)[applied["places"][:]], strict=True)
    computed = dask.compute(*pipeline.build_tasks(plan))
    gathered = np.empty_like(expected)
    for places, block in computed:
        gathered[places] = block
    assert sorted(np.concatenate([places for places, _ in computed])) == list(range(len(STARTS)))
    np.testing.assert_array_equal(gathered, expected)
    in_request = dask.compute(*pipeline.build_tasks(plan, order="request", apply=row_means))
    np.testing.assert_array_equal(np.concatenate([block for _, block in in_request]), expected.mean(axis=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.zarr", "w.npy", "w.zarr"]


def row_means(block):
    return block.mean(axis=1)


def test_multiprocessing_scheduler_of_dask(matrices):
    plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)
    with dask.config.set(scheduler="processes", num_workers=2):
        windows = pipeline.gather(plan)
    np.testing.assert_array_equal(windows, stack(distinct(), STARTS, LENGTH))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_request_of_any_layout(matrices, data):
    name = data.draw(st.sampled_from(list(READERS)))
    length = data.draw(st.integers(1, ROWS) | st.sampled_from([1, 4, 16, 24, 32, ROWS]))
    starts = data.draw(st.lists(st.integers(0, ROWS - length), min_size=1, max_size=40))
    dtype = data.draw(st.sampled_from(["u1", "i2", "i8", "u8"]))
    gap = data.draw(st.sampled_from([0, 240, 8192]))
    plan = pipeline.plan_windows(open_layout(matrices, name), np.array(starts).astype(dtype), length=length)
    with dask.config.set(scheduler="synchronous"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.plan.plan.GAP_NBYTES", gap)
        windows = pipeline.gather(plan)
    np.testing.assert_array_equal(windows, stack(distinct(), starts, length), strict=True)


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "f2", "f4", "i8", "c8", "c16"])
@pytest.mark.parametrize("row_shape", [(), (1,), (7,), (2, 3, 4)])
def test_any_dtype_and_row_shape(dtype, row_shape, tmp_path):
    a = distinct(50, row_shape, dtype) if dtype != "?" else np.random.default_rng(0).random((50, *row_shape)) < 0.5
    np.save(tmp_path / "A.npy", a)
    matrix = pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr", shard_rows=12, chunk_rows=3)
    starts = [0, 45, 7, 11, 12, 13]
    plan = pipeline.plan_windows(matrix, starts, length=5)
    np.testing.assert_array_equal(pipeline.gather(plan), stack(a, starts, 5), strict=True)
    result = pipeline.store(plan, tmp_path / "w.zarr")
    np.testing.assert_array_equal(result["windows"][:], stack(a, starts, 5), strict=True)


def test_a_zarr_array_in_memory_and_one_of_a_group(tmp_path):
    a = distinct()
    inside = zarr.create_array({}, shape=a.shape, dtype=a.dtype, chunks=(10, 5, 3))
    inside[:] = a
    group = zarr.create_group(str(tmp_path / "g.zarr"))
    group.create_array("a", shape=a.shape, dtype=a.dtype, chunks=(10, 5, 3), compressors=None)[:] = a
    for source in (inside, group["a"], tmp_path / "g.zarr" / "a"):
        plan = pipeline.plan_windows(pipeline.open_matrix(source), STARTS, length=LENGTH)
        np.testing.assert_array_equal(pipeline.gather(plan), stack(a, STARTS, LENGTH))


def test_an_open_array_with_absent_chunks_is_no_fill_value():
    array = zarr.create_array({}, shape=(100, 2), dtype="f8", chunks=(10, 2))
    array[:50] = 1
    plan = pipeline.plan_windows(pipeline.open_matrix(array), [45], length=10)
    with pytest.raises(pipeline.IntegrityError, match="c/5/0"):
        pipeline.gather(plan)


@pytest.mark.parametrize("name", ["zarr-shard-gzip", "zarr-morton", "columns-shards"])
def test_an_inner_chunk_that_a_shard_lacks_is_no_fill_value(name, tmp_path):
    a = distinct()
    a[40:45] = 0
    _, write = LAYOUTS[name]
    write(tmp_path / "A.zarr", a)
    sparse = zarr.open_array(tmp_path / "A.zarr", config={"write_empty_chunks": False})
    sparse[:] = a
    matrix = pipeline.open_matrix(tmp_path / "A.zarr")
    plan = pipeline.plan_windows(matrix, [0, 45], length=16)
    np.testing.assert_array_equal(pipeline.gather(plan), stack(a, [0, 45], 16))
    with pytest.raises(pipeline.IntegrityError, match="rows 40 to 4"):
        pipeline.gather(pipeline.plan_windows(matrix, [43], length=16))


def test_chunks_are_decoded_alone_where_they_can_be(matrices):
    readers_of = {}
    for name, (kind, _) in LAYOUTS.items():
        if kind == "decoded":
            reader = readers.choose_reader(pipeline.open_matrix(matrices / f"{name}.zarr"), row=3)
            readers_of[name] = type(reader).__name__
    through_array = {"columns", "columns-shards", "wide-shards", "v2-fortran", "zarr-shard-zstd-index"}
    assert {name for name, kind in readers_of.items() if kind == "ArrayReader"} == through_array


def test_a_decoder_that_does_not_agree_with_zarr_is_not_used(matrices, monkeypatch):
    """As if another release of zarr decoded a chunk in another way when it is asked for it alone."""
    real = decoding.chunk_decoder

    def reversed_decoder(array):
        def decode(encoded, into):
            real(array)(encoded, into)
            into[...] = into[::-1].copy()

        return decode

    monkeypatch.setattr(decoding, "chunk_decoder", reversed_decoder)
    matrix = pipeline.open_matrix(matrices / "zstd.zarr")
    plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
    np.testing.assert_array_equal(pipeline.gather(plan), stack(distinct(), STARTS, LENGTH))


@pytest.mark.usefixtures("density")
@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader != "decoded"])
def test_bytes_read_are_those_planned(name, matrices):
    matrix = open_layout(matrices, name)
    plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
    read, decode_seconds = read_all(plan)
    assert plan.chunk.tasks == 1
    checksums = 4 * len(STARTS) * plan.chunk.chunks if matrix.layout.chunk_checksum else 0
    assert plan.chunk.nbytes_read <= read <= plan.chunk.nbytes_read + checksums
    assert decode_seconds == 0


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader == "direct"])
@given(st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_slabs_of_any_size_give_the_same_windows(name, matrices, data):
    """Spans are read slab by slab: a window may cross their borders, and each row is read once all the same."""
    length = data.draw(st.integers(1, 40))
    starts = data.draw(st.lists(st.integers(0, ROWS - length), min_size=1, max_size=80))
    plan = pipeline.plan_windows(open_layout(matrices, name), starts, length=length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "is_dense", lambda joined: np.ones(joined.shape[:-1], bool))
        patch.setattr(readers, "SLAB_NBYTES", 10**9)
        whole, _ = read_all(plan)
        patch.setattr(readers, "SLAB_NBYTES", plan.matrix.row_nbytes * data.draw(st.integers(1, 60)))
        read, _ = read_all(plan)
    checksums = 4 * ROWS if plan.matrix.layout.chunk_checksum else 0
    assert whole - checksums <= read <= whole


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader == "decoded"])
def test_bytes_read_to_decode_are_those_of_storage(name, matrices):
    plan = pipeline.plan_windows(open_layout(matrices, name), STARTS, length=LENGTH)
    read, decode_seconds = read_all(plan)
    files = plan.matrix.layout.files
    rows = {row // files.file_rows for start in STARTS for row in range(start, start + LENGTH)}
    folder = matrices / f"{name.partition('@')[0]}.zarr"
    stored = sum((folder / path).stat().st_size for number in rows for path in files.paths(number))
    if plan.matrix.layout.shard_rows is None:
        assert read == stored
    else:
        # The index is read again by zarr; where only zarr can read it, so is all, with another fill value.
        assert 0.2 * stored < read <= 2 * stored
    assert decode_seconds > 0


def read_all(plan):
    """Bytes and seconds, after a look at the values."""
    out = np.empty((len(plan), *plan.window_shape))
    reader = readers.choose_reader(plan.matrix, row=0)
    reading = reader.read_windows(plan.starts, plan.length, out, np.arange(len(plan)))
    np.testing.assert_array_equal(out, stack(distinct(), plan.starts, plan.length))
    return reading


def test_rows_that_windows_share_are_read_once(matrices):
    plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "zarr-plain.zarr"), [*range(50, 90)], length=LENGTH)
    assert plan.chunk.nbytes_read == (39 + LENGTH) * 120
    assert plan.chunk.amplification < 0.2


def test_direct_reading_reads_nothing_beside_the_windows(matrices):
    plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "zarr-plain.zarr"), [3, 100, 190], length=LENGTH)
    assert plan.chunk.nbytes_read == plan.nbytes
    assert plan.chunk.amplification == 1.0


def test_planning_reads_no_data(matrices, monkeypatch):
    matrix = pipeline.open_matrix(matrices / "zstd.zarr")
    monkeypatch.setattr("os.preadv", lambda *_: pytest.fail("read"))
    monkeypatch.setattr("os.pread", lambda *_: pytest.fail("read"))
    monkeypatch.setattr("os.open", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr("zarr.Array.__getitem__", lambda *_: pytest.fail("decoded"))
    repr(pipeline.plan_windows(matrix, STARTS, length=LENGTH))


def test_short_reads_are_continued(matrices, monkeypatch):
    monkeypatch.setattr("pipeline.readers.runs.is_dense", lambda joined: False)
    real = os.preadv
    calls = []

    def some(fd, buffers, offset):
        """As a read that a signal interrupts, or of more than 2 GiB."""
        calls.append(offset)
        return real(fd, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)

    monkeypatch.setattr("os.preadv", some)
    plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)
    np.testing.assert_array_equal(pipeline.gather(plan), stack(distinct(), STARTS, LENGTH))
    assert len(calls) > 2 * len(STARTS)


def test_many_files_are_open_at_once_only_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.readers.runs.is_dense", lambda joined: False)
    a = distinct(300, (2,))
    np.save(tmp_path / "A.npy", a)
    matrix = pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr", shard_rows=0, chunk_rows=1)
    starts = np.random.default_rng(0).permutation(290)
    opened, real_open, real_close, peak = set(), os.open, os.close, [0]

    def counting_open(path, *arguments):
        fd = real_open(path, *arguments)
        if ".zarr/c/" in str(path):
            opened.add(fd)
            peak[0] = max(peak[0], len(opened))
        return fd

    def counting_close(fd):
        opened.discard(fd)
        real_close(fd)

    monkeypatch.setattr("os.open", counting_open)
    monkeypatch.setattr("os.close", counting_close)
    with dask.config.set(scheduler="synchronous"):
        windows = pipeline.gather(pipeline.plan_windows(matrix, starts, length=10))
    np.testing.assert_array_equal(windows, stack(a, starts, 10))
    assert 1 < peak[0] <= 64
    assert not opened


def test_store_cuts_shards_that_one_task_owns(matrices, tmp_path, cut_small):
    plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)
    windows = pipeline.store(plan, tmp_path / "w.zarr")["windows"]
    assert windows.shards[0] == plan.task_windows
    assert windows.chunks[0] == 3
    assert [codec.to_dict()["name"] for codec in windows.metadata.codecs[0].codecs] == ["bytes", "crc32c"]


def test_a_window_larger_than_a_shard_is_chunked_along_its_rows(matrices, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.plan.plan.BLOCK_NBYTES", 1000)
    monkeypatch.setattr("pipeline.outputs.shards.SHARD_NBYTES", 1000)
    plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), [0, 9, 4], length=40)
    windows = pipeline.store(plan, tmp_path / "w.zarr")["windows"]
    assert windows.chunks == (1, 8, 5, 3)
    np.testing.assert_array_equal(windows[:], stack(distinct(), [0, 9, 4], 40))


def test_xarray_opens_a_result(matrices, tmp_path):
    plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)
    pipeline.store(plan, tmp_path / "w.zarr", order="chunk")
    with xarray.open_zarr(tmp_path / "w.zarr", consolidated=False) as opened:
        assert opened["windows"].dims == ("window", "row", "column_0", "column_1")
        assert opened["starts"].dims == opened["places"].dims == ("window",)
        np.testing.assert_array_equal(opened["windows"].values, stack(distinct(), opened["starts"].values, LENGTH))


def test_crossing_parts_and_within(tmp_path):
    parts = [distinct(20, (2,)) + 100 * number for number in range(3)]
    for number, part in enumerate(parts):
        np.save(tmp_path / f"{number}.npy", part)
    matrix = pipeline.create_matrix([tmp_path / f"{number}.npy" for number in range(3)], tmp_path / "A.zarr")
    np.testing.assert_array_equal(matrix.parts, [[0, 20], [20, 40], [40, 60]])
    plan = pipeline.plan_windows(matrix, [0, 16, 17, 36, 37, 39, 56], length=4)
    assert plan.crossings() == 3
    inside = pipeline.draw_starts(60, length=4, count=500, seed=0, within=matrix.parts)
    assert pipeline.plan_windows(matrix, inside, length=4).crossings() == 0
    np.testing.assert_array_equal(pipeline.gather(plan), stack(np.concatenate(parts), plan.starts, 4))


class TestApply:
    @pytest.fixture
    def plan(self, matrices):
        return pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)

    def test_a_result_of_another_dtype_and_no_further_axis(self, plan):
        result = pipeline.gather(plan, apply=lambda block: (block > 100).sum(axis=(1, 2, 3)).astype("u2"))
        expected = (stack(distinct(), STARTS, LENGTH) > 100).sum(axis=(1, 2, 3)).astype("u2")
        np.testing.assert_array_equal(result, expected, strict=True)

    @pytest.mark.parametrize(
        ("apply", "words"),
        [
            (lambda block: block[0], "one entry a window"),
            (lambda block: 1.0, "one entry a window"),
            (lambda block: block.sum(), "one entry a window"),
            (lambda block: block.__setitem__(0, 0), "read-only"),
            (lambda block: 1 / 0, "ZeroDivisionError"),
            (lambda block: ["a"] * len(block), "numbers"),
        ],
    )
    def test_a_broken_contract_is_found_before_the_work(self, plan, apply, words):
        with pytest.raises(pipeline.IntegrityError, match=words):
            pipeline.gather(plan, apply=apply)

    @pytest.mark.usefixtures("cut_small")
    @pytest.mark.parametrize("later", [lambda b: b[:, :2], lambda b: b * 1j, lambda b: 1 / 0])
    def test_a_contract_broken_later_names_the_task(self, plan, later, any_scheduler):
        def apply(block):
            return later(block) if block[0, 0, 0, 0] > 2000 else block

        with pytest.raises(pipeline.IntegrityError) as raised:
            pipeline.gather(plan, apply=apply)
        assert any("task " in note for note in raised.value.__notes__)

    def test_no_function(self, plan):
        with pytest.raises(pipeline.InputError, match="callable"):
            pipeline.gather(plan, apply="mean")


class TestOut:
    @pytest.fixture
    def plan(self, matrices):
        return pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)

    @pytest.mark.parametrize(
        "out",
        [
            np.empty((20, 16, 5, 2)),
            np.empty((20, 16, 5, 3), "f4"),
            np.empty((20, 16, 5, 3), order="F"),
            np.broadcast_to(np.empty(()), (20, 16, 5, 3)),
        ],
    )
    def test_an_array_that_does_not_fit(self, plan, out):
        with pytest.raises(pipeline.InputError, match=r"\(20, 16, 5, 3\)"):
            pipeline.gather(plan, out=out)

    def test_an_existing_npy_is_kept_unless_overwritten(self, plan, tmp_path):
        path = tmp_path / "w.npy"
        before = np.array(pipeline.gather(plan, out=path, apply=np.negative))
        with pytest.raises(pipeline.OutputExistsError):
            pipeline.gather(plan, out=path)
        np.testing.assert_array_equal(np.load(path), before)
        np.testing.assert_array_equal(before, -stack(distinct(), STARTS, LENGTH))
        pipeline.gather(plan, out=path, overwrite=True)
        np.testing.assert_array_equal(np.load(path), stack(distinct(), STARTS, LENGTH))

    @pytest.mark.parametrize("name", ["w.npy", "w.zarr"])
    def test_a_failure_leaves_nothing_and_keeps_what_was_there(self, matrices, tmp_path, name):
        path = tmp_path / name
        _, write = LAYOUTS["shards"]
        write(tmp_path / "A.zarr", distinct())
        (tmp_path / "A.npy").unlink()
        plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.zarr"), STARTS, length=LENGTH)
        sink = (lambda **k: pipeline.gather(plan, out=path, **k)) if name == "w.npy" else (lambda **k: pipeline.store(plan, path, **k))  # fmt: skip
        sink()
        before = {file: file.read_bytes() for file in tmp_path.glob("w*/**/*") if file.is_file()}
        shard = tmp_path / "A.zarr" / "c" / "3" / "0" / "0"
        torn = bytearray(shard.read_bytes())
        torn[-1] ^= 1
        shard.write_bytes(torn)
        with pytest.raises(pipeline.IntegrityError, match="index"):
            sink(overwrite=True)
        assert {file: file.read_bytes() for file in tmp_path.glob("w*/**/*") if file.is_file()} == before
        assert sorted(each.name for each in tmp_path.iterdir()) == ["A.zarr", name]

    def test_no_other_folder_is_ever_replaced(self, plan, tmp_path):
        (tmp_path / "w.zarr").mkdir()
        (tmp_path / "w.zarr" / "thesis.txt").write_text("mine")
        with pytest.raises(pipeline.OutputExistsError, match="none"):
            pipeline.store(plan, tmp_path / "w.zarr", overwrite=True)
        assert (tmp_path / "w.zarr" / "thesis.txt").read_text() == "mine"


class TestMemory:
    def test_a_result_that_does_not_fit_is_refused_before_it_is_allocated(self, matrices, monkeypatch):
        matrix = pipeline.open_matrix(matrices / "shards.zarr")
        plan = pipeline.plan_windows(matrix, np.zeros(100_000, int), length=ROWS, memory="1GB")
        monkeypatch.setattr("numpy.empty", lambda *_: pytest.fail("allocated"))
        with pytest.raises(pipeline.BudgetError, match="--memory allows 954 MiB; .*--out") as raised:
            pipeline.gather(plan)
        assert isinstance(raised.value, MemoryError)

    def test_a_client_in_this_process_with_a_memory_limit_is_used_where_the_result_fits(self, matrices):
        plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)
        limited = distributed.LocalCluster(
            processes=False, n_workers=1, memory_limit="4GB", dashboard_address="127.0.0.1:0",
        )  # fmt: skip
        with limited, distributed.Client(limited):
            windows = pipeline.gather(plan)
        np.testing.assert_array_equal(windows, stack(distinct(), STARTS, LENGTH), strict=True)


def test_a_run_that_ends_waits_for_its_writers_and_bars_others():
    entered, release = threading.Event(), threading.Event()
    out = np.zeros(1)

    def write_late():
        with writing(run):
            entered.set()
            release.wait()
            out[0] = 1

    writer = threading.Thread(target=write_late)
    with contextlib.suppress(KeyError), open_run() as run:
        writer.start()
        entered.wait()
        threading.Timer(0.05, release.set).start()
        raise KeyError
    assert out[0] == 1
    with pytest.raises(pipeline.IncompleteError), writing(run):
        pass
    writer.join()


@pytest.mark.usefixtures("cut_small")
def test_a_failed_store_is_no_result_though_tasks_still_write(any_scheduler, matrices, tmp_path):
    plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS * 20, length=LENGTH)
    for _ in range(5):
        with pytest.raises(pipeline.IntegrityError, match="not divide"):
            pipeline.store(plan, tmp_path / "w.zarr", apply=fail_at_high_rows, overwrite=True)
        assert {path.name for path in tmp_path.iterdir()} <= {"w.zarr.partial"}
    result = pipeline.store(plan, tmp_path / "w.zarr", overwrite=True)
    np.testing.assert_array_equal(result["windows"][:], stack(distinct(), STARTS * 20, LENGTH))
    assert {path.name for path in tmp_path.iterdir()} == {"w.zarr"}


def fail_at_high_rows(block):
    if block[0, 0, 0, 0] > 2000:
        raise ZeroDivisionError("not divide")
    return block


def test_tasks_of_a_failed_run_are_cancelled(matrices, cut_small):
    plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)
    calls = []

    def apply(block):
        calls.append(len(block))
        if len(calls) > 2:
            # The word of the first failure needs time to come around.
            time.sleep(0.2)
        if len(calls) > 1:
            raise ValueError("no")
        return block

    with pipeline.connect(threads_per_worker=1, dashboard_address=None), pytest.raises(pipeline.IntegrityError):
        pipeline.gather(plan, apply=apply)
    assert len(calls) < 7


class TestRunsThatGoWrong:
    """What was once seen to give wrong values, or to lose what was there."""

    def test_forked_workers_do_not_write_into_their_copy(self, matrices):
        plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)
        context = multiprocessing.get_context("fork")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, which is the point
            with ProcessPoolExecutor(2, mp_context=context) as pool, dask.config.set(scheduler=pool):
                windows = pipeline.gather(plan)
        np.testing.assert_array_equal(windows, stack(distinct(), STARTS, LENGTH))

    @pytest.mark.usefixtures("cut_small")
    @pytest.mark.parametrize("later", [np.int64, np.float32])
    def test_a_later_block_is_never_narrowed(self, matrices, later):
        plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)

        def apply(block):
            made = block[:, 0, 0, 0]
            return made.astype(later) if made[0] > 100 else made.astype(np.int8)

        with pytest.raises(pipeline.IntegrityError, match="same shape and dtype"):
            pipeline.gather(plan, apply=apply)

    def test_a_masked_result_is_refused(self, matrices):
        plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)
        with pytest.raises(pipeline.IntegrityError, match="masked"):
            pipeline.gather(plan, apply=lambda block: np.ma.masked_greater(block, 10))

    def test_the_remains_of_others_and_inputs_are_not_removed(self, matrices, tmp_path):
        plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)
        (tmp_path / "w.zarr.partial").mkdir()
        (tmp_path / "w.zarr.partial" / "thesis.txt").write_text("mine")
        with pytest.raises(pipeline.OutputExistsError, match="remains"):
            pipeline.store(plan, tmp_path / "w.zarr", overwrite=True)
        assert (tmp_path / "w.zarr.partial" / "thesis.txt").read_text() == "mine"
        _, write = LAYOUTS["shards"]
        write(tmp_path / "C.zarr", distinct())
        (tmp_path / "C.zarr").rename(tmp_path / "B.zarr.partial")
        plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "B.zarr.partial"), STARTS, length=LENGTH)
        with pytest.raises(pipeline.OutputExistsError, match="lies apart from its input"):
            pipeline.store(plan, tmp_path / "B.zarr", overwrite=True)
        np.testing.assert_array_equal(pipeline.gather(plan), stack(distinct(), STARTS, LENGTH))

    def test_an_npy_of_another_kind_is_not_replaced(self, matrices, tmp_path):
        plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)
        np.save(tmp_path / "w.npy", np.arange(3))
        with pytest.raises(pipeline.OutputExistsError, match="none"):
            pipeline.gather(plan, out=tmp_path / "w.npy", overwrite=True)
        np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), np.arange(3))

    @pytest.mark.parametrize("name", ["w.npy", "w.zarr"])
    def test_what_appears_during_the_run_is_kept(self, name, tmp_path):
        path, request = tmp_path / name, Request({"kind": "test"})

        def appear():
            with staging.stage_output(path, request, cut=1, nbytes=0, resume=False, overwrite=False) as stage:
                for place, text in ((stage.output, "new"), (path, "mine")):
                    file = place
                    if name == "w.zarr":
                        place.mkdir()
                        file = place / "thesis.txt"
                    file.write_text(text)

        with pytest.raises(pipeline.OutputExistsError, match="meanwhile"):
            appear()
        assert (path / "thesis.txt" if name == "w.zarr" else path).read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("codecs", ["memory", "gzip-around", "big-endian-index", "nested"])
    def test_inner_chunks_that_any_shard_lacks(self, codecs, tmp_path):
        a = distinct(96, (4,))
        a[8:16] = 0
        inner: list[Any] = [BytesCodec(), GzipCodec()]
        index: list[Any] = [BytesCodec(endian="big" if codecs == "big-endian-index" else "little"), Crc32cCodec()]
        if codecs == "nested":
            inner = [ShardingCodec(chunk_shape=(4, 4), codecs=[BytesCodec()])]
        serializer = ShardingCodec(chunk_shape=(8, 4), codecs=inner, index_codecs=index)
        store = {} if codecs == "memory" else str(tmp_path / "A.zarr")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr warns of codecs around shards
            array = zarr.create_array(
                store, shape=a.shape, dtype=a.dtype, chunks=(32, 4), serializer=serializer, filters=None,
                compressors=GzipCodec() if codecs == "gzip-around" else None,
            )  # fmt: skip
            array[:] = a
            matrix = pipeline.open_matrix(array)
            starts = [32, 60] if codecs == "gzip-around" else [16, 60]  # such a shard is read whole
            windows = pipeline.gather(pipeline.plan_windows(matrix, starts, length=16))
            np.testing.assert_array_equal(windows, stack(a, starts, 16))
            with pytest.raises(pipeline.IntegrityError):
                pipeline.gather(pipeline.plan_windows(matrix, [0], length=16))
            with pytest.raises(pipeline.IntegrityError):
                pipeline.create_matrix(array, tmp_path / "B.zarr")

    def test_gather_inside_a_task_does_not_wait_for_its_own_thread(self, matrices):
        plan = pipeline.plan_windows(pipeline.open_matrix(matrices / "shards.zarr"), STARTS, length=LENGTH)
        with pipeline.connect(threads_per_worker=1, dashboard_address=None) as client:
            windows = client.submit(pipeline.gather, plan).result(timeout=20)
        np.testing.assert_array_equal(windows, stack(distinct(), STARTS, LENGTH))

    def test_chunks_of_several_sizes_are_refused_in_words(self, tmp_path):
        with zarr.config.set({"array.rectilinear_chunks": True}):
            array = zarr.create_array(str(tmp_path / "R.zarr"), shape=(10, 2), chunks=([4, 6], [2]), dtype="f8")
            with pytest.raises(pipeline.InputError, match="one size"):
                pipeline.open_matrix(array)
