"""All that listens, whatever the cluster, to a user of this machine who has no certificate."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import dask
import distributed
import numpy as np
import pytest

from pipeline.cluster import security
from pipeline.cluster.connect import connect
from pipeline.runtime.shared_memory import share_memory
from tests.sockets import LOOPBACK, listening
from tests.stranger import UID, intrude
from tests.test_service_contract import describe

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")

PROCESSES = {"processes": True, "n_workers": 2, "threads_per_worker": 1}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [each for each in os.environ if each.startswith("DASK_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def keys(monkeypatch):
    """Temporary keys that were made, each a line of its text."""
    keys, make = [], security._make_temporary

    def made():
        temporary = make()
        keys.append(temporary.tls_client_key.splitlines()[1])
        return temporary

    monkeypatch.setattr(security, "_make_temporary", made)
    return keys


def nodes_of(client):
    """Process numbers of scheduler, nannies and workers."""
    pids = {*client.run(os.getpid).values(), *client.run(os.getppid).values(), client.run_on_scheduler(os.getpid)}
    # The parent of a worker in process, and of a nanny in it, is no node.
    return pids - {os.getppid(), 1}


def unix_listeners(*pids):
    """Sockets of processes that others on this host connect to by a path, or a name."""
    lines = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    # Those that listen have this flag.
    inodes = {f"socket:[{line[6]}]": line[7:] for line in lines if int(line[3], 16) & 0x10000}
    links = [str(each.readlink()) for pid in pids for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]
    return [inodes[link] for link in links if link in inodes]


@pytest.mark.parametrize(
    "name",
    [
        "in-process",
        "processes",
        pytest.param("ssh", marks=pytest.mark.ssh),
        pytest.param("slurm", marks=pytest.mark.slurm),
    ],
)
def test_strangers_are_shown_pages_at_most(name, request, tmp_path, keys, capfd):
    """They run no code, and no secret is in their reach."""
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps({"version": 1, **describe(name, tmp_path, request)}))
    before = listening()
    with connect(file) as client:
        client.wait_for_workers(1 if name == "in-process" else 2, timeout=60)
        pids = nodes_of(client)
        sockets = listening(*pids) - before
        assert {host for host, _ in sockets} == LOOPBACK
        workers = client.scheduler_info(n_workers=-1)["workers"]
        ports = {int(each.rpartition(":")[2]) for each in workers if "://127" in each}
        assert ports <= {port for _, port in sockets}
        assert len(sockets) >= (2 if name == "in-process" else 8)
        assert unix_listeners(*pids) == []
        private = [Path(f"/proc/{pid}/{each}") for pid in pids for each in ("environ", "mem", "fd/1")]
        certificate = client.run_on_scheduler(dask.config.get, "distributed.comm.tls.scheduler.cert")
        folders = [Path(certificate).parent] if certificate else list(tmp_path.glob(".random-windows-*"))
        assert len(folders) == (name in ("ssh", "slurm"))
        for folder in folders:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert {stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()} == {0o600}
            private += folder.iterdir()
        answers, readable = intrude([port for _, port in sockets], files=private)
        assert set().union(*answers.values()) == {"http"}
        assert readable == [] or os.getuid() != 0
        # What is in sight, and what is printed or logged, holds no key.
        assert len(keys) == (name != "in-process")
        for key in keys:
            for pid in pids:
                for each in ("cmdline", "environ"):
                    assert key.encode() not in Path(f"/proc/{pid}/{each}").read_bytes()
            logs = [client.get_scheduler_logs(), client.get_worker_logs(), client.get_worker_logs(nanny=True)]
            shown = [client.scheduler_info(n_workers=-1), dask.config.config, *logs, repr(client), client._repr_html_()]
            assert key not in str(shown)
    assert "PRIVATE" not in "".join(capfd.readouterr())


def test_plain_tcp_by_the_users_word_is_open_to_strangers():
    """The protection removed: the same tries get through."""
    with connect(**PROCESSES, insecure=True, dashboard_address=None) as client:
        assert client.scheduler.address.startswith("tcp://127.0.0.1:")
        answers, _ = intrude([port for _, port in listening()])
        assert sum(schemes == {"tcp"} for schemes in answers.values()) == 1 + 2 * 2


def test_a_client_without_the_certificate_is_refused():
    with connect(**PROCESSES, dashboard_address=None) as client:
        assert client.submit(sum, [3, 4]).result() == 7
        stranger, address = distributed.Security.temporary(), client.scheduler.address
        for security_of, tried in ((None, address.replace("tls", "tcp")), (stranger, address)):
            with pytest.raises(OSError, match=r".*"):
                distributed.Client(tried, security=security_of, timeout=0.5, set_as_default=False)


def test_a_scheduler_of_the_users_own_over_plain_tcp(capfd):
    """It works, and one line says what it means."""
    with distributed.LocalCluster(
        n_workers=1, processes=False, protocol="tcp", host="127.0.0.1", memory_limit=0,
        dashboard_address="127.0.0.1:0", worker_dashboard_address="127.0.0.1:0",
    ) as cluster:  # fmt: skip
        for insecure, lines in ((False, 1), (True, 0)):
            with connect(scheduler_address=cluster.scheduler_address, insecure=insecure) as client:
                assert client.submit(sum, [3, 4]).result() == 7
            said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("dashboard:")]
            assert len(said) == lines
            assert all("every user of this machine can run code" in line for line in said)


# Dashboards, to a page of another site that the user's browser shows


def ask(port, path="/status", method="GET", **headers):
    """Status of one request, and what it says where it is refused."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        response = connection.getresponse()
        return response.status, response.read(300) if response.status == 403 else b""
    finally:
        connection.close()


