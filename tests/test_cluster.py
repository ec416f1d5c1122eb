"""Clusters that start for real, what they listen on and leave behind, and what a `cluster.yaml` may say."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import bokeh.client
import dask
import distributed
import numpy as np
import pytest
import yaml

import pipeline
from pipeline.cluster import connect as module
from pipeline.cluster import resolve as choice_module
from pipeline.cluster.connect import connect, dashboard_link
from pipeline.cluster.local import LOCAL_DEFAULTS, local_kwargs
from pipeline.cluster.resolve import choose_cluster, plan_deployment
from pipeline.cluster.spec import read_spec
from pipeline.errors import InputError, NotFoundError, OpenError
from tests.sockets import listening

LINUX = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
SHIPPED = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A working directory without a cluster.yaml; whatever happens, Dask's settings come back as they were."""
    monkeypatch.chdir(tmp_path)
    before = copy.deepcopy(dask.config.config)
    yield
    assert dask.config.config == before


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return write


@LINUX
def test_default_cluster(capfd):
    before = listening()
    with connect() as client:
        assert distributed.get_client() is client
        workers = client.scheduler_info(n_workers=-1)["workers"]
        ((address, worker),) = workers.items()
        assert address.startswith("inproc://")
        assert worker["nthreads"] == max(2, len(os.sched_getaffinity(0)))
        assert worker["memory_limit"] == 0
        assert client.submit(os.getpid).result() == os.getpid()
        sockets = listening() - before
        assert sockets
        assert {host for host, _ in sockets} == {"0100007F"}
        (line,) = capfd.readouterr().err.splitlines()
        link = line.removeprefix("dashboard: ")
        with urlopen(link) as response:
            assert b"Dask" in response.read()
    assert listening() == before
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match="No global client"):
        distributed.get_client()


