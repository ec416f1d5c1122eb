"""Files are known by what they hold: HDF5 behind a user block, and formats that are no plain numbers, by their names."""

import bz2
import contextlib
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile

import h5py
import numcodecs
import numpy as np
import pytest

import pipeline
from pipeline.errors import InputError, OpenError
from pipeline.matrix import signatures as formats
from pipeline.matrix.formats import open_source
from pipeline.matrix.sources import FileSource

pytestmark = pytest.mark.versions

ARRAY = np.arange(1.0, 61.0).reshape(20, 3)
RAW = {"dtype": "float64", "row_shape": (3,)}

# HDF5 behind a user block


def with_user_block(path, size, *, prepended, **options):
    with h5py.File(path, "w", **({} if prepended else {"userblock_size": size})) as file:
        file.create_dataset("group/x", data=ARRAY, **options)
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(size)[:size]
    if prepended:
        path.write_bytes(header + path.read_bytes())
    else:
        with path.open("r+b") as file:
            file.write(header)


@pytest.mark.parametrize("name", ["A.mat", "A.nwb", "A", "A.bin", "A.h5"])
@pytest.mark.parametrize("size", [512, 1024, 2048, 65536])
@pytest.mark.parametrize("prepended", [False, True])
def test_user_block(tmp_path, name, size, prepended):
    with_user_block(tmp_path / name, size, prepended=prepended)
    with h5py.File(tmp_path / name) as file:
        np.testing.assert_array_equal(file["group/x"][:], ARRAY)
    for text in (tmp_path / name, f"{tmp_path / name}::group/x", f"{tmp_path / name}::/group/x"):
        source = open_source(text)
        assert isinstance(source, FileSource)
        np.testing.assert_array_equal(source.read_rows(4, 19), ARRAY[4:19])
        matrix = pipeline.open_matrix(text)
        windows = pipeline.gather(pipeline.plan_windows(matrix, [0, 7], length=2))
        np.testing.assert_array_equal(windows, [ARRAY[0:2], ARRAY[7:9]])
    with pytest.raises(InputError, match="raw binary"):
        open_source(tmp_path / name, **RAW)


@pytest.mark.parametrize("prepended", [False, True])
def test_user_block_before_chunks(tmp_path, prepended):
    with_user_block(tmp_path / "A.mat", 2048, prepended=prepended, chunks=(4, 2), compression="gzip")
    matrix = pipeline.create_matrix(tmp_path / "A.mat", tmp_path / "A.zarr", dataset="group/x")
    np.testing.assert_array_equal(matrix.array[:], ARRAY)


@pytest.mark.parametrize("offset", [8, 256, 768, 3072])
def test_superblock_elsewhere_is_none(tmp_path, offset):
    content = bytearray(4800)
    content[offset : offset + 8] = formats.HDF5_MAGIC
    (tmp_path / "A.bin").write_bytes(content)
    assert open_source(tmp_path / "A.bin", **RAW).shape == (200, 3)


# .npy


@pytest.mark.parametrize("opened", [open_source, pipeline.open_matrix])
def test_npy_of_two_arrays(tmp_path, opened):
    for rest, match in ((ARRAY + 1, "a second array"), (b"abc", "3 more than its header declares")):
        with (tmp_path / "A.npy").open("wb") as file:
            np.save(file, ARRAY)
            np.save(file, rest) if isinstance(rest, np.ndarray) else file.write(rest)
        with pytest.raises(OpenError, match=match):
            opened(tmp_path / "A.npy")
        with pytest.raises(OpenError, match=match):
            opened([tmp_path / "A.npy"])
    with pytest.raises(OpenError, match="3 more"):
        pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr")
    assert not (tmp_path / "A.zarr").exists()
    np.save(tmp_path / "A.npy", ARRAY)
    (tmp_path / "A.npy").write_bytes((tmp_path / "A.npy").read_bytes()[:-1])
    with pytest.raises(OpenError, match="bytes that its header declares"):
        opened(tmp_path / "A.npy")


# other formats


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, a=ARRAY)
    return buffer.getvalue()


def npz_of_nothing():
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    return buffer.getvalue()


def tar_of_hdf5():
    inner, outer = io.BytesIO(), io.BytesIO()
    with h5py.File(inner, "w") as file:
        file["x"] = ARRAY
    with tarfile.open(fileobj=outer, mode="w") as archive:
        entry = tarfile.TarInfo("A.h5")
        entry.size = len(inner.getvalue())
        archive.addfile(entry, io.BytesIO(inner.getvalue()))
    return outer.getvalue()