WEBSOCKET = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec_WebSocket_Version": "13",
    "Sec_WebSocket_Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
    "Sec_WebSocket_Protocol": "bokeh, e30.e30",
}


def dashboards(client):
    """Ports of the dashboards of scheduler and workers."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return [urlsplit(client.dashboard_link).port, *(each["services"]["dashboard"] for each in workers)]


@pytest.mark.parametrize(
    "name",
    [
        "in-process",
        "processes",
        pytest.param("ssh", marks=pytest.mark.ssh),
        pytest.param("slurm", marks=pytest.mark.slurm),
    ],
)
def test_dashboards_refuse_other_sites(name, request, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps({"version": 1, **describe(name, tmp_path, request)}))
    with connect(file) as client:
        client.wait_for_workers(1 if name == "in-process" else 2, timeout=60)
        ports = dashboards(client)
        assert len(ports) == (2 if name == "in-process" else 3)
        for port in ports:
            own, other = f"http://127.0.0.1:{port}", "http://elsewhere.example"
            # The first request is a websocket's, of a page of another site.
            refused, said = ask(port, "/status/ws", **WEBSOCKET, Origin=other)
            assert (refused, b"'http://elsewhere.example' is not this dashboard" in said) == (403, True)
            # Over SSH Dask's workers have no pages that follow anything.
            followed = 404 if name == "ssh" and port != ports[0] else 101
            for origin in (own, "http://localhost:4711", "http://[::1]:4711"):
                assert ask(port, "/status/ws", **WEBSOCKET, Origin=origin)[0] == followed
            for origin in (
                other,
                "null",
                f"http://elsewhere.example:{port}",
                "http://localhost.elsewhere.example",
                "][",
            ):
                assert ask(port, "/status/ws", **WEBSOCKET, Origin=origin)[0] == 403
                assert ask(port, Origin=origin)[0] == 403
            # A name of theirs for loopback.
            rebound = {"Host": f"elsewhere.example:{port}"}
            assert ask(port, "/status/ws", **WEBSOCKET, **rebound, Origin=f"http://{rebound['Host']}")[0] == 403
            for path in ("/status", "/health", "/json/counts.json", "/eventstream", "/statics/css/base.css"):
                assert ask(port, path, **rebound)[0] == 403
            for host in (f"127.0.0.1:{port}", "localhost:4711", "[::1]:4711"):
                assert ask(port, "/health", Host=host)[0] == 200
            # They show, and take nothing.
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                for path in ("/status", "/health", "/info/main/workers.html", "/api/v1/retire_workers", "/"):
                    assert ask(port, path, method)[0] in (403, 404, 405)


def test_a_worker_that_comes_later_refuses_other_sites(tmp_path):
    with connect(**PROCESSES) as client:
        (before, *_) = client.scheduler_info(n_workers=-1)["workers"]
        client.restart_workers([before], timeout=120)
        for port in dashboards(client):
            assert ask(port, Host="elsewhere.example")[0] == 403


def test_hosts_that_the_user_names_are_let_in():
    """Such as that of a proxy before the dashboard; Dask's own value, all, counts as none."""
    setting = "distributed.scheduler.dashboard.bokeh-application.allow_websocket_origin"
    assert dask.config.get(setting) == ["*"]
    proxy = {"Host": "hub.example:443", "Origin": "https://hub.example:443"}
    for hosts, expected in ((["*"], 403), (["hub.example:443"], 101)):
        with dask.config.set({setting: hosts}), connect() as client:
            for port in dashboards(client):
                status, said = ask(port, "/status/ws", **WEBSOCKET, **proxy)
                assert status == expected
                assert setting.encode() in said or expected == 101
    with connect(insecure=True) as client:
        for port in dashboards(client):
            assert ask(port, "/status/ws", **WEBSOCKET, **proxy)[0] == 101


def test_shared_memory_is_out_of_the_reach_of_strangers():
    """They find it nowhere: not among the open files of the process, nor in `/dev/shm`, nor by its number."""
    names = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").is_dir() else set()
    shared = share_memory((4, 5), np.dtype("f8"))
    try:
        files = [Path(f"/proc/{os.getpid()}/fd/{file.fd}") for file in shared.handle.files]
        maps = [Path(f"/proc/{os.getpid()}/{each}") for each in ("mem", "maps", "map_files", "fd")]
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert not Path("/dev/shm").is_dir() or set(Path("/dev/shm").iterdir()) == names
        _, readable = intrude([], files=[*files, *maps])
        assert readable == [] or os.getuid() != 0
        # Who may open it is what the second line of defence is tried with: a descriptor that was handed over.
        assert os.getuid() != 0 or is_refused_to_stranger(files[0])
    finally:
        shared.close(0)


def is_refused_to_stranger(file):
    """Whether another user cannot open a file anew that it already has open for reading."""
    fd = os.open(file, os.O_RDONLY)
    try:
        command = ["sh", "-c", f": <> /proc/self/fd/{fd}"]
        done = subprocess.run(command, check=False, pass_fds=[fd], user=UID, group=UID, extra_groups=[], stderr=-1)
    finally:
        os.close(fd)
    return b"denied" in done.stderr
