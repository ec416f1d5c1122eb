"""What a name means, who asks for it, and that nobody is told how."""

from __future__ import annotations

import http.server
import os
import pickle
import re
import subprocess
import sys
import threading
import traceback
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import fsspec
import numpy as np
import obstore
import pytest
import zarr
from fsspec.implementations.local import LocalFileSystem

import pipeline
from pipeline.readers import choose as readers
from pipeline.redaction import scrub
from pipeline.storage.locations import locate, name_store, say_failure
from pipeline.storage.stores import open_store
from tests.layouts import distinct, stack

STARTS = [3, 100, 195]
SECRETS = ("AKIDSECRET", "KEYSECRET", "TOKENSECRET", "USERSECRET", "SIGSECRET")


def told(text):
    """Secrets that a text tells."""
    return [secret for secret in SECRETS if secret in text]


class TestNames:
    @pytest.mark.parametrize(
        ("name", "path"),
        [
            ("A.zarr", "A.zarr"),
            ("/data/A.zarr", "/data/A.zarr"),
            ("A.h5::group/data", "A.h5::group/data"),
            ("C:\\data\\A.zarr", "C:\\data\\A.zarr"),
            ("C:/data/A.zarr", "C:/data/A.zarr"),
            ("c://data", "c:/data"),
            ("random:100x3", "random:100x3"),
            ("file:///data/A%20b.zarr", "/data/A b.zarr"),
            ("file://localhost/data/A.zarr", "/data/A.zarr"),
            ("a/s3://b", "a/s3:/b"),
            ("", "."),
        ],
    )
    def test_paths(self, name, path):
        assert locate(name) == Path(path)
        assert locate(Path(path)) == Path(path)

    @pytest.mark.parametrize(
        ("name", "text", "scheme"),
        [
            ("s3://bucket/a/A.zarr", "s3://bucket/a/A.zarr", "s3"),
            ("S3://bucket/a/A.zarr/", "s3://bucket/a/A.zarr", "s3"),
            ("s3://bucket", "s3://bucket", "s3"),
            ("gcs://bucket/A", "gs://bucket/A", "gs"),
            ("azure://container/A", "az://container/A", "az"),
            (
                "abfs://container@account.dfs.core.windows.net/A",
                "abfs://container@account.dfs.core.windows.net/A",
                "abfs",
            ),
            ("https://host:8080/A.zarr", "https://host:8080/A.zarr", "https"),
            ("memory://name/A.zarr", "memory://name/A.zarr", "memory"),
            ("s3://bucket/a b%20#c", "s3://bucket/a b%20#c", "s3"),
            ("ftp://host/A", "ftp://host/A", "ftp"),
        ],
    )
    def test_urls(self, name, text, scheme):
        url = locate(name)
        assert (str(url), url.scheme) == (text, scheme)
        assert locate(url) is url
        assert pickle.loads(pickle.dumps(url)) == url

    def test_parts(self):
        url = locate("s3://bucket/a/A.zarr", {"region": "here"})
        assert (url.name, url.suffix) == ("A.zarr", ".zarr")
        assert str(url.child("windows/c")) == "s3://bucket/a/A.zarr/windows/c"
        assert str(url.parent) == "s3://bucket/a"
        assert str(url.with_name("B.zarr")) == "s3://bucket/a/B.zarr"
        assert url.parent.child("A.zarr") == url
        assert {each.options["region"] for each in (url.child("x"), url.parent, url.with_name("x"))} == {"here"}
        bucket = locate("s3://bucket")
        assert (bucket.name, str(bucket.child("A"))) == ("bucket", "s3://bucket/A")
        with pytest.raises(pipeline.InputError, match="below a bucket"):
            bucket.with_name("x")

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("s3x://bucket/A", "did you mean s3"),
            ("htps://host/A", r"did you mean https?://"),
            ("nonsense://x", "choose s3://"),
            ("s3:///A", "names a host or a bucket"),
            ("s3://AKIDSECRET:KEYSECRET@bucket/A", "no password and no query; that of s3://bucket/A has"),
            ("s3://AKIDSECRET:KEY/SECRET@bucket/A", "got something with a colon"),
            ("https://me:PASS/SECRET@host:80/A", "got something with a colon"),
            ("gs://bucket/A?token=TOKENSECRET", "no password and no query; that of gs://bucket/A has"),
            ("s3://bucket/a//b", "empty or made of dots"),
            ("s3://bucket/../b", "empty or made of dots"),
        ],
    )
    def test_names_that_are_refused(self, name, words):
        with pytest.raises(pipeline.InputError, match=words) as caught:
            locate(name)
        assert told(str(caught.value)) == []

    def test_options_are_for_urls(self):
        with pytest.raises(pipeline.InputError, match="are for URLs; A.zarr is a path"):
            locate("A.zarr", {"region": "here"})
        with pytest.raises(pipeline.InputError, match="are for URLs"):
            pipeline.open_matrix(zarr.create_array({}, shape=(3,), dtype="f8"), storage_options={"region": "here"})


