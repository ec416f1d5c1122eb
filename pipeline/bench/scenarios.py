"""Which windows of which matrix are read, and what is timed; every value follows from its row and column."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import InputError
from pipeline.formatting import MIB, format_size
from pipeline.plan.starts import draw_starts

if TYPE_CHECKING:
    from numpy.typing import NDArray

STEP_NBYTES = 16 * MIB
"""Values computed at a time."""
_DEFAULT_ROWS = 125_000
"""Of the scenarios that have two million rows at full size."""
_LEAST_COUNT = 500


@dataclass(frozen=True, slots=True)
class Scenario:
    """A matrix, and the windows to read from it."""

    name: str
    rows: int
    columns: int
    dtype: str
    length: int
    count: int
    """Windows of one read."""
    chunk_rows: int
    """Rows of a chunk, or of an inner chunk, of the Zarr array that peers read."""
    shard_rows: int
    """Rows of a shard of that array; 0: plain chunks."""
    compressed: bool = False
    """Whether all contenders read one compressed Zarr array, whose values rise with 8 bits of noise. Otherwise every
    value of the matrix differs, and there are an HDF5 file and two Zarr arrays."""
    task: Literal["gather", "store", "create", "clusters", "batches"] = "gather"
    """What is timed. `gather`: windows into an array. `clusters`: the same by this project, on several clusters.
    `batches`: windows into batches. `store`: windows into a file, flushed. `create`: the HDF5 file copied, flushed."""

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row."""
        return self.columns * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix in memory."""
        return self.rows * self.row_nbytes

    @property
    def result_nbytes(self) -> int:
        """Bytes of the windows."""
        return self.count * self.length * self.row_nbytes

    @property
    def timed_nbytes(self) -> int:
        """Bytes of the windows, or of the matrix where it is created."""
        return self.nbytes if self.task == "create" else self.result_nbytes

    def describe(self) -> str:
        """Say what is timed, for a person."""
        size = format_size(self.timed_nbytes)
        if self.task == "create":
            return f"{self.rows:,} rows of ({self.columns},) {self.dtype}, {size}"
        shape = f"({self.length}, {self.columns})"
        return f"{self.count:,} windows of {shape} {self.dtype}, {size} out of {format_size(self.nbytes)}"

    def starts(self) -> NDArray[np.int64]:
        """Draw the starts, (count,) int64, the same in every process."""
        return draw_starts(self.rows, length=self.length, count=self.count, seed=0)

    def rows_at(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Compute rows of the matrix, (k,) int64 -> (k, columns)."""
        numbers = rows[:, None] * self.columns + np.arange(self.columns)
        if self.compressed:
            # Whole numbers below 2**24 are exact in float32; the multipliers are those of a common hash function.
            mixed = numbers.astype(np.uint32)
            for multiplier in (0x7FEB352D, 0x846CA68B):
                mixed ^= mixed >> np.uint32(16)
                mixed *= np.uint32(multiplier)
            return ((mixed >> np.uint32(24)) + rows[:, None].astype(np.uint32) * np.uint32(15)).astype(self.dtype)
        if self.dtype == "float32":
            # float32 has too few whole numbers, but enough bit patterns: none below 2**31 - 2**23 is a NaN.
            return (numbers + 1).astype(np.uint32).view(np.float32)
        return (numbers + 1).astype(self.dtype)

    def is_right(self, windows: Any, starts: NDArray[np.int64]) -> bool:
        """Compare every bit of windows, which are an array, the like of one by slices, or a list of batches."""
        if isinstance(windows, list):
            ends = np.cumsum([len(batch) for batch in windows])
            return bool(ends[-1] == len(starts)) and all(map(self.is_right, windows, np.split(starts, ends[:-1])))
        if windows.shape != (len(starts), self.length, self.columns):
            return False
        bits = f"u{np.dtype(self.dtype).itemsize}"
        step = max(1, STEP_NBYTES // (self.length * self.row_nbytes))
        for first in range(0, len(starts), step):
            rows = starts[first : first + step, None] + np.arange(self.length)
            got = np.ascontiguousarray(windows[first : first + step])
            expected = self.rows_at(rows.ravel()).reshape(got.shape)
            if got.dtype != self.dtype or not np.array_equal(got.view(bits), expected.view(bits)):
                return False
        return True


_SEED = Scenario("seed", 2_000_000, 2000, "float64", 16, 10_000, 4, 4096)
_SMALL = Scenario("small", 10_000_000, 32, "float32", 16, 1_000_000, 512, 524_288)
_CHUNKS = Scenario("compressed-chunks", 400_000, 500, "float32", 16, 10_000, 256, 0, compressed=True)

SCENARIOS = {
    "seed": (_SEED,),
    "compressed": (_CHUNKS, replace(_CHUNKS, name="compressed-shards", chunk_rows=32, shard_rows=8192)),
    "small": (_SMALL,),
    "store": (replace(_SEED, name="store", task="store"),),
    "create": (replace(_SEED, name="create", task="create"),),
    "clusters": (replace(_SEED, name="clusters", task="clusters"),),
    # Enough windows for ten batches with the default number of rows.
    "batches": (replace(_SEED, name="batches", task="batches", count=40_960),),
}
"""Scenarios at full size, by the name on the command line."""


def choose_scenarios(name: str, rows: int | None) -> tuple[Scenario, ...]:
    """Return the scenarios of a name, cut to `rows`, with proportionally fewer windows, at least 500.

    Raises
    ------
    InputError
        If there are fewer rows than a window has, or more than the values of the scenario can number.

    Examples
    --------
    >>> [(scenario.rows, scenario.count) for scenario in choose_scenarios("seed", None)]
    [(125000, 625)]
    >>> [(scenario.name, scenario.count) for scenario in choose_scenarios("compressed", 1000)]
    [('compressed-chunks', 500), ('compressed-shards', 500)]
    """
    chosen = []
    for full in SCENARIOS[name]:
        size = rows or (_DEFAULT_ROWS if full.rows == _SEED.rows else full.rows)
        if size < full.length:
            raise InputError(f"--rows {size} is less than one window of {full.length} rows; give more")
        most = 2**20 - 1 if full.compressed else (2**31 - 2**23 - 1) // full.columns
        if full.dtype == "float32" and size > most:
            raise InputError(
                f"--rows {size} is too many for {name}, whose values float32 must tell apart; give at most {most}"
            )
        chosen.append(replace(full, rows=size, count=max(_LEAST_COUNT, full.count * size // full.rows)))
    return tuple(chosen)
