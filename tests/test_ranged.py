"""Windows out of any store: which requests are made, how many at once, and what is said of keys that are not right."""

from __future__ import annotations

import asyncio
import contextlib
import io
import pickle
import zipfile
from typing import ClassVar

import dask
import numpy as np
import obstore
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.storage import (
    FsspecStore,
    LocalStore,
    LoggingStore,
    MemoryStore,
    ObjectStore,
    WrapperStore,
    ZipStore,
)

import pipeline
from pipeline.matrix import fingerprint as stamps
from pipeline.readers import choose as readers
from pipeline.readers import ranged
from pipeline.storage import concurrency as fetching
from tests.layouts import LAYOUTS, ROWS, as_objects, distinct, in_memory, open_layout, stack

ROW = 120
"""Bytes of a row of `distinct()`."""
STARTS = [195, 3, 40, 100]
LENGTH = 16


@pytest.fixture(autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for name in (
        "plain",
        "shards",
        "zarr-morton",
        "zarr-index-first",
        "zarr-plain",
        "zstd",
        "columns",
        "columns-shards",
    ):
        LAYOUTS[name][1](folder / f"{name}.zarr", distinct())
    return folder


class Watched(WrapperStore):
    """Notes each read: its key, range and bytes; and how many are under way."""

    def __init__(self, store):
        super().__init__(store)
        self.reads, self.asked, self.under_way, self.peak = [], [], 0, 0

    async def get(self, key, prototype, byte_range=None):
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        try:
            value = await self.read(key, prototype, byte_range)
        finally:
            self.under_way -= 1
        self.reads.append((key, byte_range, None if value is None else len(value)))
        return value

    async def read(self, key, prototype, byte_range):
        return await self._store.get(key, prototype, byte_range)

    @property
    def _supports_sync_io(self):
        return False

    async def exists(self, key):
        self.asked.append(key)
        return await self._store.exists(key)

    def list_prefix(self, prefix):
        self.asked.append(prefix + "*")
        return self._store.list_prefix(prefix)

    def data_reads(self):
        return [read for read in self.reads if not read[0].endswith((".json", ".zarray", ".zattrs"))]


def watched(path, kind=Watched):
    """A matrix of the files in `path`, and its store, which has nothing noted yet."""
    store = kind(in_memory(path))
    matrix = pipeline.open_matrix(zarr.open_array(store, mode="r"))
    store.reads.clear()
    return matrix, matrix.array.store


def read(matrix, starts, length=LENGTH):
    reader = readers.choose_reader(matrix, row=0)
    assert type(reader) is ranged.RangedReader
    out = np.zeros((len(starts), length, *matrix.row_shape), matrix.dtype)
    reading = reader.read_windows(np.array(starts), length, out, np.arange(len(starts)))
    np.testing.assert_array_equal(out, stack(distinct(), starts, length), strict=True)
    return reading


def spread(matrix, monkeypatch):
    """As if rows were so long that no two windows lie near each other."""
    monkeypatch.setattr("pipeline.readers.ranged.JOINED_NBYTES", 0)
    monkeypatch.setattr("pipeline.readers.runs.is_dense", lambda joined: False)


class TestRequests:
    def test_a_window_is_one_range_and_a_shard_one_index_more(self, layouts, monkeypatch):
        matrix, store = watched(layouts / "zarr-morton.zarr")
        spread(matrix, monkeypatch)
        reading = read(matrix, [0, 40, 96, 130])  # shards of 32 rows, 8 inner chunks without checksums
        requests = store.data_reads()
        index = SuffixByteRequest(8 * 16 + 4)
        assert sorted(key for key, byte_range, _ in requests if byte_range == index) == [
            f"c/{n}/0/0" for n in (0, 1, 3, 4)
        ]
        assert [nbytes for _, byte_range, nbytes in requests if byte_range != index] == [LENGTH * ROW] * 4
        assert reading.nbytes == sum(nbytes for *_, nbytes in requests) == 4 * LENGTH * ROW + 4 * 132

    def test_an_index_that_comes_first_is_read_from_there(self, layouts):
        matrix, store = watched(layouts / "zarr-index-first.zarr")
        read(matrix, [0])
        assert store.data_reads()[0][1:] == (RangeByteRequest(0, 132), 132)

    def test_ranges_that_lie_near_are_read_with_what_is_between(self, layouts, monkeypatch):
        matrix, store = watched(layouts / "plain.zarr")  # 16 rows a chunk
        monkeypatch.setattr("pipeline.readers.runs.is_dense", lambda joined: False)
        monkeypatch.setattr("pipeline.readers.ranged.JOINED_NBYTES", 3 * ROW)
        reading = read(matrix, [0, 5, 12, 34, 40], length=2)
        assert [(key, byte_range.start, nbytes) for key, byte_range, nbytes in sorted(store.data_reads(), key=str)] == [
            ("c/0/0/0", 0, 7 * ROW),
            ("c/0/0/0", 12 * ROW, 2 * ROW),
            ("c/2/0/0", 2 * ROW, 2 * ROW),
            ("c/2/0/0", 8 * ROW, 2 * ROW),
        ]
        assert reading.nbytes == 13 * ROW

    def test_rows_that_windows_share_are_read_once(self, layouts):
        matrix, store = watched(layouts / "plain.zarr")
        assert read(matrix, [3, 3, *range(50, 90)]).nbytes == sum(nbytes for *_, nbytes in store.data_reads())
        assert sum(nbytes for *_, nbytes in store.data_reads()) == (90 + LENGTH - 4) * ROW
        assert len(store.data_reads()) == 7

    def test_what_is_long_is_read_in_parts(self, layouts, monkeypatch):
        matrix, store = watched(layouts / "zarr-morton.zarr")
        monkeypatch.setattr("pipeline.readers.ranged.REQUEST_NBYTES", 1000)
        read(matrix, [*range(ROWS - LENGTH + 1)])
        ranges = [nbytes for _, byte_range, nbytes in store.data_reads() if isinstance(byte_range, RangeByteRequest)]
        assert max(ranges) <= 1000
        assert sum(ranges) == ROWS * ROW
        assert len(ranges) == 6 * 4 + 3  # 3,840 bytes each of the first six shards, 19 rows the last

    @pytest.mark.parametrize(("dense", "rows"), [(True, 42), (False, 7 + 2 + 2)])
    def test_the_plan_tells_the_bytes(self, dense, rows, layouts, monkeypatch):
        matrix, _ = watched(layouts / "zarr-plain.zarr")  # 10 rows a chunk
        for module in ("plan.plan", "readers.runs"):
            monkeypatch.setattr(f"pipeline.{module}.is_dense", lambda joined: np.full(joined.shape[:-1], dense))
        plan = pipeline.plan_windows(matrix, [40, 0, 5, 12], length=2)
        assert plan.chunk.nbytes_read == read(matrix, plan.starts, 2).nbytes == rows * ROW
        assert plan.reading_nbytes > 32 * 2**20
        assert "reads" in plan.facts()["gather (order chunk)"]

    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_the_plan_tells_the_bytes_of_any_request(self, layouts, data):
        matrix, store = watched(layouts / "zarr-morton.zarr")
        length = data.draw(st.integers(1, 60))
        starts = data.draw(st.lists(st.integers(0, ROWS - length), min_size=1, max_size=12))
        gap, most = data.draw(st.integers(0, 40)) * ROW, data.draw(st.integers(100, 9000))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.plan.plan.GAP_NBYTES", 2 * ROW)
            patch.setattr("pipeline.plan.plan.JOINED_NBYTES", gap)
            patch.setattr("pipeline.readers.ranged.JOINED_NBYTES", gap)
            patch.setattr("pipeline.readers.ranged.REQUEST_NBYTES", most)
            if data.draw(st.booleans()):
                for module in ("plan.plan", "readers.runs"):
                    patch.setattr(f"pipeline.{module}.is_dense", lambda joined: np.zeros(joined.shape[:-1], bool))
            plan = pipeline.plan_windows(matrix, starts, length=length)
            assert read(matrix, starts, length).nbytes == plan.chunk.nbytes_read
        assert sum(nbytes for *_, nbytes in store.data_reads()) == plan.chunk.nbytes_read


RANGES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 500), st.integers(1, 60)).map(lambda r: (r[0], r[1], r[1] + r[2])),
    min_size=1, max_size=30,
)  # fmt: skip


