"""Clusters that start for real, what they listen on and leave behind, and what a `cluster.yaml` may say."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.request import urlopen

import bokeh.client
import dask
import distributed
import pytest
import yaml

from pipeline import cluster as module
from pipeline.cluster import check_client, connect, dashboard_link
from pipeline.errors import InputError, NotFoundError, OpenError

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


def listening():
    """(host, port) of every TCP socket on which this process or a child of it listens, from the kernel's tables."""
    pids = [os.getpid()]
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            # A thread may end while it is looked at.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pids += map(int, (task / "children").read_text().split())
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not Path(table).exists():
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            host, port = words[1].split(":")
            if words[3] == "0A" and words[9] in inodes:
                found.add((host, int(port, 16)))
    return found


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
        check_client(client)
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
        check_client(client)

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
    assert content.pop("kwargs") == module._DEFAULTS
    assert content == {"version": 1, "module": "dask.distributed", "class": "LocalCluster"}
    shipped, settings, _ = module.read_spec(SHIPPED)
    assert settings == {}
    for overrides in ({}, {"processes": True, "memory_limit": "1GB"}, {"n_workers": 3}):
        built_in = module._local_kwargs({}, overrides, 1, "")
        assert module._local_kwargs(shipped.kwargs, overrides, 1, "") == built_in


def test_examples_in_the_shipped_file_work(write):
    text = SHIPPED.read_text()
    for line in ("scale: {workers: 4}", "adapt: {minimum: 1, maximum: 4}", "temporary-directory: /scratch"):
        assert f"# {line}\n" in text
        module.read_spec(write(text.replace(f"# {line}", line)))
    dask_part = "# distributed:\n#   scheduler: {no-workers-timeout: 5 minutes}\n"
    assert dask_part in text
    _, settings, _ = module.read_spec(write(text.replace(dask_part, dask_part.replace("# ", "").replace("#", ""))))
    assert settings == {"distributed": {"scheduler": {"no-workers-timeout": "5 minutes"}}}


def test_working_directory_file_is_found(write):
    write("version: 1\nkwargs: {n_workers: 2, threads_per_worker: 3}\n").rename("cluster.yaml")
    with connect() as client:
        assert sorted(client.nthreads().values()) == [3, 3]
    with connect(n_workers=1, threads_per_worker=5, dashboard_address="127.0.0.1:0") as client:
        assert sorted(client.nthreads().values()) == [5]


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
        "import sys\nsys.modules['bokeh'] = None\nfrom pipeline.cluster import connect\n"
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
    with distributed.Client(
        processes=False, n_workers=1, memory_limit="4GB", dashboard_address=None, set_as_default=False
    ) as client:
        with pytest.raises(InputError, match="memory_limit=0"):
            check_client(client)
        with (
            distributed.Client(client.scheduler.address, set_as_default=False) as second,
            pytest.raises(InputError, match="got memory_limit=4000000000"),
        ):
            check_client(second)


def test_limit_of_the_other_kind_is_forgotten():
    kwargs = module._local_kwargs({"processes": True, "memory_limit": "4GB"}, {"processes": False}, 1, "")
    assert kwargs["memory_limit"] == 0
    kwargs = module._local_kwargs({"processes": True, "memory_limit": "4GB"}, {"n_workers": 2}, 1, "")
    assert kwargs["memory_limit"] == "4GB"


def test_existing_scheduler(write, monkeypatch):
    with distributed.LocalCluster(
        n_workers=1, processes=False, protocol="tcp", memory_limit=0, dashboard_address="127.0.0.1:0"
    ) as running:
        address = running.scheduler_address
        with connect(write(f"version: 1\nscheduler-address: {address}\n")) as client:
            assert client.submit(sum, [5, 6]).result() == 11
            check_client(client)
        with connect(scheduler_address=address) as client:
            assert client.submit(sum, [5, 7]).result() == 12
        with pytest.raises(InputError, match="drop one"), connect(scheduler_address=address, n_workers=2):
            pass
        assert running.status.name == "running"


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{}", "127.0.0.1:{}"])
def test_scheduler_that_does_not_answer(monkeypatch, address):
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.3)
    with socket.socket() as bound:  # Bound, and nobody listens.
        bound.bind(("127.0.0.1", 0))
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
        "from pipeline.cluster import connect\nfrom pipeline.errors import OpenError\n"
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
    ("version: 1\nmodule: os\nclass: system", InputError, "got os.system .* use dask.distributed.LocalCluster"),
    ("version: 1\nclass: SSHCluster", InputError, "dask.distributed.LocalCluster"),
    ("version: 1\nscheduler-address: tcp://h:1\nkwargs: {n_workers: 1}", InputError, "drop one"),
    (KWARGS + "{n_worker: 2}", InputError, "mean 'n_workers'"),
    (KWARGS + "{asynchronous: true}", InputError, "'asynchronous'"),
    (KWARGS + "{n_workers: 0}", InputError, "n_workers .* at least 1"),
    (KWARGS + "{n_workers: '2'}", InputError, "n_workers"),
    (KWARGS + "{threads_per_worker: 0.5}", InputError, "threads_per_worker"),
    (KWARGS + "{processes: 'yes'}", InputError, "processes"),
    (KWARGS + "{processes: true, memory_limit: 8XB}", InputError, "XB"),
    (KWARGS + "{dashboard_address: 'host.invalid:1'}", OpenError, "must start"),
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