@LINUX
def test_two_processes(capfd):
    sockets = listening()
    with connect(n_workers=2, processes=True) as client:
        pids = client.run(os.getpid)
        assert len(set(pids.values()) - {os.getpid()}) == 2
        limits = [worker["memory_limit"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
        assert limits[0] == limits[1]
        assert free / 8 < limits[0] <= 1.1 * free / 2
        new = listening() - sockets
        assert len(new) >= 5
        assert {host for host, _ in new} == {"0100007F"}

        # Ctrl-C on a terminal reaches the whole process group; the worker that a nanny started anew must stand it, too.
        (address, victim), (_, other) = pids.items()
        os.kill(victim, signal.SIGKILL)
        while address in client.scheduler_info(n_workers=-1)["workers"]:
            os.sched_yield()
        client.wait_for_workers(2, timeout=30)
        now = client.run(os.getpid)
        assert other in now.values()
        for pid in now.values():
            os.kill(pid, signal.SIGINT)
        assert client.run(os.getpid) == now
    assert not {pid for pid in now.values() if Path(f"/proc/{pid}").exists()}
    assert listening() == sockets
    assert not [name for name in os.environ if name.startswith("DASK_LOGGING")]
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_shipped_file_is_the_default():
    content = yaml.safe_load(SHIPPED.read_text())
    assert content.pop("kwargs") == LOCAL_DEFAULTS
    assert content == {"version": 1, "module": "dask.distributed", "class": "LocalCluster"}
    shipped, settings, _ = read_spec(SHIPPED)
    assert settings == {}
    for overrides in ({}, {"processes": True, "memory_limit": "1GB"}, {"n_workers": 3}):
        built_in = local_kwargs({}, overrides, None, "", insecure=False)
        assert local_kwargs(shipped.kwargs, overrides, None, "", insecure=False) == built_in


def test_working_directory_file_is_found(write):
    write("version: 1\nkwargs: {n_workers: 2, threads_per_worker: 3}\n").rename("cluster.yaml")
    with connect() as client:
        assert sorted(client.nthreads().values()) == [3, 3]
    with connect(n_workers=1, threads_per_worker=5, dashboard_address="127.0.0.1:0") as client:
        assert sorted(client.nthreads().values()) == [5]


def test_workers_and_threads(write):
    """Two or more workers are processes, whatever the file says; a limit for the other kind is forgotten."""

    def planned(file, **given):
        deployment = plan_deployment(choose_cluster(file, given))
        names = ("n_workers", "processes", "threads_per_worker")
        return tuple(deployment.kwargs[name] for name in names), deployment.scale, deployment.adapt

    cores = max(2, len(os.sched_getaffinity(0)))
    threads = write("version: 1\nkwargs: {processes: false, memory_limit: 0}\nscale: {workers: 3}")
    for file in (None, SHIPPED, threads):
        assert planned(file, workers=2) == ((2, True, math.ceil(cores / 2)), None, None)
        assert planned(file, workers=2, processes=False)[0][1] is False
        assert planned(file, workers=1, threads=7) == ((1, False, 7), None, None)
    processes = write("version: 1\nkwargs: {processes: true, n_workers: 5}\nadapt: {maximum: 3}")
    assert planned(processes, workers=1) == ((1, True, cores), None, None)
    assert planned(processes, threads=3)[0] == (5, True, 3)
    assert planned(processes, threads=3)[2].maximum == 3
    for wrong in (
        {"workers": 0},
        {"workers": "2"},
        {"threads": True},
        {"threads": 0.5},
        {"workers": 2, "n_workers": 2},
    ):
        with pytest.raises(InputError, match=r"workers|threads"):
            planned(None, **wrong)


@pytest.mark.parametrize("scale", ["scale: {workers: 3}", "scale: {n: 3}", "adapt: {minimum: 3, maximum: 4}"])
def test_scaling(write, scale):
    with connect(write(f"version: 1\n{scale}\n")) as client:
        client.wait_for_workers(3, timeout=10)
        assert set(client.nthreads().values()) <= {1, 2}


def test_dask_settings_are_merged_and_restored(write, monkeypatch):
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "7")
    path = write(
        "version: 1\ntemporary_directory: /tmp\n"
        "distributed: {scheduler: {no-workers-timeout: 5 minutes, allowed-failures: 9, worker_ttl: 17 s}}\n"
    )
    before = copy.deepcopy(dask.config.config["distributed"])
    with dask.config.set({"distributed.scheduler.allowed-failures": 7}), connect(path):
        assert dask.config.get("temporary-directory") == "/tmp"
        inside = copy.deepcopy(dask.config.config["distributed"])
        expected = {"no-workers-timeout": "5 minutes", "allowed-failures": 7, "worker-ttl": "17 s"}
        assert inside["scheduler"] == before["scheduler"] | expected
        assert inside["worker"] == before["worker"]


def test_tasks_do_not_wait_for_workers_without_end(write):
    path = write("version: 1\ndistributed: {scheduler: {no-workers-timeout: 7 s}}\n")
    for given, seconds in ((None, 300), (path, 7)):
        with connect(given, dashboard_address=None) as client:
            assert client.cluster.scheduler.no_workers_timeout == seconds


def test_port_that_is_taken(capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with connect(dashboard_address=f"127.0.0.1:{port}"):
            (line,) = capfd.readouterr().err.splitlines()
            assert f":{port}/" not in line
            with urlopen(line.removeprefix("dashboard: ")) as response:
                assert response.status == 200


@LINUX
def test_without_dashboard(capfd):
    before = listening()
    with connect(dashboard_address=None, worker_dashboard_address=None) as client:
        assert {host for host, _ in listening() - before} <= {"0100007F"}
        assert client.submit(sum, [3, 4]).result() == 7
    assert capfd.readouterr().err == ""


def test_without_bokeh():
    code = (
        "import sys\nsys.modules['bokeh'] = None\nfrom pipeline.cluster.connect import connect\n"
        "with connect() as client: print(client.submit(sum, [3, 4]).result())"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("7\n", "")


def addresses(client):
    """Of the HTTP servers of the scheduler and of its one worker."""
    ((_, worker),) = client.scheduler_info(n_workers=-1)["workers"].items()
    ports = [client.cluster.scheduler.http_server.port, worker["services"]["dashboard"]]
    return [f"http://127.0.0.1:{port}" for port in ports]


def pages(client):
    """Paths of the pages that the scheduler and its worker have made."""
    nodes = [client.cluster.scheduler, client.cluster.workers[0]]
    return [{path for each in node.http_application.applications for path in each.app_paths} for node in nodes]


def test_dashboard_is_complete_whatever_is_asked_for_first():
    """One whose pages Dask makes at the start is the measure."""
    keywords = {"processes": False, "n_workers": 1, "memory_limit": 0, "worker_dashboard_address": "127.0.0.1:0"}
    with (
        distributed.LocalCluster(**keywords, dashboard_address="127.0.0.1:0") as plain,
        distributed.Client(plain, set_as_default=False) as client,
        urlopen(f"{addresses(client)[0]}/individual-plots.json") as response,
    ):
        expected, plots = pages(client), response.read()
    assert [len(each) > 4 and "/status" in each for each in expected] == [True, True]
    with connect() as client:
        assert pages(client) == [set(), set()]
        with urlopen(f"{addresses(client)[0]}/individual-plots.json") as response:
            assert response.read() == plots
        assert pages(client) == [expected[0], set()]
        with urlopen(f"{addresses(client)[1]}/health") as response:
            assert response.read() == b"ok"
        assert pages(client) == expected


@pytest.mark.filterwarnings("ignore:There is no current event loop")  # Bokeh's client asks for one.
def test_dashboard_draws_and_is_made_once():
    with connect() as client:
        application = client.cluster.scheduler.http_application
        assert application.applications == []
        link = dashboard_link(client)
        for address in addresses(client):
            for _ in range(2):
                # Over the web socket, as a browser does.
                session = bokeh.client.pull_session(url=f"{address}/status")
                assert session.document.roots
                session.close()
        assert len(application.applications) == 1
        assert dashboard_link(client) == link
        assert client.submit(sum, [3, 4]).result() == 7


def test_settings_of_a_worker_are_found(write):
    """Dask looks for some of them by the name of the worker's class."""
    path = write("version: 1\ndistributed: {worker: {blocked-handlers: [terminate]}}\n")
    with connect(path) as client:
        ((_, worker),) = client.scheduler_info(n_workers=-1)["workers"].items()
        assert worker["type"] == "Worker"
        assert client.cluster.workers[0].blocked_handlers == ["terminate"]


def test_scheduler_keywords_are_kept(capfd):
    prefixed = {"http_prefix": "/here", "dashboard": True}
    with connect(scheduler_kwargs=prefixed) as client, urlopen(f"{addresses(client)[0]}/here/status") as response:
        assert b"Dask" in response.read()
    with connect(scheduler_kwargs={"dashboard": False}) as client:
        assert dashboard_link(client) is None
    assert len(capfd.readouterr().err.splitlines()) == 1


EVENTS = {}


def _stuck():
    EVENTS["entered"].set()
    EVENTS["release"].wait()
    EVENTS["left"].set()


def test_exception_of_the_body_wins_and_does_not_wait_for_tasks(capfd):
    EVENTS["entered"], EVENTS["release"], EVENTS["left"] = (threading.Event() for _ in range(3))
    try:
        with pytest.raises(KeyboardInterrupt, match="from the body"), connect() as client:  # noqa: PT012
            future = client.submit(_stuck)
            assert EVENTS["entered"].wait(30)
            raise KeyboardInterrupt("from the body")
        assert not EVENTS["left"].is_set()
    finally:
        EVENTS["release"].set()
    assert EVENTS["left"].wait(30)
    del future
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_failing_task_logs_nothing(capfd):
    with connect() as client, pytest.raises(ZeroDivisionError):
        client.submit(divmod, 1, 0).result()
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_memory_limit_in_process(write):
    with pytest.raises(InputError, match="memory_limit=0"), connect(memory_limit="4GB"):
        pass
    with (
        pytest.raises(InputError, match="memory_limit=0"),
        connect(write("version: 1\nkwargs: {processes: false, memory_limit: 4GB}")),
    ):
        pass


def test_limit_of_the_other_kind_is_forgotten():
    given = {"processes": True, "memory_limit": "4GB"}
    kwargs, _ = local_kwargs(given, {"processes": False}, None, "", insecure=False)
    assert kwargs["memory_limit"] == 0
    kwargs, _ = local_kwargs(given, {"n_workers": 2}, None, "", insecure=False)
    assert kwargs["memory_limit"] == "4GB"


def test_existing_scheduler(write, monkeypatch):
    with distributed.LocalCluster(
        n_workers=1, processes=False, protocol="tcp", memory_limit=0, dashboard_address="127.0.0.1:0"
    ) as running:
        address = running.scheduler_address
        with connect(write(f"version: 1\nscheduler-address: {address}\n")) as client:
            assert client.submit(sum, [5, 6]).result() == 11
        with connect(scheduler_address=address) as client:
            assert client.submit(sum, [5, 7]).result() == 12
        with pytest.raises(InputError, match="drop one"), connect(scheduler_address=address, n_workers=2):
            pass
        assert running.status.name == "running"


def test_scheduler_file(write, tmp_path, monkeypatch):
    """It may be absent, or half written, when it is looked for first."""
    path = tmp_path / "scheduler.json"
    with distributed.LocalCluster(
        n_workers=1, processes=False, protocol="tcp", memory_limit=0, dashboard_address="127.0.0.1:0"
    ) as running:
        text = json.dumps(running.scheduler.identity() | {"workers": {}})
        timers = [threading.Timer(0.3, path.write_text, [text[:20]]), threading.Timer(0.6, path.write_text, [text])]
        for timer in timers:
            timer.start()
        with connect(scheduler_file=path) as client:
            assert client.scheduler.address == running.scheduler_address
        for timer in timers:
            timer.join()
        with connect(write(f"version: 1\nscheduler-file: {path}")) as client:
            assert client.submit(sum, [5, 6]).result() == 11
    monkeypatch.setattr(choice_module, "_FILE_SECONDS", 0.2)
    monkeypatch.setattr(choice_module, "_TORN_SECONDS", 0.2)
    for text, message in (("{", "JSONDecodeError"), ("{}", "KeyError: 'address'"), ("[]", "TypeError")):
        path.write_text(text)
        with pytest.raises(OpenError, match=message) as caught, connect(scheduler_file=path):
            pass
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(OpenError, match="got none at .*scheduler.json"), connect(scheduler_file=path):
        pass


def _row_sums(block):
    time.sleep(0.05)
    return block.sum(axis=2)


ADAPTIVE = """adapt: {minimum: 1, maximum: 2}
distributed: {adaptive: {interval: 100ms, target-duration: 50ms, wait-count: 1}}"""


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param("scale: {workers: 2}", id="by hand"),
        pytest.param(ADAPTIVE, id="ci adaptive", marks=pytest.mark.slow),
    ],
)
def test_workers_that_come_and_go_during_runs(write, samples, tmp_path, monkeypatch, scale):
    """Those that are closed hold results, or run tasks."""
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", 24)
    rows = np.load(samples / "A.npy")
    matrix = pipeline.open_matrix(samples / "A.zarr")
    starts = pipeline.draw_starts(matrix.rows, length=16, count=400, seed=1)
    expected = np.stack([rows[start : start + 16].sum(axis=1) for start in starts])
    path = write(f"version: 1\nkwargs: {{processes: true, threads_per_worker: 1, memory_limit: 1GB}}\n{scale}\n")
    with connect(path, dashboard_address=None) as client:
        workers = client.cluster.scheduler.workers
        ended = threading.Event()

        def watch():
            end = time.monotonic() + 15
            for number in (2, 1):
                if scale is not ADAPTIVE:
                    client.cluster.scale(number)
                while len(workers) != number and time.monotonic() < end and not ended.wait(0.01):
                    pass
            ended.set()

        watching = threading.Thread(target=watch)
        watching.start()
        plan = pipeline.plan_windows(matrix, starts, length=16)
        try:
            rounds = 0
            while not rounds or not ended.is_set():
                np.testing.assert_allclose(pipeline.gather(plan, apply=_row_sums), expected)
                stored = pipeline.store(plan, tmp_path / f"{rounds}.zarr", apply=_row_sums)
                np.testing.assert_allclose(stored["windows"][:], expected)
                rounds += 1
        finally:
            ended.set()
            watching.join()
        if scale is not ADAPTIVE:
            assert len(workers) == 1


@pytest.mark.timeout(20)
@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{}", "127.0.0.1:{}"])
def test_scheduler_that_does_not_answer(monkeypatch, address, listens):
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.3)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if listens:  # As for a process that was stopped: the kernel accepts.
            bound.listen()
        address = address.format(bound.getsockname()[1])
        message = r"must answer within 0.3 s.*scheduler-address"
        with pytest.raises(OpenError, match=message) as caught, connect(scheduler_address=address):
            pass
    with pytest.raises(ValueError, match="No global client"):
        distributed.get_client()
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("address", ["foo://x:1", "tls://127.0.0.1:1", "tcp://127.0.0.1:port"])
def test_address_that_cannot_be_used(address):
    with pytest.raises(InputError, match=address), connect(scheduler_address=address):
        pass
    with pytest.raises(ValueError, match="No global client"):
        distributed.get_client()
    assert dask.compute(dask.delayed(sum)([8, 9])) == (17,)


