"""One small matrix on disk, and the command line called in this process."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

import pipeline
from pipeline.cli import main as command
from tests import services
from tests.proxy import Proxy, proxied

ROWS, COLUMNS = 2_000, 20

# Over SSH, and in a batch job, `connect` says a line more.
for _name in ("SSH_CONNECTION", "SLURM_SUBMIT_HOST", "PBS_O_HOST", "SGE_O_HOST", "LSB_SUB_HOST"):
    os.environ.pop(_name, None)

# The same examples every time, so that who changes nothing breaks nothing; others where somebody looks further.
settings.register_profile("pipeline", derandomize="FUZZ_EXAMPLES" not in os.environ, deadline=None)
settings.load_profile("pipeline")


def pytest_configure():
    """End in order when terminated, as by a CI that gives up: services that were started end with their fixtures."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def numbers(self) -> dict[str, Any]:
        """What `--json` printed: exactly one JSON object."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        assert self.out.count("\n") == 1
        return value


@pytest.fixture(scope="session")
def values():
    """(2000, 20) float64; every value differs, and none is zero, the fill value."""
    return np.arange(1.0, ROWS * COLUMNS + 1).reshape(ROWS, COLUMNS)


@pytest.fixture(scope="session")
def samples(tmp_path_factory, values):
    """Folder with `A.npy` and, of it, `A.zarr`, 8 shards of 256 rows; never to be changed."""
    folder = tmp_path_factory.mktemp("samples")
    np.save(folder / "A.npy", values)
    pipeline.create_matrix(folder / "A.npy", folder / "A.zarr", shard_rows=256, chunk_rows=8)
    return folder


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Call the command line, `cli("info", path)`, in an empty working directory; what it said is an `Outcome`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in [name for name in os.environ if name.startswith("PIPELINE_")]:
        monkeypatch.delenv(name)
    modules = set(sys.modules)
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            command.main()
        return Outcome(left.value.code or 0, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, handler)
    for name in set(sys.modules) - modules:
        # What `--apply` imported here must not answer for a module of the next test.
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def program():
    """Path of the installed console script."""
    return str(Path(sys.executable).with_name("pipeline"))


@dataclass(frozen=True)
class Bucket:
    """An empty bucket of a real S3 service, behind a proxy of its own."""

    url: str
    """Such as `s3://b1`; the environment says where it is."""
    proxy: Proxy
    """Counts requests and bytes, and makes trouble; see `tests/proxy.py`."""
    endpoint: str
    """The service itself, past the proxy."""


@pytest.fixture(scope="session")
def tls_service(tmp_path_factory):
    """The cluster file of a scheduler and two workers; skips where it cannot be had, as the following do."""
    pytest.importorskip("cryptography")
    from pipeline.bench.tls_cluster import tls_cluster

    with tls_cluster(tmp_path_factory.mktemp("tls")) as file:
        yield file


@pytest.fixture(scope="session")
def ssh_service(tmp_path_factory):
    """`SshHosts`."""
    if reason := services.absent_ssh():
        pytest.skip(reason)
    with services.ssh_server(tmp_path_factory.mktemp("ssh")) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def slurm_service(tmp_path_factory):
    """A Slurm of two nodes, which the environment names."""
    if reason := services.absent_slurm():
        pytest.skip(reason)
    with services.slurm_nodes(tmp_path_factory.mktemp("slurm")) as variables, pytest.MonkeyPatch.context() as patch:
        for variable, value in variables.items():
            patch.setenv(variable, value)
        yield


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory):
    if reason := services.absent_s3():
        pytest.skip(reason)
    with services.s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


_bucket_numbers = itertools.count()


@pytest.fixture
def bucket(s3_endpoint, monkeypatch):
    """A `Bucket`; skips where there is no S3 service to be had. Mark such a test `s3`."""
    name = f"bucket-{next(_bucket_numbers)}"
    services.make_bucket(s3_endpoint, name)
    for variable in [each for each in os.environ if each.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    with proxied(s3_endpoint) as proxy:
        for variable, value in services.s3_variables(proxy.url).items():
            monkeypatch.setenv(variable, value)
        yield Bucket(f"s3://{name}", proxy, s3_endpoint)
