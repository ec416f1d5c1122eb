"""Windows out of a real S3 service: what is asked of it, and what becomes of a run when it answers badly."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import multiprocessing
import pickle
import time
from collections import Counter
from datetime import timedelta

import dask
import numpy as np
import obstore
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

import pipeline
from pipeline.readers import choose as readers
from pipeline.storage.locations import locate
from pipeline.storage.stores import open_store
from tests import services
from tests.layouts import LAYOUTS, ROWS, distinct, stack
from tests.proxy import proxied

pytestmark = pytest.mark.s3

LENGTH = 16
STARTS = [195, 3, 40, 100]
SECRETS = ("AKIDSECRET", "KEYSECRET", "TOKENSECRET")
HASTE = {
    "retry_config": {"max_retries": 2, "backoff": {"init_backoff": timedelta(milliseconds=1), "base": 2}},
    "client_options": {"read_timeout": "300ms"},
}
"""Options by which a failure that stays is one soon."""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """And no task is run again."""
    monkeypatch.setattr("pipeline.runtime.retries._PAUSES", ())
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Folders of matrices, each written when it is asked for."""
    folder = tmp_path_factory.mktemp("layouts")

    def written(name):
        if not (folder / f"{name}.zarr").exists():
            LAYOUTS[name][1](folder / f"{name}.zarr", distinct())
        return folder / f"{name}.zarr"

    return written


def upload(folder, url):
    """Put the files of a folder under a URL."""
    store = open_store(locate(url), read_only=False).store
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        obstore.put(store, str(file.relative_to(folder)), file.read_bytes())
    return url


_uploaded: dict[str, str] = {}


@pytest.fixture
def stored(bucket, layouts):
    """Open a layout that all tests share, with nothing counted yet."""

    def store(name, **settings):
        if name not in _uploaded:
            services.make_bucket(bucket.endpoint, f"shared-{name}")
            _uploaded[name] = upload(layouts(name), f"s3://shared-{name}/a/{name}.zarr")
        matrix = pipeline.open_matrix(_uploaded[name], **settings)
        bucket.proxy.reset()
        return matrix

    return store


@pytest.fixture
def own(bucket, layouts):
    """Open a layout that the test may change."""

    def store(name):
        matrix = pipeline.open_matrix(upload(layouts(name), f"{bucket.url}/{name}.zarr"))
        bucket.proxy.reset()
        return matrix

    return store


def gather(matrix, starts=STARTS, length=LENGTH):
    windows = pipeline.gather(pipeline.plan_windows(matrix, starts, length=length))
    np.testing.assert_array_equal(windows, stack(distinct(), starts, length), strict=True)
    return windows


def read(matrix, starts=STARTS, length=LENGTH, kind=None):
    """Read windows with the reader alone."""
    reader = readers.choose_reader(matrix, row=0)
    assert kind in (None, type(reader).__name__)
    out = np.zeros((len(starts), length, *matrix.row_shape), matrix.dtype)
    reading = reader.read_windows(np.array(starts), length, out, np.arange(len(starts)))
    np.testing.assert_array_equal(out, stack(distinct(), starts, length), strict=True)
    return reading


def kinds(proxy):
    """How many requests there were of each kind."""

    def kind(asked):
        if "list-type" in asked.key:
            return "list"
        name = asked.key.rpartition(".zarr/")[2]
        if name.rpartition("/")[2] in {"zarr.json", ".zarray", ".zattrs", ".zgroup"}:
            return f"{asked.method} {name}"
        return "index" if (asked.range or "").startswith("bytes=-") else f"{asked.method} chunk"

    return dict(Counter(map(kind, proxy.asked)))


READERS = {
    "shards": "RangedReader",
    "zarr-index-first": "RangedReader",
    "zarr-v2-key": "RangedReader",
    "zstd": "ChunkReader",
    "blosc-plain": "ChunkReader",
    "big-endian": "ChunkReader",
    "columns": "ArrayReader",
    "columns-shards": "ArrayReader",
    "v2": "RangedReader",
    "v2-zstd": "ChunkReader",
    "v2-fortran": "ArrayReader",
}


