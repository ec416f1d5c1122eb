"""Windows out of plain bytes under the keys of any store: ranges are joined, and many are asked for at once."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.plan.plan import IN_FLIGHT_NBYTES, JOINED_NBYTES, REQUEST_NBYTES
from pipeline.readers.runs import cut_pieces, read_by_runs
from pipeline.storage.concurrency import in_flight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pipeline.matrix.keys import Keys
    from pipeline.plan.columns import Part, Selection
    from pipeline.readers.runs import Runs
    from pipeline.storage.preads import Reading


class Request(NamedTuple):
    """A range of one key that is read in one go, and the pieces that have bytes in it."""

    file: int
    offset: int
    nbytes: int
    begin: int
    """First piece."""
    end: int
    """One after the last piece."""


@dataclass(frozen=True, slots=True)
class RangedReader:
    """Rows that lie as plain bytes under keys of a store: ranges are read by few requests, many of them in flight.

    As many requests of a task are in flight as `fetching.concurrency` says, on Zarr's event loop. Each thread copies
    its own rows to their places, straight out of what the store gave.
    """

    keys: Keys
    row_nbytes: int
    """As stored."""
    part: Part | None = None
    """What is read of each row; None: all of it."""
    selection: Selection | None = None
    """What is made of what was read; None: nothing."""

    def read_windows(
        self, starts: NDArray[np.int64], length: int, out: NDArray[Any], places: NDArray[np.int64]
    ) -> Reading:
        """Read windows; see `Reader.read_windows`."""
        return read_by_runs(
            self._read_runs, starts, length, out, places, row_nbytes=self.row_nbytes, selection=self.selection
        )

    def _read_runs(self, runs: Runs, out: NDArray[Any]) -> Iterator[int]:
        """Read runs of rows, all in one slab; see `ReadRuns`."""
        target = out.reshape(-1).view(np.uint8)
        pieces = cut_pieces(self.keys, self.row_nbytes, runs, self.part)
        bases, nbytes_read = self._locate(pieces.file, pieces.extent)
        offsets = bases + pieces.offset
        order = np.lexsort((offsets + pieces.nbytes, offsets, pieces.file))
        offsets, pieces = offsets[order], pieces.take(order)
        ends = offsets + pieces.nbytes
        requests = coalesce(pieces.file, offsets, ends, gap=JOINED_NBYTES, most=REQUEST_NBYTES)
        begins, stops, wheres = offsets.tolist(), ends.tolist(), pieces.target.tolist()
        sized = ((request.nbytes, partial(self._fetch, request)) for request in requests)
        with closing(in_flight(sized, most_nbytes=IN_FLIGHT_NBYTES)) as results:
            for request, read in results:
                nbytes_read += len(read)
                for piece in range(request.begin, request.end):
                    begin = max(begins[piece], request.offset)
                    stop = min(stops[piece], request.offset + request.nbytes)
                    where = wheres[piece] + begin - begins[piece]
                    if begin < stop:
                        target[where : where + stop - begin] = read[begin - request.offset : stop - request.offset]
        yield nbytes_read

    def _locate(self, files: NDArray[np.int64], extents: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Byte of its key at which each extent begins, and the bytes that were read to know it."""
        bases = np.zeros(len(files), np.int64)
        index = self.keys.index
        if index is None:
            return bases, 0
        nbytes_read = 0
        edges = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), len(files)]
        spans = {int(files[begin]): slice(begin, end) for begin, end in pairwise(edges)}
        sized = ((index.nbytes, partial(self._fetch_index, number)) for number in spans)
        with closing(in_flight(sized, most_nbytes=IN_FLIGHT_NBYTES)) as results:
            for number, (entries, nbytes) in results:
                bases[spans[number]] = self.keys.offsets(entries, number, extents[spans[number]])
                nbytes_read += nbytes
        return bases, nbytes_read

    async def _fetch(self, request: Request) -> tuple[Request, NDArray[np.uint8]]:
        return request, await self.keys.fetch(request.file, request.offset, request.nbytes)

    async def _fetch_index(self, number: int) -> tuple[int, tuple[NDArray[np.int64], int]]:
        return number, await self.keys.fetch_index(self.keys.path(number), number)


def coalesce(
    files: NDArray[np.int64], begins: NDArray[np.int64], ends: NDArray[np.int64], *, gap: int, most: int
) -> list[Request]:
    """Join ranges of the same file that are at most `gap` bytes apart, and cut what is longer than `most` bytes.

    Parameters
    ----------
    files, begins, ends
        (p,) ranges [begin, end) of bytes in a file, by file and then by begin. They may overlap.
    """
    requests = []
    for top, bottom in pairwise([0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), len(files)]):
        begin, reach = begins[top:bottom], np.maximum.accumulate(ends[top:bottom])
        breaks = np.flatnonzero(begin[1:] - reach[:-1] > gap) + 1
        for low, high in pairwise([0, *breaks.tolist(), bottom - top]):
            first, stop = int(begin[low]), int(reach[high - 1])
            count = -(-(stop - first) // most)
            cuts = first + np.arange(count + 1) * (stop - first) // count
            # What begins before a cut's end and reaches beyond its begin, or lies between such.
            served = top + low + np.searchsorted(reach[low:high], cuts[:-1], side="right")
            wanted = top + low + np.searchsorted(begin[low:high], cuts[1:], side="left")
            sides = zip(*map(np.ndarray.tolist, (cuts[:-1], np.diff(cuts), served, wanted)), strict=True)
            requests += [Request(int(files[top]), *side) for side in sides]
    return requests
