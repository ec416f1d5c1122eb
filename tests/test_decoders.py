"""One chunk's bytes to its values, beside what zarr makes of them; damaged ones are refused."""

from __future__ import annotations

import zlib

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

from pipeline.matrix.arrays import reading_config
from pipeline.readers import codecs as decoders

pytestmark = pytest.mark.versions

ROWS, COLUMNS = 24, 5
VALUES = np.arange(1, ROWS * COLUMNS + 1, dtype="f4").reshape(ROWS, COLUMNS)

PLAIN = {
    "blosc": {"compressors": [BloscCodec(cname="lz4", typesize=4)]},
    "blosc-zstd-bits": {"compressors": [BloscCodec(cname="zstd", typesize=4, shuffle="bitshuffle")]},
    "zstd": {"compressors": [ZstdCodec(level=1)]},
    "zstd-checksum": {"compressors": [ZstdCodec(level=1, checksum=True)]},
    "gzip": {"compressors": [GzipCodec()]},
    "zstd-crc32c": {"compressors": [ZstdCodec(), Crc32cCodec()]},
    "crc32c-blosc": {"compressors": [Crc32cCodec(), BloscCodec(typesize=4)]},
    "twice": {"compressors": [ZstdCodec(), BloscCodec(typesize=1)]},
    "crc32c": {"compressors": [Crc32cCodec()]},
    "shards": {"shards": (ROWS, COLUMNS), "compressors": [ZstdCodec(), Crc32cCodec()]},
    "v2-blosc": {"zarr_format": 2, "compressors": numcodecs.Blosc()},
    "v2-zlib": {"zarr_format": 2, "compressors": numcodecs.Zlib()},
    "v2-lz4": {"zarr_format": 2, "compressors": numcodecs.LZ4()},
}
OTHER = {
    "big-endian": {"compressors": [ZstdCodec()], "serializer": BytesCodec(endian="big")},
    "transposed": {"compressors": [ZstdCodec()], "filters": [TransposeCodec(order=(1, 0))]},
    "v2-delta": {"zarr_format": 2, "compressors": numcodecs.Zstd(), "filters": [numcodecs.Delta("f4")]},
    "v2-big-endian": {"zarr_format": 2, "compressors": numcodecs.Zstd(), "dtype": ">f4"},
    "v2-lzma": {"zarr_format": 2, "compressors": numcodecs.LZMA()},
    "shards-big-endian": {
        "chunks": (ROWS, COLUMNS),
        "compressors": None,
        "serializer": ShardingCodec(chunk_shape=(8, COLUMNS), codecs=[BytesCodec(endian="big"), ZstdCodec()]),
    },
}


def make(path, dtype="f4", **settings):
    """An array of chunks of 8 rows, and the encoded bytes of its second chunk."""
    settings = {"chunks": (8, COLUMNS), "filters": None} | settings
    array = zarr.create_array(str(path), shape=VALUES.shape, dtype=dtype, **settings)
    array[:] = VALUES
    array = reading_config(array)
    key = array.metadata.encode_chunk_key((0 if array.shards else 1, 0))
    encoded = np.fromfile(path / key, np.uint8)
    if array.shards:
        offset, nbytes = np.frombuffer(encoded[-4 - 16 * 3 : -4].tobytes(), "<u8").reshape(3, 2)[1].tolist()
        encoded = encoded[offset : offset + nbytes]
    return array, encoded


@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
def test_values_are_those_that_were_written(name, tmp_path):
    array, encoded = make(tmp_path / "A.zarr", **(PLAIN | OTHER)[name])
    into = np.full((8, COLUMNS), -1, "f4")
    decode = decoders.chunk_decoder(array)
    assert decode is not None
    decode(encoded, into)
    np.testing.assert_array_equal(into, VALUES[8:16])


@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
def test_only_plain_rows_go_without_zarr(name, tmp_path, monkeypatch):
    array, _ = make(tmp_path / "A.zarr", **(PLAIN | OTHER)[name])
    monkeypatch.setattr(decoders, "_zarr_decoder", lambda _: None)
    assert (decoders.chunk_decoder(array) is not None) == (name in PLAIN)


def test_order_f_is_left_to_the_array(tmp_path):
    array, _ = make(tmp_path / "A.zarr", zarr_format=2, compressors=numcodecs.Zstd(), order="F")
    assert decoders.chunk_decoder(array) is None


@pytest.mark.parametrize("name", PLAIN)
def test_a_chunk_that_is_cut_is_refused(name, tmp_path):
    array, encoded = make(tmp_path / "A.zarr", **PLAIN[name])
    decode = decoders.chunk_decoder(array)
    into = np.zeros((8, COLUMNS), "f4")
    for kept in (0, 1, 3, 7, len(encoded) // 2, len(encoded) - 1):
        with pytest.raises((ValueError, RuntimeError, OSError, EOFError, zlib.error)):
            decode(encoded[:kept], into)


@pytest.mark.parametrize("name", ["blosc", "zstd", "gzip", "v2-zlib", "v2-lz4"])
@pytest.mark.parametrize("rows", [4, 16])
def test_a_chunk_of_fewer_or_more_bytes_is_refused(name, rows, tmp_path):
    """As a damaged header may have it: else the rest would be what the buffer held before."""
    array, _ = make(tmp_path / "A.zarr", **PLAIN[name])
    settings = PLAIN[name] | {"chunks": (rows, COLUMNS)}
    _, other = make(tmp_path / "B.zarr", **settings)
    with pytest.raises(ValueError, match=f"holds {rows * COLUMNS * 4} bytes instead of {8 * COLUMNS * 4}"):
        decoders.chunk_decoder(array)(other, np.zeros((8, COLUMNS), "f4"))


def test_every_flipped_bit_is_found_where_there_is_a_checksum(tmp_path):
    array, encoded = make(tmp_path / "A.zarr", **PLAIN["zstd-crc32c"])
    decode = decoders.chunk_decoder(array)
    into = np.zeros((8, COLUMNS), "f4")
    assert google_crc32c.value(encoded[:-4].tobytes()) == int.from_bytes(encoded[-4:].tobytes(), "little")
    for bit in range(8 * len(encoded)):
        damaged = encoded.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="checksum"):
            decode(damaged, into)
