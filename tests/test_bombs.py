"""Chunks that decode to much more, or less, than they hold are corrupt, and take no memory; sound ones are read."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import google_crc32c
import h5py
import hdf5plugin
import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.codecs import numcodecs as zarr_numcodecs

from pipeline.matrix.formats import open_source
from tests import bombs

ROWS, COLUMNS, CHUNK_ROWS = 16, 2**16, 8
VALUES = np.arange(ROWS * COLUMNS, dtype="f8").reshape(ROWS, COLUMNS)
"""A chunk holds 4 MiB, more than any bomb takes."""

V3 = {
    "blosc": BloscCodec(),
    "bz2": zarr_numcodecs.BZ2(),
    "gzip": GzipCodec(),
    "gzip-members": GzipCodec(),
    "lz4": zarr_numcodecs.LZ4(),
    "lzma": zarr_numcodecs.LZMA(),
    "zlib": zarr_numcodecs.Zlib(),
    "zstd": ZstdCodec(),
    "zstd-unknown": ZstdCodec(),
    "zstd-frames": ZstdCodec(),
}
V2 = {
    name: {
        "blosc": numcodecs.Blosc(),
        "bz2": numcodecs.BZ2(),
        "gzip": numcodecs.GZip(),
        "lz4": numcodecs.LZ4(),
        "lzma": numcodecs.LZMA(),
        "zlib": numcodecs.Zlib(),
        "zstd": numcodecs.Zstd(),
    }[name.partition("-")[0]]
    for name in V3
}
ZARR = {
    **{f"v3-{name}": (name, {"compressors": [codec]}) for name, codec in V3.items()},
    **{f"v2-{name}": (name, {"zarr_format": 2, "compressors": codec}) for name, codec in V2.items()},
    **{
        f"{name}-{form}": (name, settings)
        for name in ("blosc", "gzip", "zstd", "zstd-unknown")
        for form, settings in {
            "transposed": {"compressors": [V3[name]], "filters": [TransposeCodec(order=(1, 0))]},
            "big-endian": {"compressors": [V3[name]], "serializer": BytesCodec(endian="big")},
            "outermost": {"compressors": [ZstdCodec(), V3[name]]},
            "checked": {"compressors": [V3[name], Crc32cCodec()]},
            "columns": {"compressors": [V3[name]], "chunks": (CHUNK_ROWS, COLUMNS // 2)},
            "shards": {"compressors": [V3[name]], "shards": (ROWS, COLUMNS)},
            "shards-big-endian": {
                "chunks": (ROWS, COLUMNS),
                "compressors": None,
                "serializer": ShardingCodec(
                    chunk_shape=(CHUNK_ROWS, COLUMNS), codecs=[BytesCodec(endian="big"), V3[name]]
                ),
            },
            "v2-delta": {"zarr_format": 2, "compressors": V2[name], "filters": [numcodecs.Delta("f8")]},
            "v2-order-f": {"zarr_format": 2, "compressors": V2[name], "order": "F"},
            "v2-filter": {"zarr_format": 2, "compressors": None, "filters": [V2[name]]},
        }.items()
    },
}


def make_zarr(path, settings):
    array = zarr.create_array(
        path, shape=VALUES.shape, dtype="f8", **({"chunks": (CHUNK_ROWS, COLUMNS), "filters": None} | settings)
    )
    array[:] = VALUES
    return array


def spoil_zarr(array, encoded):
    """Put bytes into the place of the last chunk, or of all inner chunks."""
    folder = Path(array.store.root)
    if "Crc32c" in str(array.metadata.codecs if array.metadata.zarr_format == 3 else ()) and array.shards is None:
        encoded += google_crc32c.value(encoded).to_bytes(4, "little")
    if array.shards is not None:
        count = ROWS // CHUNK_ROWS
        index = b"".join(struct.pack("<QQ", 0, len(encoded)) for _ in range(count))
        encoded += index + google_crc32c.value(index).to_bytes(4, "little")
    last = tuple(-(-size // chunk) - 1 for size, chunk in zip(array.shape, array.shards or array.chunks, strict=True))
    target = folder / array.metadata.encode_chunk_key(last)
    assert target.exists()
    target.write_bytes(encoded)


PLUGINS = {
    "blosc": hdf5plugin.Blosc("lz4"),
    "zstd": hdf5plugin.Zstd(),
    "lz4": hdf5plugin.LZ4(),
    "bitshuffle": hdf5plugin.Bitshuffle(),
    "bzip2": hdf5plugin.BZip2(),
}
FILTERS = {
    "zlib": [(h5py.h5z.FILTER_DEFLATE, (4,))],
    "zlib-fletcher32": [(h5py.h5z.FILTER_DEFLATE, (4,)), (h5py.h5z.FILTER_FLETCHER32, ())],
    "shuffle-zlib": [(h5py.h5z.FILTER_SHUFFLE, ()), (h5py.h5z.FILTER_DEFLATE, (4,))],
    # Left to h5py.
    "zlib-shuffle": [(h5py.h5z.FILTER_DEFLATE, (4,)), (h5py.h5z.FILTER_SHUFFLE, ())],
    "lzf": [(h5py.h5z.FILTER_LZF, ())],
    **{name: [(plugin.filter_id, plugin.filter_options)] for name, plugin in PLUGINS.items()},
}
RAW = {
    "zlib": "zlib",
    "shuffle-zlib": "zlib",
    "blosc": "blosc",
    "zstd": "zstd",
    "bzip2": "bz2",
}


def make_hdf5(path, filters):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((CHUNK_ROWS, COLUMNS))
    for code, values in filters:
        if code == h5py.h5z.FILTER_SHUFFLE:
            properties.set_shuffle()
        elif code == h5py.h5z.FILTER_FLETCHER32:
            properties.set_fletcher32()
        else:
            properties.set_filter(code, h5py.h5z.FLAG_OPTIONAL, values)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(VALUES.shape)
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_DOUBLE, space, properties)
        file["x"][:] = VALUES


def spoil_hdf5(path, encoded):
    with h5py.File(path, "r+") as file:
        file["x"].id.write_direct_chunk((CHUNK_ROWS, 0), encoded)


def hdf5_bomb(name, encoded):
    if name in RAW:
        return encoded[RAW[name]]
    if name == "zlib-fletcher32":
        import numcodecs.fletcher32

        return bytes(numcodecs.fletcher32.Fletcher32().encode(np.frombuffer(encoded["zlib"], np.uint8)))
    if name == "zlib-shuffle":
        raw = np.frombuffer(encoded["zlib"], np.uint8)
        whole = len(raw) // 8 * 8
        return raw[:whole].reshape(-1, 8).T.tobytes() + raw[whole:].tobytes()
    if name == "lzf":
        return bombs.lzf(4 * 2**20 // 3)
    return struct.pack(">QI", bombs.NBYTES, 2**16) + bytes(64)


@pytest.fixture(scope="module")
def encoded():
    return {name: make() for name, make in bombs.ENCODED.items()}


@pytest.fixture(scope="module")
def raised(encoded, tmp_path_factory):
    """What reading each prepared source raises, and by how much it raises the peak memory, in one process."""
    folder = tmp_path_factory.mktemp("bombs")
    cases = {}
    make_zarr(folder / "sound.zarr", {"compressors": [GzipCodec()]})
    make_hdf5(folder / "sound.h5", FILTERS["lz4"])
    cases["sound"] = "gather", str(folder / "sound.zarr")
    for name, (bomb, settings) in ZARR.items():
        array = make_zarr(folder / f"{name}.zarr", settings)
        spoil_zarr(array, encoded[bomb])
        cases[f"gather-{name}"] = "gather", str(folder / f"{name}.zarr")
        cases[f"create-{name}"] = "create", str(folder / f"{name}.zarr")
    for name, filters in FILTERS.items():
        path = folder / f"{name}.h5"
        make_hdf5(path, filters)
        spoil_hdf5(path, hdf5_bomb(name, encoded))
        cases[f"hdf5-{name}"] = "create", f"{path}::x"
        layout = h5py.VirtualLayout((ROWS + 2, COLUMNS), "f8")
        layout[1 : ROWS + 1] = h5py.VirtualSource(path, "x", VALUES.shape)
        with h5py.File(folder / f"virtual-{name}.h5", "w") as file:
            file.create_virtual_dataset("v", layout)
        cases[f"virtual-{name}"] = "create", f"{folder / f'virtual-{name}.h5'}::v"
        with h5py.File(folder / f"linked-{name}.h5", "w") as file:
            file["l"] = h5py.ExternalLink(path, "x")
        cases[f"linked-{name}"] = "create", f"{folder / f'linked-{name}.h5'}::l"
    for name in ("gzip", "zstd"):
        group = folder / f"coordinate-{name}.zarr"
        zarr.create_group(group)
        zarr.create_array(group / "x", data=VALUES[:, :4], dimension_names=["time", "c"], chunks=(8, 4))
        time = zarr.create_array(
            group / "time", shape=(ROWS,), dtype="f8", chunks=(ROWS,), dimension_names=["time"], compressors=[V3[name]]
        )
        time[:] = np.arange(ROWS)
        (group / "time" / "c" / "0").write_bytes(encoded[name])
        cases[f"coordinate-{name}"] = "coordinate", str(group / "x")
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.bombs"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    yield json.loads(done.stdout)
    shutil.rmtree(folder)


NAMES = [
    *(f"{way}-{name}" for way in ("gather", "create") for name in ZARR),
    *(f"{way}-{name}" for way in ("hdf5", "virtual", "linked") for name in FILTERS),
    "coordinate-gzip",
    "coordinate-zstd",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_chunk_that_decodes_to_gigabytes_is_corrupt(name, raised):
    kind, code, text, growth = raised[name]
    assert (kind, code) == ("IntegrityError", 4), text
    assert growth < 2**29
    assert re.search(r"instead of \d|holds more than \d|buffer is too small", text), text
    stem = name if name.startswith(("virtual", "linked", "coordinate")) else name.partition("-")[2]
    assert stem in text
    # Of a run of rows where zarr decodes several chunks in one call.
    assert re.search(r"chunk at \(8, 0\)|/c/[01]/[01]\b|/1\.0\b|rows \[0, 16\)|the coordinate time", text)


def test_the_command_line_says_it_in_one_line(encoded, tmp_path):
    make_hdf5(tmp_path / "A.h5", FILTERS["zlib"])
    spoil_hdf5(tmp_path / "A.h5", encoded["zlib"])
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "create", "A.h5", "A.zarr", "-q"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    [line] = done.stderr.splitlines()
    assert "A.h5" in line
    assert "(8, 0)" in line
    assert not os.path.lexists(tmp_path / "A.zarr")


@pytest.mark.parametrize("name", ZARR)
def test_sound_chunks_of_every_codec_are_read(name, tmp_path):
    make_zarr(tmp_path / "A.zarr", ZARR[name][1])
    np.testing.assert_array_equal(open_source(tmp_path / "A.zarr").read_rows(0, ROWS), VALUES)


def test_a_chunk_at_the_edge_that_skips_the_filters_is_not_taken_for_their_bytes(tmp_path):
    """Its values, as bytes, would be a header of LZ4 that asks for gigabytes."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((4,))
    properties.set_filter(PLUGINS["lz4"].filter_id, h5py.h5z.FLAG_OPTIONAL, PLUGINS["lz4"].filter_options)
    library = ctypes.CDLL(h5py.h5p.__file__)
    library.H5Pset_chunk_opts.argtypes = [ctypes.c_int64, ctypes.c_uint]
    assert library.H5Pset_chunk_opts(properties.id, 2) >= 0
    values = np.frombuffer(struct.pack(">Q", bombs.NBYTES) * 6, "f8")
    with h5py.File(tmp_path / "A.h5", "w", libver="latest") as file:
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((6,)), properties)
        file["x"][:] = values
    np.testing.assert_array_equal(open_source(tmp_path / "A.h5").read_rows(0, 6), values)


@pytest.mark.parametrize("name", FILTERS)
def test_sound_chunks_of_every_filter_are_read(name, tmp_path):
    make_hdf5(tmp_path / "A.h5", FILTERS[name])
    np.testing.assert_array_equal(open_source(tmp_path / "A.h5").read_rows(0, ROWS), VALUES)
