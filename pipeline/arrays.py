"""A Zarr array: opened, decoded without an event loop, and read with no chunk missing."""

from __future__ import annotations

import math
import os
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import BudgetError, IntegrityError, NotFoundError, OpenError
from pipeline.memory import budget
from pipeline.sizes import format_size

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

FUSED_PIPELINE = "zarr.core.codec_pipeline.FusedCodecPipeline"
"""The codec pipeline of zarr that works in the calling thread; about 1.7 times as fast here as its default."""
_LISTED = 10
"""Names that an error lists at most."""


def open_array(path: Path) -> zarr.Array[Any]:
    """Open the Zarr array in a folder, for reading; the errors of `open_matrix`."""
    import zarr

    if not os.path.lexists(path):
        raise NotFoundError(f"a matrix is there before it is opened; nothing is at {path}; check the path")
    if not path.is_dir():
        raise OpenError(f"a Zarr array is a folder; {path} is none; name another")
    if not any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup")):
        raise OpenError(f"a Zarr array has a zarr.json or .zarray; {path} has neither; name a folder that has")
    node = open_node(path)
    if isinstance(node, zarr.Array):
        return node
    names = sorted(name for name, member in node.members(max_depth=None) if isinstance(member, zarr.Array))
    held = f"with the arrays {', '.join(names[:_LISTED])}" if names else "without arrays"
    held += f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    way_out = f"write {path / names[0]}" if names else "name another folder"
    raise OpenError(f"a matrix is one Zarr array; {path} is a group {held}; {way_out}")


def open_node(folder: Path) -> zarr.Array[Any] | zarr.Group:
    """Open the Zarr array or group in a folder; OpenError where there is none."""
    import zarr

    try:
        return zarr.open(store=folder.absolute(), mode="r")
    except Exception as error:  # zarr raises what its parsers raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OpenError(f"Zarr metadata are readable; {folder}: {reason}; restore them") from error


def reading_config(array: zarr.Array[Any], *, fills: bool = False) -> zarr.Array[Any]:
    """Let an array decode without an event loop, and raise where a key is absent, unless `fills` asks for fill values.

    Zarr gives the fill value for what a shard leaves out, all the same.
    """
    import zarr

    # An array takes its codec pipeline from the configuration in force when it is made, and keeps it when pickled.
    with zarr.config.set({"codec_pipeline.path": FUSED_PIPELINE}):
        return array.with_config({"read_missing_chunks": fills})


def check_decodable(array: zarr.Array[Any], name: str) -> tuple[int, ...]:
    """Return the shape of what zarr decodes in one go, or raise BudgetError where that does not fit the memory.

    Metadata may say anything: it is read before anything of that size is allocated.
    """
    # Codecs around a shard's own make zarr read the shard whole.
    whole = not array.async_array.codec_pipeline.supports_partial_decode
    try:
        shape: tuple[int, ...] = (array.shards if whole else None) or array.chunks
    except NotImplementedError:  # Chunks of several sizes: each is listed.
        shape = tuple(map(max, array.write_chunk_sizes if whole else array.read_chunk_sizes))
    nbytes, allowed = math.prod(shape) * np.dtype(array.dtype).itemsize, budget()
    if nbytes > allowed.nbytes:
        raise BudgetError(
            f"a chunk is decoded whole; one of {name} takes {format_size(nbytes)}, {allowed.source} allows "
            f"{format_size(allowed.nbytes)}; write the array anew in smaller chunks"
        )
    return shape


def read_present(array: zarr.Array[Any], selection: tuple[slice, ...], *, checked: bool = False) -> NDArray[Any]:
    """Read part of an array of `reading_config`, refusing inner chunks that its shards lack.

    Zarr raises for a key that is absent, but gives the fill value for what a shard leaves out. What is there does not
    depend on the fill value: where shards are involved, a second reading with another one tells.

    Parameters
    ----------
    checked
        Whether the shards' indexes were looked at already, so that one reading is enough.

    Raises
    ------
    IntegrityError
        If the two readings differ.
    """
    from zarr.codecs import ShardingCodec

    block = np.asarray(array[selection])
    codecs = getattr(array.metadata, "codecs", ())
    if checked or not any(isinstance(codec, ShardingCodec) for codec in codecs):
        return block
    inner: Any = array.async_array
    fill: Any = array.metadata.dtype.cast_scalar(0)
    if np.asarray(array.fill_value).tobytes() == np.asarray(fill).tobytes():
        fill = array.metadata.dtype.cast_scalar(1)
    twin = copy(inner)
    object.__setattr__(twin, "metadata", replace(inner.metadata, fill_value=fill))
    if np.asarray(type(array)(twin)[selection]).tobytes() != block.tobytes():
        raise IntegrityError(
            f"every chunk is there; a shard of {array.store_path} leaves some out at {selection}; write it with "
            "write_empty_chunks=True"
        )
    return block


def count_nbytes(array: zarr.Array[Any]) -> int:
    """Count the bytes that an array takes in its store."""
    from zarr.storage import LocalStore

    store = array.store_path.store
    if not isinstance(store, LocalStore):
        return array.nbytes_stored()
    # The same number without a coroutine for each file.
    folders = os.walk(store.root / array.store_path.path)
    return sum(Path(folder, name).stat().st_size for folder, _, names in folders for name in names)