class TestCoalescing:
    @given(ranges=RANGES, gap=st.integers(0, 80), most=st.integers(1, 200))
    def test_of_any_ranges(self, ranges, gap, most):
        ranges.sort()
        files, begins, ends = np.array(ranges).T
        requests = ranged.coalesce(files, begins, ends, gap=gap, most=most)
        wanted = {(file, byte) for file, begin, end in ranges for byte in range(begin, end)}
        got = [(file, byte) for file, offset, nbytes, *_ in requests for byte in range(offset, offset + nbytes)]
        assert len(got) == len(set(got))
        assert wanted <= set(got)
        for file, byte in set(got) - wanted:
            before = max(b for f, b in wanted if f == file and b < byte)
            after = min(b for f, b in wanted if f == file and b > byte)
            assert after - before - 1 <= gap
        for one, (file, offset, nbytes, first, stop) in enumerate(requests):
            assert 0 < nbytes <= most
            served = [n for n, (f, b, e) in enumerate(ranges) if f == file and b < offset + nbytes and e > offset]
            assert set(served) <= set(range(first, stop))
            assert {ranges[n][0] for n in range(first, stop)} <= {file}
            assert served or most <= 2 * gap
            following = [o for f, o, *_ in requests[one + 1 :] if f == file]
            # Nothing is cut that could have been one request.
            assert not following or following[0] - offset - nbytes > gap or following[0] == offset + nbytes