@pytest.mark.parametrize("name", READERS)
def test_every_layout(name, stored):
    matrix = stored(name)
    assert matrix.path.startswith("s3://")
    read(matrix, kind=READERS[name])


class TestWhatIsAsked:
    def test_to_open_an_array(self, stored, bucket):
        for name, asked in [
            ("shards", {"GET zarr.json": 1}),
            ("v2", {"GET zarr.json": 1, "GET .zarray": 2, "GET .zattrs": 1}),
        ]:
            matrix = stored(name)
            pipeline.open_matrix(matrix.path)
            assert kinds(bucket.proxy) == asked

    def test_of_a_whole_run(self, stored, bucket, cli, tmp_path):
        matrix = stored("shards")  # 9 shards of 24 rows, 6 inner chunks each
        np.savetxt(tmp_path / "starts.txt", STARTS, fmt="%d")
        run = ("run", matrix.path, "--starts", "starts.txt", "--length", LENGTH, "--out")
        assert cli(*run, "w.npy").code == 0
        np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), stack(distinct(), STARTS, LENGTH))
        asked = kinds(bucket.proxy)
        # Metadata: opened, stamped, seen by the worker, the stamp looked at again. Listings: before and after.
        assert asked.pop("GET zarr.json") == 3
        assert asked.pop("HEAD zarr.json", 0) <= 1
        assert asked.pop("list") == 2
        # Rows 3 to 18, 40 to 55, 100 to 115, 195 to 210 touch five shards; all of a task's rows of one are near.
        assert asked == {"index": 5, "GET chunk": 5}

    def test_a_plan_reads_no_data(self, stored, bucket, cli):
        matrix = stored("shards")
        assert cli("plan", matrix.path, "--count", 3).code == 0
        assert cli("info", matrix.path).code == 0
        assert set(kinds(bucket.proxy)) == {"GET zarr.json", "list"}

    def test_presence_is_told_by_pages_of_a_listing(self, layouts, monkeypatch, tmp_path, bucket):
        """With pages of ten keys, instead of a thousand."""
        monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
        monkeypatch.setattr("pipeline.storage.listing._PAGE_KEYS", 10)
        with services.s3_server(tmp_path) as endpoint:
            services.make_bucket(endpoint, "paged")
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            url = upload(layouts("one-row-chunks"), "s3://paged/A.zarr")
            bucket.proxy.reset()
            with proxied(endpoint) as proxy:
                monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
                matrix = pipeline.open_matrix(url)
                proxy.reset()
                assert matrix.count_files()[:2] == (31, 31)
                assert proxy.count("GET", "list-type") == 4
                # A page that ends early is asked for again, and the listing goes on after the last that was whole.
                proxy.reset()
                proxy.trouble("cut", key="continuation-token", skip=1, times=1)
                assert matrix.count_files()[:2] == (31, 31)
                assert proxy.count("GET", "list-type") == 5
                obstore.delete(matrix.array.store.store, "c/30/0/0")
                with pytest.raises(pipeline.IntegrityError, match=r"c/30/0/0 \(rows 210 to 216\) is absent"):
                    gather(matrix)

    def test_few_keys_of_many_are_asked_for_alone(self, stored, bucket, monkeypatch):
        monkeypatch.setattr("pipeline.matrix.keys._LISTED_KEYS", 1)
        matrix = stored("shards")
        gather(matrix, [3, 100])
        assert kinds(bucket.proxy)["HEAD chunk"] == 4
        assert "list" not in kinds(bucket.proxy)

    def test_an_index_is_read_once_by_all_tasks(self, stored, bucket):
        matrix = stored("shards")
        plan = pipeline.plan_windows(matrix, [195, 3, 40, 100, 5, 190, 42, 101], length=LENGTH)
        reader = readers.choose_reader(matrix, row=0)
        for task in plan.tasks("request", windows=2):
            out = np.empty((2, *plan.window_shape))
            pickle.loads(pickle.dumps(reader)).read_windows(task.starts, LENGTH, out, np.arange(2))
            np.testing.assert_array_equal(out, stack(distinct(), task.starts, LENGTH))
        assert kinds(bucket.proxy)["index"] == 6
        # Another run reads them anew.
        gather(matrix, [3])
        assert kinds(bucket.proxy)["index"] == 7

    @pytest.mark.parametrize("name", ["shards", "zstd"])
    def test_checked_reads_read_an_index_once(self, name, stored, bucket):
        matrix = stored(name, check_reads=True) if name == "shards" else stored(name)
        assert matrix.layout.checked
        reader = readers.choose_reader(matrix, row=0)
        bucket.proxy.reset()
        out = np.empty((4, LENGTH, 5, 3))
        reading = reader.read_windows(np.array(STARTS), LENGTH, out, np.arange(4))
        np.testing.assert_array_equal(out, stack(distinct(), STARTS, LENGTH))
        indexes = bucket.proxy.count("GET", r"/c/\d+/0/0") - sum(
            not asked.range.startswith("bytes=-") for asked in bucket.proxy.fitting("GET", "/c/")
        )
        assert indexes <= 5
        assert reading.nbytes == bucket.proxy.nbytes("GET", "/c/")


