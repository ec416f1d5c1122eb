"""Runs in a memory cgroup that is smaller than the matrix and the output, whose page cache is full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

import pipeline

ROOT = Path("/sys/fs/cgroup/memory")
MIB = 2**20


@pytest.fixture
def cgroup(tmp_path):
    """Return a function that makes a cgroup of so many bytes; its processes start in it."""
    if os.geteuid() != 0 or not (ROOT / "memory.limit_in_bytes").exists():
        pytest.skip("takes root and memory cgroups of version 1")
    folder = ROOT / tmp_path.name
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no cgroup can be made")

    def limit(nbytes):
        (folder / "memory.limit_in_bytes").write_text(str(nbytes))
        return folder

    yield limit
    folder.rmdir()


def run(cgroup, *arguments, cwd):
    done = subprocess.run(
        [
            "/bin/sh",
            "-c",
            'echo $$ > "$0/cgroup.procs"; exec "$@"',
            cgroup,
            sys.executable,
            "-m",
            "pipeline",
            *arguments,
            "--json",
            "-q",
        ],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(done.stdout or "{}") | {"code": done.returncode, "said": done.stderr}


@pytest.mark.parametrize(
    ("limit", "rows"),
    [
        pytest.param(320 * MIB, 24_000, id="small"),
        pytest.param(1024 * MIB, 250_000, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_matrix_and_output_are_larger(cgroup, tmp_path, limit, rows):
    folder, count = cgroup(limit), rows // 16
    made = run(folder, "create", f"random:{rows}x2000", "A.zarr", cwd=tmp_path)
    assert made["code"] == 0, made["said"]
    assert made["nbytes"] > limit
    command = ["run", "A.zarr", "--count", str(count), "--seed", "4"]
    stored = run(folder, *command, "--out", "w.zarr", cwd=tmp_path)
    assert stored["code"] == 0, stored["said"]
    assert stored["nbytes_delivered"] > 0.9 * made["nbytes"] > limit
    mapped = run(folder, *command, "--out", "w.npy", cwd=tmp_path)
    assert mapped["code"] == 0, mapped["said"]
    refused = run(folder, *command, cwd=tmp_path)
    assert refused["code"] == 5
    assert "cgroup" in refused["error"]
    assert run(folder, "verify", "w.zarr", cwd=tmp_path)["code"] == 0
    source = zarr.open_array(tmp_path / "A.zarr", mode="r")
    starts = pipeline.draw_starts(rows, length=16, count=count, seed=4)
    windows, npy = zarr.open_group(tmp_path / "w.zarr", mode="r")["windows"], np.load(tmp_path / "w.npy", mmap_mode="r")
    for place in range(0, count, count // 100):
        expected = source[starts[place] : starts[place] + 16]
        np.testing.assert_array_equal(windows[place], expected)
        np.testing.assert_array_equal(npy[place], expected)