class TestConcurrency:
    @pytest.mark.parametrize("concurrency", [1, 4])
    def test_so_many_requests_are_in_flight(self, concurrency, layouts, monkeypatch):
        class Gathering(Watched):
            """A read ends when as many are under way as there may be, or there are no more to come."""

            async def read(self, key, prototype, byte_range):
                for _ in range(200 if key.startswith("c/") else 0):
                    if self.peak >= concurrency:
                        break
                    await asyncio.sleep(0.01)
                return await self._store.get(key, prototype, byte_range)

        with zarr.config.set({"async.concurrency": concurrency}):
            matrix, store = watched(layouts / "plain.zarr", Gathering)
            spread(matrix, monkeypatch)
            read(matrix, [0, 20, 40, 60, 80, 100, 120])
        assert store.peak == concurrency
        assert len(store.data_reads()) == 12

    @given(sizes=st.lists(st.integers(1, 50), max_size=30), most=st.integers(1, 100), concurrency=st.integers(1, 6))
    @settings(deadline=None, max_examples=40)
    def test_bytes_in_flight_are_bounded(self, sizes, most, concurrency):
        held, peak = {}, []

        async def fetch(number):
            held[number] = sizes[number]
            peak.append((sum(held.values()), len(held)))
            await asyncio.sleep(0)
            del held[number]
            return number

        given_out = [(size, lambda number=number: fetch(number)) for number, size in enumerate(sizes)]
        with zarr.config.set({"async.concurrency": concurrency}):
            assert sorted(fetching.in_flight(given_out, most_nbytes=most)) == list(range(len(sizes)))
            assert list(fetching.in_order(given_out, most_nbytes=most)) == list(range(len(sizes)))
        assert all(nbytes <= max(most, *sizes) and count <= concurrency for nbytes, count in peak)

    def test_a_failure_ends_what_is_under_way(self, layouts, monkeypatch):
        class Failing(Watched):
            cancelled = 0

            async def read(self, key, prototype, byte_range):
                if key == "c/0/0/0":
                    raise TimeoutError("no answer")
                try:
                    await asyncio.sleep(60 if key.startswith("c/") else 0)
                except asyncio.CancelledError:
                    Failing.cancelled += 1
                    raise
                return await self._store.get(key, prototype, byte_range)

        matrix, _ = watched(layouts / "plain.zarr", Failing)
        spread(matrix, monkeypatch)
        with pytest.raises(pipeline.OpenError, match=r"c/0/0/0 \(rows 0 to 15\) cannot: no answer"):
            read(matrix, [0, 20, 40])
        zarr.core.sync.sync(asyncio.sleep(0.01))
        assert Failing.cancelled == 4


