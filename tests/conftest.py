"""One small matrix on disk, and the command line called in this process."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline
from pipeline import cli as command

ROWS, COLUMNS = 2_000, 20


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
