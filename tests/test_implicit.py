"""A `cluster.yaml` that nobody named: who may have written it, and what it may say."""

import os
import re
from pathlib import Path

import pytest

import pipeline
from pipeline.cluster.resolve import choose_cluster
from pipeline.cluster.spec import read_spec
from pipeline.errors import InputError

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
STRANGER = 12345


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir(mode=0o755)
    monkeypatch.chdir(folder)
    Path("cluster.yaml").write_text("version: 1\nkwargs: {n_workers: 1, dashboard_address: null}\n")
    Path("cluster.yaml").chmod(0o644)
    return folder


def writable_by(mode):
    return lambda folder: (folder / "cluster.yaml").chmod(mode)


def given_away(folder):
    os.chown(folder / "cluster.yaml", STRANGER, 0)


def folder_given_away(folder):
    os.chown(folder, STRANGER, 0)


def folder_writable(folder):
    folder.chmod(0o777)


def folder_like_tmp(folder):
    folder.chmod(0o1777)


def shared_group(folder):
    os.chown(folder / "cluster.yaml", -1, STRANGER)
    (folder / "cluster.yaml").chmod(0o664)


def linked_from_a_shared_folder(folder):
    shared = folder.parent / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "mine.yaml").write_text("version: 1\n")
    (folder / "cluster.yaml").unlink()
    (folder / "cluster.yaml").symlink_to(shared / "mine.yaml")


def link_of_a_stranger(folder):
    (folder / "cluster.yaml").rename(folder / "mine.yaml")
    (folder / "cluster.yaml").symlink_to("mine.yaml")
    os.lchown(folder / "cluster.yaml", STRANGER, 0)


@pytest.mark.parametrize(
    "prepare",
    [
        writable_by(0o666),
        writable_by(0o646),
        folder_writable,
        folder_like_tmp,
        linked_from_a_shared_folder,
        *(pytest.param(each, marks=ROOT) for each in (given_away, folder_given_away, shared_group, link_of_a_stranger)),
    ],
)
def test_what_others_could_have_written_must_be_named(here, prepare):
    read_spec(None)
    prepare(here)
    with pytest.raises(InputError, match=r"cluster\.yaml is not used: .*--cluster cluster\.yaml") as caught:
        read_spec(None)
    assert "\n" not in str(caught.value)
    assert read_spec("cluster.yaml")[0].version == 1


@ROOT
def test_a_command_of_a_user_runs_nothing_of_a_stranger(cli, here, monkeypatch):
    monkeypatch.chdir(here)
    given_away(here)
    (here / "cluster.yaml").write_text("version: 1\ndistributed: {worker: {preload: [evil.py]}}\n")
    (here / "evil.py").write_text("open('ran', 'w')\n")
    said = cli("config")
    assert (said.code, said.err.count("\n")) == (2, 1), said.err
    assert "belongs to user 12345" in said.err
    assert not (here / "ran").exists()


UNSAFE = [
    ("insecure: true", "insecure"),
    ("scheduler-address: tcp://192.0.2.1:8786\ninsecure: true", "insecure"),
    ("kwargs: {preload: [evil.py]}", "preload"),
    ("kwargs: {host: 0.0.0.0}", "kwargs.host"),
    ("kwargs: {env: {LD_PRELOAD: evil.so}}", "kwargs.env"),
    ("kwargs: {scheduler_kwargs: {preload: [evil.py]}}", "scheduler_kwargs"),
    ("kwargs: {security: false}", "security"),
    ("kwargs: {protocol: tcp}", "protocol"),
    ("distributed: {worker: {preload: [evil.py]}}", "distributed.worker.preload"),
    ("distributed: {scheduler: {preload: [evil.py]}}", "distributed.scheduler.preload"),
    ("distributed: {nanny: {preload: [evil.py]}}", "distributed.nanny.preload"),
    ("distributed: {nanny: {pre-spawn-environ: {LD_PRELOAD: evil.so}}}", "pre-spawn-environ"),
    ("distributed: {nanny: {pre_spawn_environ: {LD_PRELOAD: evil.so}}}", "pre-spawn-environ"),
    ("distributed: {nanny: {environ: {PYTHONPATH: .}}}", "environ"),
    ("distributed: {client: {security-loader: evil.load}}", "security-loader"),
    ("distributed: {client: {preload: [evil.py]}}", "distributed.client.preload"),
    ("distributed: {comm: {require-encryption: false}}", "require-encryption"),
    ("distributed: {comm: {tls: {ca-file: theirs.pem}}}", "distributed.comm.tls.ca-file"),
    ("distributed: {scheduler: {http: {routes: [evil]}}}", "distributed.scheduler.http.routes"),
    ("distributed: {worker: {http: {routes: [evil]}}}", "distributed.worker.http.routes"),
    ("distributed: {scheduler: {allowed-imports: [evil]}}", "allowed-imports"),
    (
        "distributed: {scheduler: {dashboard: {bokeh-application: {allow_websocket_origin: ['*']}}}}",
        "allow-websocket-origin",
    ),
    ("distributed: {dashboard: {link: '{JUPYTERHUB_API_TOKEN}'}}", "distributed.dashboard.link"),
    ("logging: {distributed: {'()': evil.make}}", "logging.distributed"),
    ("class: SSHCluster\nkwargs: {hosts: [127.0.0.1, 127.0.0.2]}", "SSHCluster"),
    ("class: SSHCluster\nkwargs: {connect_options: {proxy_command: evil}}", "SSHCluster"),
    ("class: SLURMCluster\nkwargs: {cores: 1, memory: 1GB, job_script_prologue: [evil]}", "job_script_prologue"),
    ("class: SLURMCluster\nkwargs: {cores: 1, memory: 1GB, python: evil}", "kwargs.python"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "key"), UNSAFE, ids=[key for _, key in UNSAFE])
def test_keys_that_run_code_or_let_others_in_need_a_named_file(text, key):
    Path("cluster.yaml").write_text(f"version: 1\n{text}\n")
    with pytest.raises(InputError, match=r"nobody named the file; pass --cluster cluster\.yaml") as caught:
        choose_cluster(None, {})
    assert key in str(caught.value)
    assert choose_cluster("cluster.yaml", {}).origin == "cluster.yaml"


@pytest.mark.parametrize(
    "text",
    [
        "kwargs: {n_workers: 2, threads_per_worker: 1, processes: true, memory_limit: 1GB}\nadapt: {maximum: 3}",
        "class: SLURMCluster\nkwargs: {cores: 1, memory: 1GB, queue: main, walltime: 1:00:00}\nscale: {jobs: 2}",
        "scheduler-address: tcp://127.0.0.1:8786",
        "distributed: {scheduler: {no-workers-timeout: 5 minutes, allowed_failures: 3}, worker: {memory: {pause: 0.9}}}",
        "temporary-directory: /scratch\nlogging: {distributed: info}",
    ],
)
def test_sizes_and_times_need_no_name(text):
    Path("cluster.yaml").write_text(f"version: 1\n{text}\n")
    assert choose_cluster(None, {}).origin == "cluster.yaml"


def test_the_file_in_force_is_said(capfd):
    Path("cluster.yaml").write_text("version: 1\nkwargs: {dashboard_address: '127.0.0.1:0'}\n")
    with pipeline.connect():
        pass
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"dashboard: http://127\.0\.0\.1:\d+/status \(cluster file: cluster\.yaml\)", line)
    Path("cluster.yaml").unlink()
    with pipeline.connect(dashboard_address="127.0.0.1:0"):
        assert "cluster file" not in capfd.readouterr().err
