"""What `create_matrix` reads from: every kind of source gives the rows that NumPy has."""

import os
import pickle
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError, IntegrityError, NotFoundError, OpenError
from pipeline.matrix import sources
from pipeline.matrix.formats import open_source
from pipeline.matrix.sources import StackedSource
from pipeline.storage.files import read_runs

DTYPES = ["<f8", ">f8", "<f4", ">i2", "<u4", "|i1", "|b1", "<c8", ">c16", "<f2"]


def make_array(shape, dtype="<f8"):
    """Every value differs, as far as the dtype can tell them apart."""
    values = np.arange(np.prod(shape)).reshape(shape) * (1 + 1j if np.dtype(dtype).kind == "c" else 1)
    if np.dtype(dtype).kind == "b":
        values = np.random.default_rng(0).integers(0, 2, shape)
    return values.astype(dtype)


def save_npy(path, array):
    np.save(path, array)
    return path, {}


def save_fortran(path, array):
    np.save(path, np.asfortranarray(array))
    return path, {}


def save_raw(path, array):
    path = path.with_suffix(".bin")
    array.tofile(path)
    return path, {"dtype": array.dtype.str, "row_shape": array.shape[1:]}


def save_hdf5(path, array):
    path = path.with_suffix(".h5")
    with h5py.File(path, "w") as file:
        file["test"] = array
    return path, {}


