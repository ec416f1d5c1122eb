"""Memory of whole runs, the interpreter, the cluster and all it loads included, on results larger than the bounds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MIB = 2**20
NBYTES = 5000 * 16 * 2000 * 8
"""Of the result: 1.2 GiB, more than `store` may hold."""


def run(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments, "--json", "-q"],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bounds")
    assert run("create", "random:20000x2000", "plain.zarr", cwd=folder)["peak_memory"] < 1024 * MIB
    assert run("create", "plain.zarr", "packed.zarr", "--compress", "blosc", cwd=folder)["peak_memory"] < 1024 * MIB
    return folder


@pytest.mark.parametrize("matrix", ["plain.zarr", "packed.zarr"])
def test_gather_holds_its_result_and_400_mib_at_most(matrix, folder):
    numbers = run("run", matrix, "--count", "5000", cwd=folder)
    assert numbers["nbytes_delivered"] == NBYTES
    assert NBYTES < numbers["peak_memory"] <= NBYTES + 400 * MIB


@pytest.mark.parametrize(("matrix", "order"), [("plain.zarr", "request"), ("packed.zarr", "chunk")])
def test_store_holds_1_gib_at_most(matrix, order, folder):
    numbers = run("run", matrix, "--count", "5000", "--out", "w.zarr", "--order", order, "--overwrite", cwd=folder)
    assert numbers["nbytes_delivered"] > NBYTES > 1024 * MIB
    assert numbers["peak_memory"] <= 1024 * MIB
    less = run(
        "run",
        matrix,
        "--count",
        "2000",
        "--out",
        "w.zarr",
        "--order",
        order,
        "--overwrite",
        "--memory",
        "500MB",
        cwd=folder,
    )
    assert less["peak_memory"] <= 500_000_000