class TestSideBySide:
    @pytest.mark.parametrize(
        ("name", "reader"), [("zarr-plain", "RangedReader"), ("v2-zstd", "ChunkReader"), ("columns", "ArrayReader")]
    )
    def test_many_requests_are_under_way(self, name, reader, stored, bucket):
        matrix = stored(name)  # 10 rows a chunk
        assert type(readers.choose_reader(matrix, row=0)).__name__ == reader
        bucket.proxy.reset()
        bucket.proxy.latency = 0.05
        # Twenty chunks, none beside another.
        starts = list(range(0, ROWS - 10, 20))
        begin = time.monotonic()
        read(matrix, starts, 4, kind=reader)
        assert bucket.proxy.count("GET") >= 11
        assert bucket.proxy.peak >= 8
        assert time.monotonic() - begin < 0.05 * bucket.proxy.count("GET")


TROUBLES = {"error": 500, "slow down": 503, "too many": 429, "drop": 0, "cut": 0, "stall": 0.2}
PLACES = {"metadata": r"zarr\.json$", "a listing": "list-type", "an index": r"/c/4/0/0$", "rows": r"/c/[0-8]/0/0$"}


class TestWhatPasses:
    @pytest.mark.parametrize(
        ("trouble", "place"),
        [*((trouble, "rows") for trouble in TROUBLES), *itertools.product(["error", "cut", "stall"], [*PLACES][:3])],
    )
    def test_is_asked_for_again(self, trouble, place, stored, bucket):
        url = stored("shards").path
        kind = trouble if trouble in ("drop", "cut", "stall") else "error"
        skip = 5 if place == "rows" else 0
        struck = bucket.proxy.trouble(
            kind, method="GET", key=PLACES[place], amount=TROUBLES[trouble], times=2, skip=skip
        )
        gather(pipeline.open_matrix(url))
        assert struck.done == 2

    def test_after_the_store_has_given_up(self, stored, bucket, monkeypatch):
        matrix = pipeline.open_matrix(stored("shards").path, storage_options=HASTE)
        struck = bucket.proxy.trouble("error", method="GET", key="/c/4/0/0", amount=503, times=6)
        with pytest.raises(pipeline.OpenError, match="503"):
            gather(matrix)
        monkeypatch.setattr("pipeline.runtime.retries._PAUSES", (0.01,))
        gather(matrix)
        assert struck.done == 6

    def test_to_codecs_of_zarr(self, stored, bucket):
        matrix = stored("columns-shards")
        for kind in ("error", "cut", "drop"):
            struck = bucket.proxy.trouble(kind, method="GET", key="/c/", times=2, skip=3)
            gather(matrix)
            assert struck.done == 2


