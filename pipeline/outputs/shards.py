"""What we write: a Zarr array of uncompressed or compressed shards, every inner chunk with its crc32c."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import DiskSpaceError, InputError, IntegrityError, OpenError, PipelineError
from pipeline.integrity.record import record_file
from pipeline.matrix.layout import Files, read_layout
from pipeline.outputs.encoding import write_plain
from pipeline.plan.plan import BLOCK_NBYTES
from pipeline.storage.filesystem import sync_path
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import zarr
    from numpy.typing import NDArray
    from zarr.abc.store import Store

    from pipeline.matrix.layout import Layout
    from pipeline.storage.checksums import FileRecord

Compression = Literal["zstd", "blosc"]

CHUNK_NBYTES = 64 * 1024
"""An inner chunk holds about as many bytes of whole rows, at least one row."""
SHARD_NBYTES = BLOCK_NBYTES
_LEAST_COMPRESSED_NBYTES = 16 * 1024
_PLAIN_COMPRESSED_NBYTES = 2**20


@dataclass(frozen=True, slots=True)
class Cut:
    """How the first axis of an array is cut into files and chunks."""

    chunk: int
    """Entries of the first axis in one inner chunk."""
    shard: int
    """Entries in one file; 0 writes plain chunks."""
    inner: tuple[int, ...] = ()
    """Chunk shape along the other axes; empty where chunks hold them whole."""

    @property
    def file(self) -> int:
        """Entries of one file."""
        return self.shard or self.chunk


@pinned_config()
def create_array(
    path: Path | Store,
    name: str | None = None,
    *,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    cut: Cut,
    compress: Compression | None,
    dimension_names: Sequence[str],
    attributes: dict[str, Any],
) -> zarr.Array[Any]:
    """Create a Zarr v3 array in the layout that this package writes, to be filled by `write_entries`.

    It lies in the folder or store `path`, or, by its name, in the group that is there.
    """
    import zarr
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

    from pipeline.storage.folderstore import FolderStore

    compressors: dict[Any, list[Any]] = {
        "zstd": [ZstdCodec(level=3)],
        "blosc": [BloscCodec(typesize=dtype.itemsize)],
        None: [],
    }
    chunk = (cut.chunk, *(cut.inner or shape[1:]))
    serializer: Any = BytesCodec()
    outer = chunk
    after: list[Any] = [*compressors[compress], Crc32cCodec()]
    if cut.shard:
        # Written out in full: the `shards=` keyword leaves no word on a checksum within the shard's codecs.
        outer = (cut.shard, *shape[1:])
        serializer = ShardingCodec(
            chunk_shape=chunk, codecs=[BytesCodec(), *after], index_codecs=[BytesCodec(), Crc32cCodec()]
        )
        after = []
    store = FolderStore(path) if isinstance(path, Path) else path
    return zarr.create_array(
        store,
        name=name,
        shape=shape,
        dtype=dtype,
        chunks=outer,
        filters=None,
        serializer=serializer,
        compressors=after or None,
        dimension_names=list(dimension_names),
        attributes=attributes,
        # An empty chunk that is left out reads as the fill value, and so does a lost one: write them all.
        config={"write_empty_chunks": True},
    )


def write_entries(
    array: zarr.Array[Any], first: int, stop: int, read: Callable[[int, int], NDArray[Any]]
) -> list[FileRecord]:
    """Write entries [first, stop), whole files of an array that `create_array` made, flush them, and read them back.

    Uncompressed chunks are encoded here, byte for byte as zarr does it (its codecs `bytes`, `crc32c` and
    `sharding_indexed`), at several times its speed; all else is zarr's.

    Parameters
    ----------
    first, stop
        `first` begins a file; `stop` ends one, or the array.
    read
        Gives entries [a, b) of the array, asked for in order, each once.

    Returns
    -------
    list of FileRecord
        Of each file; keys are relative to the array's folder.

    Raises
    ------
    DiskSpaceError
        If the disk is full.
    OpenError
        If it cannot be written.
    IntegrityError
        If a file does not read back as it was written.
    """
    layout = read_layout(array)
    written = []
    plain = layout.reader == "direct" and layout.chunk_checksum
    try:
        for start in range(first, stop, layout.file_rows):
            end = min(start + layout.file_rows, stop)
            if plain:
                written.append(write_plain(layout, array.shape[1:], array.dtype, start, end, read))
            else:
                written += _write_by_zarr(array, layout, start, read(start, end))
    except PipelineError:
        raise
    except FileNotFoundError as error:
        raise OpenError(
            f"workers share the output's folder; {array.store_path} is not there: its run has ended, or this worker's "
            f"disk is another; start one that shares it"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(f"an output fits its disk; {array.store_path}: {error.strerror}; free some") from error
        raise OpenError(f"an output can be written; {array.store_path}: {error.strerror}; check the disk") from error
    return written


@pinned_config()
def _write_by_zarr(array: zarr.Array[Any], layout: Layout, start: int, block: NDArray[Any]) -> list[FileRecord]:
    """Write the entries of one file, or of those that hold the same rows."""
    files = layout.files
    assert isinstance(files, Files)
    stop = start + len(block)
    if not Path(files.root, "zarr.json").exists():
        # Zarr would make the folder anew.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), files.root)
    array[start:stop] = block
    number = start // layout.file_rows
    for path in files.paths(number):
        sync_path(Path(path))
    found = np.asarray(array[start:stop])
    if not np.array_equal(found.view(np.uint8), np.ascontiguousarray(block, array.dtype).view(np.uint8)):
        raise IntegrityError(
            f"a file reads back as it was written; {files.path(number)} does not: check the disk and memory"
        )
    root = Path(files.root)
    return [record_file(root, os.path.relpath(path, root)) for path in files.paths(number)]


def cut_rows(
    rows: int,
    row_nbytes: int,
    *,
    length: int,
    compress: Compression | None,
    chunk_rows: int | None,
    shard_rows: int | None,
) -> Cut:
    """Cut the rows of a matrix into shards of about 64 MiB and inner chunks of about 64 KiB, unless told otherwise.

    Chunks that are compressed hold a window of `length` rows, since they are decoded whole. Plain chunks
    (`shard_rows=0`) are larger, so that files stay few: 64 MiB, or 1 MiB where they are compressed.
    """
    if chunk_rows is None:
        nbytes = CHUNK_NBYTES
        if shard_rows == 0:
            nbytes = _PLAIN_COMPRESSED_NBYTES if compress else SHARD_NBYTES
        elif compress:
            nbytes = _LEAST_COMPRESSED_NBYTES
        chunk_rows = max(nbytes // row_nbytes, length if compress else 1, 1)
        if shard_rows:
            chunk_rows = math.gcd(chunk_rows, shard_rows) if shard_rows % chunk_rows else chunk_rows
    chunk = min(chunk_rows, rows)
    if shard_rows is None:
        # Shards of one size, so that the last one is not padded with almost as much again.
        chunks = -(-rows // chunk)
        shards = -(-chunks // max(1, SHARD_NBYTES // (chunk * row_nbytes)))
        return Cut(chunk, -(-chunks // shards) * chunk)
    if shard_rows % chunk:
        raise InputError(
            f"a shard holds whole chunks; got {shard_rows} shard rows of {chunk} chunk rows; give a multiple of {chunk}"
        )
    return Cut(chunk, shard_rows)


def cut_results(count: int, window_nbytes: int, task_windows: int, window_shape: tuple[int, ...]) -> Cut:
    """Cut the windows of a result: a task's windows are one shard, of chunks of whole windows of about 64 KiB.

    A window of more than 64 MiB is chunked along its rows.
    """
    shard = min(task_windows, count)
    chunk = max(1, min(shard, CHUNK_NBYTES // window_nbytes))
    while shard % chunk:
        chunk -= 1
    if window_nbytes > SHARD_NBYTES and window_shape and window_shape[0] > 1:
        rows = max(1, SHARD_NBYTES // (window_nbytes // window_shape[0]))
        return Cut(1, 0, (min(rows, window_shape[0]), *window_shape[1:]))
    return Cut(chunk, shard)