class OtherLocal(LocalStore):
    """Not a plain folder, for all that is known."""


def zipped(path):
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for file in path.rglob("*"):
            if file.is_file():
                archive.write(file, file.relative_to(path))
    return ZipStore(path.with_suffix(".zip"))


@pytest.mark.parametrize(
    "open_store",
    [
        OtherLocal,
        zipped,
        in_memory,
        as_objects,
        lambda path: WrapperStore(LocalStore(path)),
        lambda path: LoggingStore(LocalStore(path), log_level="ERROR"),
        lambda path: FsspecStore.from_url(f"file://{path}", read_only=True),
    ],
    ids=["subclass", "zip", "memory", "objects", "wrapper", "logging", "fsspec"],
)
@pytest.mark.filterwarnings("ignore:.*asynchronous:UserWarning")
def test_any_store(open_store, layouts):
    for name in ("shards", "zarr-index-first", "plain"):
        matrix = pipeline.open_matrix(zarr.open_array(open_store(layouts / f"{name}.zarr"), mode="r"))
        assert matrix.layout.reader == "ranged"
        plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
        np.testing.assert_array_equal(pipeline.gather(plan), stack(distinct(), STARTS, LENGTH), strict=True)
        present, total, nbytes = matrix.count_files()
        files = [file.stat().st_size for file in (layouts / f"{name}.zarr" / "c").rglob("*") if file.is_file()]
        assert (present, total, nbytes) == (len(files), len(files), sum(files))


def test_an_array_of_a_group_in_a_store():
    store = MemoryStore()
    for settings_ in ({}, {"zarr_format": 2}):
        group = zarr.create_group(store, path=f"g{len(settings_)}", **settings_)
        array = group.create_array("a", shape=(ROWS, 5, 3), dtype="f8", chunks=(10, 5, 3), compressors=None)
        array[:] = distinct()
        matrix = pipeline.open_matrix(array)
        plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
        np.testing.assert_array_equal(pipeline.gather(plan), stack(distinct(), STARTS, LENGTH), strict=True)
        assert matrix.count_files()[:2] == (22, 22)


def test_a_reader_is_pickled_with_its_store(layouts):
    for name in ("shards@objects", "shards@memory"):
        matrix = pickle.loads(pickle.dumps(open_layout(layouts, name)))
        read(matrix, STARTS)


@pytest.mark.parametrize("compressors", [None, "auto"])
def test_a_reader_does_not_carry_what_the_attributes_tell_of_every_file(compressors, tmp_path):
    told = {"files": [*range(10_000)]}
    zarr.create_array(
        tmp_path / "A", data=distinct(), chunks=(10, 5, 3), compressors=compressors, filters=None, attributes=told
    )
    matrix = pipeline.open_matrix(zarr.open_array(as_objects(tmp_path / "A"), mode="r"))
    reader = readers.choose_reader(matrix, row=0)
    assert len(pickle.dumps(reader)) < 5_000 < len(pickle.dumps(matrix))
    assert matrix.array.attrs.asdict() == told


