"""All that listens, whatever the cluster, to a user of this machine who has no certificate."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import dask
import distributed
import pytest

from pipeline import security
from pipeline.cluster import connect
from tests.sockets import LOOPBACK, listening
from tests.stranger import intrude
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
