"""A matrix from what people have, in every layout, complete or not there."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import zarr

import pipeline
from pipeline.outputs.shards import cut_results, cut_rows
from pipeline.sinks.create import plan_creation
from tests.layouts import distinct

A = distinct(300, (6,))


def write_npy(folder):
    np.save(folder / "A.npy", A)
    return folder / "A.npy", {}


def write_fortran_big_endian(folder):
    np.save(folder / "A.npy", np.asfortranarray(A).astype(">f8"))
    return folder / "A.npy", {}


def write_columns_first(folder):
    np.save(folder / "A.npy", A.T)
    return folder / "A.npy", {"axis": 1}


def write_raw(folder):
    A.tofile(folder / "A.bin")
    return folder / "A.bin", {"dtype": "float64", "row_shape": (6,)}


def write_hdf5(folder):
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_dataset("deep/test", data=A)
    return f"{folder}/A.h5::deep/test", {}


def write_hdf5_compressed(folder):
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_dataset("test", data=A, chunks=(37, 4), compression="gzip", shuffle=True)
    return folder / "A.h5", {"dataset": "/test"}


def write_zarr_columns(folder):
    zarr.create_array(str(folder / "B.zarr"), shape=A.shape, dtype=A.dtype, chunks=(120, 1))[:] = A
    return folder / "B.zarr", {}


def write_zarr_v2(folder):
    zarr.create_array(str(folder / "B.zarr"), shape=A.shape, dtype=">f8", chunks=(50, 6), zarr_format=2)[:] = A
    return folder / "B.zarr", {}


SOURCES = [value for name, value in sorted(globals().items()) if name.startswith("write_")]


@pytest.mark.parametrize("write", SOURCES)
@pytest.mark.parametrize("settings", [{}, {"shard_rows": 0, "chunk_rows": 70}, {"shard_rows": 32, "compress": "zstd"}])
def test_every_source_in_every_layout(write, settings, tmp_path):
    source, arguments = write(tmp_path)
    matrix = pipeline.create_matrix(source, tmp_path / "A.zarr", **arguments, **settings)
    assert matrix.dtype == np.dtype("f8")
    assert matrix.parts is None
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "A.zarr", mode="r")[:], A, strict=True)


def test_parts_are_stacked_and_their_borders_kept(tmp_path):
    for number, part in enumerate(np.split(A, [10, 200])):
        np.save(tmp_path / f"{number}.npy", part)
    matrix = pipeline.create_matrix([tmp_path / f"{number}.npy" for number in range(3)], tmp_path / "A.zarr")
    np.testing.assert_array_equal(matrix.array[:], A)
    assert matrix.parts.dtype == np.int64
    assert pipeline.open_matrix(tmp_path / "A.zarr").parts.tolist() == [[0, 10], [10, 200], [200, 300]]


def test_random_values_depend_on_the_seed_alone(tmp_path):
    def make(name, seed, **settings):
        return pipeline.create_matrix("random:3000x7", tmp_path / name, seed=seed, **settings).array[:]

    one = make("a.zarr", 1)
    with pipeline.connect(n_workers=2, processes=True, threads_per_worker=1, dashboard_address=None):
        np.testing.assert_array_equal(make("b.zarr", 1, shard_rows=100, chunk_rows=10), one)
    np.testing.assert_array_equal(make("c.zarr", 1, shard_rows=0, chunk_rows=999), one)
    assert (make("d.zarr", 2) != one).mean() > 0.99
    assert 0 <= one.min() < 0.01
    assert 0.99 < one.max() < 1
    assert abs(one.mean() - 0.5) < 0.01
    assert len(np.unique(one)) == one.size


def test_the_default_layout(tmp_path):
    np.save(tmp_path / "A.npy", np.zeros((5000, 2000)))
    matrix = pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr")
    metadata = json.loads((tmp_path / "A.zarr" / "zarr.json").read_bytes())
    assert matrix.array.chunks == (4, 2000)
    # Two shards of one size, not one of 64 MiB and a small one that is padded to as much.
    assert matrix.array.shards == (2500, 2000)
    [sharding] = metadata["codecs"]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]
    assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    assert metadata["dimension_names"] == ["row", "column_0"]
    # Zeros, the fill value, are written all the same.
    present, total, nbytes = matrix.count_files()
    assert present == total == 2
    assert nbytes == 2 * (625 * (64_000 + 4) + 625 * 16 + 4)
    creation = plan_creation(
        tmp_path / "A.npy", tmp_path / "B.zarr", dtype=None, row_shape=None, dataset=None, axis=0, seed=0, length=16,
        shard_rows=None, chunk_rows=None, compress=None, memory=None, resume=False, overwrite=False,
    )  # fmt: skip
    assert creation.nbytes_written == nbytes
    assert not (tmp_path / "B.zarr").exists()


@pytest.mark.parametrize("compress", ["zstd", "blosc"])
def test_compressed_chunks_fit_the_window_and_carry_a_checksum(compress, tmp_path):
    np.save(tmp_path / "A.npy", a := np.repeat(np.arange(10_000.0), 500).reshape(-1, 500))
    matrix = pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr", compress=compress, length=20)
    assert matrix.chunk_rows == 20
    assert matrix.layout.codecs == ("bytes", compress, "crc32c")
    assert matrix.count_files()[2] < matrix.nbytes / 4
    np.testing.assert_array_equal(matrix.array[:], a)


@pytest.mark.parametrize(
    ("settings", "cut"),
    [
        ({}, (4, 4188)),
        ({"chunk_rows": 10}, (10, 4190)),
        ({"shard_rows": 1000}, (4, 1000)),
        ({"shard_rows": 999}, (1, 999)),
        ({"shard_rows": 0}, (4194, 0)),
        ({"shard_rows": 0, "chunk_rows": 256}, (256, 0)),
        ({"compress": "zstd"}, (16, 4192)),
        ({"compress": "zstd", "shard_rows": 0}, (65, 0)),
        ({"row_nbytes": 2**27}, (1, 1)),
        ({"row_nbytes": 8}, (8192, 2_000_000 // 8192 * 8192 + 8192)),
    ],
)
def test_rows_are_cut(settings, cut):
    defaults = {"length": 16, "compress": None, "chunk_rows": None, "shard_rows": None, "row_nbytes": 16_000}
    made = cut_rows(2_000_000, **defaults | settings)
    assert (made.chunk, made.shard) == cut


@pytest.mark.parametrize(
    ("count", "window_nbytes", "task", "cut"),
    [(10_000, 256_000, 262, (1, 262)), (100, 100, 1000, (100, 100)), (10_000, 1000, 128, (64, 128)), (5, 7, 3, (3, 3))],
)
def test_results_are_cut(count, window_nbytes, task, cut):
    made = cut_results(count, window_nbytes, task, (1,))
    assert (made.chunk, made.shard) == cut


def test_a_sources_chunks_are_decoded_about_once(tmp_path, monkeypatch):
    """A column-chunked source of long chunks: a task takes a run of shards, and reads it in one go."""
    source, _ = write_zarr_columns(tmp_path)
    creation = plan_creation(
        source, tmp_path / "A.zarr", dtype=None, row_shape=None, dataset=None, axis=0, seed=0, length=16,
        shard_rows=40, chunk_rows=4, compress=None, memory=None, resume=False, overwrite=False,
    )  # fmt: skip
    assert creation.task_rows == 120
    assert creation.nbytes_read == A.nbytes


@pytest.mark.parametrize(
    "settings",
    [{"shard_rows": 10, "chunk_rows": 4}, {"chunk_rows": 0}, {"shard_rows": -1}, {"length": 0}, {"compress": "lz5"}],
)
def test_bad_settings(settings, tmp_path):
    np.save(tmp_path / "A.npy", A)
    with pytest.raises(pipeline.InputError):
        pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["A.npy"]


def test_a_failing_source_leaves_no_matrix(tmp_path):
    source, _ = write_zarr_v2(tmp_path)
    (source / "3.0").unlink()
    with pytest.raises(pipeline.IntegrityError):
        pipeline.create_matrix(source, tmp_path / "A.zarr", shard_rows=10)
    assert {path.name for path in tmp_path.iterdir()} <= {"B.zarr", "A.zarr.partial"}


def test_overwrite_replaces_ours_alone(tmp_path):
    np.save(tmp_path / "A.npy", A)
    pipeline.create_matrix("random:10x6", tmp_path / "A.zarr")
    with pytest.raises(pipeline.OutputExistsError):
        pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr")
    matrix = pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr", overwrite=True)
    np.testing.assert_array_equal(matrix.array[:], A)
    theirs, _ = write_zarr_v2(tmp_path)
    with pytest.raises(pipeline.OutputExistsError, match="none"):
        pipeline.create_matrix(tmp_path / "A.npy", theirs, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A.npy", "A.zarr", "B.zarr"]


@pytest.mark.parametrize("inside", ["B.zarr", "B.zarr/inner.zarr"])
def test_a_destination_apart_from_its_source(inside, tmp_path):
    source, _ = write_zarr_v2(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(pipeline.OutputExistsError):
        pipeline.create_matrix(source, tmp_path / inside, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_task_that_does_not_fit_the_memory(tmp_path):
    with pytest.raises(pipeline.BudgetError, match="--memory"):
        pipeline.create_matrix("random:100000x2000", tmp_path / "A.zarr", memory="100MB")
    assert not list(tmp_path.iterdir())
