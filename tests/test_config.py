"""What is in force, who said so, and that no secret is among it; every part of the shipped `cluster.yaml`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import dask
import pytest
import yaml

from pipeline.cli import config as module
from pipeline.cluster.resolve import choose_cluster, plan_deployment
from pipeline.cluster.spec import merged_settings, read_spec
from pipeline.errors import InputError
from pipeline.redaction import HIDDEN, without_secrets

SHIPPED = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [each for each in os.environ if each.startswith(("PIPELINE_", "DASK_SCHEDULER"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def shown(cli):
    """`config --json` as {name: (value, origin)}."""

    def shown(*arguments):
        said = cli("config", "--json", *arguments)
        assert said.code == 0, said.err
        return {name: (each["value"], each["origin"]) for name, each in json.loads(said.out).items()}

    return shown


def test_a_flag_goes_over_the_environment_over_the_file_over_the_default(shown, monkeypatch):
    names = [f"cluster.kwargs.{name}" for name in ("n_workers", "processes", "threads_per_worker")]
    found = shown()
    assert [found[name][0] for name in names] == [1, False, max(2, len(os.sched_getaffinity(0)))]
    assert {found[name][1] for name in names} == {"built in"}
    assert found["cluster.file"] == (None, "built in")

    Path("cluster.yaml").write_text(
        "version: 1\n\nkwargs:\n  processes: true\n  n_workers: 3\n  threads_per_worker: 7\n"
    )
    found = shown()
    assert [found[name] for name in names] == [
        (3, "cluster.yaml, line 5"),
        (True, "cluster.yaml, line 4"),
        (7, "cluster.yaml, line 6"),
    ]
    assert found["cluster.file"] == ("cluster.yaml", "the working directory")

    monkeypatch.setenv("PIPELINE_WORKERS", "4")
    monkeypatch.setenv("PIPELINE_THREADS", "8")
    found = shown()
    assert found[names[0]] == (4, "PIPELINE_WORKERS")
    assert found[names[2]] == (8, "PIPELINE_THREADS")

    found = shown("--workers", 5)
    assert found[names[0]] == (5, "--workers")
    assert found[names[2]] == (8, "PIPELINE_THREADS")

    Path("other.yaml").write_text("version: 1\ninsecure: true\n")
    monkeypatch.setenv("PIPELINE_CLUSTER", "absent.yaml")
    found = shown("--cluster", "other.yaml")
    assert found["cluster.file"] == ("other.yaml", "--cluster")
    assert found["cluster.insecure"] == (True, "other.yaml, line 2")
    assert shown("--cluster", "other.yaml", "--insecure")["cluster.insecure"] == (True, "--insecure")
    assert shown("--cluster", "cluster.yaml")["cluster.insecure"] == (False, "built in")


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({"CLUSTER": "a"}, ("--cluster", "b"), {"cluster": "b"}),
        ({"SCHEDULER": "tcp://a:1"}, ("--cluster", "b"), {"cluster": "b"}),
        ({"SCHEDULER": "tcp://a:1"}, ("--scheduler-file", "f"), {"scheduler_file": "f"}),
        ({"SCHEDULER": "tcp://a:1"}, ("--workers", "2"), {"workers": 2}),
        ({"SCHEDULER": "tcp://a:1"}, ("--insecure",), {"scheduler_address": "tcp://a:1", "insecure": True}),
        ({"WORKERS": "2", "THREADS": "3"}, ("--scheduler", "tcp://b:1"), {"scheduler_address": "tcp://b:1"}),
        ({"WORKERS": "2"}, ("--threads", "3"), {"workers": 2, "threads": 3}),
        ({"WORKERS": "2", "CLUSTER": "a"}, (), {"workers": 2, "cluster": "a"}),
        ({"CLUSTER": "a"}, ("--scheduler", "tcp://b:1"), {"scheduler_address": "tcp://b:1", "cluster": "a"}),
        ({"INSECURE": "0"}, (), {}),
        ({}, ("--cluster", ""), {"cluster": ""}),
    ],
)
def test_the_environment_gives_way_where_a_flag_names_another_cluster(cli, monkeypatch, environment, flags, expected):
    for name, value in environment.items():
        monkeypatch.setenv(f"PIPELINE_{name}", value)
    asked = []
    monkeypatch.setattr(module, "collect_settings", lambda where, told, **_: asked.append((where, told)) or {"a": None})
    monkeypatch.setattr(module, "report_settings", lambda _: ({"a": "b"}, {}))
    assert cli("config", *flags).code == 0
    ((where, told),) = asked
    assert where == expected
    assert set(told) == set(expected)


@pytest.mark.parametrize(
    "flags",
    [
        ("--scheduler", "tcp://127.0.0.1:1", "--workers", "2"),
        ("--scheduler", "tcp://127.0.0.1:1", "--scheduler-file", "f"),
        ("--workers", "0"),
        ("--threads", "many"),
    ],
)
def test_flags_that_contradict_each_other(cli, flags):
    for verb in (("config",), ("demo", "folder")):
        said = cli(*verb, *flags)
        assert said.code == 2
        assert said.err.count("\n") == 1
    assert not Path("folder").exists()


def test_which_scheduler_it_is(monkeypatch, shown):
    """The arguments, the variable, the file, then Dask's own configuration."""
    Path("cluster.yaml").write_text("version: 1\n\nscheduler_address: tcp://127.0.0.3:3\n")
    with dask.config.set({"scheduler-address": "tcp://127.0.0.4:4"}):
        assert choose_cluster(None, {}).scheduler == "tcp://127.0.0.3:3"
        assert shown()["cluster.scheduler-address"] == ("tcp://127.0.0.3:3", "cluster.yaml, line 3")
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.2:2")
        assert choose_cluster(None, {}).scheduler == "tcp://127.0.0.2:2"
        assert shown()["cluster.scheduler-address"] == ("tcp://127.0.0.2:2", "DASK_SCHEDULER_ADDRESS")
        # Who names a file means it.
        assert choose_cluster("cluster.yaml", {}).scheduler == "tcp://127.0.0.3:3"
        given = {"scheduler_address": "tcp://127.0.0.1:1"}
        assert choose_cluster("cluster.yaml", given).scheduler == "tcp://127.0.0.1:1"
        assert shown("--scheduler", "tcp://127.0.0.1:1")["cluster.scheduler-address"][1] == "--scheduler"
        with pytest.raises(InputError, match="from DASK_SCHEDULER_ADDRESS, and n_workers; drop one"):
            choose_cluster(None, {"n_workers": 2})
        monkeypatch.delenv("DASK_SCHEDULER_ADDRESS")
        Path("cluster.yaml").write_text("version: 1\nclass: LocalCluster\n")
        assert choose_cluster(None, {}).scheduler is None
        Path("cluster.yaml").write_text("version: 1\ntemporary-directory: /tmp\n")
        assert choose_cluster(None, {}).scheduler == "tcp://127.0.0.4:4"
        assert shown()["cluster.scheduler-address"][1] == "Dask's configuration"
    assert choose_cluster(None, {}).scheduler is None
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "")
    assert choose_cluster(None, {}).scheduler is None
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS")
    Path("cluster.yaml").write_text("version: 1\nscheduler-file: s.json\n")
    choice = choose_cluster(None, {})
    assert (choice.scheduler, choice.is_file) == ("s.json", True)
    assert shown()["cluster.scheduler-file"] == ("s.json", "cluster.yaml, line 2")


