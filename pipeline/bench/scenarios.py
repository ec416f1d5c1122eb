"""What is read: a matrix whose every value follows from its row and column, in the layouts that contenders read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import InputError, IntegrityError
from pipeline.formatting import MIB, format_size
from pipeline.outputs.folder import check_destination
from pipeline.plan.starts import draw_starts
from pipeline.sinks.create import create_matrix
from pipeline.storage.filesystem import sync_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

Values = Literal["counted", "smooth"]
Task = Literal["gather", "store", "create", "clusters", "batches"]

_FUSED_PIPELINE = "zarr.core.codec_pipeline.FusedCodecPipeline"
_STEP_NBYTES = 16 * MIB
_LEAST_COUNT = 500
_SPARE_NBYTES = 1024 * MIB
"""Left free on the disk."""
DATASET = "A"
"""Name of the HDF5 data set."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A matrix, the windows to read from it, and the files that hold it."""

    name: str
    rows: int
    columns: int
    dtype: np.dtype[Any]
    length: int
    count: int
    """Windows of one read."""
    values: Values
    """`counted`: every value of the matrix differs. `smooth`: rising, with 8 bits of noise, so that it compresses."""
    chunk_rows: int
    """Rows of a chunk, or of an inner chunk, of the Zarr that the peers read."""
    shard_rows: int
    """Rows of its shards; 0: plain chunks."""
    compressed: bool
    """Whether the one Zarr is compressed and all contenders read it; else there are an HDF5 file and two of Zarr."""
    task: Task = "gather"
    """What is timed: windows into an array, by all, or by this project on several clusters; into a file that is
    flushed; a copy of the HDF5 file, flushed; or windows into batches."""

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix in memory."""
        return self.rows * self.columns * self.dtype.itemsize

    @property
    def result_nbytes(self) -> int:
        """Bytes of the windows."""
        return self.count * self.length * self.columns * self.dtype.itemsize

    @property
    def made_nbytes(self) -> int:
        """Bytes of what is timed: of the windows, or of the matrix where it is created."""
        return self.nbytes if self.task == "create" else self.result_nbytes

    def words(self) -> str:
        """What is timed, for a person."""
        rows = f"{self.rows:,} rows" if self.task == "create" else f"{self.count:,} windows"
        shape = f"({self.columns},)" if self.task == "create" else f"({self.length}, {self.columns})"
        whole = "" if self.task == "create" else f" out of {format_size(self.nbytes)}"
        return f"{rows} of {shape} {self.dtype}, {format_size(self.made_nbytes)}{whole}"

    @property
    def disk_nbytes(self) -> int:
        """Bytes that the files take at most, but for the peers' copy in Zarr, which may be left out."""
        return self.nbytes * (1 if self.compressed else 2)

    def starts(self) -> NDArray[np.int64]:
        """Draw the starts, (count,) int64, the same in every process."""
        return draw_starts(self.rows, length=self.length, count=self.count, seed=0)

    def rows_at(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Compute rows of the matrix, (k,) int64 -> (k, columns), without reading anything."""
        if self.values == "smooth":
            # Whole numbers below 2**24, which float32 holds exactly; the multipliers are those of a common hash.
            mixed = (rows[:, None] * self.columns + np.arange(self.columns)).astype(np.uint32)
            for multiplier in (0x7FEB352D, 0x846CA68B):
                mixed ^= mixed >> np.uint32(16)
                mixed *= np.uint32(multiplier)
            return ((mixed >> np.uint32(24)) + rows[:, None].astype(np.uint32) * np.uint32(15)).astype(self.dtype)
        numbers = rows[:, None] * self.columns + np.arange(1, self.columns + 1)
        if self.dtype == np.float32:
            # Bit patterns differ where float32 has no more whole numbers; below 2**31 - 2**23 none is a NaN.
            return numbers.astype(np.uint32).view(np.float32)
        return numbers.astype(self.dtype)

    def is_right(self, windows: Any, starts: NDArray[np.int64]) -> bool:
        """Whether windows, an array or what is sliced like one, hold the very bits that they should."""
        shape = (len(starts), self.length, self.columns)
        if windows.shape != shape or windows.dtype != self.dtype:
            return False
        bits = np.dtype(f"u{self.dtype.itemsize}")
        step = max(1, _STEP_NBYTES // (self.length * self.columns * self.dtype.itemsize))
        for first in range(0, len(starts), step):
            rows = (starts[first : first + step, None] + np.arange(self.length)).ravel()
            got = np.ascontiguousarray(windows[first : first + step]).reshape(len(rows), -1)
            if not np.array_equal(got.view(bits), self.rows_at(rows).view(bits)):
                return False
        return True

    def make_files(self, folder: Path, say: Callable[[str], None]) -> Job:
        """Write the files below `folder`, unless they are there from an earlier run, and say where they are."""
        made = folder / f"{self.name}-{self.rows}x{self.columns}-{self.length}"
        if not made.exists():
            folder.mkdir(parents=True, exist_ok=True)
            check_destination(made, nbytes=self.disk_nbytes, overwrite=False)
            partial = made.with_name(made.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if not self.compressed:
                say(f"write {self.name}: A.h5, contiguous")
                self._write_hdf5(partial / "A.h5")
            if not self.compressed and self.task != "create":
                say(f"write {self.name}: A.zarr, as `pipeline create` makes it")
                create_matrix(partial / "A.h5", partial / "A.zarr", dataset=DATASET, progress=False)
            room = shutil.disk_usage(partial).free > self.nbytes + _SPARE_NBYTES
            if self.compressed or (self.task == "gather" and room):
                say(f"write {self.name}: plain.zarr, for the peers" if not self.compressed else f"write {self.name}")
                self._write_zarr(partial / "plain.zarr")
            for path in partial.rglob("*"):
                if path.is_file():
                    sync_path(path)
            partial.rename(made)
        return self.job(made)

    def job(self, made: Path) -> Job:
        """Name the files that `make_files` wrote."""
        plain = made / "plain.zarr"
        hdf5 = None if self.compressed else made / "A.h5"
        return Job(self, hdf5, plain, plain if self.compressed else made / "A.zarr")

    def _write_hdf5(self, path: Path) -> None:
        import h5py

        with h5py.File(path, "w") as file:
            dataset = file.create_dataset(DATASET, (self.rows, self.columns), self.dtype)
            for first, stop in self._steps(1):
                dataset[first:stop] = self.rows_at(np.arange(first, stop))

    def _write_zarr(self, path: Path) -> None:
        import zarr

        compressors = [zarr.codecs.BloscCodec(cname="zstd", typesize=self.dtype.itemsize)] if self.compressed else None
        with zarr.config.set({"codec_pipeline.path": _FUSED_PIPELINE}):
            array = zarr.create_array(
                path,
                shape=(self.rows, self.columns),
                dtype=self.dtype,
                chunks=(self.chunk_rows, self.columns),
                shards=(self.shard_rows, self.columns) if self.shard_rows else None,
                compressors=compressors,
                filters=None,
                config={"write_empty_chunks": True},
            )
            for first, stop in self._steps(self.shard_rows or self.chunk_rows):
                array[first:stop] = self.rows_at(np.arange(first, stop))

    def _steps(self, unit: int) -> list[tuple[int, int]]:
        step = max(1, 4 * _STEP_NBYTES // (unit * self.columns * self.dtype.itemsize)) * unit
        return [(first, min(first + step, self.rows)) for first in range(0, self.rows, step)]


@dataclass(frozen=True, slots=True)
class Job:
    """What a contender is told."""

    scenario: Scenario
    hdf5: Path | None
    """HDF5 file with the contiguous data set `A`; None where the scenario is compressed."""
    zarr: Path
    """Zarr array without checksums, for the peers; absent where the disk did not hold it."""
    matrix: Path
    """Zarr array as this package's `create` writes it; the peers' where the scenario is compressed."""
    where: dict[str, Any] = field(default_factory=dict)
    """Keywords of `connect` for the contender that runs on a cluster."""
    folder: Path | None = None
    """See `scratch`."""

    @property
    def length(self) -> int:
        """Rows of a window."""
        return self.scenario.length

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the matrix."""
        return self.scenario.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return (self.scenario.rows, self.scenario.columns)

    def offset(self) -> int:
        """First byte of the contiguous data set in its file."""
        import h5py

        with h5py.File(self.hdf5) as file:
            offset = file[DATASET].id.get_offset()
        if offset is None:
            raise IntegrityError(f"the data set is contiguous; {self.hdf5} has it otherwise; remove the folder")
        return int(offset)

    def memmap(self) -> np.memmap[Any, Any]:
        """Map the rows of the HDF5 file, (rows, columns): a contiguous data set is raw bytes at one offset."""
        assert self.hdf5 is not None
        return np.memmap(self.hdf5, self.dtype, mode="r", offset=self.offset(), shape=self.shape)

    def empty(self, count: int) -> NDArray[Any]:
        """Allocate the windows, (count, length, columns), inside the clock."""
        return np.empty((count, self.length, self.shape[1]), self.dtype)

    def scratch(self) -> Path:
        """Folder for what is written within the clock; it is removed afterwards."""
        assert self.folder is not None
        return self.folder

    def row_indices(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of every row of every window, (count * length,)."""
        return (starts[:, None] + np.arange(self.length)).ravel()


BATCH_SIZE = 256
"""Windows of a batch."""


@dataclass(frozen=True, slots=True)
class BatchesOf:
    """Windows that came in batches, one after the other, put together when they are looked at: after the clock."""

    batches: list[NDArray[Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, length, columns)."""
        return (sum(map(len, self.batches)), *self.batches[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the windows."""
        return self.batches[0].dtype

    def __getitem__(self, part: slice) -> NDArray[Any]:
        begin, stop, _ = part.indices(self.shape[0])
        first, last = begin // BATCH_SIZE, -(-stop // BATCH_SIZE)
        return np.concatenate(self.batches[first:last])[begin - first * BATCH_SIZE : stop - first * BATCH_SIZE]


@dataclass(frozen=True, slots=True)
class WindowsOf:
    """Windows of an array of rows, cut when they are looked at: after the clock."""

    rows: Any
    starts: NDArray[np.int64]
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, length, columns)."""
        return (len(self.starts), self.length, *self.rows.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the rows."""
        dtype: np.dtype[Any] = self.rows.dtype
        return dtype

    def __getitem__(self, part: slice) -> NDArray[Any]:
        return np.stack([self.rows[start : start + self.length] for start in self.starts[part].tolist()])


_SEED = Scenario("seed", 2_000_000, 2000, np.dtype("f8"), 16, 10_000, "counted", 4, 4096, compressed=False)
_SMALL = Scenario("small", 10_000_000, 32, np.dtype("f4"), 16, 1_000_000, "counted", 512, 524_288, compressed=False)
_CHUNKS = Scenario("compressed-chunks", 400_000, 500, np.dtype("f4"), 16, 10_000, "smooth", 256, 0, compressed=True)
_SHARDS = replace(_CHUNKS, name="compressed-shards", chunk_rows=32, shard_rows=8192)

SCENARIOS = {
    "seed": (_SEED,),
    "compressed": (_CHUNKS, _SHARDS),
    "small": (_SMALL,),
    "store": (replace(_SEED, name="store", task="store"),),
    "create": (replace(_SEED, name="create", task="create"),),
    "clusters": (replace(_SEED, name="clusters", task="clusters"),),
    # More windows: ten batches, where the matrix is as small as by default.
    "batches": (replace(_SEED, name="batches", task="batches", count=40_960),),
}
"""At full size, by the name that the command line takes."""
_DEFAULT_ROWS = {"seed": 125_000, "store": 125_000, "create": 125_000, "clusters": 125_000, "batches": 125_000}


def choose_scenarios(name: str, rows: int | None) -> tuple[Scenario, ...]:
    """Take the scenarios of a name, cut to `rows`, with proportionally fewer windows, at least 500.

    Raises
    ------
    InputError
        If there are fewer rows than a window has.

    Examples
    --------
    >>> [(each.rows, each.count) for each in choose_scenarios("seed", None)]
    [(125000, 625)]
    >>> [(each.name, each.count) for each in choose_scenarios("compressed", 1000)]
    [('compressed-chunks', 500), ('compressed-shards', 500)]
    """
    wanted = rows or _DEFAULT_ROWS.get(name)
    chosen = []
    for full in SCENARIOS[name]:
        size = full.rows if wanted is None else wanted
        if size < full.length:
            raise InputError(f"a window has {full.length} rows; got --rows {rows}; give more")
        if size * full.columns >= 2**31 - 2**23 and full.values == "counted" and full.dtype == np.float32:
            raise InputError(f"the values of {name} are numbered in 31 bits; got --rows {rows}; give fewer")
        if size >= 2**20 and full.values == "smooth":
            raise InputError(f"the values of {name} are whole numbers of 24 bits; got --rows {rows}; give fewer")
        count = max(_LEAST_COUNT, full.count * size // full.rows)
        chosen.append(replace(full, rows=size, count=min(count, full.count) if rows is None else count))
    return tuple(chosen)
