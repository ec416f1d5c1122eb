"""Entries of an array as objects: encoded in memory, put, and proved to be what was put, by any worker."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import IntegrityError, PipelineError
from pipeline.matrix.layout import read_layout
from pipeline.outputs.encoding import encode_plain, encoded_nbytes
from pipeline.plan.cost import writing_nbytes
from pipeline.storage.buckets import TakenError, digest_content
from pipeline.storage.checksums import FileRecord, extend_crc32
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import zarr
    from numpy.typing import NDArray

    from pipeline.matrix.layout import Layout
    from pipeline.outputs.ledger import Ledger
    from pipeline.storage.buckets import Content

MOST_NBYTES = 5 * 2**30
"""What S3 takes as one object in one go; others take as much at least."""
_TRIES = 5
"""Times that others may put another object between our look and our own put."""


def uploading_nbytes(file_nbytes: int, chunk_nbytes: int, *, plain: bool) -> int:
    """Memory that writing a file to a store takes beside its entries: it is put whole."""
    return file_nbytes + writing_nbytes(file_nbytes, chunk_nbytes, plain=plain)


@dataclass(frozen=True, slots=True)
class Upload:
    """Where objects of an output are put, by whom, and how each is proved. Picklable."""

    ledger: Ledger
    run: str
    """Of the claim: once another run has taken over, nothing is put any more."""
    making: str
    """See `Claim.making`."""
    root: str
    """Prefix of the keys, with a slash at its end."""

    def put(self, key: str, content: Content) -> FileRecord:
        """Put an object at a key below the root, and prove that the store holds it.

        A put under the condition that nothing is there never harms what a later run has put: a task of an earlier one
        may be late. What differs from ours is replaced by the run alone that has the claim, and only as it was seen.
        Where the store's tag of an object is the MD5 of its bytes, it is proof; otherwise the object is read back.
        """
        bucket, path, digest = self.ledger.bucket, self.root + key, digest_content(content)
        self.ledger.check(self.run)
        held = None
        for _ in range(_TRIES):
            try:
                made = bucket.put_if(path, content, held)
            except TakenError:
                found = bucket.compare(path, content)
                if found is None:
                    held = None
                    continue
                held, same = found
                if not same:
                    self.ledger.check(self.run)
                    continue
                made = held
            else:
                if made.tag != digest:
                    read = bucket.compare(path, content)
                    if read is None or not read[1]:
                        raise IntegrityError(
                            f"an object reads back as it was written; {bucket.url}/{path} does not: check the store "
                            f"and memory"
                        )
                    made = read[0]
            return FileRecord(key, len(content), extend_crc32(0, content), made.tag)
        raise IntegrityError(
            f"one run writes an output at a time; {bucket.url}/{path} changes under way; end the other"
        )

    def look(self) -> str:
        """See `preflight.Sight.look`."""
        try:
            replace(self.ledger, bucket=self.ledger.bucket.hurried()).check(self.run)
        except PipelineError as error:
            return f"{self.ledger.name}: {error}"
        return ""


@dataclass(frozen=True, slots=True)
class ObjectWriter:
    """Fills an array in the layout that this package writes; see `outputs.Writer`. Picklable."""

    upload: Upload
    array: zarr.Array[Any]
    """Its metadata, in a store in memory that holds nothing else."""

    def sights(self) -> tuple[Upload, ...]:
        """See `outputs.Writer.sights`: the claim."""
        return (self.upload,)

    def write(
        self, first: int, stop: int, read: Callable[[int, int], NDArray[Any]], task: int | None
    ) -> list[FileRecord]:
        """See `outputs.Writer.write`; the task is noted as finished."""
        layout, array = read_layout(self.array), self.array
        plain = layout.reader == "ranged" and layout.chunk_checksum
        written = []
        for start in range(first, stop, layout.file_rows):
            end = min(start + layout.file_rows, stop)
            encoded = (
                self._encode_plain(layout, start, end, read) if plain else _encode_by_zarr(array, start, end, read)
            )
            written += [self.upload.put(key, content) for key, content in encoded]
        if task is not None:
            self.upload.ledger.note(self.upload.run, self.upload.making, task, written)
        return written

    def _encode_plain(
        self, layout: Layout, start: int, end: int, read: Callable[[int, int], NDArray[Any]]
    ) -> Iterable[tuple[str, Content]]:
        """Key and bytes of a file of plain chunks."""
        array, filled = self.array, 0
        shape, dtype = array.shape[1:], np.dtype(array.dtype)
        content = np.empty(encoded_nbytes(layout, math.prod(shape) * dtype.itemsize, end - start), np.uint8)
        for part in encode_plain(layout, shape, dtype, start, end, read):
            content[filled : filled + len(part)] = part
            filled += len(part)
        assert filled == len(content)
        return [(layout.files.path(start // layout.file_rows), content)]


def _encode_by_zarr(
    array: zarr.Array[Any], start: int, end: int, read: Callable[[int, int], NDArray[Any]]
) -> Iterator[tuple[str, Content]]:
    """Yield key and bytes of each file that holds entries [start, end), as zarr encodes them."""
    kept = _fill_store(array, start, end, read(start, end))
    for key in sorted(kept):
        yield key, kept.pop(key).as_numpy_array().view(np.uint8)


@pinned_config()
def _fill_store(array: zarr.Array[Any], start: int, end: int, block: NDArray[Any]) -> dict[str, Any]:
    """Encode entries [start, end) of an array, and return the contents of its store."""
    import zarr
    from zarr.core.array import AsyncArray
    from zarr.storage import MemoryStore, StorePath

    kept: dict[str, Any] = {}
    inner: AsyncArray[Any] = AsyncArray(
        array.metadata, StorePath(MemoryStore(kept), array.path), array.async_array.config
    )
    twin = zarr.Array(inner)
    twin[start:end] = block
    found = np.asarray(twin[start:end])
    if not np.array_equal(found.view(np.uint8), np.ascontiguousarray(block, twin.dtype).view(np.uint8)):
        raise IntegrityError(
            f"a file is decoded as it was encoded; entries {start} to {end - 1} of {array.path or 'the array'} are "
            f"not: check memory"
        )
    return kept