FILE = """version: 1
class: SSHCluster
kwargs:
  hosts: [127.0.0.1, 127.0.0.2]
  connect_options: {password: SESAME-1, username: me}
  worker_options: {nthreads: 3}
distributed:
  scheduler: {allowed-failures: 5, worker-ttl: 9 s}
  comm: {tls: {ca-file: /ca.pem, client: {cert: /c.pem, key: "-----BEGIN PRIVATE KEY-----\\nSESAME-2\\n"}}}
"""
OWN = """
distributed: {scheduler: {allowed-failures: 6, work-stealing: false}}
somewhere: {api_token: SESAME-3, url: "https://me:SESAME-4@example.org/"}
"""


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_origins_and_secrets_of_all_layers(tmp_path, form):
    """In a process of its own, since Dask reads its files and variables when it is imported."""
    Path("named.yaml").write_text(FILE)
    (tmp_path / ".config/dask").mkdir(parents=True)
    own = tmp_path / ".config/dask/own.yaml"
    own.write_text(OWN)
    variables = {
        "HOME": str(tmp_path),
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "7 s",
        "DASK_GATEWAY__AUTH__PASSWORD": "SESAME-5",
        "PIPELINE_MEMORY": "1GB",
        "ZARR_ASYNC__CONCURRENCY": "17",
    }
    command = [sys.executable, "-m", "pipeline", "config", "--threads", "2", "--cluster", "named.yaml", *form]
    said = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    assert "SESAME" not in said.stdout + said.stderr
    if not form:
        assert f"dask.somewhere.api-token {HIDDEN}" in re.sub(" +", " ", said.stdout)
        return
    found = {name: (each["value"], each["origin"]) for name, each in json.loads(said.stdout).items()}
    expected = {
        "cluster.class": ("dask.distributed.SSHCluster", "named.yaml, line 2"),
        "cluster.kwargs.hosts": (["127.0.0.1", "127.0.0.2"], "named.yaml, line 4"),
        "cluster.kwargs.connect_options.password": (HIDDEN, "named.yaml, line 5"),
        "cluster.kwargs.connect_options.username": ("me", "named.yaml, line 5"),
        "cluster.kwargs.worker_options.nthreads": (2, "--threads"),
        "cluster.kwargs.worker_options.host": ("127.0.0.1", "built in"),
        "dask.distributed.scheduler.allowed-failures": (5, "named.yaml, line 8"),
        "dask.distributed.scheduler.worker-ttl": ("7 s", "the environment, DASK_*"),
        "dask.distributed.scheduler.work-stealing": (False, str(own)),
        "dask.distributed.scheduler.no-workers-timeout": ("300 s", "built in"),
        "dask.distributed.comm.tls.client.cert": ("/c.pem", "named.yaml, line 9"),
        "dask.distributed.comm.tls.client.key": (HIDDEN, "named.yaml, line 9"),
        "dask.distributed.comm.tls.worker.key": (None, "built in"),
        "dask.somewhere.api-token": (HIDDEN, str(own)),
        "dask.somewhere.url": (HIDDEN, str(own)),
        "dask.gateway.auth.password": (HIDDEN, "the environment, DASK_*"),
        "zarr.async.concurrency": (17, "the environment, ZARR_ASYNC__CONCURRENCY"),
        "memory.budget": ("954 MiB", "PIPELINE_MEMORY"),
        "environment.PIPELINE_MEMORY": ("1GB", "the environment"),
    }
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("password", "a", True),
        ("api_token", 5, True),
        ("AWS_SECRET_ACCESS_KEY", "a", True),
        ("passphrase", "a", True),
        ("key", "/home/me/key.pem", False),
        ("key", "-----BEGIN PRIVATE KEY-----\nabc", True),
        ("client_keys", ["~/.ssh/id"], False),
        ("proxy", "http://me:word@host:3", True),
        ("proxy", "http://host:3", False),
        ("job_script_prologue", ["module load x", "export MY_TOKEN=abc"], True),
        ("worker_extra_args", ["--preload", "x.py"], False),
        ("env", [{"name": "DB_PASSWORD", "value": "abc"}], True),
        ("env", [{"name": "HOME", "value": "abc"}], False),
        ("password", None, False),
        ("token", "", False),
        ("AZURE_STORAGE_ACCOUNT_KEY", "a", True),
        ("AZURE_STORAGE_CONNECTION_STRING", "a", True),
        ("headers", {"Authorization": "a"}, True),
        ("sas_token", "a", True),
        ("MYSQL_PWD", "a", True),
        ("bypass", "a", False),
        ("db_pass", "a", True),
        ("proxy", "http://ghp_abc@host:3", True),
        ("tokenizer", "a", False),
        ("secretary", "a", False),
        ("cookie_path", "a", False),
    ],
)
def test_what_is_secret(name, value, hidden):
    assert (HIDDEN in str(without_secrets(name, value))) is hidden
    assert without_secrets("a", {"b": {name: value}}) == {"b": {name: without_secrets(name, value)}}