class TestWhatStays:
    @pytest.mark.parametrize(
        ("trouble", "place"),
        [
            *itertools.product(["error", "cut"], PLACES),
            ("drop", "rows"),
            ("stall", "rows"),
            ("stall", "metadata"),
        ],
    )
    def test_is_one_line(self, trouble, place, stored, bucket):
        url = stored("shards").path
        struck = bucket.proxy.trouble(trouble, method="GET", key=PLACES[place], times=1000)
        begin = time.monotonic()
        if place == "a listing":
            # Keys are asked for one by one, then.
            gather(pipeline.open_matrix(url, storage_options=HASTE))
        else:
            with pytest.raises(pipeline.OpenError, match=r"shards\.zarr/.* cannot: .*; check the store") as caught:
                gather(pipeline.open_matrix(url, storage_options=HASTE))
            assert "\n" not in str(caught.value)
            assert caught.value.exit_code == 3
            # The task may be run again, a while later.
            assert pickle.loads(pickle.dumps(caught.value)).passing
        assert struck.done >= (1 if place == "a listing" and trouble == "cut" else 3)
        assert time.monotonic() - begin < 8

    @pytest.mark.parametrize("name", ["zstd", "columns", "columns-shards"])
    def test_whatever_decodes_it(self, name, stored, bucket):
        url = stored(name).path
        matrix = pipeline.open_matrix(url, storage_options=HASTE)
        bucket.proxy.trouble("error", method="GET", key="/c/", times=1000, amount=503)
        with pytest.raises(pipeline.OpenError, match=r"/c/.* cannot: 503 Service Unavailable.*, after 2 retries"):
            gather(matrix)

    def test_a_server_that_is_gone(self, stored, bucket, monkeypatch, cli):
        url = stored("shards").path
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{services.free_port()}")
        begin = time.monotonic()
        outcome = cli("verify", url)
        assert time.monotonic() - begin < 12
        assert (outcome.code, outcome.err.count("\n")) == (3, 1)
        assert "no connection: Connection refused at http://127.0.0.1:" in outcome.err
        with pytest.raises(pipeline.OpenError, match="no connection: Connection refused"):
            pipeline.open_matrix(url, storage_options=HASTE)

    @pytest.mark.parametrize(("status", "words"), [(403, "access is denied"), (401, "credentials are missing")])
    def test_who_may_not(self, status, words, stored, bucket):
        matrix = stored("shards")
        bucket.proxy.trouble("error", amount=status, times=1000)
        for fails in (lambda: pipeline.open_matrix(matrix.path), lambda: gather(matrix), lambda: read(matrix)):
            with pytest.raises(pipeline.OpenError, match=words) as caught:
                fails()
            assert not caught.value.passing
        # Those who may not list a bucket are refused what is not there, too.
        bucket.proxy.reset()
        bucket.proxy.trouble("error", amount=status, times=1000, key="list-type|zarr.json")
        v2 = upload_v2(bucket)
        assert pipeline.open_matrix(v2).shape == (20, 3)

    def test_a_chunk_that_goes_under_way(self, stored, bucket):
        matrix = stored("shards")
        bucket.proxy.trouble("error", method="GET", key="/c/4/0/0", amount=404, times=1000)
        with pytest.raises(
            pipeline.IntegrityError, match=r"every chunk is there; s3:.*/c/4/0/0 \(rows 96 to 119\) is not"
        ):
            gather(matrix)

    def test_a_chunk_that_was_gone_before(self, own, bucket):
        matrix = own("shards")
        obstore.delete(open_store(locate(matrix.path), read_only=False).store, "c/4/0/0")
        with pytest.raises(
            pipeline.IntegrityError, match=r"s3:.*/c/4/0/0 \(rows 96 to 119\) is absent, and .*; restore it"
        ):
            gather(matrix)
        assert kinds(bucket.proxy).get("GET chunk") is None

    def test_a_chunk_that_changes_under_way(self, own, bucket, layouts):
        matrix = own("shards")
        plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)

        def change(block):
            path = layouts("shards") / "c/4/0/0"
            obstore.put(open_store(locate(matrix.path), read_only=False).store, "c/4/0/0", path.read_bytes()[::-1])
            return block.copy()

        with pytest.raises(pipeline.IntegrityError, match=r"c/4/0/0|was changed"):
            pipeline.gather(plan, apply=change)

    def test_a_byte_that_is_another(self, stored, bucket):
        matrix = stored("shards", check_reads=True)
        bucket.proxy.trouble("corrupt", method="GET", key="/c/4/0/0", skip=1, times=1000)
        with pytest.raises(pipeline.IntegrityError, match=r"c/4/0/0 .*its checksum, a crc32c, does not match; restore"):
            gather(matrix)


