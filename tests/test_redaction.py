"""No password, signature or key leaves the process, whatever verb got it, and whatever becomes of it."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import traceback
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import dask
import numpy as np
import pytest

import pipeline
from pipeline.cluster.connect import dashboard_link
from pipeline.redaction import scrub
from pipeline.storage.stores import UrlStore
from tests.layouts import distinct
from tests.test_locations import web_server

SECRETS = ("USERSECRET", "PASSSECRET", "SIGSECRET", "MORESECRET", "FRAGSECRET", "ENVSECRET", "KEYSECRET", "TOKENSECRET")
BASIC = base64.b64encode(b"USERSECRET:PASSSECRET@1").decode()
CLOSED = "http://127.0.0.1:9"
LATE = """
def late(block):
    if len(block) > 1: raise ValueError("late")
    return block
"""


def told(*texts):
    """Secrets that texts, or bytes, tell."""
    whole = "\n".join(each.decode("latin-1") if isinstance(each, bytes) else str(each) for each in texts)
    return [secret for secret in (*SECRETS, BASIC) if secret in whole]


def signed(url):
    """Ask for what is at a URL in all ways at once."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://USERSECRET:PASSSECRET@1@{rest}?signature=SIGSECRET,MORESECRET&b=(MORESECRET)#FRAGSECRET"


def written(folder):
    """Names and contents of all files below a folder."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    return [*map(str, paths), *(path.read_bytes() for path in paths if path.is_file())]


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A web server with bucket/A.zarr, and bucket/torn.zarr, of which a chunk is wrong; yields its URL."""
    folder = tmp_path_factory.mktemp("web")
    np.save(folder / "A.npy", distinct())
    for name in ("A", "torn"):
        (folder / "bucket").mkdir(exist_ok=True)
        pipeline.create_matrix(folder / "A.npy", folder / f"bucket/{name}.zarr", shard_rows=24, chunk_rows=4)
    with (folder / "bucket/torn.zarr/c/1/0/0").open("r+b") as file:
        file.write(b"????")
    with web_server(folder) as (url, _):
        yield url