class TestSecrets:
    URL = "https://USERSECRET:KEYSECRET@host/a/A.zarr?signature=SIGSECRET"

    def test_no_text_of_a_url_tells_them(self):
        for url in (locate(self.URL, {"token": "TOKENSECRET"}), locate("s3://b/A", {"secret": "KEYSECRET"})):
            for each in (url, url.child("c"), url.parent, [url], {"at": url}):
                assert told(f"{each} {each!r}") == []

    def test_no_text_of_a_store_tells_them(self):
        options = {"access_key_id": "AKIDSECRET", "secret_access_key": "KEYSECRET", "token": "TOKENSECRET"}
        for url in (locate(self.URL), locate("s3://b/A", options | {"region": "us-east-1"})):
            store = open_store(url, read_only=True)
            assert told(f"{store} {store!r} {name_store(store)} {store.with_read_only(read_only=True)}") == []
        plain = zarr.storage.ObjectStore(obstore.store.HTTPStore.from_url(self.URL))
        assert told(str(plain)) != []  # which is why
        assert told(name_store(plain)) == []

    def test_no_text_of_a_reader_tells_those_of_an_open_array(self, folder):
        with web_server(folder) as (url, _):
            given = url.replace("//", "//USERSECRET:KEYSECRET@") + "/bucket/A.zarr?signature=SIGSECRET"
            store = zarr.storage.ObjectStore(
                obstore.store.HTTPStore.from_url(given, client_options={"allow_http": True}), read_only=True
            )
            for settings in ({}, {"check_reads": True}):
                matrix = pipeline.open_matrix(zarr.open_array(store, mode="r"), **settings)
                reader = readers.choose_reader(matrix, row=0)
                plan = pipeline.plan_windows(matrix, STARTS, length=16)
                assert told(f"{matrix!r} {matrix.layout!r} {reader!r} {plan!r} {pipeline.build_tasks(plan)}") == []
        with pytest.raises(pipeline.OpenError) as caught:
            read(matrix)
        assert told("".join(traceback.format_exception(caught.value))) == []

    @pytest.mark.parametrize(
        ("said", "words"),
        [
            ("Error at http://USERSECRET:KEYSECRET@h/x?sig=SIGSECRET&x=1 now", "Error at http://h/x now"),
            ("'https://h/a?X-Amz-Signature=SIGSECRET', and", "'https://h/a', and"),
            ("did it? yes: http://h/a", "did it? yes: http://h/a"),
        ],
    )
    def test_scrubbing(self, said, words):
        assert scrub(said) == words

    def test_what_s3_says_of_a_key(self):
        document = (
            "Generic S3 error: Error performing GET http://h/b/x in 1.2ms, after 2 retries, max_retries: 2, "
            "retry_timeout: 1s  - Server returned non-2xx status code: 400 Bad Request: <?xml version='1.0'?>\n"
            "<Error><Code>ExpiredToken</Code><Message>expired</Message><Token-0>TOKENSECRET</Token-0></Error>"
            "\n\nDebug source:\nGeneric { AKIDSECRET }"
        )
        assert say_failure(OSError(document)) == "400 Bad Request: ExpiredToken at http://h, after 2 retries"


