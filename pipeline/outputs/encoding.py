"""A file of uncompressed chunks, byte for byte as zarr encodes it, written as fast as the disk takes it."""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from pipeline.errors import IntegrityError
from pipeline.integrity.record import record_file
from pipeline.matrix.chunks import CHECKSUM_NBYTES
from pipeline.matrix.layout import Files
from pipeline.plan.cost import slab_nbytes
from pipeline.storage.checksums import FileRecord, extend_crc32
from pipeline.storage.filesystem import advise, flush, move_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from pipeline.matrix.layout import Layout


def write_plain(
    layout: Layout,
    entry_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    first: int,
    stop: int,
    read: Callable[[int, int], NDArray[Any]],
) -> FileRecord:
    """Write one file of chunks that are plain bytes and a checksum each: beside its name, flushed, read back, renamed.

    Parameters
    ----------
    layout
        That a `direct` reader reads, with a checksum after each chunk.
    entry_shape, dtype
        Of one entry along the first axis.
    first, stop
        Entries of the file: as many as it holds, or up to the end of the array.
    read
        Gives entries [a, b) of the array, asked for in order, each once.

    Returns
    -------
    FileRecord
        Its key is relative to the array's folder.

    Raises
    ------
    OSError
        As the system says it.
    IntegrityError
        If the file does not read back as it was written.
    """
    files = layout.files
    assert isinstance(files, Files)
    path = Path(files.path(first // layout.file_rows))
    _make_folders(Path(files.root), path.parent)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    parts = encode_plain(layout, entry_shape, dtype, first, stop, read)
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            written, crc32c = _write_parts(fd, parts)
            flush(fd)
        finally:
            os.close(fd)
        _check_written(partial, written.nbytes, crc32c)
        move_file(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return written._replace(key=os.path.relpath(path, files.root))


def _make_folders(root: Path, folder: Path) -> None:
    """Make folders below one that is there: a run that has ended, or a worker that does not share it, has none."""
    for parent in reversed([folder, *folder.parents]):
        if root in parent.parents:
            with contextlib.suppress(FileExistsError):
                parent.mkdir()


def _check_written(path: Path, nbytes: int, crc32c: int) -> None:
    """Read a file back. By crc32c, which takes a third of the time of the crc32 that is recorded."""
    found = record_file(path.parent, path.name, extend=google_crc32c.extend)
    if (found.nbytes, found.crc32) != (nbytes, crc32c):
        raise IntegrityError(f"a file reads back as it was written; {path} does not: check the disk and memory")


def encode_plain(
    layout: Layout,
    entry_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    first: int,
    stop: int,
    read: Callable[[int, int], NDArray[Any]],
) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of one file in parts, each good until the next: its chunks, then the index of a shard.

    Parameters are those of `write_plain`; the layout may also be that of a `ranged` reader.
    """
    entry_nbytes = math.prod(entry_shape) * dtype.itemsize
    chunk_nbytes = layout.chunk_rows * entry_nbytes
    step = slab_nbytes(layout.file_rows * entry_nbytes, chunk_nbytes) // entry_nbytes
    slab = np.empty((step // layout.chunk_rows, chunk_nbytes + CHECKSUM_NBYTES), np.uint8)
    written = 0
    for start in range(first, stop, step):
        entries = _as_bytes(read(start, min(start + step, stop)), dtype)
        whole, rest = divmod(len(entries), chunk_nbytes)
        chunks = slab[: whole + bool(rest)]
        chunks[:whole, :-CHECKSUM_NBYTES] = entries[: len(entries) - rest].reshape(whole, chunk_nbytes)
        if rest:
            # The array's last chunk: what it lacks reads as zeros, the fill value.
            chunks[-1, :rest] = entries[-rest:]
            chunks[-1, rest:] = 0
        for chunk in chunks:
            checksum = google_crc32c.value(chunk[:-CHECKSUM_NBYTES])
            chunk[-CHECKSUM_NBYTES:] = np.frombuffer(checksum.to_bytes(CHECKSUM_NBYTES, "little"), np.uint8)
        written += chunks.size
        yield chunks.reshape(-1)
    if layout.files.index is not None:
        index = layout.files.index.encode(np.arange(0, written, slab.shape[1]), slab.shape[1])
        yield np.frombuffer(index, np.uint8)


def encoded_nbytes(layout: Layout, entry_nbytes: int, entries: int) -> int:
    """Bytes that `encode_plain` yields for so many entries."""
    index = layout.files.index
    chunks = -(-entries // layout.chunk_rows)
    return chunks * (layout.chunk_rows * entry_nbytes + CHECKSUM_NBYTES) + (index.nbytes if index else 0)


def _as_bytes(entries: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(entries, dtype.newbyteorder("<")).reshape(-1).view(np.uint8)


def _write_parts(fd: int, parts: Iterator[NDArray[np.uint8]]) -> tuple[FileRecord, int]:
    """Write a file as it is encoded; return what was written, and its crc32c."""
    written = crc32 = crc32c = 0
    for part in parts:
        crc32, crc32c = extend_crc32(crc32, part), google_crc32c.extend(crc32c, part)
        _write_fully(fd, memoryview(part))
        # Linux starts writing such pages to the disk at once, so that the flush at the end finds little to do.
        advise(fd, written, len(part), "DONTNEED")
        written += len(part)
    return FileRecord("", written, crc32), crc32c


def _write_fully(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]
