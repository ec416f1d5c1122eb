"""Who can reach a cluster: listeners on loopback, TLS off it, certificates made and removed, no secret in sight."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import dask
import distributed
import pytest

from pipeline.cluster import jobqueue as jobs_module
from pipeline.cluster import registry as deployments
from pipeline.cluster import security
from pipeline.cluster.connect import connect
from pipeline.cluster.jobqueue import job_kwargs
from pipeline.cluster.local import local_kwargs
from pipeline.cluster.registry import load_class
from pipeline.cluster.resolve import choose_cluster, plan_deployment
from pipeline.cluster.security import Encryption, check_address, check_dashboard, is_loopback
from pipeline.cluster.spec import merged_settings
from pipeline.cluster.ssh import _write, ssh_kwargs
from pipeline.errors import InputError, NotFoundError, OpenError
from tests.sockets import LOOPBACK, listening
from tests.stranger import UID

LINUX = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
ELSEWHERE = "192.0.2.7"
"""An address for documentation: nobody's."""
CERTIFICATES = {
    "distributed.comm.tls.ca-file": "/certificates/ca.pem",
    **{f"distributed.comm.tls.{role}.cert": f"/certificates/{role}.pem" for role in ("scheduler", "worker", "client")},
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [each for each in os.environ if each.startswith("DASK_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("", False),
        ("0.0.0.0", False),
        ("::", False),
        (ELSEWHERE, False),
        ("host.invalid", False),
        ("a" * 70, False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1:1", "tcp://localhost:1", "inproc://192.0.2.7/1/2"])
def test_schedulers_on_loopback_may_be_plain_and_it_is_said_what_that_means(address):
    check_address(address, insecure=False)
    warning = security.warn_of_plain(address, insecure=False)
    assert (warning is None) is address.startswith("inproc")
    assert warning is None or re.match(rf"{address} .*every user of this machine can run code.*--insecure", warning)
    assert security.warn_of_plain(address, insecure=True) is None


def test_what_is_plain():
    assert security.is_plain("tcp://127.0.0.1:1", loopback=True)
    assert security.is_plain(f"tcp://{ELSEWHERE}:1", loopback=False)
    assert not security.is_plain(f"tls://{ELSEWHERE}:1", loopback=False)
    assert not security.is_plain("tcp://127.0.0.1:1", loopback=False)
    assert security.address_encryption("tcp://127.0.0.1:1", insecure=False) is Encryption.LOOPBACK


@pytest.mark.parametrize("address", [f"tcp://{ELSEWHERE}:1", f"{ELSEWHERE}:1", f"ws://{ELSEWHERE}:1"])
def test_schedulers_elsewhere_need_tls(address):
    with pytest.raises(InputError, match=r"over TLS; got .*192\.0\.2\.7:1.*ssh -L.*--insecure"):
        check_address(address, insecure=False)
    check_address(address, insecure=True)
    with pytest.raises(InputError, match="over TLS"), connect(scheduler_address=address):
        pass


def test_a_scheduler_over_tls_needs_certificates_that_are_there(tmp_path):
    address = f"tls://{ELSEWHERE}:1"
    for insecure in (False, True):
        with pytest.raises(InputError, match=r"no distributed\.comm\.tls\.ca-file and distributed.*client\.cert"):
            check_address(address, insecure=insecure)
    files = [tmp_path / name for name in ("ca.pem", "client.pem")]
    settings = {
        f"distributed.comm.tls.{name}": str(file) for name, file in zip(("ca-file", "client.cert"), files, strict=True)
    }
    with dask.config.set(settings):
        for file in files:
            with pytest.raises(NotFoundError, match=r"\.pem as distributed\.comm\.tls"):
                check_address(address, insecure=False)
            file.touch()
        check_address(address, insecure=False)


@pytest.mark.parametrize(
    ("address", "good"),
    [
        ("127.0.0.1:8787", True),
        ("localhost:0", True),
        (None, True),
        (":8787", False),
        (8787, False),
        ("0.0.0.0:8787", False),
        (f"{ELSEWHERE}:1", False),
        ("127.0.0.1:1,:2", False),
        ("a:b:c", False),
    ],
)
def test_dashboards(address, good):
    if good:
        check_dashboard(address, insecure=False)
        return
    with pytest.raises(InputError, match="dashboard"):
        check_dashboard(address, insecure=False)
    for key in ("dashboard_address", "worker_dashboard_address"):
        with pytest.raises(InputError, match="dashboard"):
            local_kwargs({key: address}, {}, None, "", insecure=False)
    check_dashboard(address, insecure=True)
    with dask.config.set({"distributed.scheduler.dashboard.tls.cert": "/a.pem"}):
        if address != "a:b:c":
            check_dashboard(address, insecure=False)


def encryption(given, *, insecure=False, **settings):
    with dask.config.set(settings):
        kwargs, found = local_kwargs(given, {}, None, "", insecure=insecure)
    return found, kwargs.get("protocol"), kwargs.get("security")


OPEN = {"processes": True, "host": "0.0.0.0"}


def test_a_local_cluster_is_encrypted_on_loopback_too():
    assert encryption({}) == (Encryption.IN_PROCESS, "inproc://", None)
    for where in ({}, {"host": "127.0.0.1"}, {"interface": "lo"}, {"host": "0.0.0.0"}, {"host": ELSEWHERE}):
        assert encryption({"processes": True} | where) == (Encryption.TEMPORARY, "tls://", None)
        assert encryption({"processes": True} | where, insecure=True) == (Encryption.NONE, None, None)
    for listens in ({"host": "127.0.0.1"}, {"scheduler_port": 0, "interface": "lo"}, {"security": True}):
        assert encryption(listens)[:2] == (Encryption.TEMPORARY, "tls://")
    for processes in (True, False):
        with pytest.raises(InputError, match="got host in scheduler_kwargs"):
            encryption({"processes": processes, "scheduler_kwargs": {"host": ELSEWHERE}})
    own = distributed.Security.temporary()
    for insecure in (False, True):
        assert encryption(OPEN | {"security": own}, insecure=insecure) == (Encryption.CONFIGURED, "tls://", own)
        assert encryption(OPEN | {"security": True}, insecure=insecure) == (Encryption.TEMPORARY, "tls://", True)
        assert encryption(OPEN, insecure=insecure, **CERTIFICATES) == (Encryption.CONFIGURED, "tls://", None)
    # A setting that asks for encryption, and names no certificates.
    assert encryption({"processes": True}, **{"distributed.comm.require-encryption": True})[0] is Encryption.TEMPORARY
    for wrong in ({"protocol": "tcp://"}, {"protocol": "ws"}):
        for given in (OPEN, {"processes": True}, {}):
            with pytest.raises(InputError, match="protocol '(tcp://|ws)' is not encrypted; .*--insecure"):
                encryption(given | wrong)
            assert encryption(given | wrong, insecure=True)[0] is Encryption.NONE
    with pytest.raises(InputError, match="security is true or a distributed.Security; got dict"):
        encryption({"processes": True, "security": {"ca": "a.pem"}})
    with pytest.raises(InputError, match="interface is one of this machine's.*nosuch0"):
        encryption({"processes": True, "interface": "nosuch0"})
    with pytest.raises(InputError, match="dashboard"):
        encryption({"scheduler_kwargs": {"dashboard_address": ":1"}})


def test_threads_are_of_this_process_also_where_dask_is_told_to_encrypt():
    with (
        dask.config.set({"distributed.comm.require-encryption": True}),
        connect(dashboard_address=None) as client,
    ):
        assert client.scheduler.address.startswith("inproc://")
        assert client.submit(sum, [3, 4]).result() == 7


def test_a_package_that_is_absent_is_named(monkeypatch):
    absent = []
    monkeypatch.setattr(deployments, "find_spec", lambda name: None if name in absent else object())
    for name, module, kind in (
        ("dask_jobqueue", "dask_jobqueue", "SLURMCluster"),
        ("dask_kubernetes", "dask_kubernetes.operator", "KubeCluster"),
        ("dask_gateway", "dask_gateway", "GatewayCluster"),
        ("asyncssh", "dask.distributed", "SSHCluster"),
    ):
        absent[:] = [name]
        with pytest.raises(OpenError, match=f"{kind} comes with .*; pip install {name.replace('_', '-')}$"):
            load_class(module, kind)
        Path("my.yaml").write_text(f"version: 1\nclass: {kind}\n")
        with pytest.raises(OpenError, match="pip install"), connect("my.yaml"):
            pass


def test_importing_a_class_leaves_ctrl_c_alone(monkeypatch):
    pytest.importorskip("dask_jobqueue")
    for name in [each for each in sys.modules if each.partition(".")[0] == "dask_jobqueue"]:
        monkeypatch.delitem(sys.modules, name)
    before = signal.getsignal(signal.SIGINT)
    load_class("dask_jobqueue", "SLURMCluster")
    assert "dask_jobqueue.runner" in sys.modules
    assert signal.getsignal(signal.SIGINT) is before


# Job queues


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURMCluster's class on a machine that can hand in jobs; none is handed in."""
    pytest.importorskip("dask_jobqueue")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return load_class("dask_jobqueue", "SLURMCluster")


JOB = {"cores": 2, "memory": "1GB", "interface": "lo"}


def made(factory, kwargs, settings=None, *, threads=None, insecure=False):
    return job_kwargs(factory, kwargs, settings or {}, "my.yaml", threads=threads, insecure=insecure)


def script(factory, kwargs):
    """What is handed in."""
    of_cluster = {"scheduler_options", "shared_temp_directory", "interface", "config_name"}
    own = {key: value for key, value in kwargs.items() if key not in of_cluster}
    return factory.job_cls("tls://127.0.0.1:1", "worker-1", **own).job_script()


def test_jobs_are_encrypted_and_keep_their_dashboards_to_themselves(slurm):
    kwargs, found = made(slurm, JOB)
    assert found is Encryption.TEMPORARY
    assert kwargs["scheduler_options"] == {"dashboard_address": "127.0.0.1:8787"}
    assert "--dashboard-address 127.0.0.1:0" in script(slurm, kwargs)
    assert made(slurm, JOB, insecure=True)[1] is Encryption.NONE
    with dask.config.set(CERTIFICATES):
        assert made(slurm, JOB)[1] is Encryption.CONFIGURED
    for wrong in (
        {"protocol": "tcp://"},
        {"scheduler_options": {"protocol": "tcp"}},
        {"scheduler_options": {"dashboard_address": ":8787"}},
        {"worker_extra_args": ["--dashboard-address", ":0"]},
        {"worker_extra_args": ["--dashboard-address=0.0.0.0:0"]},
        {"worker_extra_args": ["--dashboard-address", "127.0.0.1:0", "--dashboard-address", ":0"]},
    ):
        with pytest.raises(InputError, match="--insecure"):
            made(slurm, JOB | wrong)
        made(slurm, JOB | wrong, insecure=True)


def test_options_of_jobs_that_cannot_be_used(slurm):
    off = made(slurm, JOB | {"scheduler_options": {"dashboard_address": None}})[0]["scheduler_options"]
    assert off == {"dashboard_address": "127.0.0.1:0", "dashboard": False}
    for name, value in (("scheduler_options", 5), ("worker_extra_args", 5), ("worker_extra_args", "abc")):
        with pytest.raises(InputError, match=f"{name} is a .*got {value!r}"):
            made(slurm, JOB | {name: value})


def test_jobs_need_to_know_an_interface(slurm):
    without = {key: value for key, value in JOB.items() if key != "interface"}
    with pytest.raises(InputError, match=r"write interface: NAME among the kwargs, one of .*\blo\b"):
        made(slurm, without)
    made(slurm, without | {"scheduler_options": {"host": "127.0.0.1"}})
    made(slurm, without | {"scheduler_options": {"interface": "lo"}})
    for wrong, word in (
        ({"job_cls": "os.system"}, "job_cls"),
        ({"asynchronous": True}, "asynchronous"),
        ({"core": 1}, "cores"),
    ):
        with pytest.raises(InputError, match=word):
            made(slurm, JOB | wrong)


def test_a_users_own_jobqueue_file_stays_in_force(slurm):
    own = {
        "cores": 6,
        "processes": 3,
        "memory": "7GB",
        "interface": "lo",
        "queue": "long",
        "worker-extra-args": ["--lifetime", "1h"],
        "job-script-prologue": ["module load x"],
        "scheduler-options": {"port": 4321},
    }
    with dask.config.set({f"jobqueue.slurm.{key}": value for key, value in own.items()}):
        kwargs, _ = made(slurm, {}, {"distributed": {"worker": {"memory": {"spill": 0.66}}}})
        assert kwargs["scheduler_options"] == {"dashboard_address": "127.0.0.1:8787", "port": 4321}
        # What is not added to is not said.
        assert not kwargs.keys() & {"cores", "processes", "memory", "queue", "interface"}
        text = script(slurm, kwargs)
        for words in ("-p long", "--lifetime 1h", "--nthreads 2", "--nworkers 3", "module load x\nexport DASK_"):
            assert words in text
        # The file and the caller go over it.
        assert "-p short" in script(slurm, made(slurm, {"queue": "short"})[0])
        kwargs, _ = made(slurm, {}, threads=5)
        assert (kwargs["cores"], kwargs["processes"]) == (15, 3)
        with dask.config.set({"jobqueue.slurm.worker-extra-args": ["--dashboard-address", "127.0.0.1:99"]}):
            assert made(slurm, {})[0]["worker_extra_args"] == ["--dashboard-address", "127.0.0.1:99"]


def test_how_many_jobs(slurm):
    def planned(text, **given):
        Path("my.yaml").write_text(
            f"version: 1\nclass: SLURMCluster\n{text}\nkwargs: {json.dumps(JOB | given.pop('own', {}))}"
        )
        deployment = plan_deployment(choose_cluster("my.yaml", given))
        assert "n_workers" not in deployment.kwargs
        scale = deployment.scale
        return (scale and (scale.n, scale.workers, scale.jobs)), deployment.adapt and deployment.adapt.maximum

    assert planned("") == ((1, None, None), None)
    assert planned("scale: {jobs: 3}") == ((None, None, 3), None)
    assert planned("", own={"n_workers": 4}) == ((4, None, None), None)
    assert planned("adapt: {maximum: 4}") == (None, 4)
    for text in ("scale: {jobs: 3}", "adapt: {maximum: 4}"):
        assert planned(text, workers=5) == ((None, 5, None), None)
    Path("my.yaml").write_text("version: 1\nscale: {jobs: 3}")
    with pytest.raises(InputError, match="jobs are of a batch system"), connect("my.yaml"):
        pass


def test_settings_of_the_file_reach_a_job(slurm, tmp_path):
    """Through a shell and another Python; certificates do not."""
    Path("my.yaml").write_text(
        "version: 1\nclass: SLURMCluster\n"
        'distributed: {worker: {memory: {spill: 0.61, target: false}, preload: ["it\'s", b]}, '
        "nanny: {pre-spawn-environ: {MALLOC_TRIM_THRESHOLD_: 5}}, "
        'comm: {tls: {worker: {key: "-----BEGIN PRIVATE KEY-----\\nSESAME"}}}}\n'
        "temporary-directory: /tmp/a b\njobqueue: {slurm: {cores: 1, memory: 1GB, interface: lo}}\n"
    )
    choice = choose_cluster("my.yaml", {})
    with dask.config.set(merged_settings(choice.settings)):
        lines = plan_deployment(choice).kwargs["job_script_prologue"]
    assert "SESAME" not in str(lines)
    names = ("distributed.worker.memory.spill", "distributed.worker.memory.target", "distributed.worker.preload",
             "distributed.nanny.pre-spawn-environ", "temporary-directory")  # fmt: skip
    code = f"import dask, distributed, json; print(json.dumps([dask.config.get(name) for name in {names}]))"
    command = "\n".join([*lines, f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"])
    said = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    found = json.loads(said.stdout)
    # Beside Dask's own.
    assert found.pop(3)["MALLOC_TRIM_THRESHOLD_"] == 5
    assert found == [0.61, False, ["it's", "b"], "/tmp/a b"]


def test_certificates_of_jobs_are_for_their_owner_and_removed(tmp_path):
    temporary = distributed.Security.temporary()
    text = temporary.tls_worker_key
    with ExitStack() as stack:
        jobs_module._write_certificates(stack, temporary, str(tmp_path))
        files = {
            Path(getattr(temporary, f"tls_{name}")) for name in ("ca_file", "worker_cert", "worker_key", "client_key")
        }
        assert len(files) == 2
        (folder,) = {file.parent for file in files}
        assert (folder.parent, stat.S_IMODE(folder.stat().st_mode)) == (tmp_path, 0o700)
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert Path(temporary.tls_worker_key).read_text() == text
        assert temporary.get_connection_args("worker")["ssl_context"]
    assert not folder.exists()
    with pytest.raises(OpenError, match="shared_temp_directory"), ExitStack() as stack:
        jobs_module._write_certificates(stack, distributed.Security.temporary(), str(tmp_path / "absent"))


def test_certificates_of_jobs_are_written_over_nothing(tmp_path, monkeypatch):
    """Whatever the umask: it takes rights away, and gives none."""
    (tmp_path / "victim").write_text("dear")
    monkeypatch.setattr(jobs_module.tempfile, "TemporaryDirectory", lambda **_: nullcontext(str(tmp_path)))
    (tmp_path / "ca-file.pem").symlink_to("victim")
    before = os.umask(0)
    try:
        with pytest.raises(OpenError, match="File exists"), ExitStack() as stack:
            jobs_module._write_certificates(stack, distributed.Security.temporary(), "")
        (tmp_path / "ca-file.pem").unlink()
        with ExitStack() as stack:
            jobs_module._write_certificates(stack, distributed.Security.temporary(), "")
    finally:
        os.umask(before)
    assert (tmp_path / "victim").read_text() == "dear"
    assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.glob("*.pem")} == {0o600}


# SSH


class LocalHost:
    """A connection whose commands run here; `meanwhile`: what somebody else does before each."""

    def __init__(self, meanwhile=lambda _: None):
        self.meanwhile = meanwhile

    async def run(self, command, *, input=None, check):  # noqa: A002 (that of asyncssh)
        self.meanwhile(command)
        given = {"input": input, "check": check, "text": True, "capture_output": True}
        return await asyncio.to_thread(subprocess.run, ["sh", "-c", command], **given)


def send(folder, connection):
    asyncio.run(_write(str(folder), {"ca.pem": "certificate", "run": "script"}, connection))


def test_certificates_are_sent_into_a_folder_of_their_owner_alone(tmp_path):
    folder = tmp_path / "random-windows-0123"
    before = os.umask(0)
    try:
        send(folder, LocalHost())
        # The same host, by another name.
        send(folder, LocalHost())
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {each.name: (each.read_text(), stat.S_IMODE(each.stat().st_mode)) for each in folder.iterdir()} == {
        "ca.pem": ("certificate", 0o600),
        "run": ("script", 0o600),
    }


@pytest.mark.parametrize("kind", ["link", "file", "link in it", pytest.param("stranger", marks=ROOT)])
def test_certificates_are_sent_to_no_place_that_somebody_has_prepared(tmp_path, kind):
    """Commands are in sight of all users of a host, and whoever is fast enough may be first."""
    folder, victim = tmp_path / "random-windows-0123", tmp_path / "victim"
    victim.mkdir(mode=0o755)
    (victim / "a").write_text("dear")

    def prepare(command):
        if kind == "link in it":
            if "set -C" in command:
                (folder / "ca.pem").symlink_to(victim / "a")
        elif kind == "link":
            folder.symlink_to(victim)
        elif kind == "file":
            folder.write_text("")
        else:
            folder.mkdir(mode=0o777)
            os.chown(folder, UID, UID)

    with pytest.raises(subprocess.CalledProcessError):
        send(folder, LocalHost(prepare))
    assert {each.name: each.read_text() for each in victim.iterdir()} == {"a": "dear"}
    assert kind != "stranger" or not list(folder.iterdir())


def test_hosts_name_an_interface_unless_they_are_loopback():
    kwargs, found = ssh_kwargs({"hosts": ["127.0.0.1", "127.0.0.2"]}, "my.yaml", threads=3, insecure=False)
    assert found is Encryption.TEMPORARY
    assert kwargs["scheduler_options"] == {
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:8787",
        "idle_timeout": 120,
    }
    off = {"dashboard_address": None}
    hidden = {"hosts": ["127.0.0.1", "127.0.0.2"], "scheduler_options": off, "worker_options": off}
    without, _ = ssh_kwargs(hidden, "my.yaml", threads=None, insecure=False)
    for name in ("scheduler_options", "worker_options"):
        assert (without[name]["dashboard_address"], without[name]["dashboard"]) == ("127.0.0.1:0", False)
    assert kwargs["worker_options"]["host"] == "127.0.0.1"
    assert kwargs["worker_options"]["dashboard_address"] == "127.0.0.1:0"
    assert kwargs["worker_options"]["nthreads"] == 3
    hosts = {"hosts": ["127.0.0.1", ELSEWHERE]}
    named = {"interface": "eth7"}
    for options, wrong in (
        ({}, "scheduler_options"),
        ({"scheduler_options": named}, "worker_options"),
        ({"worker_options": named}, "scheduler_options"),
    ):
        with pytest.raises(InputError, match=f"got none in {wrong} of my.yaml"):
            ssh_kwargs(hosts | options, "my.yaml", threads=None, insecure=False)
    both = hosts | {"scheduler_options": named, "worker_options": {"host": "0.0.0.0"}}
    kwargs, _ = ssh_kwargs(both, "my.yaml", threads=None, insecure=False)
    assert "host" not in kwargs["scheduler_options"]
    assert ssh_kwargs(both, "my.yaml", threads=None, insecure=True)[1] is Encryption.NONE
    for wrong in (
        {"hosts": ["127.0.0.1"]},
        {"hosts": "127.0.0.1"},
        {"connect_options": [{}]},
        {"connect_options": 5},
        {"connect_options": [{}, 5]},
        {"worker_options": "abc"},
        {"scheduler_options": [1]},
        {"worker_optoins": {}},
        {"scheduler": {}},
        {"worker_options": {"host": "127.0.0.1", "protocol": "tcp"}},
        {"worker_options": {"host": "127.0.0.1", "dashboard_address": ":0"}},
    ):
        with pytest.raises(InputError):
            ssh_kwargs(both | wrong, "my.yaml", threads=None, insecure=False)
    Path("my.yaml").write_text(
        "version: 1\nclass: SSHCluster\nscale: {workers: 2}\nkwargs: {hosts: [localhost, localhost]}\n"
    )
    with pytest.raises(InputError, match="worker for each of its hosts"), connect("my.yaml"):
        pass


# Services: their packages need not be there.


def test_kubernetes_and_gateway_travel_in_plain_only_by_the_users_word():
    from pipeline.cluster.services import service_kwargs
    from tests.test_config import GatewayCluster, KubeCluster

    def planned(factory, kwargs, *, threads=None, insecure=False):
        return service_kwargs(factory, kwargs, "my.yaml", threads=threads, insecure=insecure)

    with pytest.raises(InputError, match="KubeCluster, whose pods speak plain TCP"):
        planned(KubeCluster, {"image": "a"})
    assert planned(KubeCluster, {"image": "a"}, insecure=True) == ({"quiet": True, "image": "a"}, Encryption.NONE)
    with pytest.raises(InputError, match="mean 'image'"):
        planned(KubeCluster, {"imag": "a"}, insecure=True)
    for address, good in (("https://g.invalid", True), ("http://127.0.0.1:1", True), ("http://g.invalid", False)):
        if good:
            assert planned(GatewayCluster, {"address": address, "worker_cores": 3})[1] is Encryption.SERVICE
        else:
            with pytest.raises(InputError, match="write https"):
                planned(GatewayCluster, {"address": address})
            with dask.config.set({"gateway.address": address}), pytest.raises(InputError, match="write https"):
                planned(GatewayCluster, {})
    with pytest.raises(InputError, match="'asynchronous'"):
        planned(GatewayCluster, {"asynchronous": True})
    for factory in (KubeCluster, GatewayCluster):
        with pytest.raises(InputError, match="got --threads 3"):
            planned(factory, {}, threads=3, insecure=True)


# Real services


def inherited(pid):
    """Dask's settings that a process was given, as its command line said them."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (said,) = [each.partition(b"=")[2] for each in variables if each.startswith(b"DASK_INTERNAL_INHERIT_CONFIG=")]
    return base64.urlsafe_b64decode(said).decode()


@LINUX
@pytest.mark.ssh
def test_hosts_over_ssh_listen_on_loopback_and_are_told_no_secret(ssh_service):
    kwargs = {
        "hosts": list(ssh_service.hosts[:2]),
        "connect_options": {"config": [str(ssh_service.config)]},
        "remote_python": sys.executable,
        "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
    }
    Path("my.yaml").write_text(json.dumps({"version": 1, "class": "SSHCluster", "kwargs": kwargs}))
    with dask.config.set({"gateway.auth.kwargs.password": "SESAME"}), connect("my.yaml", threads=1) as client:
        assert dask.config.get("gateway.auth.kwargs.password") == "SESAME"
        assert client.scheduler.address.startswith("tls://127.0.0.1:")
        assert set(client.nthreads().values()) == {1}
        scheduler = client.run_on_scheduler(os.getpid)
        (worker,) = client.run(os.getpid).values()
        (nanny,) = client.run(os.getppid).values()
        sockets = listening(scheduler, nanny, worker)
        assert len(sockets) >= 4
        assert {host for host, _ in sockets} == LOOPBACK
        for pid in (scheduler, nanny):
            settings = json.loads(inherited(pid))
            assert "SESAME" not in str(settings)
            assert "BEGIN" not in str(settings)
            key = Path(settings["distributed"]["comm"]["tls"]["worker"]["key"])
        assert key.parent.parent == Path("/tmp")
        assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
        assert {stat.S_IMODE(each.stat().st_mode) for each in key.parent.iterdir()} == {0o600}
        assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.no_workers_timeout) == 300
        assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.idle_timeout) is None
        pids = (key.parent / "pids").read_text().split()
        assert {int(pid) for pid in pids} == {scheduler, nanny}
    assert not key.parent.exists()
    assert dask.config.get("distributed.comm.tls.worker.key") is None


@pytest.mark.ssh
def test_hosts_that_cannot_be_used(ssh_service):
    def refused(kwargs, message):
        kwargs = {
            "hosts": list(ssh_service.hosts[:2]),
            "connect_options": {"config": [str(ssh_service.config)]},
        } | kwargs
        Path("my.yaml").write_text(json.dumps({"version": 1, "class": "SSHCluster", "kwargs": kwargs}))
        begin = time.monotonic()
        with pytest.raises(OpenError, match=message) as caught, connect("my.yaml"):
            pass
        assert time.monotonic() - begin < 20
        assert "\n" not in str(caught.value)

    before = set(Path("/tmp").glob("random-windows-*"))
    refused({"remote_python": "/absent/python"}, "correct remote_python")
    refused({"connect_options": {"config": [], "known_hosts": [], "port": 1}}, "cluster did not start: .*Connect")
    assert set(Path("/tmp").glob("random-windows-*")) <= before


@LINUX
@pytest.mark.slurm
def test_jobs_listen_on_loopback_and_their_certificates_go(slurm_service, tmp_path):
    kwargs = {
        "cores": 1,
        "memory": "1GB",
        "interface": "lo",
        "log_directory": str(tmp_path / "logs"),
        "shared_temp_directory": str(tmp_path),
        "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
    }
    file = {"version": 1, "class": "SLURMCluster", "kwargs": kwargs, "scale": {"jobs": 2}}
    file["distributed"] = {"worker": {"memory": {"spill": 0.61}}}
    Path("my.yaml").write_text(json.dumps(file))
    before = listening()
    with connect("my.yaml") as client:
        client.wait_for_workers(2, timeout=30)
        pids = [*client.run(os.getpid).values(), *client.run(os.getppid).values()]
        own = listening() - before
        assert {host for host, _ in own | listening(*pids)} == LOOPBACK
        assert all(each.startswith("tls://127.0.0.1:") for each in client.scheduler_info()["workers"])
        assert set(client.run(dask.config.get, "distributed.worker.memory.spill").values()) == {0.61}
        (folder,) = tmp_path.glob(".random-windows-*")
        for pid in pids:
            assert b"BEGIN" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert not folder.exists()
    assert listening() == before

    # Jobs that stay queued, and one that is not taken.
    def refused(extra, message):
        changed = {"kwargs": kwargs | {"job_extra_directives": [extra]}}
        changed["distributed"] = {"scheduler": {"no-workers-timeout": "1 s"}}
        Path("my.yaml").write_text(json.dumps(file | changed))
        begin = time.monotonic()
        with pytest.raises(OpenError, match=message), connect("my.yaml"):
            pass
        assert time.monotonic() - begin < 20

    refused("--hold", r"a worker within 1 s; got none of the jobs \d+, \d+; see whether they are still queued")
    refused("--partition=absent", "cluster did not start: .*invalid partition")
    jobs = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True)
    assert jobs.stdout == ""
    assert not list(tmp_path.glob(".random-windows-*"))