@contextmanager
def web_server(folder):
    """A plain web server with byte ranges; yields its URL and the headers of each request."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            asked.append((self.command, self.path, dict(self.headers)))
            path = folder / unquote(self.path.partition("?")[0]).lstrip("/")
            content, status = (path.read_bytes(), 200) if path.is_file() else (b"", 404)
            size = len(content)
            headers = {"ETag": f'"{hash(content)}"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
            if status == 200 and (wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")):
                first = int(wanted[1]) if wanted[1] else size - int(wanted[2])
                stop = min(size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else size
                content, status = content[first:stop], 206
                headers["Content-Range"] = f"bytes {first}-{stop - 1}/{size}"
            self.send_response(status)
            for key, value in (headers if status != 404 else {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    for method in ("GET", "HEAD"):
        setattr(Handler, f"do_{method}", Handler.answer)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds bucket/A.zarr: shards without compression."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "bucket").mkdir()
    np.save(folder / "A.npy", distinct())
    pipeline.create_matrix(folder / "A.npy", folder / "bucket/A.zarr", shard_rows=24, chunk_rows=4)
    return folder


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """No credentials in the environment, nor in the user's own files."""
    for variable in [each for each in os.environ if each.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))


def read(matrix):
    windows = pipeline.gather(pipeline.plan_windows(matrix, STARTS, length=16))
    np.testing.assert_array_equal(windows, stack(distinct(), STARTS, 16), strict=True)


class TestServers:
    """Servers of other kinds than S3, as far as they only give bytes: none of them lists."""

    def test_a_web_server(self, folder, nobody):
        with web_server(folder) as (url, asked):
            matrix = pipeline.open_matrix(f"{url}/bucket/A.zarr")
            assert [(method, path) for method, path, _ in asked] == [("GET", "/bucket/A.zarr/zarr.json")]
            assert (matrix.path, matrix.layout.reader) == (f"{url}/bucket/A.zarr", "ranged")
            read(matrix)
            assert {method for method, *_ in asked} == {"GET", "HEAD"}
            assert pipeline.verify(f"{url}/bucket/A.zarr") == []

    def test_with_a_password_and_a_signature(self, folder, nobody):
        with web_server(folder) as (url, asked):
            given = url.replace("//", "//USERSECRET:KEYSECRET@") + "/bucket/A.zarr?signature=SIGSECRET"
            matrix = pipeline.open_matrix(given)
            read(matrix)
            assert told(f"{matrix!r} {matrix._repr_html_()} {matrix.path} {matrix.array} {matrix.layout.files}") == []
            assert all("signature=SIGSECRET" in path for _, path, _ in asked)
            assert {headers["authorization"][:6] for *_, headers in asked} == {"Basic "}
            with pytest.raises(pipeline.NotFoundError) as caught:
                pipeline.open_matrix(given.replace("A.zarr", "B.zarr"))
            assert told(str(caught.value)) == []

    def test_a_web_server_that_refuses_tells_no_secret_in_a_traceback(self, folder, nobody, cli):
        with web_server(folder) as (url, _):
            pass
        given = url.replace("//", "//USERSECRET:KEYSECRET@") + "/bucket/A.zarr?signature=SIGSECRET"
        outcome = cli("info", given, "--debug")
        assert outcome.code == 3
        assert "Traceback" in outcome.err
        assert told(outcome.err + outcome.out) == []

    def test_nothing_is_written_to_a_web_server(self, nobody):
        with pytest.raises(pipeline.InputError, match="web servers are read from; https://host/A is to be written"):
            open_store(locate("https://host/A"), read_only=False)

    def test_google(self, folder, nobody):
        with web_server(folder) as (url, asked):
            options = {"base_url": url, "skip_signature": True, "client_options": {"allow_http": True}}
            matrix = pipeline.open_matrix("gs://bucket/A.zarr", storage_options=options)
            read(matrix)
            assert matrix.path == "gs://bucket/A.zarr"
            assert ("GET", "/bucket/A.zarr/zarr.json") in [(method, unquote(path)) for method, path, _ in asked]

    def test_azure_by_its_environment(self, folder, nobody, monkeypatch):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "S0VZU0VDUkVU")
        with web_server(folder) as (url, asked):
            options = {"endpoint": url, "client_options": {"allow_http": True}}
            read(pipeline.open_matrix("az://bucket/A.zarr", storage_options=options))
            assert all(headers["authorization"].startswith("SharedKey account:") for *_, headers in asked)

    def test_a_server_that_fsspec_knows(self, folder, nobody, monkeypatch):
        class Bus(LocalFileSystem):
            protocol = "bus"

            @classmethod
            def _strip_protocol(cls, path):
                return str(folder / path.removeprefix("bus://stop/"))

        fsspec.register_implementation("bus", Bus, clobber=True)
        matrix = pipeline.open_matrix("bus://stop/bucket/A.zarr")
        assert (matrix.path, matrix.layout.reader) == ("bus://stop/bucket/A.zarr", "ranged")
        read(matrix)
        with pytest.raises(pipeline.NotFoundError, match="nothing is at bus://stop/absent"):
            pipeline.open_matrix("bus://stop/absent")
        assert pipeline.verify("bus://stop/bucket/A.zarr") == []

    def test_a_package_that_is_missing(self, monkeypatch, nobody):
        monkeypatch.setitem(sys.modules, "obstore.store", None)
        with pytest.raises(pipeline.OpenError, match=r"obstore is not installed; pip install obstore botocore"):
            pipeline.open_matrix("s3://bucket/A.zarr")
        with pytest.raises(pipeline.OpenError, match="gdrive:// needs a package; .*gdrive_fs"):
            pipeline.open_matrix("gdrive://A.zarr")


