"""Matrices of every layout, by other writers, too; all values differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import obstore.store
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore, ObjectStore

import pipeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

ROWS = 211


def distinct(rows: int = ROWS, row_shape: tuple[int, ...] = (5, 3), dtype: str = "f8") -> NDArray[Any]:
    """(rows, *row_shape), no value twice, none of them 0, the fill value."""
    count = rows * int(np.prod(row_shape, dtype=int))
    return np.arange(1, count + 1).reshape(rows, *row_shape).astype(dtype)


def stack(a: NDArray[Any], starts: Any, length: int) -> NDArray[Any]:
    """The oracle."""
    return np.stack([a[int(start) : int(start) + length] for start in starts])


def _ours(**settings: Any) -> Callable[[Path, NDArray[Any]], None]:
    def write(path: Path, a: NDArray[Any]) -> None:
        np.save(path.with_suffix(".npy"), a)
        pipeline.create_matrix(path.with_suffix(".npy"), path, **settings)

    return write


def _zarr(**settings: Any) -> Callable[[Path, NDArray[Any]], None]:
    def write(path: Path, a: NDArray[Any]) -> None:
        shaped = {
            key: tuple(n or m for n, m in zip(value, a.shape, strict=True))
            for key, value in settings.items()
            if key in {"chunks", "shards"}
        }
        array = zarr.create_array(
            str(path), shape=a.shape, dtype=a.dtype, config={"write_empty_chunks": True}, **settings | shaped
        )
        array[:] = a

    return write


def _sharded(shard: int, chunk: int, codecs: list[Any], **settings: Any) -> Callable[[Path, NDArray[Any]], None]:
    def write(path: Path, a: NDArray[Any]) -> None:
        serializer = ShardingCodec(chunk_shape=(chunk, *a.shape[1:]), codecs=codecs, **settings)
        array = zarr.create_array(
            str(path), shape=a.shape, dtype=a.dtype, chunks=(shard, *a.shape[1:]), serializer=serializer, compressors=None, filters=None,
            config={"write_empty_chunks": True},
        )  # fmt: skip
        array[:] = a

    return write


def _npy(path: Path, a: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, a)


def _hdf5(path: Path, a: NDArray[Any]) -> None:
    with h5py.File(path, "w") as file:
        file["scalar"] = 3
        file["group/test"] = a


LAYOUTS: dict[str, tuple[str, Callable[[Path, NDArray[Any]], None]]] = {
    # name: (the reader that must serve it, how it is written); 211 rows fill no file to its end.
    "default": ("direct", _ours()),
    "shards": ("direct", _ours(shard_rows=24, chunk_rows=4)),
    "plain": ("direct", _ours(shard_rows=0, chunk_rows=16)),
    "one-row-chunks": ("direct", _ours(shard_rows=7, chunk_rows=1)),
    "zstd": ("decoded", _ours(compress="zstd", length=4, shard_rows=48, chunk_rows=4)),
    "blosc-plain": ("decoded", _ours(compress="blosc", shard_rows=0, chunk_rows=9)),
    "zarr-plain": ("direct", _zarr(chunks=(10, 0, 0), compressors=None)),
    "zarr-v2-key": ("direct", _zarr(chunks=(10, 0, 0), compressors=None, chunk_key_encoding={"name": "v2", "configuration": {"separator": "."}})),
    "zarr-morton": ("direct", _sharded(32, 4, [BytesCodec()])),
    "zarr-index-first": ("direct", _sharded(32, 4, [BytesCodec(), Crc32cCodec()], index_location="start")),
    "zarr-index-plain": ("direct", _sharded(32, 4, [BytesCodec()], index_codecs=[BytesCodec()])),
    "zarr-shard-gzip": ("decoded", _sharded(32, 4, [BytesCodec(), GzipCodec()])),
    "zarr-shard-zstd-index": ("decoded", _sharded(32, 4, [BytesCodec()], index_codecs=[BytesCodec(), Crc32cCodec(), Crc32cCodec()])),
    "zarr-crc": ("direct", _zarr(chunks=(10, 0, 0), compressors=[Crc32cCodec()])),
    "zarr-zstd": ("decoded", _zarr(chunks=(10, 0, 0), compressors=[ZstdCodec()])),
    "columns": ("decoded", _zarr(chunks=(10, 2, 2), compressors=None)),
    "columns-shards": ("decoded", _zarr(chunks=(5, 2, 3), shards=(20, 4, 3), compressors=None)),
    "wide-shards": ("decoded", _zarr(chunks=(5, 0, 0), shards=(20, 10, 6), compressors=None)),
    "wide-chunks": ("decoded", _zarr(chunks=(300, 8, 8), compressors=None)),
    "transposed": ("decoded", _zarr(chunks=(10, 0, 0), compressors=None, filters=[TransposeCodec(order=(2, 1, 0))])),
    "big-endian": ("decoded", _zarr(chunks=(10, 0, 0), compressors=None, serializer=BytesCodec(endian="big"))),
    "v2": ("direct", _zarr(chunks=(10, 0, 0), compressors=None, zarr_format=2)),
    "v2-slash": ("direct", _zarr(chunks=(10, 0, 0), compressors=None, zarr_format=2, chunk_key_encoding={"name": "v2", "separator": "/"})),
    "v2-fortran": ("decoded", _zarr(chunks=(10, 0, 0), compressors=None, zarr_format=2, order="F")),
    "v2-zstd": ("decoded", _zarr(chunks=(10, 0, 0), zarr_format=2)),
    # Read in place: known by how the files begin, whatever their names.
    "npy": ("direct", _npy),
    "hdf5": ("direct", _hdf5),
}  # fmt: skip


def in_memory(path: Path) -> MemoryStore:
    """A folder's files as the keys of a store in memory."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return MemoryStore(
        {str(file.relative_to(path)): cpu.Buffer.from_bytes(file.read_bytes()) for file in files}, read_only=True
    )


def as_objects(path: Path) -> ObjectStore[Any]:
    """A folder through obstore, as a bucket is read."""
    return ObjectStore(obstore.store.LocalStore(path), read_only=True)


STORES: dict[str, Callable[[Path], Any]] = {"memory": in_memory, "objects": as_objects}

READERS: dict[str, str] = {
    **{name: reader for name, (reader, _) in LAYOUTS.items()},
    **{f"{name}@objects": "ranged" for name, (reader, _) in LAYOUTS.items() if reader == "direct" and name not in {"npy", "hdf5"}},
    **dict.fromkeys(["default@memory", "plain@memory", "zarr-index-first@memory", "v2@memory"], "ranged"),
    **dict.fromkeys(["zstd@objects", "columns-shards@objects", "zarr-shard-gzip@memory", "big-endian@objects"], "decoded"),
}  # fmt: skip
"""The reader that must serve each layout, and each layout in another store."""


def open_layout(folder: Path, name: str) -> pipeline.Matrix:
    """Open `folder/name.zarr`, or, with a name such as `shards@objects`, the same through another store."""
    layout, _, store = name.partition("@")
    path = folder / f"{layout}.zarr"
    return pipeline.open_matrix(zarr.open_array(STORES[store](path), mode="r") if store else path)