def damaged(layouts, name, change, store=in_memory):
    """Open a matrix, then change the bytes under its first key, or take the key away."""
    opened = in_memory(layouts / f"{name}.zarr")
    key = "c/0/0/0"
    keys = dict(opened._store_dict)
    value = change(bytearray(keys.pop(key).to_bytes()))
    if value is not None:
        keys[key] = zarr.core.buffer.cpu.Buffer.from_bytes(bytes(value))
    if store is in_memory:
        return pipeline.open_matrix(zarr.open_array(MemoryStore(keys), mode="r"))
    memory = obstore.store.MemoryStore()
    for each, data in keys.items():
        memory.put(each, data.to_bytes())
    return pipeline.open_matrix(zarr.open_array(ObjectStore(memory), mode="r"))


def entry(chunk, offset, nbytes):
    """Change an entry of the index at the end, of 8 inner chunks, without a checksum."""

    def change(value):
        where = len(value) - 128 + 16 * chunk
        value[where : where + 16] = np.array([offset, nbytes], "<u8").tobytes()
        return value

    return change


@pytest.fixture(scope="module")
def bare(layouts):
    """Shards whose index has no checksum."""
    LAYOUTS["zarr-index-plain"][1](layouts / "zarr-index-plain.zarr", distinct())
    return layouts


@pytest.mark.parametrize("store", [in_memory, as_objects])
class TestKeysThatAreNotRight:
    def refused(self, matrix, kind=pipeline.IntegrityError, **words):
        with pytest.raises(kind, **words) as caught:
            read(matrix, [4, 100])
        assert "(rows 0 to " in str(caught.value) or "rows 4 to 7" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "c/0/0/0" in str(caught.value)

    @pytest.mark.parametrize("name", ["plain", "shards", "zarr-index-first"])
    def test_absent(self, name, store, layouts):
        self.refused(
            damaged(layouts, name, lambda value: None, store), match="every chunk is there; .* is not; restore"
        )

    @pytest.mark.parametrize("nbytes", [0, 100, 16 * ROW - 1])
    def test_short(self, nbytes, store, layouts):
        matrix = damaged(layouts, "plain", lambda value: value[:nbytes], store)
        self.refused(matrix, match="ends within the bytes at 480")

    @pytest.mark.parametrize("name", ["zarr-morton", "zarr-index-first"])
    def test_shorter_than_its_index(self, name, store, layouts):
        self.refused(
            damaged(layouts, name, lambda value: value[:50], store), match="index 132|ends within the bytes at 0"
        )

    def test_short_by_a_chunk(self, store, layouts):
        matrix = damaged(layouts, "zarr-index-first", lambda value: value[:400], store)
        self.refused(matrix, match="ends within the bytes at")

    @pytest.mark.parametrize("name", ["zarr-morton", "zarr-index-first"])
    def test_corrupt_index(self, name, store, layouts):
        def flip(value):
            value[20 if name == "zarr-index-first" else -20] ^= 1
            return value

        self.refused(
            damaged(layouts, name, flip, store), match="matches its checksum; that of .* does not: torn or corrupt"
        )

    def test_absent_inner_chunk(self, store, bare):
        matrix = damaged(bare, "zarr-index-plain", entry(1, 2**64 - 1, 2**64 - 1), store)
        self.refused(matrix, match="inner chunk 1 of .*rows 4 to 7. is absent; restore the shard")

    def test_inner_chunk_of_another_size(self, store, bare):
        matrix = damaged(bare, "zarr-index-plain", entry(1, 480, 479), store)
        self.refused(matrix, match="inner chunk 1 of .*rows 4 to 7. has 479 bytes instead of 480")

    @pytest.mark.parametrize("offset", [32 * ROW + 100, 10**9, 2**62 - 480])
    def test_inner_chunk_past_the_end(self, offset, store, bare):
        matrix = damaged(bare, "zarr-index-plain", entry(1, offset, 480), store)
        self.refused(matrix, match=r"ends within the bytes at \d+; restore it")

    @pytest.mark.parametrize("offset", [2**62, 2**63, 2**64 - 100])
    def test_inner_chunk_past_any_end(self, offset, store, bare):
        matrix = damaged(bare, "zarr-index-plain", entry(1, offset, 480), store)
        self.refused(matrix, match="points past its")


