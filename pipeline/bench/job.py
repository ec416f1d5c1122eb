"""The files of a scenario, and what contenders need to read them."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.bench.scenarios import STEP_NBYTES, Scenario
from pipeline.errors import IntegrityError
from pipeline.formatting import MIB
from pipeline.outputs.folder import check_destination
from pipeline.sinks.create import create_matrix
from pipeline.storage.filesystem import sync_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

Files = Literal["hdf5", "zarr", "chunks", "matrix", "either", "nothing"]

DATASET = "A"
"""Name of the HDF5 data set."""
BATCH_SIZE = 256
"""Windows of a batch."""
_SPARE_NBYTES = 1024 * MIB
"""Left free on the disk."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a contender gets, besides starts."""

    scenario: Scenario
    home: Path
    """Folder of the scenario's files."""
    where: dict[str, Any] = field(default_factory=dict)
    """Keywords of `connect`, which name the user's cluster."""
    scratch: Path = Path()
    """Folder for what is written while timed; it is removed afterwards."""

    @property
    def hdf5(self) -> Path:
        """HDF5 file with one contiguous data set; absent if the scenario is compressed."""
        return self.home / "A.h5"

    @property
    def zarr(self) -> Path:
        """Zarr array without checksums, for peers; absent if the disk was too small for it."""
        return self.home / "plain.zarr"

    @property
    def matrix(self) -> Path:
        """Zarr array as `pipeline create` writes it, or that of the peers if the scenario is compressed."""
        return self.zarr if self.scenario.compressed else self.home / "A.zarr"

    @property
    def length(self) -> int:
        """Rows of a window."""
        return self.scenario.length

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return np.dtype(self.scenario.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return (self.scenario.rows, self.scenario.columns)

    def files(self, kind: Files) -> list[Path]:
        """List the files of one kind; `either`: the HDF5 file, or Zarr if the scenario is compressed."""
        if kind == "nothing":
            return []
        if kind == "hdf5" or (kind == "either" and not self.scenario.compressed):
            return [self.hdf5]
        root = self.matrix if kind == "matrix" else self.zarr
        return sorted(path for path in root.rglob("*") if path.is_file())

    @contextmanager
    def dataset(self) -> Iterator[Any]:
        """Open the HDF5 data set."""
        import h5py

        with h5py.File(self.hdf5) as file:
            yield file[DATASET]

    def offset(self) -> int:
        """First byte of the HDF5 data set in its file."""
        with self.dataset() as dataset:
            offset: int | None = dataset.id.get_offset()
        if offset is None:
            raise IntegrityError(f"{self.hdf5} is not contiguous; remove {self.home}, and run the bench again")
        return offset

    def memmap(self) -> np.memmap[Any, Any]:
        """Map the rows of the HDF5 file, (rows, columns): a contiguous data set is raw bytes at one offset."""
        return np.memmap(self.hdf5, self.dtype, mode="r", offset=self.offset(), shape=self.shape)

    def empty(self, count: int) -> NDArray[Any]:
        """Allocate windows, (count, length, columns)."""
        return np.empty((count, self.length, self.shape[1]), self.dtype)

    def copy_windows(self, rows: Any, starts: NDArray[np.int64]) -> NDArray[Any]:
        """Slice each window of `rows`, and copy it to its place in one array."""
        windows = self.empty(len(starts))
        for place, start in enumerate(starts.tolist()):
            windows[place] = rows[start : start + self.length]
        return windows

    def index_windows(self, rows: Any, starts: NDArray[np.int64]) -> NDArray[Any]:
        """Index all rows of all windows at once, by row numbers of shape (n * length,)."""
        indices = (starts[:, None] + np.arange(self.length)).ravel()
        return np.asarray(rows[indices]).reshape(len(starts), self.length, -1)


@dataclass(frozen=True, slots=True)
class WindowsOf:
    """Windows of an array of rows, sliced when they are indexed."""

    rows: Any
    starts: NDArray[np.int64]
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, length, *row shape)."""
        return (len(self.starts), self.length, *self.rows.shape[1:])

    def __getitem__(self, part: slice) -> NDArray[Any]:
        return np.stack([self.rows[start : start + self.length] for start in self.starts[part].tolist()])


def split_batches(values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Split starts or places into those of each batch."""
    return [values[first : first + BATCH_SIZE] for first in range(0, len(values), BATCH_SIZE)]


def prepare_job(scenario: Scenario, folder: Path, say: Callable[[str], None]) -> Job:
    """Write the files of a scenario to a folder below `folder`, unless an earlier run left them there."""
    job = Job(scenario, folder / f"{scenario.name}-{scenario.rows}x{scenario.columns}-{scenario.length}")
    if job.home.exists():
        return job
    folder.mkdir(parents=True, exist_ok=True)
    # The peers' copy is left out where the disk has no room for it.
    check_destination(job.home, nbytes=scenario.nbytes * (1 if scenario.compressed else 2), overwrite=False)
    partial = Job(scenario, job.home.with_name(job.home.name + ".partial"))
    shutil.rmtree(partial.home, ignore_errors=True)
    partial.home.mkdir()
    if scenario.compressed:
        say(f"write {scenario.name}")
        _write_zarr(partial)
    else:
        say(f"write {scenario.name}: A.h5, contiguous")
        _write_hdf5(partial)
        if scenario.task != "create":
            say(f"write {scenario.name}: A.zarr, as `pipeline create` makes it")
            create_matrix(partial.hdf5, partial.matrix, dataset=DATASET, progress=False)
        if scenario.task == "gather" and shutil.disk_usage(partial.home).free > scenario.nbytes + _SPARE_NBYTES:
            say(f"write {scenario.name}: plain.zarr, for the peers")
            _write_zarr(partial)
    for path in partial.home.rglob("*"):
        if path.is_file():
            sync_path(path)
    partial.home.rename(job.home)
    return job


def _write_hdf5(job: Job) -> None:
    import h5py

    with h5py.File(job.hdf5, "w") as file:
        _fill(file.create_dataset(DATASET, job.shape, job.dtype), job.scenario, 1)


def _write_zarr(job: Job) -> None:
    import zarr

    scenario = job.scenario
    blosc = zarr.codecs.BloscCodec(cname="zstd", typesize=job.dtype.itemsize)
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"}):
        array = zarr.create_array(
            job.zarr,
            shape=job.shape,
            dtype=job.dtype,
            chunks=(scenario.chunk_rows, scenario.columns),
            shards=(scenario.shard_rows, scenario.columns) if scenario.shard_rows else None,
            compressors=[blosc] if scenario.compressed else None,
            filters=None,
            config={"write_empty_chunks": True},
        )
        _fill(array, scenario, scenario.shard_rows or scenario.chunk_rows)


def _fill(array: Any, scenario: Scenario, unit: int) -> None:
    """Write all rows, whole units at a time."""
    step = max(1, 4 * STEP_NBYTES // (unit * scenario.row_nbytes)) * unit
    for first in range(0, scenario.rows, step):
        stop = min(first + step, scenario.rows)
        array[first:stop] = scenario.rows_at(np.arange(first, stop))