def save_hdf5_chunks(path, array):
    path = path.with_suffix(".hdf5")
    with h5py.File(path, "w") as file:
        chunks = tuple(max(1, (n + 1) // 3) for n in array.shape)
        file.create_dataset("a/test", data=array, chunks=chunks, compression="gzip", shuffle=True, fletcher32=True)
    return f"{path}::a/test", {}


def save_zarr(path, array, **options):
    zarr.create_array(path, data=array, config={"write_empty_chunks": True}, **options)
    return path, {}


def save_zarr2(path, array):
    return save_zarr(path, array, zarr_format=2, chunks=tuple(max(1, n // 2) for n in array.shape))


def save_shards(path, array):
    chunks = tuple(max(1, n // 5) for n in array.shape)
    return save_zarr(path, array, chunks=chunks, shards=tuple(2 * n for n in chunks))


SAVERS = [save_npy, save_fortran, save_raw, save_hdf5, save_hdf5_chunks, save_zarr, save_zarr2, save_shards]


def check_rows(source, expected):
    """The whole contract of a `Source`, against rows that NumPy has, rows first."""
    source = pickle.loads(pickle.dumps(source))
    assert source.shape == expected.shape
    assert source.dtype == expected.dtype.newbyteorder("=")
    assert source.dtype.isnative
    assert 1 <= source.chunk_rows <= len(expected)
    assert source.nbytes > 0
    rows = len(expected)
    for start, stop in {(0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows // 3 + rows // 2), (1, 1)}:
        got = source.read_rows(start, stop)
        assert got.dtype == source.dtype
        np.testing.assert_array_equal(got, expected[start:stop])
    for start, stop in ((-1, 1), (0, rows + 1), (2, 1)):
        with pytest.raises(IndexError):
            source.read_rows(start, stop)


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("shape", [(37, 5), (41,), (23, 4, 3), (1, 7)])
def test_rows(tmp_path, save, shape):
    array = make_array(shape)
    path, options = save(tmp_path / "A.npy", array)
    check_rows(open_source(path, **options), array)


@pytest.mark.parametrize("save", SAVERS)
def test_other_working_directory(tmp_path, monkeypatch, save):
    # As on a worker.
    array = make_array((19, 6))
    path, options = save(tmp_path / "A.npy", array)
    monkeypatch.chdir(tmp_path)
    source = open_source(os.path.relpath(path), **options)
    monkeypatch.chdir("/")
    check_rows(source, array)


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(tmp_path, save, dtype):
    array = make_array((19, 6), dtype)
    path, options = save(tmp_path / "A.npy", array)
    check_rows(open_source(str(path), **options), array)


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("axis", [1, 2, -1, -3])
def test_axis(tmp_path, save, axis):
    array = make_array((11, 13, 17), ">f8")
    path, options = save(tmp_path / "A.npy", array)
    check_rows(open_source(path, axis=axis, **options), np.moveaxis(array, axis, 0))


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("axis", [2, -3])
def test_axis_out_of_range(tmp_path, save, axis):
    path, options = save(tmp_path / "A.npy", make_array((6, 5)))
    with pytest.raises(InputError, match=r"is outside \[-2, 1\]"):
        open_source(path, axis=axis, **options)


@pytest.mark.parametrize("save", [save_npy, save_raw, save_hdf5])
@pytest.mark.parametrize("rows", [20, 3000])
def test_far_and_near_runs(tmp_path, save, rows):
    # Runs whose starts lie near one another are read with their gaps, others alone.
    array = make_array((1500, rows), "<f8")
    path, options = save(tmp_path / "A.npy", array)
    check_rows(open_source(path, axis=1, **options), array.T)


@settings(deadline=None)
@given(count=st.integers(1, 60), size=st.integers(0, 300), gap=st.integers(0, 30_000), offset=st.integers(0, 50))
def test_read_runs(tmp_path_factory, count, size, gap, offset):
    path = tmp_path_factory.getbasetemp() / "runs.bin"
    stride = size + gap
    content = np.random.default_rng(count).integers(0, 256, offset + max(0, count * stride - gap), np.uint8)
    content.tofile(path)
    runs = np.zeros((count, size), np.uint8)
    with path.open("rb", buffering=0) as file:
        read_runs(file, runs, offset, stride)
    for i in range(count):
        assert runs[i].tobytes() == content[offset + i * stride : offset + i * stride + size].tobytes()


def count_reads(monkeypatch):
    """Bytes and requests that `FileSource` asks the file for."""
    sizes = []
    read = sources.read_runs.__globals__["_read_exactly"]

    def counting(file, out, offset):
        sizes.append(len(out))
        read(file, out, offset)

    monkeypatch.setitem(sources.read_runs.__globals__, "_read_exactly", counting)
    return sizes


@pytest.mark.parametrize(("save", "requests"), [(save_npy, 1), (save_fortran, 40)])
def test_reads_no_more_than_asked(tmp_path, monkeypatch, save, requests):
    path, options = save(tmp_path / "A.npy", make_array((5000, 40)))
    source = open_source(path, **options)
    sizes = count_reads(monkeypatch)
    source.read_rows(1000, 2000)
    assert sum(sizes) == 1000 * 40 * 8
    assert len(sizes) == requests


# .npy


def test_npy_object_dtype_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "unpickled",))

    np.save(tmp_path / "A.npy", np.array([Bomb(), 1], dtype=object), allow_pickle=True)
    with pytest.raises(OpenError, match="never unpickled"):
        open_source(tmp_path / "A.npy")
    (tmp_path / "B.npy").write_bytes(pickle.dumps([Bomb()]))
    with pytest.raises(OpenError, match="header"):
        open_source(tmp_path / "B.npy")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("size", [0, 3, 9, 60, 127, 128, 128 + 399])
def test_npy_cut_off(tmp_path, size):
    np.save(tmp_path / "A.npy", make_array((10, 5)))
    os.truncate(tmp_path / "A.npy", size)
    with pytest.raises(OpenError) as caught:
        open_source(tmp_path / "A.npy")
    assert str(tmp_path / "A.npy") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_npy_of_another_name(tmp_path):
    np.save(tmp_path / "A.npy", make_array((10, 5)))
    (tmp_path / "A.npy").rename(tmp_path / "A.data")
    check_rows(open_source(tmp_path / "A.data"), make_array((10, 5)))


@pytest.mark.parametrize("save", [save_npy, save_fortran, save_raw, save_hdf5, save_hdf5_chunks])
@pytest.mark.parametrize("change", ["cut", "grow", "touch", "remove"])
def test_file_that_changes_after_it_was_opened(tmp_path, save, change):
    path, options = save(tmp_path / "A.npy", make_array((300, 50)))
    source = open_source(path, **options)
    file = Path(str(path).partition("::")[0])
    if change == "cut":
        os.truncate(file, file.stat().st_size - 8)
    elif change == "grow":
        os.truncate(file, file.stat().st_size + 8)
    elif change == "touch":
        os.utime(file, ns=(0, 12345))
    else:
        file.unlink()
    with pytest.raises(IntegrityError, match="must stay as it is"):
        source.read_rows(0, 10)


@pytest.mark.parametrize("stride", [100, 100_000])
def test_short_read(tmp_path, stride):
    # Behind the check of the size: the file is cut between the check and the read.
    (tmp_path / "A.bin").write_bytes(bytes(stride + 5))
    with (tmp_path / "A.bin").open("rb", buffering=0) as file, pytest.raises(IntegrityError, match="5 bytes early"):
        read_runs(file, np.empty((2, 10), np.uint8), 0, stride)


# raw binary


def test_raw_needs_dtype_and_row_shape(tmp_path):
    (tmp_path / "A.bin").write_bytes(bytes(80))
    for options in ({}, {"dtype": "f8"}, {"row_shape": (5,)}):
        with pytest.raises(InputError, match=r"--dtype.*--row-shape"):
            open_source(tmp_path / "A.bin", **options)
    check_rows(open_source(tmp_path / "A.bin", dtype=np.float64, row_shape=()), np.zeros(10))


def test_raw_remainder(tmp_path):
    (tmp_path / "A.bin").write_bytes(bytes(83))
    with pytest.raises(OpenError, match="3 bytes more"):
        open_source(tmp_path / "A.bin", dtype="f8", row_shape=(5,))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "nonsense", "row_shape": (5,)},
        {"dtype": "O", "row_shape": (5,)},
        {"dtype": "U3", "row_shape": (5,)},
        {"dtype": "g", "row_shape": (5,)},
        {"dtype": "f8", "row_shape": (0,)},
        {"dtype": "f8", "row_shape": (-5,)},
        {"dtype": "f8", "row_shape": ("x",)},
        {"dtype": "f8", "row_shape": (5,), "dataset": "a"},
    ],
)
def test_raw_bad_options(tmp_path, options):
    (tmp_path / "A.bin").write_bytes(bytes(80))
    with pytest.raises(InputError):
        open_source(tmp_path / "A.bin", **options)


@pytest.mark.parametrize("save", [s for s in SAVERS if s is not save_raw])
@pytest.mark.parametrize("options", [{"dtype": "f8"}, {"row_shape": (5,)}])
def test_options_of_raw_binary_elsewhere(tmp_path, save, options):
    path, _ = save(tmp_path / "A.npy", make_array((8, 5)))
    with pytest.raises(InputError, match="is for raw binary"):
        open_source(path, **options)


@pytest.mark.parametrize("save", [save_npy, save_zarr])
def test_data_set_elsewhere(tmp_path, save):
    path, _ = save(tmp_path / "A.npy", make_array((8, 5)))
    with pytest.raises(InputError, match="is for HDF5"):
        open_source(path, dataset="test")
    with pytest.raises(InputError, match="is for HDF5"):
        open_source(f"{path}::test")


# Zarr


@pytest.mark.parametrize(
    ("options", "chunk_rows"),
    [
        ({"chunks": (10, 3)}, 10),
        ({"chunks": (5, 7), "shards": (20, 7)}, 5),
        ({"chunks": (100, 7), "compressors": None}, 30),
        ({"chunks": (4, 7), "zarr_format": 2, "order": "F"}, 4),
    ],
)
def test_zarr_chunk_rows(tmp_path, options, chunk_rows):
    array = make_array((30, 7))
    save_zarr(tmp_path / "A.zarr", array, **options)
    source = open_source(tmp_path / "A.zarr")
    assert source.chunk_rows == chunk_rows
    check_rows(source, array)


def test_zarr_shard_inside_a_codec_is_read_whole(tmp_path):
    array = make_array((30, 7))
    shards = zarr.codecs.ShardingCodec(chunk_shape=(5, 7))
    with pytest.warns(UserWarning, match="disables partial reads"):
        made = zarr.create(
            store=tmp_path / "A.zarr",
            shape=array.shape,
            dtype="f8",
            chunks=(15, 7),
            codecs=[shards, zarr.codecs.Crc32cCodec()],
        )
    made[:] = array
    with pytest.warns(UserWarning, match="disables partial reads"):
        source = open_source(tmp_path / "A.zarr")
    assert source.chunk_rows == 15
    np.testing.assert_array_equal(source.read_rows(3, 20), array[3:20])


@pytest.mark.parametrize("local", [True, False])
def test_zarr_object(tmp_path, local):
    array = make_array((30, 7))
    made = zarr.create_array(tmp_path / "A.zarr" if local else zarr.storage.MemoryStore(), data=array, chunks=(7, 3))
    source = open_source(made, axis=1)
    np.testing.assert_array_equal(source.read_rows(2, 5), array.T[2:5])
    assert source.nbytes == made.nbytes_stored()


@pytest.mark.parametrize("save", [save_zarr, save_zarr2, save_shards])
def test_zarr_missing_chunk(tmp_path, save):
    save(tmp_path / "A.zarr", make_array((30, 7)))
    chunks = [p for p in (tmp_path / "A.zarr").rglob("*") if p.is_file() and not re.search(r"zarr\.json|\.z", p.name)]
    chunks[0].unlink()
    with pytest.raises(IntegrityError, match="not found in store"):
        open_source(tmp_path / "A.zarr").read_rows(0, 30)


def test_zarr_corrupt_chunk(tmp_path):
    save_zarr(tmp_path / "A.zarr", make_array((30, 7)), chunks=(30, 7))
    (tmp_path / "A.zarr/c/0/0").write_bytes(b"nonsense")
    with pytest.raises(IntegrityError) as caught:
        open_source(tmp_path / "A.zarr").read_rows(0, 30)
    assert "\n" not in str(caught.value)


def test_zarr_group(tmp_path):
    group = zarr.create_group(tmp_path / "G.zarr")
    with pytest.raises(OpenError, match="a group without arrays"):
        open_source(tmp_path / "G.zarr")
    group.create_array("x/y", data=make_array((6, 2)))
    group.create_array("k", data=make_array((6, 2)))
    with pytest.raises(OpenError, match="a group with the arrays k, x/y"):
        open_source(tmp_path / "G.zarr")
    check_rows(open_source(tmp_path / "G.zarr/x/y"), make_array((6, 2)))


def test_zarr_metadata_that_cannot_be_parsed(tmp_path):
    save_zarr(tmp_path / "A.zarr", make_array((6, 2)))
    (tmp_path / "A.zarr/zarr.json").write_text("{")
    with pytest.raises(OpenError, match="metadata"):
        open_source(tmp_path / "A.zarr")


def test_folder_that_is_no_zarr(tmp_path):
    with pytest.raises(OpenError, match=r"has neither"):
        open_source(tmp_path)
    assert not list(tmp_path.iterdir())


# random


@pytest.mark.parametrize("dtype", [None, "float64", np.float32])
@settings(deadline=None, max_examples=30)
@given(width=st.integers(1, 9), data=st.data())
def test_random_rows_do_not_depend_on_how_they_are_read(dtype, width, data):
    source = open_source(f"random:3000x{width}x1", dtype=dtype, seed=5)
    start = data.draw(st.integers(0, 3000))
    stop = data.draw(st.integers(start, 3000))
    whole = source.read_rows(0, 3000)
    np.testing.assert_array_equal(source.read_rows(start, stop), whole[start:stop])


@pytest.mark.parametrize(("dtype", "bits"), [("f8", 53), ("f4", 24)])
def test_random_values(dtype, bits):
    source = pickle.loads(pickle.dumps(open_source("random:2500x40", dtype=dtype, seed=2**63)))
    rows = source.read_rows(0, 2500)
    assert (source.shape, source.dtype, source.chunk_rows, source.nbytes) == ((2500, 40), np.dtype(dtype), 1, 0)
    assert rows.dtype == dtype
    assert 0 <= rows.min() < 0.001
    assert 0.999 < rows.max() < 1
    assert abs(rows.mean() - 0.5) < 0.01
    assert len(np.unique(rows)) > 0.99 * rows.size
    # The oracle: NumPy's generator of the documented key, and nothing of ours.
    for block in range(3):
        generator = np.random.Generator(np.random.Philox(key=np.array([2**63, block], np.uint64)))
        expected = generator.random((1024, 40), dtype=dtype)[: 2500 - block * 1024]
        np.testing.assert_array_equal(rows[block * 1024 : (block + 1) * 1024], expected)
    assert not np.array_equal(rows, open_source("random:2500x40", dtype=dtype, seed=1).read_rows(0, 2500))


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (f"random:{s}", {})
        for s in ("", "x", "10x", "x10", "1.5x3", "10X3", "-1x3", "0x3", "3x0", "1e6x3", " 3x3", "9x" * 9 + "9" * 18)
    ]
    + [
        ("random:10x3", options)
        for options in (
            {"seed": -1},
            {"seed": 2**64},
            {"dtype": "i4"},
            {"dtype": "f2"},
            {"dtype": "?!"},
            {"axis": 1},
            {"row_shape": (3,)},
            {"dataset": "a"},
        )
    ],
)
def test_random_bad_input(spec, options):
    with pytest.raises(InputError):
        open_source(spec, **options)


# stacks


@settings(deadline=None, max_examples=50)
@given(start=st.integers(0, 60), stop=st.integers(0, 60))
def test_stack(tmp_path_factory, start, stop):
    folder = tmp_path_factory.getbasetemp() / "stack"
    array = make_array((60, 4))
    cuts = [0, 7, 8, 31, 60]
    if not folder.exists():
        folder.mkdir()
        for i, save in enumerate([save_npy, save_fortran, save_hdf5_chunks, save_zarr]):
            save(folder / f"{i}.npy", array[cuts[i] : cuts[i + 1]])
    source = open_source([folder / "0.npy", str(folder / "1.npy"), f"{folder / '2.hdf5'}::a/test", folder / "3.npy"])
    assert isinstance(source, StackedSource)
    np.testing.assert_array_equal(source.parts, [[0, 7], [7, 8], [8, 31], [31, 60]])
    assert source.parts.dtype == np.int64
    if start <= stop:
        source = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(source.read_rows(start, stop), array[start:stop])


def test_stack_of_one_is_a_part(tmp_path):
    path, _ = save_npy(tmp_path / "A.npy", make_array((9, 4)))
    source = open_source((path,), axis=1)
    np.testing.assert_array_equal(source.parts, [[0, 4]])
    check_rows(source, make_array((9, 4)).T)


@pytest.mark.parametrize(("other", "what"), [(make_array((9, 5)), "row shape"), (make_array((9, 4), "f4"), "dtype")])
def test_parts_that_differ(tmp_path, other, what):
    first, _ = save_npy(tmp_path / "A.npy", make_array((9, 4)))
    second, _ = save_npy(tmp_path / "B.npy", other)
    with pytest.raises(InputError, match=rf"A\.npy has {what} .* B\.npy|A\.npy has {what} .*B\.npy has {what}"):
        open_source([first, first, second])


def test_parts_of_either_byte_order_agree(tmp_path):
    first, _ = save_npy(tmp_path / "A.npy", make_array((3, 4), "<f8"))
    second, _ = save_npy(tmp_path / "B.npy", make_array((3, 4), ">f8"))
    check_rows(open_source([first, second]), np.concatenate([make_array((3, 4))] * 2))


def test_empty_stack():
    with pytest.raises(InputError, match="the list of sources is empty"):
        open_source([])


# what is refused wherever it comes from


@pytest.mark.parametrize(
    "array",
    [
        np.array(3.0),
        np.empty((0, 4)),
        np.empty((4, 0)),
        np.array(["a", "b"]),
        np.array([b"a", b"b"]),
        np.zeros(3, "M8[s]"),
        np.zeros(3, [("a", "f8"), ("b", "i4")]),
        np.zeros(3, np.longdouble),
        np.zeros(3, np.clongdouble),
    ],
    ids=str,
)
def test_arrays_that_are_no_matrix(tmp_path, array):
    np.save(tmp_path / "A.npy", array)
    with pytest.raises(InputError):
        open_source(tmp_path / "A.npy")


@pytest.mark.parametrize(
    "name",
    ["A.npy", "A.h5", "A.h5::test", "A.zarr", "A.bin", "no/A.npy", "memory://nothing/A.zarr", "random", "a::b", ""],
)
def test_absent(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError if name else OpenError):
        open_source(name)
    assert not list(tmp_path.iterdir())


def test_names_with_colons(tmp_path):
    path = tmp_path / "A::B.npy"
    np.save(path, make_array((5, 3)))
    check_rows(open_source(path), make_array((5, 3)))


def test_file_that_is_named_like_random_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Path("random:5x3").open("wb") as file:
        np.save(file, make_array((5, 3)))
    check_rows(open_source("random:5x3"), make_array((5, 3)))


def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "A.npy")
    with pytest.raises(OpenError, match="is neither"):
        open_source(tmp_path / "A.npy")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path, _ = save_npy(tmp_path / "A.npy", make_array((5, 3)))
    path.chmod(0)
    with pytest.raises(OpenError, match="permissions"):
        open_source(path)


def test_what_is_no_source():
    with pytest.raises(InputError, match="ndarray is not a path"):
        open_source(np.zeros((3, 3)))