def test_config_starts_nothing_and_refuses_what_a_run_refuses(cli):
    Path("cluster.yaml").write_text("version: 1\nkwargs: {n_worker: 2}\n")
    said = cli("config")
    assert (said.code, said.err.count("\n"), "mean 'n_workers'" in said.err) == (2, 1, True)
    assert cli("config", "--cluster", "absent.yaml").code == 3


def parts():
    """{heading: lines} of the shipped file; those before the first part have none."""
    found, heading = {None: []}, None
    for line in SHIPPED.read_text().splitlines():
        if line.startswith("# == "):
            heading = line.removeprefix("# == ")
            found[heading] = []
        else:
            found[heading].append(line)
    return found


def uncommented(lines):
    """YAML of a part: a # that no space follows, or an indented one, is taken away; a line of words stays."""
    return [line[1:] if re.match("#(?! \\S)", line) else line for line in lines]


HEADINGS = [heading for heading in parts() if heading]
CLASSES = {
    "1": "LocalCluster",
    "2": "LocalCluster",
    "3": "SSHCluster",
    "4": "SLURMCluster",
    "5": "KubeCluster",
    "6": "GatewayCluster",
}


class KubeCluster:
    """The keywords of dask-kubernetes 2026.3."""

    def __init__(self, *, name, namespace, image, n_workers, resources, env, worker_command, quiet=False, **kwargs):
        pass


