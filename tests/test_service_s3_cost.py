"""What windows cost on an S3 service, in requests and bytes: here, and in other readers of the same objects.

`pytest -n 0 -m slow -k cost_of_windows -s` prints the table of a matrix whose rows and density are the main job's.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import dask
import numpy as np
import obstore
import pytest
import zarr
from obstore.store import S3Store
from zarr.storage import ObjectStore

import pipeline

pytestmark = pytest.mark.s3

LENGTH = 16
FUSED = {"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"}


class Job(NamedTuple):
    url: str
    endpoint: str
    starts: np.ndarray
    shape: tuple[int, int, int]
    """Of the windows."""

    @property
    def rows(self):
        return (self.starts[:, None] + np.arange(LENGTH)).ravel()

    def empty(self):
        return np.empty(self.shape)


def ours(job):
    with dask.config.set(scheduler="threads"):
        matrix = pipeline.open_matrix(job.url)
        return pipeline.gather(pipeline.plan_windows(matrix, job.starts, length=LENGTH))


def open_zarr(job):
    return zarr.open_array(ObjectStore(S3Store.from_url(job.url), read_only=True), mode="r", zarr_format=3)


def zarr_loop(job):
    array, windows = open_zarr(job), job.empty()
    for place, start in enumerate(job.starts.tolist()):
        windows[place] = array[start : start + LENGTH]
    return windows


def zarr_oindex(job):
    return open_zarr(job).oindex[job.rows].reshape(job.shape)


def zarr_loop_fused(job):
    with zarr.config.set(FUSED):
        return zarr_loop(job)


def zarr_oindex_fused(job):
    with zarr.config.set(FUSED):
        return zarr_oindex(job)


def open_tensorstore(job):
    ts = pytest.importorskip("tensorstore")
    bucket, _, path = job.url.removeprefix("s3://").partition("/")
    kvstore = {
        "driver": "s3",
        "bucket": bucket,
        "path": f"{path}/",
        "endpoint": job.endpoint,
        "aws_region": "us-east-1",
    }
    return ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()


def tensorstore_loop(job):
    array, windows = open_tensorstore(job), job.empty()
    for place, start in enumerate(job.starts.tolist()):
        windows[place] = array[start : start + LENGTH].read().result()
    return windows


def tensorstore_batch(job):
    import tensorstore as ts

    array, windows = open_tensorstore(job), job.empty()
    with ts.Batch() as batch:
        reads = [array[start : start + LENGTH].read(batch=batch) for start in job.starts.tolist()]
    for place, future in enumerate(reads):
        windows[place] = future.result()
    return windows


def tensorstore_index(job):
    return open_tensorstore(job)[job.rows].read().result().reshape(job.shape)


LOOPS = (zarr_loop, zarr_loop_fused, tensorstore_loop)
OTHERS = (*LOOPS, zarr_oindex, zarr_oindex_fused, tensorstore_batch, tensorstore_index)


@pytest.mark.parametrize(
    ("rows", "count", "settings"),
    [
        (1_000, 12, {"shard_rows": 250}),
        # As dense as the main job's: windows take 8 % of the rows.
        pytest.param(40_000, 200, {}, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_cost_of_windows(bucket, tmp_path, rows, count, settings):
    columns = 2_000
    values = np.arange(1.0, rows * columns + 1).reshape(rows, columns)
    np.save(tmp_path / "A.npy", values)
    pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr", **settings)
    store = S3Store.from_url(f"{bucket.url}/A.zarr")
    for path in (tmp_path / "A.zarr").rglob("*"):
        if path.is_file():
            obstore.put(store, path.relative_to(tmp_path / "A.zarr").as_posix(), path)
            path.unlink()
    shards = len(list((tmp_path / "A.zarr" / "c").iterdir()))
    (tmp_path / "A.npy").unlink()
    starts = np.random.default_rng(0).integers(0, rows - LENGTH + 1, count)
    job = Job(f"{bucket.url}/A.zarr", bucket.proxy.url, starts, (count, LENGTH, columns))
    expected = np.stack([values[start : start + LENGTH] for start in starts])
    requests, nbytes = {}, {}
    print(f"\n{count} windows of ({LENGTH}, {columns}) float64, {expected.nbytes / 1e6:.1f} MB")
    for reader in (ours, *OTHERS):
        bucket.proxy.reset()
        begin = time.perf_counter()
        windows = reader(job)
        seconds = time.perf_counter() - begin
        np.testing.assert_array_equal(windows, expected, strict=True, err_msg=reader.__name__)
        requests[reader], nbytes[reader] = bucket.proxy.count(), bucket.proxy.nbytes()
        share = nbytes[reader] / expected.nbytes
        print(
            f"{reader.__name__:<20}{requests[reader]:>5} requests {nbytes[reader] / 1e6:>7.1f} MB {share:>5.2f} "
            f"{seconds:>6.2f} s  at most {bucket.proxy.peak} at once"
        )
    assert nbytes[ours] < min(nbytes[reader] for reader in OTHERS)
    assert nbytes[ours] < 1.05 * expected.nbytes
    # Each window one, each shard's index one, or two where a task ends within; metadata and a listing, three times.
    assert requests[ours] <= count + 2 * shards + 6
    assert requests[ours] < min(requests[reader] for reader in LOOPS)