def sqlite():
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("create table t (x)")
        return database.serialize()


def picture(kind):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, kind)
    return buffer.getvalue()


def numbers():
    return ARRAY.tobytes()


FORMATS = [
    (npz, "ZIP"),
    (npz_of_nothing, "ZIP"),
    (lambda: gzip.compress(numbers()), "gzip"),
    (lambda: bz2.compress(numbers()), "bzip2"),
    (lambda: bz2.compress(b""), "bzip2"),
    (lambda: lzma.compress(numbers()), "xz"),
    (lambda: bytes(numcodecs.Zstd().encode(numbers())), "Zstandard"),
    (tar_of_hdf5, "tar archive"),
    (sqlite, "SQLite"),
    (lambda: b"CDF\x01" + numbers(), "netCDF-3"),
    (lambda: b"CDF\x02" + numbers(), "netCDF-3"),
    (lambda: b"CDF\x05" + numbers(), "netCDF-3"),
    (lambda: b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\1IM" + numbers(), "MATLAB"),
    (lambda: b"PAR1" + numbers() + b"PAR1", "Parquet"),
    (lambda: b"ARROW1\0\0" + numbers(), "Arrow"),
    (lambda: b"SIMPLE  =                    T".ljust(80) + numbers(), "FITS"),
    (lambda: b"GRIB\0\0\0\2" + numbers(), "GRIB"),
    (lambda: picture("PNG"), "image"),
    (lambda: picture("TIFF"), "TIFF"),
    (lambda: b"0".ljust(8) + b"patient".ljust(80) + numbers(), "EDF"),
    (lambda: b"RIFF\0\0\0\0WAVEfmt " + numbers(), "WAV"),
]
UNSURE = [
    *((lambda protocol=protocol: pickle.dumps(ARRAY, protocol), "pickle") for protocol in range(2, 6)),
    (lambda: picture("JPEG"), "image"),
    (lambda: b"1.0,2.0\n" * 200, "text"),
]


@pytest.mark.parametrize(("make", "name"), FORMATS + UNSURE)
def test_format_is_named(tmp_path, make, name):
    for file in ("A.bin", "A.nc", "A.npz", "A.mat"):
        path = tmp_path / file
        path.write_bytes(make())
        if path.suffix == ".nc" and (make, name) in UNSURE:
            continue
        for opened in (open_source, pipeline.open_matrix):
            with pytest.raises(OpenError, match=name) as caught:
                opened(path)
            assert "\n" not in str(caught.value)
            assert "--dtype" not in str(caught.value)


@pytest.mark.parametrize(("make", "name"), FORMATS)
def test_sure_format_is_no_raw_binary(tmp_path, make, name):
    content = make()
    (tmp_path / "A.bin").write_bytes(content)
    for options in ({"dtype": "uint8", "row_shape": ()}, {"dtype": "uint8", "row_shape": (len(content),)}):
        with pytest.raises(OpenError, match=name):
            open_source(tmp_path / "A.bin", **options)


@pytest.mark.parametrize(("make", "name"), UNSURE)
def test_unsure_format_is_raw_binary_where_the_caller_says_so(tmp_path, make, name):
    content = make()
    (tmp_path / "A.bin").write_bytes(content)
    rows = open_source(tmp_path / "A.bin", dtype="uint8", row_shape=()).read_rows(0, len(content))
    assert rows.tobytes() == content


@pytest.mark.parametrize("value", [0, 1, -1, 255, 32767, 1000, 0.5, 1.0, np.pi, np.nan, 1e300])
@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<i4", ">i4", "<i8", ">i8", "<f4", ">f4", "<f8", ">f8", "?"])
def test_numbers_are_no_format(tmp_path, value, dtype):
    with np.errstate(all="ignore"):
        data = np.full(400, value).astype(dtype)
    (tmp_path / "A.bin").write_bytes(data.tobytes())
    np.testing.assert_array_equal(
        open_source(tmp_path / "A.bin", dtype=dtype, row_shape=()).read_rows(0, 400),
        data.astype(data.dtype.newbyteorder("=")),
    )
    if data.dtype.itemsize > 1:
        with pytest.raises(InputError, match="raw binary needs a dtype"):
            open_source(tmp_path / "A.bin")


def test_empty_file_is_no_format():
    assert formats.recognize(io.BytesIO()) is None
    assert formats.find_hdf5(io.BytesIO()) is None