CONFIG = """
[profile other]
region = eu-west-3
endpoint_url = {endpoint}
[default]
region = eu-north-1
"""
KEYS = """
[default]
aws_access_key_id = DEFAULTKEY
aws_secret_access_key = KEYSECRET
[other]
aws_access_key_id = OTHERKEY
aws_secret_access_key = KEYSECRET
aws_session_token = TOKENSECRET
"""


class TestProfiles:
    """Who asks S3 for an object, by the requests' own signatures."""

    @pytest.fixture
    def asker(self, folder, nobody, tmp_path):
        """Open a matrix; gives the key and region that the requests are signed with, and session tokens."""
        (tmp_path / ".aws").mkdir()
        with web_server(folder) as (url, asked):
            (tmp_path / ".aws/config").write_text(CONFIG.format(endpoint=url))
            (tmp_path / ".aws/credentials").write_text(KEYS)

            def ask(endpoint=True, **options):
                asked.clear()
                options |= {"endpoint": url} if endpoint else {}
                matrix = pipeline.open_matrix("s3://bucket/A.zarr", storage_options=options)
                read(matrix)
                signed = {re.search(r"Credential=(\w+)/\d+/([\w-]+)/s3", h["authorization"]) for *_, h in asked}
                [found] = {match.groups() for match in signed}
                assert {h.get("x-amz-security-token") for *_, h in asked} <= {None, "TOKENSECRET"}
                assert told(f"{matrix!r} {matrix.array.store.store!r}") == []
                assert not told(pickle.dumps(matrix).decode("latin-1")) or options.keys() & {"secret", "token"}
                return found

            yield ask

    def test_the_default_one(self, asker):
        assert asker() == ("DEFAULTKEY", "eu-north-1")

    def test_one_that_the_environment_names_with_its_endpoint(self, asker, monkeypatch):
        monkeypatch.setenv("AWS_PROFILE", "other")
        assert asker(endpoint=False) == ("OTHERKEY", "eu-west-3")

    def test_one_that_is_given(self, asker, monkeypatch):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "KEYSECRET")
        assert asker(profile="other") == ("OTHERKEY", "eu-west-3")

    def test_the_environment_comes_before_files(self, asker, monkeypatch):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "KEYSECRET")
        assert asker() == ("ENVKEY", "eu-north-1")
        monkeypatch.setenv("AWS_REGION", "ap-east-1")
        assert asker() == ("ENVKEY", "ap-east-1")

    def test_what_is_given_comes_first(self, asker, monkeypatch):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "KEYSECRET")
        assert asker(access_key_id="GIVEN", secret_access_key="x", region="us-west-1") == ("GIVEN", "us-west-1")
        # As s3fs calls them.
        assert asker(key="GIVEN", secret="x", region="us-west-1") == ("GIVEN", "us-west-1")

    def test_a_profile_that_is_not_there(self, asker, monkeypatch):
        monkeypatch.setenv("AWS_PROFILE", "absent")
        with pytest.raises(pipeline.InputError, match="'absent', which is not there; check AWS_PROFILE"):
            asker()

    def test_without_the_package_that_reads_them(self, asker, monkeypatch):
        monkeypatch.setitem(sys.modules, "botocore.session", None)
        with pytest.raises(pipeline.OpenError, match=r"s3://bucket/A.zarr needs botocore .*pip install botocore"):
            asker()

    def test_nobody(self, folder, nobody, monkeypatch):
        """Such as on a laptop: the cloud's own service of credentials is not there."""
        options = {
            "region": "us-east-1",
            "client_options": {"connect_timeout": "200ms"},
            "retry_config": {"max_retries": 0},
        }
        with pytest.raises(pipeline.OpenError, match="no credentials were found: set them in the environment"):
            pipeline.open_matrix("s3://bucket/A.zarr", storage_options=options)

    def test_an_endpoint_without_a_scheme(self, nobody):
        with pytest.raises(pipeline.InputError, match="begins with https:// or http://; that of s3://bucket/A.zarr"):
            pipeline.open_matrix("s3://bucket/A.zarr", storage_options={"endpoint": "127.0.0.1:9000"})

    def test_an_option_that_is_not_known(self, nobody):
        with pytest.raises(pipeline.InputError, match="Configuration key: 'regoin' is not valid"):
            pipeline.open_matrix("s3://bucket/A.zarr", storage_options={"regoin": "us-east-1"})