def test_script_without_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pipeline.cluster.connect import connect\nfrom pipeline.errors import OpenError\n"
        "try:\n    with connect(processes=True): print('no')\nexcept OpenError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    assert run.stderr == ""
    assert run.stdout.count("\n") == 1
    assert "if __name__ == '__main__':" in run.stdout


KWARGS = "version: 1\nkwargs: "
BAD_FILES = [
    ("version: 1\n\tclass: LocalCluster", OpenError, "readable YAML"),
    ("version: [1", OpenError, "readable YAML"),
    ("version: 1\nkwargs: {a: \x07}", OpenError, "readable YAML"),
    ("[" * 3000, OpenError, "readable YAML"),
    ("", OpenError, "got NoneType"),
    ("# version: 1\n", OpenError, "got NoneType"),
    ("- version: 1\n", OpenError, "got list"),
    ("version: 1\n---\nversion: 1\n", OpenError, "readable YAML"),
    ("kwargs: {}", InputError, "version"),
    ("version: 2", InputError, "version"),
    ("version: '1'", InputError, "version"),
    ("version: 1\nversion: 1", InputError, "'version' twice .* line 2"),
    (KWARGS + "{n_workers: 1, n_workers: 2}", InputError, "'n_workers' twice"),
    ("version: 1\ndistributed:\n  scheduler:\n    a: 1\n    a: 2", InputError, "'a' twice .* line 5"),
    ("version: 1\nclas: LocalCluster", InputError, "mean 'class'"),
    ("version: 1\nschedular-address: tcp://h:1", InputError, "mean 'scheduler-address'"),
    ("version: 1\nTrue: 1", InputError, "got True"),
    ("version: 1\nkwargs: [1]", InputError, "kwargs"),
    ("version: 1\nkwargs: {1: 2}", InputError, "kwargs"),
    ("version: 1\nkwargs: !!python/object/apply:os.system ['touch ran']", InputError, "a tag or an alias"),
    ("!!python/object/apply:os.system ['touch ran']", InputError, "a tag or an alias"),
    ("version: !!int 1", InputError, "a tag or an alias"),
    ("version: 1\nkwargs: &a {n: *a}", InputError, "a tag or an alias"),
    ("version: 1\ndistributed: {schedular: {}}", InputError, "mean 'scheduler'"),
    ("version: 1\ndistributed: {scheduler: {no-worker-timeout: 1}}", InputError, "mean 'no-workers-timeout'"),
    ("version: 1\ndistributed: {worker: {memory: {spil: 1}}}", InputError, "mean 'spill'"),
    ("version: 1\ndistributed: {scheduler: 5}", InputError, "scheduler .* mapping"),
    ("version: 1\ndistributed:", InputError, "distributed .* mapping"),
    ("version: 1\nscale: {worker: 2}", InputError, "mean 'workers'"),
    ("version: 1\nscale: {workers: 0}", InputError, "scale"),
    ("version: 1\nscale: {}", InputError, "one number or between two"),
    ("version: 1\nscale: {n: 1, jobs: 2}", InputError, "one number or between two"),
    ("version: 1\nscale: {n: 2}\nadapt: {maximum: 3}", InputError, "one number or between two"),
    ("version: 1\nadapt: {minimum: 3}", InputError, "maximum"),
    ("version: 1\nadapt: {minimum: 3, maximum: 2}", InputError, "between two"),
    ("version: 1\nadapt: {minimum: 0, maximum: 2}", InputError, "keeps a worker at least, .*write minimum: 1"),
    ("version: 1\nscale: {jobs: 2}", InputError, "jobs are of a batch system"),
    ("version: 1\nscheduler-address: tcp://127.0.0.1:1\nscheduler-file: f", InputError, "got both from"),
    ("version: 1\nscheduler-file: my.yaml", OpenError, "scheduler's file|writes its file"),
    ("version: 1\ninsecure: 1", InputError, "insecure"),
    ("version: 1\nmodule: dask_jobqueue", InputError, "got dask_jobqueue.no class"),
    ("version: 1\nmodule: dask.distributed\nclass: SpecCluster", InputError, "mean 'dask.distributed"),
    ("version: 1\nmodule: dask_jobqueue.core\nclass: JobQueueCluster", InputError, "one of Dask's clusters"),
    ("version: 1\nmodule: dask_jobqueue\nclass: PDSCluster", InputError, "mean 'dask_jobqueue.PBSCluster'"),
    (KWARGS + "{worker_class: os.system}", InputError, "'worker_class'"),
    (KWARGS + "{processes: true, dashboard_address: ':0'}", InputError, "--insecure"),
    ("version: 1\nmodule: os\nclass: system", InputError, "got os.system .* did you mean"),
    ("version: 1\nclass: SSHClusters", InputError, "mean 'dask.distributed.SSHCluster'"),
    ("version: 1\nscheduler-address: tcp://h:1\nkwargs: {n_workers: 1}", InputError, "drop one"),
    (KWARGS + "{n_worker: 2}", InputError, "mean 'n_workers'"),
    (KWARGS + "{asynchronous: true}", InputError, "'asynchronous'"),
    (KWARGS + "{n_workers: 0}", InputError, "n_workers .* at least 1"),
    (KWARGS + "{n_workers: '2'}", InputError, "n_workers"),
    (KWARGS + "{threads_per_worker: 0.5}", InputError, "threads_per_worker"),
    (KWARGS + "{processes: 'yes'}", InputError, "processes"),
    (KWARGS + "{processes: true, memory_limit: 8XB}", InputError, "XB"),
    (KWARGS + "{dashboard_address: 'host.invalid:1'}", InputError, "dashboard is on loopback"),
    ("version: 1\n<<: {class: LocalCluster}", InputError, "a key << in .* line 2"),
    ("version: 1\nkwargs:\n  <<: {n_workers: 2}", InputError, "a key << in .* line 3"),
    ("version: 1\nscheduler_file: a\nscheduler-file: b", InputError, "'scheduler-file' with a hyphen"),
    ("version: 1\nscheduler-address: tcp://host.invalid:1", InputError, "name is not known here.*--insecure"),
    (KWARGS + "{scheduler_kwargs: [1]}", InputError, "scheduler_kwargs is a mapping"),
    *(
        (KWARGS + f"{{scheduler_kwargs: {{{key}: '1'}}}}", InputError, f"got {key} in scheduler_kwargs")
        for key in ("protocol", "host", "interface", "port", "security")
    ),
]


