"""The project itself on a scheduler and two workers that speak TLS alone; their start is not timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from distributed import Security

from pipeline.bench.contenders.ours_threads import read
from pipeline.cluster.connect import connect
from pipeline.errors import OpenError
from pipeline.storage.filesystem import write_private

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipeline.bench.scenarios import Job

__all__ = ["read", "session", "tls_cluster"]

_WORKERS = 2
_END_SECONDS = 10


@contextmanager
def session(job: Job) -> Iterator[None]:
    """Hold the cluster open around the clock."""
    with tls_cluster(job.scratch()) as file, connect(file) as client:
        client.wait_for_workers(_WORKERS, timeout=60)
        yield


@contextmanager
def tls_cluster(folder: Path) -> Iterator[Path]:
    """Run `dask scheduler` and two `dask worker`s of one thread on loopback, with certificates made on the spot.

    Yields
    ------
    Path
        The cluster file that names them, in `folder`; their logs lie beside it.
    """
    made = Security.temporary()
    texts = {"ca": made.tls_ca_file, "cert": made.tls_client_cert, "key": made.tls_client_key}
    paths = {name: folder / f"{name}.pem" for name in texts}
    for name, path in paths.items():
        write_private(path, texts[name])
    own = {name: str(paths[name]) for name in ("cert", "key")}
    tls = {"ca-file": str(paths["ca"]), "scheduler": own, "worker": own, "client": own}
    settings = {"distributed": {"comm": {"require-encryption": True, "tls": tls}}}
    # JSON is YAML.
    (folder / "dask.yaml").write_text(json.dumps(settings), encoding="utf-8")
    where = folder / "scheduler.json"
    scheduler = ("scheduler", "--host", "127.0.0.1", "--port", "0", "--protocol", "tls")
    worker = ("worker", "--host", "127.0.0.1", "--nthreads", "1", "--local-directory", str(folder))
    with ExitStack() as stack:
        process = stack.enter_context(_running(folder, "scheduler", *scheduler))
        while not where.exists():
            if process.poll() is not None:
                said = (folder / "scheduler.log").read_text(encoding="utf-8").splitlines()[-1:]
                raise OpenError(f"a scheduler starts; this one ended: {' '.join(said)}; see the certificates")
            time.sleep(0.05)
        for number in range(_WORKERS):
            stack.enter_context(_running(folder, f"worker-{number}", *worker, "--name", f"worker-{number}"))
        address = json.loads(where.read_text(encoding="utf-8"))["address"]
        file = folder / "cluster.yaml"
        content = {"version": 1, "scheduler-address": address, **settings}
        file.write_text(json.dumps(content), encoding="utf-8")
        yield file


@contextmanager
def _running(folder: Path, name: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    options = ("--scheduler-file", str(folder / "scheduler.json"), "--dashboard-address", "127.0.0.1:0")
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", "dask", *command, *options],
            env=os.environ | {"DASK_CONFIG": str(folder / "dask.yaml")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
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
