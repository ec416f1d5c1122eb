"""Reads that are checked: what is damaged is an error, never a wrong value; and what a file holds is never run."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import dask
import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

import pipeline
from pipeline.matrix.layout import read_layout
from pipeline.readers import choose as readers
from tests.layouts import LAYOUTS, ROWS, STORES, distinct, open_layout, stack

LENGTH = 16
STARTS = [195, 3, 40, 44, 100, 3]
OTHERS = {
    "zstd-checksum": {"chunks": (10, 5, 3), "compressors": [ZstdCodec(checksum=True)]},
    "gzip": {"chunks": (10, 5, 3), "compressors": [GzipCodec()]},
    "columns-crc": {"chunks": (10, 2, 2), "compressors": [Crc32cCodec()]},
    "nested-shards": {"chunks": (40, 5, 3), "compressors": None, "serializer": ShardingCodec(
        chunk_shape=(20, 5, 3), codecs=[ShardingCodec(chunk_shape=(4, 5, 3), codecs=[BytesCodec(), Crc32cCodec()])])},
    "v2-crc32": {"zarr_format": 2, "chunks": (10, 5, 3), "compressors": None, "filters": [numcodecs.CRC32()]},
    "v2-adler32-lz4": {"zarr_format": 2, "chunks": (10, 5, 3), "compressors": numcodecs.LZ4(), "filters": [numcodecs.Adler32()]},
    "v2-zstd-checksum": {"zarr_format": 2, "chunks": (10, 5, 3), "compressors": numcodecs.Zstd(checksum=True)},
}  # fmt: skip
CHECKED = ["default", "shards", "plain", "one-row-chunks", "zstd", "blosc-plain", "zarr-index-first", "zarr-shard-gzip", "zarr-crc", *OTHERS]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked")
    for name, (_, write) in LAYOUTS.items():
        write(folder / f"{name}.zarr", distinct())
    for name, settings in OTHERS.items():
        write_other(folder / f"{name}.zarr", ROWS, settings)[:] = distinct()
    return folder


def write_other(path, rows, settings):
    return zarr.create_array(str(path), shape=(rows, 5, 3), dtype="f8", **{"filters": None} | settings)


def open_checked(path, store=None):
    source = path if store is None else zarr.open_array(STORES[store](path), mode="r")
    return pipeline.open_matrix(source, check_reads=True)


def read(matrix, starts=STARTS):
    """Windows, and the bytes that were read, index and all."""
    reader = readers.choose_reader(matrix, row=starts[0])
    out = np.zeros((len(starts), LENGTH, *matrix.row_shape), matrix.dtype)
    return out, reader.read_windows(np.array(starts), LENGTH, out, np.arange(len(starts))).nbytes


def test_which_layouts_have_checksums(matrices):
    names = [*LAYOUTS, *OTHERS]
    assert {name for name in names if open_layout(matrices, name).layout.checksums} == set(CHECKED)


@pytest.mark.parametrize("store", [None, "memory", "objects"])
@pytest.mark.parametrize("name", CHECKED)
def test_values_are_those_of_the_matrix(name, store, matrices, tmp_path):
    matrix = open_checked(matrices / f"{name}.zarr", store)
    assert matrix.layout.reader == "decoded"
    assert matrix.layout.checked
    plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
    expected = stack(distinct(), STARTS, LENGTH)
    np.testing.assert_array_equal(pipeline.gather(plan), expected, strict=True)
    if store is None:
        result = pipeline.store(plan, tmp_path / "w.zarr")
        np.testing.assert_array_equal(result["windows"][:], expected, strict=True)


def test_reads_are_checked_only_where_all_are(matrices):
    assert not open_layout(matrices, "shards").layout.checked
    assert open_layout(matrices, "zstd").layout.checked
    assert not open_layout(matrices, "zarr-zstd").layout.checked


def index_plain(path):
    codecs = [BytesCodec(), Crc32cCodec()]
    serializer = ShardingCodec(chunk_shape=(4, 5, 3), codecs=codecs, index_codecs=[BytesCodec()])
    zarr.create_array(
        str(path), shape=(ROWS, 5, 3), dtype="f8", chunks=(32, 5, 3), serializer=serializer, compressors=None
    )


@pytest.mark.parametrize("name", ["npy", "hdf5", "zarr-plain", "zarr-morton", "v2", "zarr-zstd", "v2-zstd", "index"])
def test_without_checksums_it_is_refused(name, matrices, tmp_path):
    path = matrices / f"{name}.zarr"
    if name == "index":
        # An entry of the index that was damaged might name another chunk, whose checksum is right.
        path = tmp_path / "index.zarr"
        index_plain(path)
    with pytest.raises(
        pipeline.InputError, match=r"has none; record .* pipeline verify --write-manifest, .* pipeline create"
    ):
        pipeline.open_matrix(path, check_reads=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Rows of 16,000 bytes, four to an inner chunk, as the 32 GB of the README have them."""
    folder = tmp_path_factory.mktemp("wide")
    pipeline.create_matrix("random:1500x2000", folder / "A.zarr", seed=3)
    starts = np.random.default_rng(0).permutation(1480 // 37)[:30] * 37
    return folder / "A.zarr", starts


class TestCost:
    def test_amplification(self, wide):
        path, starts = wide
        matrix = open_checked(path)
        assert matrix.layout.chunk_rows == 4
        plan = pipeline.plan_windows(matrix, starts, length=LENGTH)
        chunks = sum((start + LENGTH - 1) // 4 - start // 4 + 1 for start in starts)
        assert plan.request.nbytes_read == chunks * 64_000
        assert plan.request.amplification == pytest.approx(chunks * 4 / (30 * LENGTH))
        assert 1.1 < plan.request.amplification < 1.25
        assert plan.matrix.shape == (1500, 2000)

    @pytest.mark.parametrize("store", [None, "memory"])
    def test_bytes_are_those_planned_and_a_window_is_one_read(self, store, wide, monkeypatch):
        path, starts = wide
        matrix = open_checked(path, store)
        calls = []
        if store is None:
            real = pipeline.readers.decoded.read_fully
            monkeypatch.setattr("pipeline.readers.decoded.read_fully", lambda *a: calls.append(a[3]) or real(*a))
        else:
            kind, real = type(matrix.array.store), type(matrix.array.store).get

            async def get(self, key, prototype, byte_range=None):
                value = await real(self, key, prototype, byte_range)
                calls.append(len(value))
                return value

            monkeypatch.setattr(kind, "get", get)
        reader = readers.choose_reader(matrix, row=0)
        calls.clear()
        out = np.empty((len(starts), LENGTH, 2000))
        nbytes = reader.read_windows(starts, LENGTH, out, np.arange(len(starts))).nbytes
        a = zarr.open_array(path)[:]
        np.testing.assert_array_equal(out, stack(a, starts, LENGTH))
        chunks = sum((start + LENGTH - 1) // 4 - start // 4 + 1 for start in starts)
        long = [call for call in calls if call >= 64_000]
        assert len(long) == len(starts)
        assert sum(long) == chunks * 64_004
        # Of a store, a run reads the index of a shard once: here when the reader was chosen.
        assert nbytes == chunks * 64_004 + (matrix.layout.files.index.nbytes if store is None else 0)


def extents(path, matrix):
    """Of the one shard in a file: (offset, bytes) of each inner chunk, read without the package; then of its index."""
    raw = path.read_bytes()
    chunks = matrix.layout.files.file_extents
    index = np.frombuffer(raw[-16 * chunks - 4 : -4], "<u8").reshape(chunks, 2).astype(np.int64)
    return index, (len(raw) - 16 * chunks - 4, 16 * chunks + 4)


FLIPPED = {
    "shards": {"shard_rows": 24, "chunk_rows": 4},
    "compressed shards": {"shard_rows": 24, "chunk_rows": 4, "compress": "blosc"},
    "plain": {"shard_rows": 0, "chunk_rows": 12},
    "compressed": {"shard_rows": 0, "chunk_rows": 12, "compress": "zstd"},
}


def flip_bits(folder, settings, flips, store):
    """Flip bits one at a time, anywhere in the files: those in what windows touch are found, others change nothing."""
    a = distinct(96, (4,))
    np.save(folder / "A.npy", a)
    matrix = pipeline.create_matrix(folder / "A.npy", folder / "A.zarr", **settings)
    starts = [30, 1, 77]
    rows = {row for start in starts for row in range(start, start + LENGTH)}
    expected = stack(a, starts, LENGTH)
    generator = np.random.default_rng(len(str(settings)))
    files = sorted(path for path in (folder / "A.zarr" / "c").rglob("*") if path.is_file())
    found = unchecked = 0
    for _ in range(flips):
        path = files[generator.integers(len(files))]
        number = int(path.relative_to(folder / "A.zarr" / "c").parts[0])
        raw = bytearray(path.read_bytes())
        byte = int(generator.integers(len(raw)))
        first = number * matrix.layout.file_rows
        if matrix.layout.shard_rows:
            index, (index_at, _) = extents(path, matrix)
            chunk = np.flatnonzero((index[:, 0] <= byte) & (byte < index.sum(axis=1)))
            held = (
                range(first, first + 24) if byte >= index_at else range(first + chunk[0] * 4, first + chunk[0] * 4 + 4)
            )
        else:
            held = range(first, first + 12)
        raw[byte] ^= 1 << int(generator.integers(8))
        kept = path.read_bytes()
        path.write_bytes(raw)
        try:
            checked = open_checked(folder / "A.zarr", store)
            if rows & set(held):
                with pytest.raises(pipeline.IntegrityError, match=r"(?s)c/\d+/0.*restore|torn or corrupt"):
                    read(checked, starts)
                found += 1
                if not settings.get("compress"):
                    plain, _ = read_anyway(pipeline.open_matrix(folder / "A.zarr"), starts)
                    unchecked += plain is not None and not np.array_equal(plain, expected)
            else:
                np.testing.assert_array_equal(read(checked, starts)[0], expected)
        finally:
            path.write_bytes(kept)
    np.testing.assert_array_equal(read(open_checked(folder / "A.zarr", store), starts)[0], expected)
    return found, unchecked


def read_anyway(matrix, starts):
    try:
        return read(matrix, starts)
    except pipeline.IntegrityError:
        return None, 0


@pytest.mark.parametrize("store", [None, "memory"])
@pytest.mark.parametrize("name", FLIPPED)
def test_every_flipped_bit_that_is_touched_is_found(name, store, tmp_path):
    found, unchecked = flip_bits(tmp_path, FLIPPED[name], 60 if store is None else 20, store)
    assert found > 5
    # What `check_reads` is for: without it, some of these gave wrong values.
    assert unchecked > 0 or FLIPPED[name].get("compress")


@pytest.mark.slow
@pytest.mark.parametrize("name", FLIPPED)
def test_a_thousand_flipped_bits(name, tmp_path):
    assert flip_bits(tmp_path, FLIPPED[name], 1000, None)[0] > 100


@pytest.mark.parametrize("name", list(OTHERS))
def test_flipped_bits_under_other_checksums(name, tmp_path):
    write_other(tmp_path / "A.zarr", 20, OTHERS[name])[:] = distinct(20)
    expected = distinct(20)[2:18]
    files = [path for path in (tmp_path / "A.zarr").rglob("*") if path.is_file() and path.name[0] not in ".z"]
    generator = np.random.default_rng(1)
    failed = 0
    for _ in range(25):
        path = files[generator.integers(len(files))]
        kept = path.read_bytes()
        raw = bytearray(kept)
        raw[generator.integers(len(raw))] ^= 1 << int(generator.integers(8))
        path.write_bytes(raw)
        try:
            np.testing.assert_array_equal(read(open_checked(tmp_path / "A.zarr"), [2])[0][0], expected)
        except pipeline.IntegrityError:
            failed += 1
        path.write_bytes(kept)
    # The headers of gzip hold a few bits that mean nothing.
    assert failed >= 20


def test_a_flip_under_way_names_its_task(tmp_path):
    np.save(tmp_path / "A.npy", distinct())
    pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr", shard_rows=24, chunk_rows=4)
    plan = pipeline.plan_windows(open_checked(tmp_path / "A.zarr"), [3, 100], length=LENGTH)
    path = tmp_path / "A.zarr/c/4/0/0"
    raw = bytearray(path.read_bytes())
    raw[484 + 7] ^= 4
    path.write_bytes(raw)
    with pytest.raises(
        pipeline.IntegrityError, match=r"rows 100 to 103 in .*c/4/0/0 .*checksum, a crc32c, does not match"
    ) as caught:
        pipeline.gather(plan)
    assert caught.value.__notes__ == ["task 0: 2 windows that start at rows 3 to 100"]


class TestCommand:
    def test_the_report_says_whether_reads_were_checked(self, cli, samples):
        line = ["run", samples / "A.zarr", "--count", "20"]
        assert re.search(r"^reads +not checked; --check-reads does$", cli(*line).out, re.MULTILINE)
        assert cli(*line, "--json").numbers["checked_reads"] is False
        assert re.search(r"^reads +checked$", cli(*line, "--check-reads").out, re.MULTILINE)
        numbers = cli(*line, "--check-reads", "--json").numbers
        assert numbers["checked_reads"] is True
        said = cli("run", samples / "A.npy", "--count", "20")
        assert re.search(r"^reads +not checked; .*A.npy has no checksums$", said.out, re.MULTILINE)

    def test_the_plan_counts_what_is_read_to_check(self, cli, samples, monkeypatch):
        line = ["plan", samples / "A.zarr", "--count", "3", "--json"]
        assert cli(*line).numbers["orders"]["chunk"]["nbytes_read"] % 1280 != 0
        monkeypatch.setenv("PIPELINE_CHECK_READS", "1")
        chunk = cli(*line).numbers["orders"]["chunk"]
        assert chunk["nbytes_read"] == chunk["chunks"] * 8 * 160

    def test_a_flipped_bit_is_exit_4_and_a_matrix_without_checksums_2(self, cli, samples, tmp_path):
        pipeline.create_matrix(samples / "A.npy", tmp_path / "A.zarr", shard_rows=256, chunk_rows=8)
        path = tmp_path / "A.zarr/c/3/0"
        raw = bytearray(path.read_bytes())
        raw[100] ^= 1
        path.write_bytes(raw)
        (tmp_path / "starts.txt").write_text("10 770")
        line = ["run", "A.zarr", "--starts", "starts.txt", "--out", "w.npy", "-q"]
        said = cli(*line, "--check-reads")
        assert said.code == 4, said.err
        assert "rows 768 to 775" in said.err
        assert not (tmp_path / "w.npy").exists()
        refused = cli("run", samples / "A.npy", "--check-reads")
        assert refused.code == 2
        assert "--write-manifest" in refused.err


class TestWhatIsNeverRun:
    @pytest.fixture
    def bomb(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        yield Bomb()
        assert not (tmp_path / "ran").exists()

    def refuse(self, path):
        for source in (path, [path]) if path.suffix == ".npy" else (path,):
            with pytest.raises((pipeline.OpenError, pipeline.InputError, pipeline.IntegrityError)) as caught:
                pipeline.gather(pipeline.plan_windows(pipeline.open_matrix(source), [0], length=2))
            assert "\n" not in str(caught.value)
        with pytest.raises((pipeline.OpenError, pipeline.InputError, pipeline.IntegrityError)):
            pipeline.create_matrix(path, path.with_name("made.zarr"))

    @pytest.mark.parametrize(
        ("dtype", "filters", "compressor"),
        [
            ("<f8", [{"id": "pickle", "protocol": 5}], None),
            ("<f8", None, {"id": "pickle", "protocol": 5}),
            ("<f8", [{"id": "delta", "dtype": "<f8"}, {"id": "pickle", "protocol": 5}], {"id": "zlib", "level": 1}),
            ("|O", [{"id": "pickle", "protocol": 5}], None),
            ("|O", None, {"id": "pickle", "protocol": 5}),
            ("|O", None, None),
            ("|O", [{"id": "json2"}], None),
        ],
    )
    def test_version_2(self, dtype, filters, compressor, bomb, tmp_path):
        path = tmp_path / "A.zarr"
        path.mkdir()
        metadata = {"zarr_format": 2, "shape": [10, 2], "chunks": [10, 2], "dtype": dtype, "fill_value": 0}
        metadata |= {"order": "C", "filters": filters, "compressor": compressor}
        (path / ".zarray").write_text(json.dumps(metadata))
        (path / "0.0").write_bytes(pickle.dumps(bomb))
        self.refuse(path)

    @pytest.mark.parametrize(
        ("data_type", "codecs"),
        [
            ("float64", [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}, {"name": "bytes"}]),
            ("float64", [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "numcodecs.pickle"}]),
            ("object", [{"name": "bytes"}]),
        ],
    )
    def test_version_3(self, data_type, codecs, bomb, tmp_path):
        path = tmp_path / "A.zarr"
        (path / "c/0").mkdir(parents=True)
        metadata = {
            "zarr_format": 3, "node_type": "array", "shape": [10, 2], "data_type": data_type, "fill_value": 0, "codecs": codecs,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10, 2]}}, "attributes": {},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        }  # fmt: skip
        (path / "zarr.json").write_text(json.dumps(metadata))
        (path / "c/0/0").write_bytes(pickle.dumps(bomb))
        self.refuse(path)

    def test_npy(self, bomb, tmp_path):
        np.save(tmp_path / "A.npy", np.array([[bomb, 1]] * 4, dtype=object), allow_pickle=True)
        self.refuse(tmp_path / "A.npy")
        (tmp_path / "B.npy").write_bytes(pickle.dumps([bomb]))
        self.refuse(tmp_path / "B.npy")


def test_a_layout_is_read_once(matrices):
    """What decodes chunks is no other layout: the fast readers keep theirs."""
    bare = read_layout(zarr.open_array(matrices / "shards.zarr"))
    assert (bare.reader, bare.checksums, bare.checked) == ("direct", True, False)
    assert (bare.decode(fills=False).reader, bare.decode(fills=True).files.fills) == ("decoded", True)
