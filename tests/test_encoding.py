"""Files that we encode ourselves: the same bytes as zarr's, whole or not there at all."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pipeline.errors import DiskSpaceError, OpenError
from pipeline.outputs.shards import Compression, Cut, create_array, write_entries
from pipeline.plan.cost import slab_nbytes, writing_nbytes

pytestmark = pytest.mark.versions

if TYPE_CHECKING:
    from pathlib import Path

    import zarr
    from numpy.typing import NDArray


def make(folder: Path, values: NDArray[Any], cut: Cut, compress: Compression | None = None) -> zarr.Array[Any]:
    names = [f"axis_{axis}" for axis in range(values.ndim)]
    return create_array(
        folder, shape=values.shape, dtype=values.dtype, cut=cut, compress=compress, dimension_names=names, attributes={}
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("slab", [1, 300, 4 << 20])
@pytest.mark.parametrize("cut", [Cut(8, 64), Cut(8, 0), Cut(1, 13), Cut(100, 100), Cut(7, 700)])
@pytest.mark.parametrize(
    "values",
    [
        np.arange(300, dtype="f4").reshape(100, 3),
        np.arange(100, dtype="i8"),
        np.arange(1200, dtype="c16").reshape(100, 3, 4)[:, ::-1],
        np.arange(100) % 3 == 0,
        np.zeros((100, 2)),
    ],
    ids=["f4", "1-d", "strided", "bool", "zeros"],
)
def test_same_bytes_as_zarr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: NDArray[Any], cut: Cut, slab: int
) -> None:
    monkeypatch.setattr("pipeline.plan.cost._SLAB_NBYTES", slab)
    asked: list[int] = []

    def read(start: int, stop: int) -> NDArray[Any]:
        asked.extend(range(start, stop))
        return values[start:stop]

    write_entries(make(tmp_path / "ours", values, cut), 0, len(values), read)
    make(tmp_path / "theirs", values, cut)[:] = values
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert asked == list(range(len(values)))


def test_part_of_the_files(tmp_path: Path) -> None:
    values = np.arange(300.0).reshape(100, 3)
    array = make(tmp_path / "A", values, Cut(8, 32))
    write_entries(array, 32, 96, lambda start, stop: values[start:stop])
    assert sorted(name for name in files(tmp_path / "A") if name != "zarr.json") == ["c/1/0", "c/2/0"]
    np.testing.assert_array_equal(array[32:96], values[32:96])


def test_compressed_through_zarr(tmp_path: Path) -> None:
    values = np.arange(300.0).reshape(100, 3)
    array = make(tmp_path / "A", values, Cut(8, 32), "zstd")
    write_entries(array, 0, 100, lambda start, stop: values[start:stop])
    np.testing.assert_array_equal(array[:], values)


def test_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(300.0).reshape(100, 3)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:13]))
    array = make(tmp_path / "A", values, Cut(8, 32))
    write_entries(array, 0, 100, lambda start, stop: values[start:stop])
    monkeypatch.undo()
    np.testing.assert_array_equal(array[:], values)


@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, DiskSpaceError), (errno.EIO, OpenError)])
@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception], call: str
) -> None:
    values = np.arange(300.0).reshape(100, 3)
    array = make(tmp_path / "A", values, Cut(8, 32))

    def fail(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(expected, match=os.strerror(code)):
        write_entries(array, 0, 100, lambda start, stop: values[start:stop])
    monkeypatch.undo()
    assert list(files(tmp_path / "A")) == ["zarr.json"]


def test_reading_fails(tmp_path: Path) -> None:
    values = np.arange(300.0).reshape(100, 3)
    array = make(tmp_path / "A", values, Cut(8, 32))

    def read(start: int, stop: int) -> NDArray[Any]:
        if start >= 32:
            raise ValueError("no more")
        return values[start:stop]

    with pytest.raises(ValueError, match="no more"):
        write_entries(array, 0, 100, read)
    assert sorted(files(tmp_path / "A")) == ["c/0/0", "zarr.json"]


def test_memory_that_writing_takes() -> None:
    mib = 2**20
    assert slab_nbytes(64 * mib, 64 * 1024) == 4 * mib
    assert slab_nbytes(2 * mib, 64 * 1024) == 2 * mib
    assert slab_nbytes(64 * mib, 16 * mib) == 16 * mib
    assert writing_nbytes(64 * mib, 64 * 1024, plain=True) == 4 * mib
    assert writing_nbytes(64 * mib, 64 * 1024, plain=False) == 128 * mib