def upload_v2(bucket):
    store = open_store(locate(f"{bucket.url}/v2.zarr"), read_only=False)
    zarr.create_array(store, shape=(20, 3), dtype="f8", chunks=(5, 3), zarr_format=2)
    return f"{bucket.url}/v2.zarr"


def test_what_is_not_there(bucket, stored, cli, tmp_path):
    stored("shards")
    for name, words in [
        ("absent.zarr", "nothing is at"),
        ("shards.zarr/c", "nothing is at"),
        ("A.npy", "read in place on a local disk"),
        ("A.h5::data", "read in place on a local disk"),
    ]:
        outcome = cli("info", f"{bucket.url}/{name}")
        assert (outcome.code, outcome.err.count("\n")) == (3, 1)
        assert words in outcome.err
        assert f"{bucket.url}/{name}" in outcome.err
    outcome = cli("info", f"{bucket.url}/A.bin", "--dtype", "f8", "--row-shape", "3")
    assert (outcome.code, outcome.err.count("\n")) == (3, 1)
    with pytest.raises(pipeline.NotFoundError):
        pipeline.open_matrix("s3://no-such-bucket/A.zarr")


def test_a_group_is_its_arrays(bucket, cli):
    """Each is opened below the URL of the group, whose options it has; deeper ones are named."""
    group = zarr.create_group(open_store(locate(f"{bucket.url}/G.zarr"), read_only=False))
    values = np.arange(1, 41.0).reshape(20, 2)
    group.create_array("inner", data=values)
    group.create_array("labels", data=np.arange(20))
    opened = pipeline.open_matrix(f"{bucket.url}/G.zarr")
    assert [each.path for each in opened.members.values()] == [
        f"{bucket.url}/G.zarr/inner",
        f"{bucket.url}/G.zarr/labels",
    ]
    plan = pipeline.plan_windows(opened, [3, 0, 16], length=4)
    result = pipeline.store(plan, f"{bucket.url}/W.zarr")
    for found in (pipeline.gather(plan), result):
        np.testing.assert_array_equal(found["inner"][:], np.stack([values[s : s + 4] for s in (3, 0, 16)]))
        np.testing.assert_array_equal(found["labels"][:], np.stack([np.arange(s, s + 4) for s in (3, 0, 16)]))
    assert pipeline.verify(f"{bucket.url}/W.zarr") == []
    zarr.create_group(open_store(locate(f"{bucket.url}/D.zarr"), read_only=False)).create_group("below").create_array(
        "inner", data=values
    )
    outcome = cli("info", f"{bucket.url}/D.zarr")
    assert outcome.code == 3
    assert f"is a group with the arrays below/inner; write {bucket.url}/D.zarr/below/inner" in outcome.err
    assert cli("info", f"{bucket.url}/G.zarr/inner").code == 0