@pytest.mark.parametrize(("text", "kind", "message"), BAD_FILES)
def test_refused_files(write, text, kind, message):
    with pytest.raises((InputError, OpenError), match=message) as caught, connect(write(text)):
        pass
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(NotFoundError, match=r"absent\.yaml"), connect(tmp_path / "absent.yaml"):
        pass
    with pytest.raises(OpenError, match="directory"), connect(tmp_path):
        pass
    (tmp_path / "latin.yaml").write_bytes(b"version: 1 # \xff")
    with pytest.raises(OpenError, match="utf-8"), connect(tmp_path / "latin.yaml"):
        pass


def test_text_of_a_file_is_not_said_again(write):
    with (
        pytest.raises(OpenError, match=r"readable YAML.*, line 3; correct it") as caught,
        connect(write("version: 1\nkwargs:\n  password: 'SESAME' b\n")),
    ):
        pass
    assert "SESAME" not in str(caught.value)


def test_a_time_stays_text(write):
    spec, _, _ = read_spec(write(KWARGS + "{a: 10:00:00, b: 1:30.5, c: 17, d: 2.5}"))
    assert spec.kwargs == {"a": "10:00:00", "b": "1:30.5", "c": 17, "d": 2.5}


def test_a_scheduler_that_ends_while_a_worker_is_awaited(monkeypatch):
    def lose(*_, **__):
        raise OSError("it went")

    monkeypatch.setattr(distributed.Client, "scheduler_info", lose)
    with pytest.raises(OpenError, match="a scheduler runs until its client ends; got it went"), connect():
        pass


def test_unknown_override():
    with pytest.raises(InputError, match="mean 'n_workers'"), connect(n_worker=2):
        pass


def test_a_scheduler_without_workers_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(module, "_WORKER_SECONDS", 0.3)
    empty = distributed.LocalCluster(
        n_workers=0, processes=False, dashboard_address="127.0.0.1:0", protocol="tcp", host="127.0.0.1"
    )
    with empty, pytest.raises(OpenError, match="a worker within"), connect(scheduler_address=empty.scheduler_address):
        pass
