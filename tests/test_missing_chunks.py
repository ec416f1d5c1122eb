"""Chunks that are not there, or are no files: an error that says what it touches, or the fill value where it is meant."""

from __future__ import annotations

import os
import re

import dask
import numcodecs
import numpy as np
import obstore
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec
from zarr.storage import ObjectStore

import pipeline
from pipeline.matrix import fingerprint as stamps
from pipeline.readers import choose as readers
from tests.layouts import STORES, distinct, stack

ROWS, LENGTH = 211, 16
STARTS = [0, 195, 40, 44, 3, 100, 150, 11]
ABSENT = [range(10, 20), range(30, 50), range(90, 100), range(120, 160), range(210, 211)]
"""Rows that nobody wrote."""

SPARSE = {
    "plain": {"chunks": (10, 5, 3), "compressors": None},
    "crc": {"chunks": (10, 5, 3), "compressors": [Crc32cCodec()]},
    "zstd": {"chunks": (10, 5, 3), "compressors": [ZstdCodec()]},
    "columns": {"chunks": (10, 2, 2), "compressors": None},
    "big-endian": {"chunks": (10, 5, 3), "compressors": None, "serializer": BytesCodec(endian="big")},
    "shards": {"shards": (40, 5, 3), "chunks": (10, 5, 3), "compressors": None},
    "shards-gzip": {"shards": (40, 5, 3), "chunks": (10, 5, 3), "compressors": [GzipCodec()]},
    "shards-columns": {"shards": (20, 4, 4), "chunks": (10, 2, 2), "compressors": None},
    "shards-index-first": {"chunks": (40, 5, 3), "compressors": None, "serializer": ShardingCodec(
        chunk_shape=(5, 5, 3), codecs=[BytesCodec(), Crc32cCodec()], index_location="start")},
    "v2": {"zarr_format": 2, "chunks": (10, 5, 3), "compressors": None},
    "v2-null": {"zarr_format": 2, "chunks": (10, 5, 3), "compressors": numcodecs.Zstd(), "fill_value": None},
    "v2-slash": {"zarr_format": 2, "chunks": (10, 5, 3), "compressors": numcodecs.LZ4(), "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "v2-fortran": {"zarr_format": 2, "chunks": (10, 5, 3), "compressors": None, "order": "F"},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def write_sparse(path, name, fill=-7.0):
    """An array with rows that were never written, and what it holds, as NumPy has it."""
    settings = {"filters": None, "fill_value": fill} | SPARSE[name]
    array = zarr.create_array(str(path), shape=(ROWS, 5, 3), dtype="f8", **settings)
    a = distinct()
    value = 0.0 if settings["fill_value"] is None else fill
    for rows in ABSENT:
        a[rows.start : rows.stop] = value
    array.set_basic_selection(slice(None), np.where(a == value, value, a))
    present = np.flatnonzero([not any(row in rows for rows in ABSENT) for row in range(ROWS)])
    # What holds only the fill value is left out, by zarr's default.
    np.testing.assert_array_equal(array[:][present], distinct()[present])
    return a


def sparse_matrix(path, store=None, **options):
    source = path if store is None else zarr.open_array(STORES[store](path), mode="r")
    return pipeline.open_matrix(source, missing_chunks="fill", **options)


def first_chunk(matrix):
    """Path of the file of row 0."""
    return next(matrix.layout.files.paths(0))


@pytest.mark.parametrize(("store", "fill"), [(None, np.nan), ("memory", -7.0), ("objects", np.inf)])
@pytest.mark.parametrize("name", SPARSE)
def test_what_is_absent_reads_as_the_fill_value(name, fill, store, tmp_path):
    a = write_sparse(tmp_path / "A.zarr", name, fill)
    matrix = sparse_matrix(tmp_path / "A.zarr", store)
    plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
    windows = pipeline.gather(plan)
    np.testing.assert_array_equal(windows, stack(a, STARTS, LENGTH), strict=True)
    assert matrix.count_files()[0] < matrix.count_files()[1]


@pytest.mark.parametrize("name", SPARSE)
def test_without_the_word_it_is_an_error(name, tmp_path):
    write_sparse(tmp_path / "A.zarr", name)
    plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.zarr"), STARTS, length=LENGTH)
    with pytest.raises(pipeline.IntegrityError, match="absent"):
        pipeline.gather(plan)


@pytest.mark.parametrize("name", ["plain", "columns", "shards", "v2-slash"])
def test_an_array_that_holds_nothing(name, tmp_path):
    settings = {"filters": None, "fill_value": 2.5} | SPARSE[name]
    zarr.create_array(str(tmp_path / "A.zarr"), shape=(ROWS, 5, 3), dtype="f8", **settings)
    for store in (None, "memory"):
        plan = pipeline.plan_windows(sparse_matrix(tmp_path / "A.zarr", store), STARTS, length=LENGTH)
        assert (pipeline.gather(plan) == 2.5).all()
        assert pipeline.store(plan, tmp_path / "w.zarr", overwrite=True)["windows"][:].min() == 2.5


@pytest.mark.parametrize("dtype", ["?", "i1", "u8", "f4", "c8"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_fill_values_of_any_dtype(dtype, zarr_format, tmp_path):
    fill = np.array(1, dtype)[()]
    array = zarr.create_array(
        str(tmp_path / "A.zarr"), shape=(40, 2), dtype=dtype, chunks=(4, 2), fill_value=fill, zarr_format=zarr_format
    )
    array[8:12] = 0
    expected = np.ones((40, 2), dtype)
    expected[8:12] = 0
    plan = pipeline.plan_windows(sparse_matrix(tmp_path / "A.zarr"), [5, 20], length=9)
    np.testing.assert_array_equal(pipeline.gather(plan), stack(expected, [5, 20], 9), strict=True)


def test_a_result_of_big_endian_fill_values(tmp_path):
    array = zarr.create_array(
        str(tmp_path / "A.zarr"), shape=(40, 2), dtype=">i4", chunks=(4, 2), fill_value=258, zarr_format=2
    )
    array[:4] = 7
    plan = pipeline.plan_windows(sparse_matrix(tmp_path / "A.zarr"), [2], length=4)
    assert pipeline.gather(plan)[0, :, 0].tolist() == [7, 7, 258, 258]


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_full_folder(path):
    make_folder(path)
    (path / "x").write_bytes(bytes(100))


def dangle(path):
    path.unlink()
    path.symlink_to("nowhere")


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


NO_FILES = {make_folder: "is no file", make_full_folder: "is no file", dangle: "is a link to nothing", make_pipe: "is no file", loop: "cannot be read"}  # fmt: skip
SHORT = [cut, halve, empty]


def damage_first(tmp_path, name, damage):
    write_sparse(tmp_path / "A.zarr", name)
    path = first_chunk(pipeline.open_matrix(tmp_path / "A.zarr"))
    damage(tmp_path / os.path.relpath(path, tmp_path))
    return path


@pytest.mark.timeout(60)
@pytest.mark.parametrize("missing", ["error", "fill"])
@pytest.mark.parametrize("damage", NO_FILES)
@pytest.mark.parametrize("name", ["plain", "zstd", "columns", "shards", "v2", "v2-fortran"])
def test_what_is_no_file_is_never_absent(name, damage, missing, tmp_path):
    path = damage_first(tmp_path, name, damage)
    matrix = pipeline.open_matrix(tmp_path / "A.zarr", missing_chunks=missing)
    plan = pipeline.plan_windows(matrix, [2, 100, 0, 4], length=4)
    last = matrix.layout.file_rows - 1
    words = rf"{re.escape(path)} \(rows 0 to {last}\) {NO_FILES[damage]}.*, and 3 of 4 windows touch it; restore it"
    with pytest.raises(pipeline.IntegrityError, match=words):
        pipeline.gather(plan)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", [*NO_FILES, *SHORT])
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        *((name, "fill") for name in ("plain", "crc", "columns", "shards-columns", "shards-gzip")),
        ("plain", "error"),
        ("shards", "error"),
        ("zstd", "error"),
        ("columns", "error"),
    ],
)
def test_it_is_found_after_work_began(name, missing, damage, tmp_path):
    """The look before work has passed; the reader finds it all the same, does not wait, and fills nothing in."""
    write_sparse(tmp_path / "A.zarr", name)
    matrix = pipeline.open_matrix(tmp_path / "A.zarr", missing_chunks=missing)
    reader = readers.choose_reader(matrix, row=0)
    path = tmp_path / os.path.relpath(first_chunk(matrix), tmp_path)
    damage(path)
    with pytest.raises((pipeline.IntegrityError, pipeline.OpenError), match=re.escape(str(path))):
        reader.read_windows(np.array([6]), 4, np.empty((1, 4, 5, 3)), np.zeros(1, int))


@pytest.mark.parametrize("name", ["plain", "zstd", "columns", "shards"])
@pytest.mark.parametrize("damage", SHORT)
def test_what_is_short_is_an_error_where_chunks_may_be_missing(name, damage, tmp_path):
    path = damage_first(tmp_path, name, damage)
    plan = pipeline.plan_windows(sparse_matrix(tmp_path / "A.zarr"), [2, 100], length=4)
    with pytest.raises(pipeline.IntegrityError, match=re.escape(path)):
        pipeline.gather(plan)


@pytest.mark.parametrize("damage", [halve, empty])
@pytest.mark.parametrize("store", ["memory", "objects"])
@pytest.mark.parametrize("name", ["zstd", "shards", "shards-columns", "v2"])
def test_and_so_it_is_in_any_store(name, store, damage, tmp_path):
    damage_first(tmp_path, name, damage)
    plan = pipeline.plan_windows(sparse_matrix(tmp_path / "A.zarr", store), [2, 100], length=4)
    with pytest.raises(pipeline.IntegrityError, match="restore"):
        pipeline.gather(plan)


def test_a_folder_of_chunks_that_is_gone_is_absent_but_not_a_link_to_nothing(tmp_path):
    a = write_sparse(tmp_path / "A.zarr", "plain")
    matrix = sparse_matrix(tmp_path / "A.zarr")
    plan = pipeline.plan_windows(matrix, [0, 45], length=10)
    chunks = tmp_path / "A.zarr/c"
    (chunks / "0").rename(tmp_path / "0")
    a[:10] = -7.0
    np.testing.assert_array_equal(pipeline.gather(plan), stack(a, [0, 45], 10))
    (chunks / "0").symlink_to("nowhere")
    with pytest.raises(pipeline.IntegrityError, match="c/0/0/0 .* is a link to nothing, or lies in one"):
        pipeline.gather(plan)
    (chunks / "0").unlink()
    (chunks / "0").write_bytes(b"")
    with pytest.raises(pipeline.IntegrityError, match="c/0/0/0 .* cannot be read: Not a directory"):
        pipeline.gather(plan)


def test_an_array_that_went_away_is_not_absent_chunks(tmp_path):
    write_sparse(tmp_path / "A.zarr", "plain")
    plan = pipeline.plan_windows(sparse_matrix(tmp_path / "A.zarr"), [0], length=10)
    (tmp_path / "A.zarr").rename(tmp_path / "B.zarr")
    with pytest.raises(pipeline.IntegrityError, match="c/0/0/0"):
        pipeline.gather(plan)


def test_a_corrupt_inner_chunk_beside_absent_ones(tmp_path):
    write_sparse(tmp_path / "A.zarr", "shards-index-first")
    matrix = sparse_matrix(tmp_path / "A.zarr", check_reads=True)
    plan = pipeline.plan_windows(matrix, [0, 20], length=10)
    pipeline.gather(plan)
    path = tmp_path / "A.zarr/c/0/0/0"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(pipeline.IntegrityError, match="c/0/0/0 .*checksum"):
        pipeline.gather(plan)


class TestWhereItCannotBe:
    def test_files_read_in_place(self, samples):
        for source in (samples / "A.npy", [samples / "A.npy", samples / "A.npy"]):
            with pytest.raises(pipeline.InputError, match=r"those of a Zarr array; .*A\.npy is read in place; drop it"):
                pipeline.open_matrix(source, missing_chunks="fill")

    @pytest.mark.parametrize("word", ["zeros", None, True])
    def test_another_word(self, word, samples):
        with pytest.raises(pipeline.InputError, match="missing_chunks is error or fill; got"):
            pipeline.open_matrix(samples / "A.zarr", missing_chunks=word)


class TestWhatIsSaidBeforeWork:
    def test_windows_are_counted(self, tmp_path):
        write_sparse(tmp_path / "A.zarr", "plain")
        plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.zarr"), [60, 5, 8, 9, 18, 70], length=2)
        with pytest.raises(pipeline.IntegrityError) as caught:
            pipeline.gather(plan)
        # Rows 10 to 19 are absent: windows at 9 and 18 have some of them.
        assert str(caught.value) == (
            f"{tmp_path}/A.zarr/c/1/0/0 (rows 10 to 19) is absent, and 2 of 6 windows touch it; restore it, or read the "
            f"fill value with --missing-chunks fill"
        )

    def test_one_window(self, tmp_path):
        write_sparse(tmp_path / "A.zarr", "plain")
        cut(tmp_path / "A.zarr/c/2/0/0")
        plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.zarr"), [25], length=2)
        with pytest.raises(
            pipeline.IntegrityError, match="has 1199 bytes instead of 1200, and 1 of 1 window touches it; restore it"
        ):
            pipeline.gather(plan)

    def test_of_a_store(self, tmp_path):
        write_sparse(tmp_path / "A.zarr", "plain")
        store = ObjectStore(obstore.store.LocalStore(tmp_path / "A.zarr"), read_only=True)
        plan = pipeline.plan_windows(pipeline.open_matrix(zarr.open_array(store, mode="r")), [9, 60, 60], length=2)
        with pytest.raises(
            pipeline.IntegrityError,
            match=r"c/1/0/0 \(rows 10 to 19\) is absent, and 1 of 3 windows touches it; restore",
        ):
            pipeline.gather(plan)

    def test_a_sparse_store_is_listed_and_not_asked_for_each_key(self, tmp_path, monkeypatch):
        write_sparse(tmp_path / "A.zarr", "plain")
        store = ObjectStore(obstore.store.LocalStore(tmp_path / "A.zarr"), read_only=True)
        matrix = pipeline.open_matrix(zarr.open_array(store, mode="r"), missing_chunks="fill")
        monkeypatch.setattr("obstore.head_async", lambda *_: pytest.fail("asked"))
        stamps.fingerprint_matrix(matrix, np.sort(STARTS), LENGTH)


class TestCommand:
    def test_run_and_plan(self, cli, tmp_path, monkeypatch):
        a = write_sparse(tmp_path / "A.zarr", "shards")
        (tmp_path / "starts.txt").write_text("8 25 195")
        line = ["run", "A.zarr", "--starts", "starts.txt", "--out", "w.npy", "-q"]
        refused = cli(*line)
        assert refused.code == 4
        assert "absent" in refused.err
        assert cli(*line, "--missing-chunks", "fill").code == 0
        np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), stack(a, [8, 25, 195], LENGTH))
        monkeypatch.setenv("PIPELINE_MISSING_CHUNKS", "fill")
        assert cli("plan", *line[1:4]).code == 0
        assert cli(*line, "--overwrite").code == 0
        wrong = cli(*line, "--missing-chunks", "zeros")
        assert wrong.code == 2