class TestSecrets:
    """Keys that are given, and those of the environment."""

    def told(self, text):
        return [secret for secret in SECRETS if secret in text]

    @pytest.fixture(params=["given", "environment"])
    def opened(self, request, stored, monkeypatch):
        url = stored("shards").path
        keys = dict(zip(("access_key_id", "secret_access_key", "session_token"), SECRETS, strict=True))
        if request.param == "given":
            return pipeline.open_matrix(url, storage_options=keys)
        for name, value in keys.items():
            monkeypatch.setenv(f"AWS_{name}".upper(), value)
        return pipeline.open_matrix(url)

    def test_are_in_no_text(self, opened, tmp_path):
        plan = pipeline.plan_windows(opened, STARTS, length=LENGTH)
        said = f"{opened!r} {opened._repr_html_()} {plan!r} {plan._repr_html_()} {opened.array!r} {opened.layout!r}"
        tasks = pipeline.build_tasks(plan)
        said += " ".join(str((task.key, task.dask)) for task in tasks)
        assert self.told(said) == []
        pipeline.store(plan, tmp_path / "w.zarr")
        pipeline.gather(plan, out=tmp_path / "w.npy")
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or self.told(file.read_bytes().decode("latin-1")) == []

    def test_are_in_no_failure(self, opened, bucket):
        plan = pipeline.plan_windows(opened, STARTS, length=LENGTH)
        for trouble, amount in [("error", 403), ("error", 400), ("error", 404)]:
            bucket.proxy.reset()
            bucket.proxy.trouble(trouble, key="/c/", amount=amount, times=1000)
            with pytest.raises(pipeline.PipelineError) as caught:
                pipeline.gather(plan)
            chain, error = [], caught.value
            while error is not None:
                chain.append(f"{error!r} {error} {getattr(error, '__notes__', '')}")
                error = error.__cause__
            assert self.told(" ".join(chain)) == []
            pickle.loads(pickle.dumps(caught.value))

    def test_of_the_environment_do_not_travel(self, opened, request):
        travel = self.told(pickle.dumps(opened).decode("latin-1"))
        assert travel == (list(SECRETS) if "given" in request.node.name else [])

    def test_are_in_no_report(self, stored, cli, monkeypatch):
        url = stored("shards").path
        for name, value in zip(("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"), SECRETS, strict=True):
            monkeypatch.setenv(f"AWS_{name}", value)
        for line in (
            ("info", url, "--json"),
            ("plan", url, "--count", 5, "-v"),
            ("run", url, "--count", 5, "--debug"),
            ("info", f"{url}x", "--debug"),
            ("verify", url, "--json"),
        ):
            outcome = cli(*line)
            assert outcome.code in (0, 3)
            assert self.told(outcome.out + outcome.err) == []


def look_from_elsewhere(pickled):
    """What another process reads."""
    return gather(pickle.loads(pickled)).sum()


def test_another_process_reads_it_with_its_own_environment(stored):
    matrix = stored("shards")
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert (
            pool.submit(look_from_elsewhere, pickle.dumps(matrix)).result() == stack(distinct(), STARTS, LENGTH).sum()
        )


