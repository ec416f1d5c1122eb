"""Orders, borders, stores and destinations where other tools lose rows."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore, WrapperStore

import pipeline
from tests.layouts import distinct, stack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence
    from pathlib import Path

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

CHUNK, LENGTH = 10, 4
A = distinct(240, (3,))


@pytest.fixture(params=["ours", "plain", "zstd"])
def matrix(request: pytest.FixtureRequest, tmp_path: Path) -> pipeline.Matrix:
    path = tmp_path / "A.zarr"
    if request.param == "ours":
        np.save(tmp_path / "A.npy", A)
        return pipeline.create_matrix(tmp_path / "A.npy", path, shard_rows=2 * CHUNK, chunk_rows=CHUNK)
    compressors = zarr.codecs.ZstdCodec() if request.param == "zstd" else None
    zarr.create_array(path, data=A, chunks=(CHUNK, 3), compressors=compressors, filters=None)
    return pipeline.open_matrix(path)


def test_every_window_across_a_border(matrix: pipeline.Matrix, tmp_path: Path) -> None:
    borders = np.arange(CHUNK, len(A), CHUNK)
    starts = np.concatenate([borders - before for before in range(1, LENGTH)])
    plan = pipeline.plan_windows(matrix, starts, length=LENGTH)
    np.testing.assert_array_equal(pipeline.gather(plan), stack(A, starts, LENGTH))
    stored = pipeline.store(plan, tmp_path / "w.zarr")
    np.testing.assert_array_equal(stored["windows"][:], stack(A, starts, LENGTH))
    longer = pipeline.plan_windows(matrix, [0, 3, 9], length=2 * CHUNK + 3)
    np.testing.assert_array_equal(pipeline.gather(longer), stack(A, [0, 3, 9], 2 * CHUNK + 3))


@pytest.mark.usefixtures("four_threads")
def test_output_chunks_of_many_matrix_chunks(
    matrix: pipeline.Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of the result takes windows of four chunks, and four tasks write at once."""
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", 20)
    generator = np.random.default_rng(0)
    for number in range(20 if matrix.layout.shard_rows else 5):
        four = [generator.choice(len(A) // CHUNK - 1, 4, replace=False) for _ in range(20)]
        starts = np.array([chunk * CHUNK + generator.integers(CHUNK) for chunks in four for chunk in chunks])
        plan = pipeline.plan_windows(matrix, starts, length=LENGTH)
        assert plan.task_windows == 4
        expected = stack(A, starts, LENGTH)
        stored = pipeline.store(plan, tmp_path / f"{number}.zarr")
        np.testing.assert_array_equal(stored["windows"][:], expected)
        np.testing.assert_array_equal(pipeline.gather(plan, out=tmp_path / f"{number}.npy"), expected)


@pytest.fixture
def four_threads() -> Any:
    with dask.config.set(scheduler="threads", num_workers=4):
        yield


class Failing(WrapperStore[MemoryStore]):
    """Fails from the n-th reading on, once or for good."""

    def __init__(self, store: MemoryStore, number: int, *, for_good: bool) -> None:
        super().__init__(store)
        self.number, self.for_good, self.count = number, for_good, 0

    def _with_store(self, store: Any) -> Failing:
        return Failing(store, self.number, for_good=self.for_good)

    def _read(self) -> None:
        self.count += 1
        if self.count == self.number or (self.for_good and self.count > self.number):
            raise ConnectionResetError("the store went away")

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        self._read()
        return await self._store.get(key, prototype, byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self._read()
        return super().get_sync(key, prototype=prototype, byte_range=byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        self._read()
        return await self._store.get_partial_values(prototype, key_ranges)

    def get_ranges(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], *, prototype: BufferPrototype, **limits: Any
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        self._read()
        return super().get_ranges(key, byte_ranges, prototype=prototype, **limits)

    async def exists(self, key: str) -> bool:
        self._read()
        return await self._store.exists(key)

    async def getsize(self, key: str) -> int:
        self._read()
        return await self._store.getsize(key)


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_store_that_fails_its_nth_reading(
    compressed: bool, for_good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.runtime.retries._PAUSES", ())
    store: Store = MemoryStore()
    compressors = zarr.codecs.ZstdCodec() if compressed else None
    zarr.create_array(store, data=A, chunks=(CHUNK, 3), compressors=compressors, filters=None)
    starts = np.array([3, 55, 111, 118, 200])
    expected, failed = stack(A, starts, LENGTH), 0
    for number in range(1, 1000):
        failing = Failing(store, number, for_good=for_good)  # type: ignore[arg-type]
        array = zarr.open_array(store, mode="r")
        array = zarr.Array(type(array.async_array)(array.metadata, zarr.storage.StorePath(failing), None))  # type: ignore[arg-type]
        with dask.config.set(scheduler="synchronous"):
            try:
                matrix = pipeline.open_matrix(array)
                plan = pipeline.plan_windows(matrix, starts, length=LENGTH)
                windows = pipeline.gather(plan)
                stored = pipeline.store(plan, tmp_path / f"{number}.zarr")["windows"][:]
            except pipeline.PipelineError as error:
                failed += "the store went away" in str(error)
                assert not (tmp_path / f"{number}.zarr").exists()
                continue
        np.testing.assert_array_equal(windows, expected)
        np.testing.assert_array_equal(stored, expected)
        if failing.count < number:
            break
    else:
        pytest.fail("it never comes to an end")
    assert failed == number - 1 > 5


def test_two_processes_on_one_output(tmp_path: Path) -> None:
    np.save(tmp_path / "A.npy", A)
    command = [sys.executable, "-m", "pipeline", "create", "A.npy", "A.zarr", "--resume", "-q"]
    running = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in running]
    assert {code for _, code in ended} <= {0, 7}
    assert 0 in {code for _, code in ended}
    for said, code in ended:
        assert code == 0 or "another run is writing" in said or "meanwhile" in said, said
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "A.zarr", mode="r")[:], A)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A.npy", "A.zarr"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_destination_that_can_only_be_read(tmp_path: Path) -> None:
    np.save(tmp_path / "A.npy", A)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], check=False).returncode:
        pytest.skip("no tmpfs can be mounted")
    try:
        with pytest.raises(pipeline.OpenError, match="can be written"):
            pipeline.create_matrix(tmp_path / "A.npy", disk / "A.zarr")
        plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.npy"), [3], length=LENGTH)
        with pytest.raises(pipeline.OpenError, match="can be written"):
            pipeline.gather(plan, out=disk / "w.npy")
    finally:
        subprocess.run(["umount", disk], check=True)
