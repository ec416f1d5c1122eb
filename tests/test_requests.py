"""Requests that a plan counts on a store, beside those that are made."""

from __future__ import annotations

import dask
import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, WrapperStore

import pipeline

ROWS, COLUMNS = 4_000, 50
ROW = 8 * COLUMNS


class Remote(WrapperStore):
    """A local store that is read as a distant one is; notes what is asked for."""

    def __init__(self, store):
        super().__init__(store)
        self.keys = []

    async def get(self, key, prototype, byte_range=None):
        self.keys.append(key)
        return await self._store.get(key, prototype, byte_range)

    @property
    def _supports_sync_io(self):
        return False


@pytest.fixture(scope="module")
def numbers():
    return np.arange(1.0, ROWS * COLUMNS + 1).reshape(ROWS, COLUMNS)


@pytest.fixture(params=["shards", "chunks", "compressed"])
def matrix(request, numbers, tmp_path):
    """40 shards or chunks of 100 rows."""
    layout = {"shards": {"shard_rows": 100}, "chunks": {"shard_rows": 0, "chunk_rows": 100}}
    layout["compressed"] = layout["shards"] | {"compress": "zstd"}
    np.save(tmp_path / "A.npy", numbers)
    pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr", **{"chunk_rows": 10} | layout[request.param])
    return pipeline.open_matrix(zarr.open_array(Remote(LocalStore(tmp_path / "A.zarr", read_only=True)), mode="r"))


@pytest.mark.parametrize("order", ["chunk", "request"])
@pytest.mark.parametrize(("count", "length"), [(5, 16), (30, 3), (300, 3), (2, 450)])
def test_as_many_as_are_made(matrix, numbers, count, length, order, monkeypatch):
    # As if gaps between windows were too long to be read with them, but for the checksum behind an inner chunk.
    for place in ("plan.plan.JOINED_NBYTES", "readers.ranged.JOINED_NBYTES", "plan.plan.GAP_NBYTES"):
        monkeypatch.setattr(f"pipeline.{place}", 4)
    monkeypatch.setattr("pipeline.plan.plan.REQUEST_NBYTES", 60 * ROW)
    monkeypatch.setattr("pipeline.readers.ranged.REQUEST_NBYTES", 60 * ROW)
    starts = pipeline.draw_starts(ROWS, length=length, count=count, seed=count)
    plan = pipeline.plan_windows(matrix, starts, length=length)
    asked = matrix.array.store.keys
    tasks = pipeline.build_tasks(plan, order=order)
    asked.clear()
    with dask.config.set(scheduler="synchronous"):
        blocks = dask.compute(*tasks)
    made = sum(key.startswith("c/") for key in asked)
    for places, block in blocks:
        np.testing.assert_array_equal(block, np.stack([numbers[starts[i] : starts[i] + length] for i in places]))
    counted = plan.cost(order).requests
    assert made > 0
    if matrix.layout.reader == "decoded":
        # Chunks that lie side by side are asked for together; where they lie is not known before.
        assert made <= 1.2 * counted <= 1.2 * (plan.cost(order).chunks + 40 * len(tasks))
    else:
        assert 0.85 * made <= counted <= 1.15 * made + 1, (counted, made)


def test_local_files_are_asked_for_nothing(samples):
    plan = pipeline.plan_windows(pipeline.open_matrix(samples / "A.zarr"), [3, 70], length=16)
    assert (plan.chunk.requests, plan.request.requests) == (0, 0)
    assert "requests" not in plan.facts()


def test_their_price(matrix):
    starts = np.arange(0, ROWS - 16, 40)
    plan = pipeline.plan_windows(matrix, starts, length=16)
    counted = plan.chunk.requests
    assert f"about {counted:,} ({counted * 0.0004 / 1000:.2f} USD) as gather" in plan.facts()["requests"]