class TestVerify:
    @pytest.fixture
    def url(self, own):
        return own("shards").path

    def store(self, url):
        return open_store(locate(url), read_only=False).store

    def test_what_is_right(self, url, bucket, cli):
        assert pipeline.verify(url) == []
        # The record, the array that names the rows, a listing, and each object in one request.
        assert kinds(bucket.proxy) == {"GET zarr.json": 2, "list": 1, "GET chunk": 9}
        outcome = cli("verify", url, "--json")
        assert (outcome.code, outcome.numbers["standard"], outcome.numbers["files"]) == (0, "record", 10)
        assert pipeline.verify(zarr.open_array(open_store(locate(url), read_only=True))) == []

    def test_what_is_wrong(self, url, cli):
        store = self.store(url)
        content = bytearray(bytes(obstore.get(store, "c/1/0/0").bytes()))
        content[5 * 8] ^= 1  # of the first inner chunk: rows 24 to 27
        obstore.put(store, "c/1/0/0", bytes(content))
        obstore.put(store, "c/2/0/0", bytes(content[:-1]))
        obstore.delete(store, "c/3/0/0")
        obstore.put(store, "c/extra", b"?")
        obstore.put(store, "c/4/0/0", b"")
        found = {each.key: (each.problem, each.runs) for each in pipeline.verify(url)}
        assert found == {
            "c/1/0/0": ("has inner chunk 0 corrupt", ((24, 28),)),
            "c/2/0/0": (f"has {len(content) - 1} bytes instead of {len(content)}", ((48, 72),)),
            "c/3/0/0": ("is gone", ((72, 96),)),
            "c/4/0/0": (f"has 0 bytes instead of {len(content)}", ((96, 120),)),
            "c/extra": ("is there, but nobody wrote it", ()),
        }
        assert cli("verify", url).code == 4

    def test_metadata_that_were_changed(self, url):
        store = self.store(url)
        document = json.loads(bytes(obstore.get(store, "zarr.json").bytes()))
        document["fill_value"] = 7.0
        obstore.put(store, "zarr.json", json.dumps(document).encode())
        assert [str(each) for each in pipeline.verify(url)] == ["zarr.json is not what was written"]

    def test_objects_longer_than_a_request(self, url, monkeypatch, bucket):
        monkeypatch.setattr("pipeline.storage.base._FETCHED_NBYTES", 1000)
        bucket.proxy.reset()
        assert pipeline.verify(url) == []
        content = len(bytes(obstore.get(self.store(url), "c/0/0/0").bytes()))
        assert bucket.proxy.count("GET", "/c/0/0/0") == -(-content // 1000) + 1

    def test_of_another_writer(self, bucket, cli, tmp_path):
        url = f"{bucket.url}/other.zarr"
        store = open_store(locate(url), read_only=False)
        array = zarr.create_array(
            store,
            shape=(ROWS, 5, 3),
            dtype="f8",
            chunks=(10, 5, 3),
            serializer=BytesCodec(),
            compressors=[Crc32cCodec()],
        )
        array[:] = distinct()
        assert pipeline.verify(url) == []
        content = bytearray(bytes(obstore.get(store.store, "c/1/0/0").bytes()))
        content[5] ^= 1
        obstore.put(store.store, "c/1/0/0", bytes(content))
        assert [(each.key, each.runs) for each in pipeline.verify(url)] == [("c/1/0/0", ((10, 20),))]

    def test_by_a_manifest(self, bucket, cli, tmp_path, layouts):
        url = upload(layouts("v2-zstd"), f"{bucket.url}/v2.zarr")
        assert cli("verify", url).code == 2
        outcome = cli("verify", url, "--write-manifest", "m.json")
        assert (outcome.code, (tmp_path / "m.json").exists()) == (0, True)
        assert cli("verify", url, "--manifest", "m.json").code == 0
        obstore.put(self.store(url), "1.0.0", b"another")
        outcome = cli("verify", url, "--manifest", "m.json")
        assert (outcome.code, "1.0.0" in outcome.err + outcome.out) == (4, True)

    def test_nothing(self, bucket):
        with pytest.raises(pipeline.NotFoundError, match="absent.zarr does not exist"):
            pipeline.verify(f"{bucket.url}/absent.zarr")

    def test_troubles(self, url, bucket):
        for kind in ("error", "cut", "drop"):
            struck = bucket.proxy.trouble(kind, method="GET", key="/c/1/0/0", times=2)
            assert pipeline.verify(url) == []
            assert struck.done == 2
        bucket.proxy.trouble("error", method="GET", key="/c/1/0/0", times=1000)
        with pytest.raises(pipeline.OpenError, match=r"a store can be read; s3://.* cannot: 500 .*, after 2 retries"):
            pipeline.verify(url, storage_options=HASTE)


def test_a_matrix_of_a_zarr_in_the_bucket(stored, tmp_path):
    matrix = stored("columns")
    made = pipeline.create_matrix(matrix.path, tmp_path / "A.zarr")
    assert made.layout.reader == "direct"
    np.testing.assert_array_equal(made.array[:], distinct())


def test_an_icechunk_session(bucket, tmp_path):
    icechunk = pytest.importorskip("icechunk")
    repository = icechunk.Repository.create(icechunk.in_memory_storage())
    session = repository.writable_session("main")
    array = zarr.create_array(session.store, shape=(ROWS, 5, 3), dtype="f8", chunks=(10, 5, 3), compressors=None)
    array[:] = distinct()
    session.commit("rows")
    matrix = pipeline.open_matrix(repository.readonly_session("main").store)
    assert matrix.layout.reader == "ranged"
    assert "\n" not in matrix.path
    assert "Icechunk" in matrix.path
    gather(matrix)
    assert matrix.count_files()[:2] == (22, 22)
