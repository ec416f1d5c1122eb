"""HDF5 data sets of every layout give the rows that were written into them."""

import os
import pickle
import sys
import zlib

import h5py
import numcodecs
import numpy as np
import pytest

from pipeline.errors import InputError, IntegrityError, NotFoundError, OpenError
from pipeline.matrix import hdf5
from pipeline.matrix.formats import open_source
from pipeline.matrix.sources import FileSource

ARRAY = np.arange(103 * 29, dtype="f8").reshape(103, 29)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "A.h5"


def write(path, data=ARRAY, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("test", data=data, **options)


def check_rows(path, expected=ARRAY, *, axis=0):
    source = pickle.loads(pickle.dumps(open_source(path, axis=axis)))
    expected = np.moveaxis(expected, axis, 0)
    assert source.shape == expected.shape
    assert source.dtype == expected.dtype.newbyteorder("=")
    rows = len(expected)
    for start, stop in ((0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows // 3 + rows // 2)):
        got = source.read_rows(start, stop)
        assert got.dtype == source.dtype
        np.testing.assert_array_equal(got, expected[start:stop])
    return source


def count_chunks(monkeypatch):
    corners = []
    read = hdf5.Hdf5Source._read_chunk

    def counting(self, dataset, corner):
        corners.append(corner)
        return read(self, dataset, corner)

    monkeypatch.setattr(hdf5.Hdf5Source, "_read_chunk", counting)
    return corners


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "gzip"},
        {"compression": "gzip", "shuffle": True},
        {"compression": "gzip", "shuffle": True, "fletcher32": True},
        {"shuffle": True},
        {"fletcher32": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["<f8", ">i4", "<c16", "|b1", "<u2"])
def test_filters_outside_of_the_lock(path, options, axis, dtype, monkeypatch):
    monkeypatch.setattr(hdf5.Hdf5Source, "_ask_rows", None)
    array = (ARRAY % 251 > 100 if dtype == "|b1" else ARRAY).astype(dtype)
    write(path, array, chunks=(10, 7), **options)
    source = check_rows(path, array, axis=axis)
    assert source.data.filters is not None
    assert source.chunk_rows == (10, 7)[axis]


@pytest.mark.parametrize("axis", [0, 1])
def test_each_chunk_is_read_once(path, monkeypatch, axis):
    write(path, chunks=(10, 7), compression="gzip")
    corners = count_chunks(monkeypatch)
    open_source(path, axis=axis).read_rows(8, 22)
    assert len(corners) == len(set(corners)) == ((3 * 5) if axis == 0 else (3 * 11))


def write_by_hand(path, filters, encode, *, masks=None):
    """Write chunks that we encode, for filters that this build of libhdf5 may not have."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((10, 29))
    for identifier, values in filters:
        properties.set_filter(identifier, h5py.h5z.FLAG_OPTIONAL, values)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(ARRAY.shape)
        dataset = h5py.h5d.create(file.id, b"test", h5py.h5t.NATIVE_DOUBLE, space, properties)
        for i in range(11):
            chunk = np.full((10, 29), -1.0)
            part = ARRAY[10 * i : 10 * i + 10]
            chunk[: len(part)] = part
            mask = masks[i % len(masks)] if masks else 0
            dataset.write_direct_chunk((10 * i, 0), encode(chunk, mask), mask)


def test_blosc(path):
    codec = numcodecs.Blosc("lz4", shuffle=numcodecs.Blosc.SHUFFLE)
    write_by_hand(path, [(32001, (2, 2, 8, 2320, 5, 1, 1))], lambda chunk, _: bytes(codec.encode(chunk)))
    check_rows(path)


def test_zstd_after_shuffle(path):
    write_by_hand(
        path,
        [(2, (8,)), (32015, (3,))],
        lambda chunk, _: bytes(numcodecs.Zstd(3).encode(numcodecs.Shuffle(8).encode(chunk))),
    )
    check_rows(path)


def test_filter_mask(path):
    def encode(chunk, mask):
        data = chunk.tobytes()
        if not mask & 1:
            data = numcodecs.Shuffle(8).encode(np.frombuffer(data, "u1")).tobytes()
        return data if mask & 2 else zlib.compress(data)

    write_by_hand(path, [(2, (8,)), (1, (4,))], encode, masks=[0, 1, 2, 3])
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["test"][:], ARRAY)
    check_rows(path)


@pytest.mark.parametrize("dtype", ["<f8", ">f4"])
def test_absent_chunks_have_the_fill_value(path, dtype):
    expected = np.full((103, 29), 2.5, dtype)
    expected[41:55] = ARRAY[41:55]
    with h5py.File(path, "w") as file:
        made = file.create_dataset("test", (103, 29), dtype, chunks=(10, 7), compression="gzip", fillvalue=2.5)
        made[41:55] = ARRAY[41:55]
    check_rows(path, expected)


def test_contiguous_data_set_that_was_never_written(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("test", (103, 29), "f8", fillvalue=2.5)
    check_rows(path, np.full((103, 29), 2.5))


@pytest.mark.parametrize("userblock", [0, 1024])
@pytest.mark.parametrize("axis", [0, 1])
def test_contiguous_data_are_read_without_h5py(path, userblock, axis, monkeypatch):
    with h5py.File(path, "w", userblock_size=userblock) as file:
        file["test"] = ARRAY.astype(">f8")
    source = open_source(path, axis=axis)
    assert isinstance(source, FileSource)
    monkeypatch.setattr(hdf5, "open_hdf5", None)
    np.testing.assert_array_equal(source.read_rows(3, 28), np.moveaxis(ARRAY, axis, 0)[3:28])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "options",
    [{"compression": "lzf"}, {"compression": "lzf", "shuffle": True}, {"scaleoffset": 3}, {"compression": "szip"}],
    ids=str,
)
def test_other_filters(path, options, axis):
    if options.get("compression") == "szip" and not h5py.h5z.filter_avail(h5py.h5z.FILTER_SZIP):
        pytest.skip("this build has no SZIP")
    write(path, chunks=(10, 7), **options)
    source = check_rows(path, axis=axis)
    assert (source.data.filters is None) == (options.get("compression") != "lzf")


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
def test_corrupt_chunk(path, compression):
    write(path, chunks=(10, 29), compression=compression, fletcher32=True)
    with h5py.File(path) as file:
        where = file["test"].id.get_chunk_info_by_coord((40, 0))
    with path.open("r+b") as file:
        file.seek(where.byte_offset + where.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    source = open_source(path)
    np.testing.assert_array_equal(source.read_rows(0, 40), ARRAY[:40])
    with pytest.raises(IntegrityError) as caught:
        source.read_rows(30, 60)
    assert "\n" not in str(caught.value)
    assert "A.h5::/test" in str(caught.value)
    np.testing.assert_array_equal(source.read_rows(50, 103), ARRAY[50:])


def test_chunk_that_is_too_long(path):
    write_by_hand(path, [(1, (4,))], lambda chunk, _: zlib.compress(chunk.tobytes() + bytes(8)))
    with pytest.raises(IntegrityError, match="2328 bytes instead of 2320"):
        open_source(path).read_rows(0, 5)


def test_chunk_that_is_too_short(path):
    write_by_hand(path, [(1, (4,))], lambda chunk, _: zlib.compress(chunk.tobytes()[:-8]))
    with pytest.raises(IntegrityError, match="2312 bytes instead of 2320"):
        open_source(path).read_rows(0, 5)


def test_virtual_data_set(path, tmp_path):
    write(tmp_path / "B.h5", chunks=(10, 7))
    layout = h5py.VirtualLayout((103, 29), "f8")
    layout[:] = h5py.VirtualSource("B.h5", "test", (103, 29))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("test", layout)
    check_rows(path)


@pytest.mark.parametrize("chunks", [None, (10, 7)])
def test_links(path, tmp_path, chunks):
    write(tmp_path / "B.h5", chunks=chunks)
    with h5py.File(path, "w") as file:
        file["far"] = h5py.ExternalLink("B.h5", "/test")
        file["own"] = ARRAY + 1
        file["near"] = h5py.SoftLink("/own")
        file["nowhere"] = h5py.ExternalLink("C.h5", "/test")
    check_rows(f"{path}::far")
    check_rows(f"{path}::near", ARRAY + 1)
    with pytest.raises((OpenError, NotFoundError)):
        open_source(path, dataset="nowhere")


def test_external_storage(path, tmp_path):
    with h5py.File(path, "w") as file:
        file.create_dataset("test", data=ARRAY, external=[(tmp_path / "data.bin", 0, ARRAY.nbytes)])
    check_rows(path)


def test_compact(path):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((8, 3))
        made = h5py.h5d.create(file.id, b"test", h5py.h5t.NATIVE_DOUBLE, space, properties)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(ARRAY[:8, :3]))
    check_rows(path, ARRAY[:8, :3])


def test_enum_and_odd_integers_are_converted(path):
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "enum", data=np.arange(8, dtype="i2") % 3, dtype=h5py.enum_dtype({"A": 0, "B": 1, "C": 2}, "i2")
        )
        odd = h5py.h5t.STD_I32LE.copy()
        odd.set_precision(20)
        odd.set_offset(4)
        made = h5py.h5d.create(file.id, b"odd", odd, h5py.h5s.create_simple((8,)))
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(8, dtype="i4") - 3)
    check_rows(f"{path}::enum", np.arange(8, dtype="i2") % 3)
    check_rows(f"{path}::odd", np.arange(8, dtype="i4") - 3)


# names


def test_names(path):
    with h5py.File(path, "w") as file:
        file["scalar"] = 3
        file["a/b"] = ARRAY
    check_rows(path)
    check_rows(f"{path}::a/b")
    check_rows(f"{path}::/a/b")
    np.testing.assert_array_equal(open_source(path, dataset="/a/b").read_rows(2, 4), ARRAY[2:4])
    with pytest.raises(InputError, match="both name a data set"):
        open_source(f"{path}::a/b", dataset="a/b")
    for name in ("x", "a/x", "x/b"):
        with pytest.raises(NotFoundError, match=r"it holds a/b$"):
            open_source(f"{path}::{name}")
    with pytest.raises(NotFoundError, match="has no data set 'a'"):
        open_source(path, dataset="a")
    with pytest.raises(InputError, match="a single number"):
        open_source(path, dataset="scalar")


def test_several_data_sets_must_be_named(path):
    with h5py.File(path, "w") as file:
        for i in range(13):
            file[f"d{i:02}"] = ARRAY
    with pytest.raises(InputError, match=r"it holds d00, .*, d09 and 3 more"):
        open_source(path)
    with h5py.File(path, "w"):
        pass
    with pytest.raises(InputError, match="it holds none"):
        open_source(path)


def test_one_data_set_of_many_files(path, tmp_path):
    write(path)
    write(tmp_path / "B.h5", ARRAY + 1, chunks=(10, 7))
    source = open_source([path, tmp_path / "B.h5"], dataset="/test")
    np.testing.assert_array_equal(source.read_rows(90, 120), np.concatenate([ARRAY[90:], ARRAY[:17] + 1]))
    assert source.chunk_rows == 10


@pytest.mark.parametrize(
    "data",
    [
        np.array([b"a", b"b"]),
        np.array(["a", "b"], dtype=h5py.string_dtype()),
        np.zeros(3, [("a", "f8"), ("b", "i4")]),
        np.zeros(3, np.longdouble),
        np.zeros((0, 3)),
    ],
    ids=str,
)
def test_data_that_are_no_matrix(path, data):
    write(path, data)
    with pytest.raises((InputError, OpenError)):
        open_source(path)


def test_null_and_reference(path):
    with h5py.File(path, "w") as file:
        file["null"] = h5py.Empty("f8")
        file.create_dataset("reference", data=[file.ref], dtype=h5py.ref_dtype)
    with pytest.raises(OpenError, match="is empty"):
        open_source(path, dataset="null")
    with pytest.raises(OpenError, match="holds Python objects"):
        open_source(path, dataset="reference")


# files


def test_magic_bytes_without_the_suffix(path, tmp_path):
    write(path, chunks=(10, 7))
    path.rename(tmp_path / "A.data")
    check_rows(tmp_path / "A.data")


@pytest.mark.parametrize("content", [b"", b"other bytes", b"\x89HDF\r\n\x1a\n"])
def test_file_that_is_no_hdf5(path, content):
    path.write_bytes(content)
    with pytest.raises(OpenError, match="must be readable"):
        open_source(path)


def test_file_that_was_cut(path):
    write(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(OpenError):
        open_source(path)


def test_file_that_is_open_elsewhere(path):
    write(path, chunks=(10, 7))
    with h5py.File(path):
        check_rows(path)


def test_h5py_is_missing(path, monkeypatch):
    write(path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(OpenError, match="pip install h5py"):
        open_source(path)