class GatewayCluster:
    """The keywords of dask-gateway 2026.3."""

    def __init__(self, address, proxy_address, public_address, auth, cluster_options, shutdown_on_close, **kwargs):
        pass


@pytest.fixture
def everything_installed(tmp_path, monkeypatch):
    """Stand-ins for packages and commands that a test machine need not have."""
    for name, kind in (("dask_kubernetes.operator", KubeCluster), ("dask_gateway", GatewayCluster)):
        parent = name.partition(".")[0]
        for each in (parent, name):
            fake = types.ModuleType(each)
            fake.__spec__ = types.SimpleNamespace(name=each, parent="")
            fake.__path__ = []
            monkeypatch.setitem(sys.modules, each, fake)
        monkeypatch.setitem(vars(sys.modules[name]), kind.__name__, kind)
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)


def test_the_shipped_file_has_all_parts():
    assert [heading.partition(".")[0] for heading in HEADINGS[:-1]] == [str(number) for number in range(1, 9)]
    assert yaml.safe_load("\n".join(parts()[None])) == {"version": 1}
    # As it stands, only the first part says anything.
    for heading in HEADINGS[1:]:
        assert yaml.safe_load("\n".join(parts()[heading])) is None


@pytest.mark.parametrize("heading", HEADINGS)
def test_each_part_of_the_shipped_file_is_right_once_it_is_uncommented(heading, everything_installed):
    lines = parts()[heading]
    assert all(len(line) <= 120 for line in lines)
    path = Path("my.yaml")
    path.write_text("\n".join([*parts()[None], *uncommented(lines)]))
    spec, settings, _ = read_spec(path)
    assert spec.kwargs or settings or spec.scheduler_file
    choice = choose_cluster(path, {})
    number = heading.partition(".")[0]
    if number in ("7", "8"):
        assert choice.scheduler
        return
    with dask.config.set(merged_settings(choice.settings)):
        deployment = plan_deployment(choice)
    assert deployment.name == CLASSES.get(number, "LocalCluster")
    for key, value in spec.kwargs.items():
        made = deployment.kwargs[key]
        assert made == value or value.items() <= made.items()


def test_every_value_of_the_first_part_is_in_force(shown):
    Path("cluster.yaml").write_text(SHIPPED.read_text())
    kwargs = {name: each for name, each in shown().items() if name.startswith("cluster.kwargs.")}
    lines = SHIPPED.read_text().splitlines()
    for name, (value, origin) in kwargs.items():
        if origin != "built in":
            line = lines[int(origin.removeprefix("cluster.yaml, line ")) - 1]
            assert yaml.safe_load(line) == {name.rpartition(".")[2]: value}
    assert len([origin for _, origin in kwargs.values() if origin != "built in"]) == 5


def test_every_verb_that_computes_takes_the_same_options():
    from pipeline.cli.main import cli as group

    names = {"cluster", "scheduler_address", "scheduler_file", "workers", "threads", "insecure"}
    for verb in ("create", "run", "verify", "bench", "demo", "config"):
        assert names <= {each.name for each in group.commands[verb].params}
    for verb in ("info", "plan"):
        assert not names & {each.name for each in group.commands[verb].params}