@pytest.fixture
def around(cli, monkeypatch, tmp_path):
    """The command line, in an environment with keys."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path.with_name(f"{tmp_path.name}-home")))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_SAS_TOKEN"):
        monkeypatch.setenv(name, "ENVSECRET")
    (tmp_path / "wrong.py").write_text(LATE)
    # A busy machine may take longer to write the report of a run that failed.
    monkeypatch.setattr("pipeline.cli.performance._FAILED_SECONDS", 120)
    return cli


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("https://me@h/A", "https://h/A"),
        ("https://me:a@b@h:80/A/x@y", "https://h:80/A/x@y"),
        ("https://me:it's@h/A", "https://h/A"),
        ("abfs://container@account/A abfs://me:word@account/A", "abfs://container@account/A abfs://account/A"),
        ("(https://h/A?sig=1,2)x=3).", "(https://h/A)."),
        ("HTTPS://h/A?SIG HTTP://h/B#F", "HTTPS://h/A HTTP://h/B"),
        ("['https://h/A?a', 'ftp://u:p@h/B?b'];", "['https://h/A', 'ftp://h/B'];"),
        ("with url: /A?sig=1 (Caused by", "with url: /A (Caused by"),
        ("no file http:/me:word@h/A?sig; no //me:word@h/A", "no file http:/h/A; no //h/A"),
        ("s3://b/A#1.zarr, what?.npy: is it? yes #2", "s3://b/A#1.zarr, what?.npy: is it? yes #2"),
        ("url='https://h/A?s=1', status=403", "url='https://h/A', status=403"),
    ],
)
def test_texts(text, words):
    assert scrub(text) == words
    assert scrub(words) == words


@pytest.mark.parametrize("kind", pipeline.PipelineError.__subclasses__())
def test_an_error_has_none_in_any_part_of_it(kind):
    error = kind(f"cannot read {signed('https://h/A')}; check it")
    error.add_note(signed("https://h/A"))
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert told(each, repr(each), each.args, each.__notes__, traceback.format_exception(each)) == []
        assert str(each) == "cannot read https://h/A; check it"


LINES = [
    ("info {A}", 3),
    ("plan {A} --count 5 --debug", 0),
    ("plan {A} --count 5", 0),
    ("run {A} --count 5 --performance-report R.html", 0),
    ("run {A} --count 5 --out w.zarr --performance-report R.html --overwrite", 0),
    ("run {A} --count 5 --out w.npy -v", 0),
    ("run {A} --count 200 --apply wrong:late --out w.zarr --performance-report R.html -v", 4),
    ("run {A} --count 200 --apply wrong:late --out w.npy", 4),
    ("run {torn} --stride 1 --out w.npy --check-reads --performance-report R.html -v", 4),
    ("create {A} B.zarr --performance-report R.html", 0),
    ("create {A} B.zarr --dry-run", 0),
    ("create {A} {B}", 2),
    ("create {A}", 2),
    ("verify {A} --performance-report R.html", 0),
    ("verify {A} --write-manifest M.json", 3),
    ("verify {torn} -v", 4),
    ("verify {torn} --manifest M.json", 3),
    ("run {A} --count 5 --out {B}", 2),
    ("run {A} --count 5 --starts {B}", 2),
    ("run {A} --starts {B}", 3),
    ("run {A} --split 0.5,0.5 --split-by {B}", 2),
    ("run {A} --count 5 --performance-report {A}", 2),
    ("run {A} --count 5 --cluster {B}", 3),
    ("run {A} --count 5 --apply {A}", 2),
    ("run {A} {A}", 2),
    ("run --count={A}", 2),
    ("info {absent}", 3),
    ("verify {absent}", 3),
    ("create {absent} B.zarr", 3),
    *((f"{verb} {{closed}}{rest}", 3) for verb, rest in {"info": "", "verify": "", "run": " --count 5"}.items()),
    ("create {closed} B.zarr", 3),
    ("config --cluster mine.yaml", 0),
    ("config --scheduler {A}", 0),
    ("config --cluster {A}", 3),
    ("nonsense {A}", 2),
]


@pytest.mark.parametrize(
    ("line", "code", "flag"),
    [(*each, flag) for each in LINES for flag in ("--json", "--debug") if flag == "--json" or each[1] > 2],
)
def test_verbs(around, web, tmp_path, monkeypatch, line, code, flag):
    urls = {name: signed(f"{web}/bucket/{name}.zarr") for name in ("A", "B", "torn", "absent")}
    urls["closed"] = signed(f"{CLOSED}/A.zarr")
    if line.startswith("config"):
        settings = {"version": 1, "distributed": {"dashboard": {"link": urls["A"]}}}
        (tmp_path / "mine.yaml").write_text(json.dumps(settings))
        monkeypatch.setitem(dask.config.config, "somewhere", f"{web}/A?SIGSECRET")
    before = {path.name for path in tmp_path.iterdir()}
    said = around(*(word.format(**urls) for word in line.split()), flag)
    assert (said.code, told(said.out, said.err)) == (code, []), said.err
    (tmp_path / "mine.yaml").unlink(missing_ok=True)
    assert told(*written(tmp_path)) == []
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} - before <= {"R", "w", "B", "M", "wrong"}
    assert ("Traceback" in said.err) is (flag == "--debug")
    if "R.html" in line:
        assert f"{web}/bucket/" in (tmp_path / "R.html").read_text()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at processes")
@pytest.mark.parametrize("processes", [False, True], ids=["in-process", "processes"])
def test_a_cluster_shows_none(around, web, tmp_path, processes):
    """Neither to who looks at the dashboard, nor to who lists processes, nor in what Dask logs."""
    shown = []
    matrix = pipeline.open_matrix(signed(f"{web}/bucket/A.zarr"))
    plan = pipeline.plan_windows(matrix, range(190), length=16)
    shown += [matrix, f"{matrix!r}", matrix._repr_html_(), plan, f"{plan!r}", getattr(plan, "_repr_html_", str)()]
    shown += [pipeline.open_matrix({"x": matrix, "y": signed(f"{web}/bucket/A.zarr")})]

    def late(block):
        if len(block) > 1:
            raise ValueError("late")
        return block

    with pipeline.connect(workers=1, processes=processes, dashboard_address="127.0.0.1:0") as client:
        pipeline.gather(plan)
        tasks = pipeline.build_tasks(plan, apply=late)
        shown += [tasks, *(repr(dict(task.dask)) for task in tasks)]
        futures = client.compute(tasks)
        with suppress(pipeline.PipelineError):
            client.gather(futures)
        with pytest.raises(pipeline.IntegrityError) as caught:
            pipeline.gather(plan, apply=late)
        shown += traceback.format_exception(caught.value)
        shown += [client.run_on_scheduler(state), repr(client.get_scheduler_logs()), repr(client.get_worker_logs())]
        base = dashboard_link(client).removesuffix("/status")
        for page in (
            "info/main/workers.html",
            "info/main/logs.html",
            "json/counts.json",
            "metrics",
            "individual-graph",
        ):
            with suppress(OSError), urlopen(f"{base}/{page}") as answer:
                shown.append(answer.read())
        shown += [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in client.run(os.getpid).values() if processes]
        shown += [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if is_child(path.parent)]
    assert "late" in str(shown)
    assert told(*shown) == []


def is_child(folder):
    with suppress(OSError):
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
    return False


def state(dask_scheduler):
    events = (
        [list(each) for each in dask_scheduler._broker._topics.items()] if hasattr(dask_scheduler, "_broker") else []
    )
    tasks = [(key, task.exception_text, task.traceback_text) for key, task in dask_scheduler.tasks.items()]
    groups = [*dask_scheduler.task_groups, *dask_scheduler.task_prefixes, *dask_scheduler.transition_log]
    return repr([groups, tasks, events])


async def refuse(self, *_):
    raise OSError(f"403 at {signed(str(self.url))}") from ValueError(signed("https://host/A"))


@pytest.mark.parametrize("source", ["absent", "closed", "refused", "lazy"])
def test_exceptions_of_python(around, web, monkeypatch, source):
    url = signed(
        f"{CLOSED}/A.zarr" if source == "closed" else f"{web}/bucket/{'A' if source == 'lazy' else 'absent'}.zarr"
    )
    calls = [
        lambda: pipeline.open_matrix(url),
        lambda: pipeline.verify(url),
        lambda: pipeline.create_matrix(url, "B.zarr"),
        lambda: pipeline.open_matrix({"x": url, "y": url}),
        lambda: pipeline.store(plan, url),
    ]
    plan = pipeline.plan_windows(pipeline.open_matrix(f"{web}/bucket/A.zarr"), [3], length=4)
    if source == "refused":
        monkeypatch.setattr(UrlStore, "get", refuse, raising=False)
    if source == "lazy":
        calls = [lambda: pipeline.open_matrix(url, dtype="x"), lambda: pipeline.store(plan, url, overwrite="no")]
    for call in calls:
        with pytest.raises((pipeline.PipelineError, OSError)) as caught:
            call()
        if isinstance(caught.value, pipeline.PipelineError):
            parts = [str(caught.value), repr(caught.value), *traceback.format_exception(caught.value)]
            assert told(*parts) == []


@pytest.mark.s3
@pytest.mark.parametrize("way", ["options", "environment"])
def test_keys_of_a_bucket(cli, bucket, samples, tmp_path, monkeypatch, way):
    """Whoever holds the results, staged files included, cannot tell how they were written."""
    keys = {"access_key_id": "KEYSECRET", "secret_access_key": "KEYSECRET", "session_token": "TOKENSECRET"}
    for name, value in keys.items():
        monkeypatch.setenv(f"AWS_{name.upper()}", value if way == "environment" else "loopback")
    options = {"region": "us-east-1"} | (keys if way == "options" else {})
    url = f"{bucket.url}/A.zarr"
    made = pipeline.create_matrix(samples / "A.npy", url, storage_options=options)
    matrix = pipeline.open_matrix(url, storage_options=options)
    plan = pipeline.plan_windows(matrix, range(0, 1900, 7), length=16)
    shown = [repr(made), repr(matrix), matrix._repr_html_(), repr(plan), repr(pipeline.build_tasks(plan))]
    pipeline.store(plan, f"{bucket.url}/w.zarr", storage_options=options)

    def late(block):
        if len(block) > 1:
            raise ValueError("late")
        return block

    with pytest.raises(pipeline.IntegrityError) as caught:
        pipeline.store(plan, f"{bucket.url}/v.zarr", apply=late, storage_options=options)
    shown += traceback.format_exception(caught.value)
    with pytest.raises(pipeline.PipelineError) as caught:
        pipeline.open_matrix(f"{bucket.url}/absent.zarr", storage_options=options)
    shown += traceback.format_exception(caught.value)
    with pytest.raises(pipeline.PipelineError) as caught:
        pipeline.open_matrix(url, storage_options=options | {"endpoint": CLOSED, "retry_config": {"max_retries": 0}})
    shown += traceback.format_exception(caught.value)
    if way == "environment":
        line = ["run", url, "--count", 50, "--out", f"{bucket.url}/u.zarr", "--performance-report", "R.html"]
        for flags in ([], ["--debug"], ["--json", "--resume"]):
            said = cli(*line, *flags)
            shown += [said.out, said.err]
        assert said.code == 0
    objects = fetch_all(bucket)
    assert any("w.zarr" in name for name in objects)
    assert told(*shown, *objects, *objects.values(), *written(tmp_path)) == []


def fetch_all(bucket):
    import obstore

    store = obstore.store.from_url(bucket.url)
    names = [each["path"] for batch in obstore.list(store) for each in batch]
    return {name: bytes(obstore.get(store, name).bytes()) for name in names}


def test_processes_of_the_program_have_none_in_their_arguments(program, web, tmp_path):
    """But for the one that the user wrote them for; seen by a task, which looks around."""
    (tmp_path / "look.py").write_text(
        "from pathlib import Path\nimport os\n"
        "def around(block):\n"
        "    pid, lines = os.getpid(), []\n"
        "    while pid != PARENT:\n"
        "        lines.append(Path(f'/proc/{pid}/cmdline').read_bytes())\n"
        "        pid = int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])\n"
        "    Path(FOLDER, f'seen-{os.getpid()}').write_bytes(b'\\n'.join(lines))\n"
        "    return block\n"
        f"FOLDER, PARENT = {str(tmp_path)!r}, os.getpid()\n"
    )
    line = [program, "run", signed(f"{web}/bucket/A.zarr"), "--count", "20", "--apply", "look:around", "--workers", "2"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIPELINE_")}
    done = subprocess.run([*line, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False, env=kept)
    assert done.returncode == 0, done.stderr
    seen = [path.read_bytes() for path in tmp_path.glob("seen-*")]
    assert any(b"multiprocessing" in each for each in seen)
    assert told(done.stdout, done.stderr, *seen) == []