def test_tasks_of_a_process_share_a_store(nobody, monkeypatch):
    pickled = pickle.dumps(open_store(locate("s3://bucket/A", {"region": "here"}), read_only=True))
    first = pickle.loads(pickled)
    assert pickle.loads(pickled) is first
    assert first.read_only
    other = pickle.dumps(open_store(locate("s3://bucket/A", {"region": "there"}), read_only=True))
    assert pickle.loads(other) is not first
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://elsewhere")
    assert pickle.loads(pickled) is not first


class TestMemory:
    def test_what_is_written_is_there_until_the_process_ends(self):
        url = locate("memory://test-locations/a/A.zarr")
        array = zarr.create_array(open_store(url, read_only=False), shape=(211, 5, 3), dtype="f8", chunks=(10, 5, 3))
        array[:] = distinct()
        del array
        matrix = pipeline.open_matrix("memory://test-locations/a/A.zarr")
        read(matrix)
        assert matrix.path == "memory://test-locations/a/A.zarr"
        assert matrix.inputs() == [url]
        with pytest.raises(pipeline.NotFoundError):
            pipeline.open_matrix("memory://test-locations/b/A.zarr")
        assert pickle.loads(pickle.dumps(matrix)).shape == (211, 5, 3)

    def test_another_process_does_not_see_it(self, tmp_path):
        store = open_store(locate("memory://test-locations/b"), read_only=False)
        (tmp_path / "store").write_bytes(pickle.dumps(store))
        code = f"import pickle; pickle.load(open({str(tmp_path / 'store')!r}, 'rb'))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "InputError: memory:// is seen by one process alone; memory://test-locations/b" in done.stderr
