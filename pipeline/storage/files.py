"""What every source in a local file needs: notice that the file changed, and read exactly what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import IntegrityError
from pipeline.storage.filesystem import advise

if TYPE_CHECKING:
    import os
    from io import FileIO
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray

_READ_THROUGH = 16 << 10
"""Bytes from one run to the next up to which reading the gaps, too, costs less than a request for each run."""

_SCRATCH_BYTES = 4 << 20
"""Bytes of scratch memory for runs that are read with their gaps."""


def change_time(status: os.stat_result) -> int:
    """Time of a file's last change in ns, modulo 2^64 as 64 bits with a sign: to be compared, not computed with.

    File systems know years beyond 2262, where 63 bits of nanoseconds end.
    """
    return (status.st_mtime_ns + 2**63) % 2**64 - 2**63


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file as it was when it was opened: size (bytes) and time of its last change (`change_time`)."""

    path: Path
    size: int
    changed: int

    @classmethod
    def take(cls, path: Path) -> Self:
        """Stamp the file as it is now, under a name that holds in any working directory."""
        now = path.stat()
        return cls(path.absolute(), now.st_size, change_time(now))

    def check(self) -> None:
        """Raise `IntegrityError` if the file is no longer the one that was stamped."""
        try:
            now = FileStamp.take(self.path)
        except OSError as error:
            raise IntegrityError(
                f"a source must stay as it is while it is read; {self.path} is gone ({error.strerror}); start again"
            ) from error
        if now != self:
            raise IntegrityError(
                f"a source must stay as it is while it is read; {self.path} was changed ({self.size} bytes when it "
                f"was opened, {now.size} now); start again"
            )


def check_rows(start: int, stop: int, rows: int) -> None:
    """Raise `IndexError` unless ``0 <= start <= stop <= rows``."""
    if not 0 <= start <= stop <= rows:
        raise IndexError(f"rows must lie in [0, {rows}]; got [{start}, {stop})")


def read_runs(file: FileIO, runs: NDArray[np.uint8], offset: int, stride: int) -> None:
    """Fill `runs` (count, size) from runs of `size` bytes that begin at `offset`, `stride` bytes apart.

    All runs are announced to the kernel before the first is read, so that a disk has many requests in flight.

    Raises
    ------
    IntegrityError
        If the file ends before the last run does.
    """
    count, size = runs.shape
    if not runs.size:
        return
    if count == 1 or size == stride:
        advise(file.fileno(), 0, 0, "SEQUENTIAL")
        _read_exactly(file, runs.reshape(-1), offset)
    elif stride <= _READ_THROUGH:
        advise(file.fileno(), 0, 0, "SEQUENTIAL")
        step = _SCRATCH_BYTES // stride
        scratch = np.empty(min(step, count) * stride, np.uint8)
        for first in range(0, count, step):
            part = runs[first : first + step]
            # The gap after the last run may lie behind the end of the file.
            _read_exactly(file, scratch[: len(part) * stride - (stride - size)], offset + first * stride)
            part[:] = scratch[: len(part) * stride].reshape(len(part), stride)[:, :size]
    else:
        # Read-ahead would fetch megabytes around each run.
        advise(file.fileno(), 0, 0, "RANDOM")
        for i in range(count):
            advise(file.fileno(), offset + i * stride, size, "WILLNEED")
        for i in range(count):
            _read_exactly(file, runs[i], offset + i * stride)


def _read_exactly(file: FileIO, out: NDArray[np.uint8], offset: int) -> None:
    file.seek(offset)
    left = memoryview(out)
    while left:
        got = file.readinto(left)
        if not got:
            raise IntegrityError(
                f"a source must stay as it is while it is read; {file.name!s} ends {len(left)} bytes early; start again"
            )
        left = left[got:]
