"""A Dask cluster on loopback that accepts only TLS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from distributed import Security

from pipeline.errors import OpenError
from pipeline.storage.filesystem import write_private

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORKERS = 2
_END_SECONDS = 10


@contextmanager
def tls_cluster(folder: Path) -> Iterator[Path]:
    """Run `dask scheduler` and two `dask worker`s of one thread each, with certificates made for the run.

    Yields
    ------
    Path
        The cluster file that names the scheduler, in `folder`; the logs of the processes are beside it.

    Raises
    ------
    OpenError
        If the scheduler ends before it listens.
    """
    security = Security.temporary()
    texts = {"ca": security.tls_ca_file, "cert": security.tls_client_cert, "key": security.tls_client_key}
    paths = {name: str(folder / f"{name}.pem") for name in texts}
    for name, text in texts.items():
        write_private(folder / f"{name}.pem", text)
    own = {name: paths[name] for name in ("cert", "key")}
    tls = {"ca-file": paths["ca"], "scheduler": own, "worker": own, "client": own}
    settings = {"distributed": {"comm": {"require-encryption": True, "tls": tls}}}
    # JSON is YAML.
    (folder / "dask.yaml").write_text(json.dumps(settings), encoding="utf-8")
    scheduler_file = folder / "scheduler.json"
    with ExitStack() as stack:
        words = ("scheduler", "--host", "127.0.0.1", "--port", "0", "--protocol", "tls")
        process = stack.enter_context(_running(folder, "scheduler", *words))
        while not scheduler_file.exists():
            if process.poll() is not None:
                last = (folder / "scheduler.log").read_text(encoding="utf-8").splitlines()[-1:]
                raise OpenError(f"the TLS scheduler did not start: {' '.join(last)}; check the certificates")
            time.sleep(0.05)
        for number in range(WORKERS):
            name = f"worker-{number}"
            words = ("worker", "--host", "127.0.0.1", "--nthreads", "1", "--local-directory", str(folder))
            stack.enter_context(_running(folder, name, *words, "--name", name))
        address = json.loads(scheduler_file.read_text(encoding="utf-8"))["address"]
        file = folder / "cluster.yaml"
        file.write_text(json.dumps({"version": 1, "scheduler-address": address, **settings}), encoding="utf-8")
        yield file


@contextmanager
def _running(folder: Path, name: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    options = ("--scheduler-file", str(folder / "scheduler.json"), "--dashboard-address", "127.0.0.1:0")
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", "dask", *words, *options],
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
