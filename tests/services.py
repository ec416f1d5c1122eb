"""Real services on loopback, each a context manager that starts it in a folder and ends all that came of it.

`absent_s3()` and the like say what is missing for one, or None; `tests/conftest.py` has them as fixtures, which skip.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_START_SECONDS = 60
_END_SECONDS = 10
_SBIN = os.pathsep.join(["/usr/sbin", "/sbin"])
_MARK = "LOOPBACK_SERVICE"
"""Variable that all processes of a service have, and what they start: its folder."""


def free_port() -> int:
    """A loopback port that nobody listens on at the moment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def executable(name: str) -> str | None:
    """Path of a program, also of one that only root has on its path."""
    return shutil.which(name) or shutil.which(name, path=_SBIN)


def _absent(*, programs: tuple[str, ...] = (), packages: tuple[str, ...] = ()) -> str | None:
    missing = [name for name in programs if executable(name) is None]
    missing += [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def wait_for(
    condition: Callable[[], object], what: str, seconds: float = _START_SECONDS, log: Path | None = None
) -> None:
    """Wait until the condition holds; AssertionError with the end of the log where it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-2000:] if log is not None and log.exists() else ""
            raise AssertionError(f"{what} not within {seconds} s\n{said}")
        time.sleep(0.05)


def listens(port: int) -> bool:
    """Whether something accepts connections on the loopback port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextmanager
def running(folder: Path, name: str, *command: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in the foreground with `NAME.log` in the folder; at the end it is terminated, or killed."""
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {_MARK: str(folder)} | variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def left_over(folder: Path) -> list[int]:
    """Processes that bear the mark of the service in this folder."""
    mark, found = f"{_MARK}={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@contextmanager
def swept(folder: Path) -> Iterator[None]:
    """End, when the block ends, what the service of this folder left running."""
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in left_over(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
            deadline = time.monotonic() + _END_SECONDS
            while left_over(folder) and time.monotonic() < deadline:
                time.sleep(0.05)


def absent_s3() -> str | None:
    """What is missing for `s3_server`."""
    return _absent(packages=("moto", "flask", "flask_cors", "obstore"))


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """An S3 service (moto), which keeps its objects in memory; yields its URL. About 160 requests a second."""
    port = free_port()
    command = (sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port))
    with running(folder, "moto", *command):
        wait_for(lambda: listens(port), "S3", log=folder / "moto.log")
        yield f"http://127.0.0.1:{port}"


def make_bucket(endpoint: str, name: str) -> None:
    """Make a bucket by an unsigned request, which moto does not mind."""
    with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")):
        pass


def s3_variables(endpoint: str) -> dict[str, str]:
    """Environment in which boto3, obstore, fsspec and tensorstore find the service, and no account of the user's."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "loopback",
        "AWS_SECRET_ACCESS_KEY": "loopback",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@dataclass(frozen=True)
class SshHosts:
    """Several hosts on loopback that let the user of this process in."""

    hosts: tuple[str, ...]
    config: Path
    """For `ssh -F`, and asyncssh."""


def absent_ssh() -> str | None:
    """What is missing for `ssh_server`."""
    return _absent(programs=("sshd", "ssh", "ssh-keygen"), packages=("asyncssh",))


@contextmanager
def ssh_server(folder: Path) -> Iterator[SshHosts]:
    """An SSH server with a throwaway key, which stands for three hosts."""
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    port, user, daemon = free_port(), getpass.getuser(), executable("sshd")
    assert daemon is not None
    for key in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / key)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    _write(
        folder / "sshd_config",
        f"Port {port}",
        *(f"ListenAddress {host}" for host in hosts),
        f"HostKey {folder}/host_key",
        "PidFile none",
        f"AllowUsers {user}",
        f"AuthorizedKeysFile {folder}/user_key.pub",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "UsePAM no",
        "StrictModes no",
        f"SetEnv {_MARK}={folder}",
    )
    config = folder / "ssh_config"
    _write(
        config,
        f"Host {' '.join(hosts)}",
        f"    Port {port}",
        f"    User {user}",
        f"    IdentityFile {folder}/user_key",
        "    IdentitiesOnly yes",
        f"    UserKnownHostsFile {folder}/known_hosts",
        "    StrictHostKeyChecking yes",
    )
    public = (folder / "host_key.pub").read_text().strip()
    _write(folder / "known_hosts", *(f"[{host}]:{port} {public}" for host in hosts))
    if os.getuid() == 0:
        # A root sshd wants this folder, which the packaged service makes at boot.
        Path("/run/sshd").mkdir(exist_ok=True)

    def answers() -> bool:
        command = ["ssh", "-n", "-F", str(config), hosts[-1], "true"]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    with swept(folder), running(folder, "sshd", daemon, "-D", "-e", "-f", str(folder / "sshd_config")):
        wait_for(answers, "ssh", log=folder / "sshd.log")
        yield SshHosts(hosts, config)


def absent_slurm() -> str | None:
    """What is missing for `slurm_nodes`."""
    programs = ("munged", "mungekey", "slurmctld", "slurmd", "sinfo", "squeue", "sbatch", "scancel")
    return _absent(programs=programs, packages=("dask_jobqueue",))


@contextmanager
def slurm_nodes(folder: Path) -> Iterator[dict[str, str]]:
    """A Slurm of two nodes with two cores and 4 GB each, which the machine need not have; yields its environment.

    Processes are tracked by their parents, not by cgroups, which need systemd: no limit on memory is enforced.
    """
    nodes, variables = ("n1", "n2"), {"SLURM_CONF": f"{folder}/slurm.conf"}
    assert len(str(folder)) <= 80, "the name of a folder with a socket in it is short"
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    ports = [free_port() for _ in ("controller", *nodes)]
    (folder / "state").mkdir()
    for node in nodes:
        (folder / f"spool-{node}").mkdir()
    _write(
        folder / "slurm.conf",
        "ClusterName=loopback",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        "MailProg=/bin/true",
        "MpiDefault=none",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU_Memory",
        "DefMemPerCPU=2000",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "SchedulerParameters=batch_sched_delay=0",
        "KillWait=5",
        "SlurmdTimeout=30",
        *(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"
            for node, port in zip(nodes, ports[1:], strict=True)
        ),
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    )

    def ask(*command: str) -> str:
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | variables)
        return done.stdout.strip() if done.returncode == 0 else "?"

    def path(name: str) -> str:
        found = executable(name)
        assert found is not None
        return found

    subprocess.run([path("mungekey"), "--create", f"--keyfile={folder}/munge.key"], check=True)
    # Forced, since it otherwise wants a socket that every user can reach.
    munged = (path("munged"), "--foreground", "--force", f"--key-file={folder}/munge.key")
    munged += tuple(f"--{name}={folder}/munge.{name}" for name in ("pid-file", "seed-file", "log-file", "socket"))
    with swept(folder), ExitStack() as stack:
        stack.enter_context(running(folder, "munged", *munged))
        wait_for((folder / "munge.socket").exists, "munge", log=folder / "munge.log-file")
        stack.enter_context(running(folder, "slurmctld", path("slurmctld"), "-D", "-c", **variables))
        for node in nodes:
            stack.enter_context(running(folder, f"slurmd-{node}", path("slurmd"), "-D", "-N", node, **variables))
        idle = ("sinfo", "--noheader", "--format=%T")
        wait_for(lambda: ask(*idle) == "idle", "idle nodes", log=folder / "slurmctld.log")
        try:
            yield variables
        finally:
            jobs = ("squeue", "--noheader", "--format=%A")
            ask("scancel", *ask(*jobs).split())
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not ask(*jobs), "the end of all jobs", _END_SECONDS)


def _write(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n")