def test_inner_chunks_may_share_their_bytes(bare):
    """As where a writer stores chunks of equal values once."""
    matrix = damaged(bare, "zarr-index-plain", entry(1, 0, 480))
    plan = pipeline.plan_windows(matrix, [0, 2, 6], length=7)
    a = distinct()
    a[4:8] = a[:4]
    np.testing.assert_array_equal(pipeline.gather(plan), stack(a, [0, 2, 6], 7))


@pytest.mark.parametrize("client", [False, True])
def test_a_failure_under_way_names_its_task(layouts, client, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.retries._PAUSES", (0.01,))

    class Failing(Watched):
        broken = False

        async def read(self, key, prototype, byte_range):
            if self.broken and key == "c/6/0/0":
                raise ConnectionResetError("peer went")
            return await self._store.get(key, prototype, byte_range)

    matrix, store = watched(layouts / "plain.zarr", Failing)
    store.broken = True
    plan = pipeline.plan_windows(matrix, [0, 100], length=LENGTH)
    with contextlib.ExitStack() as stack:
        if client:
            stack.enter_context(pipeline.connect(dashboard_address=None))
        with pytest.raises(
            pipeline.OpenError,
            match=r"c/6/0/0 \(rows 96 to 111\) cannot: peer went; check the store\ntask 0: 2 windows",
        ):
            pipeline.gather(plan)


class TestStoresThatDoNotDoAll:
    class NoSuffix(OtherLocal):
        asked: ClassVar[list[str]] = []

        async def get(self, key, prototype, byte_range=None):
            if isinstance(byte_range, SuffixByteRequest):
                raise io.UnsupportedOperation("suffix")
            return await super().get(key, prototype, byte_range)

        async def getsize(self, key):
            self.asked.append(key)
            return await super().getsize(key)

    def test_an_index_at_the_end_is_found_by_the_size(self, layouts):
        store = self.NoSuffix(layouts / "shards.zarr")  # shards of 24 rows
        matrix = pipeline.open_matrix(zarr.open_array(store, mode="r"))
        self.NoSuffix.asked.clear()
        read(matrix, [0, 100])
        assert sorted(self.NoSuffix.asked) == ["c/0/0/0", "c/4/0/0"]

    def test_no_suffix_and_no_size(self, layouts):
        class Neither(WrapperStore):
            async def get(self, key, prototype, byte_range=None):
                if isinstance(byte_range, SuffixByteRequest):
                    raise io.UnsupportedOperation("suffix")
                return await self._store.get(key, prototype, byte_range)

        matrix = pipeline.open_matrix(zarr.open_array(Neither(in_memory(layouts / "shards.zarr")), mode="r"))
        with pytest.raises(pipeline.OpenError, match=r"c/0/0/0 .* cannot: suffix; check the store"):
            read(matrix, [0])


def check(matrix, starts, length=LENGTH):
    stamps.fingerprint_matrix(matrix, np.sort(starts), length)


class TestChecksBeforeWork:
    @pytest.mark.parametrize("name", ["plain", "shards", "zstd", "columns", "columns-shards"])
    def test_an_absent_key_is_named_before_any_is_read(self, name, layouts):
        matrix, store = watched(layouts / f"{name}.zarr")
        [path] = list(matrix.layout.files.paths(1))[-1:]
        first = matrix.layout.file_rows
        plan = pipeline.plan_windows(matrix, [100, 0, first], length=LENGTH)
        pipeline.gather(plan)
        del store._store._store_dict[path]
        store.reads.clear()
        with pytest.raises(
            pipeline.IntegrityError, match=rf"{path} \(rows {first} to {2 * first - 1}\) is absent, and .* restore"
        ):
            pipeline.gather(plan)
        assert store.data_reads() == []
        check(matrix, [100])

    @pytest.mark.parametrize("nbytes", [0, 7])
    def test_sizes_that_a_listing_tells(self, nbytes, layouts):
        matrix = damaged(layouts, "plain", lambda value: value[:nbytes], as_objects)
        with pytest.raises(
            pipeline.IntegrityError,
            match=f"has {nbytes} bytes instead of {16 * ROW + 4}, and 1 of 2 windows touches it",
        ):
            check(matrix, [0, 100])
        check(matrix, [100])

    def test_one_listing_for_many_keys_and_none_for_few(self, layouts, monkeypatch):
        matrix, store = watched(layouts / "plain.zarr")
        check(matrix, [0, 100])
        assert store.asked == ["*"]
        store.asked.clear()
        monkeypatch.setattr("pipeline.matrix.keys._LISTED_KEYS", 3)
        check(matrix, [0, 100])
        assert sorted(store.asked) == ["c/0/0/0", "c/6/0/0", "c/7/0/0"]

    @pytest.mark.parametrize("listed", ["nothing", "failure"])
    def test_a_listing_that_cannot_be_relied_on(self, listed, layouts):
        class Unlisted(Watched):
            async def list_prefix(self, prefix):
                if listed == "failure":
                    raise PermissionError("ListBucket")
                for key in ():
                    yield key

        matrix, store = watched(layouts / "plain.zarr", Unlisted)
        check(matrix, [0, 100])
        assert sorted(store.asked) == ["c/0/0/0", "c/6/0/0", "c/7/0/0"]
        del store._store._store_dict["c/6/0/0"]
        with pytest.raises(pipeline.IntegrityError, match=r"c/6/0/0 \(rows 96 to 111\) is absent"):
            check(matrix, [0, 100])

    def test_a_store_that_fails(self, layouts):
        class Down(Watched):
            async def exists(self, key):
                raise TimeoutError

            async def list_prefix(self, prefix):
                raise TimeoutError
                yield

        matrix, _ = watched(layouts / "plain.zarr", Down)
        with pytest.raises(pipeline.OpenError, match="c/0/0/0 .* cannot: TimeoutError; check the store"):
            check(matrix, [0, 100])


def test_bytes_of_decoded_chunks_are_those_of_the_store(layouts):
    for name in ("zstd", "columns", "columns-shards"):
        store = Watched(in_memory(layouts / f"{name}.zarr"))
        matrix = pipeline.open_matrix(zarr.open_array(store, mode="r"))
        reader = readers.choose_reader(matrix, row=0)
        matrix.array.store.reads.clear()
        out = np.empty((4, LENGTH, 5, 3))
        reading = reader.read_windows(np.array(STARTS), LENGTH, out, np.arange(4))
        np.testing.assert_array_equal(out, stack(distinct(), STARTS, LENGTH))
        assert reading.nbytes == sum(nbytes for *_, nbytes in matrix.array.store.reads) > 0


def test_counting_keeps_the_synchronous_way(layouts, monkeypatch):
    """Zarr decodes in its event loop where a store has no `get_sync`: the one that counts has it where the other has."""
    matrix = open_layout(layouts, "columns@memory")
    monkeypatch.setattr(MemoryStore, "get", lambda *_, **__: pytest.fail("asynchronous"))
    out = np.empty((4, LENGTH, 5, 3))
    reading = readers.choose_reader(matrix, row=0).read_windows(np.array(STARTS), LENGTH, out, np.arange(4))
    np.testing.assert_array_equal(out, stack(distinct(), STARTS, LENGTH))
    assert reading.nbytes > out.nbytes
