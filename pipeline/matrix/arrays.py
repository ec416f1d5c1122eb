"""A Zarr array: opened, decoded without an event loop, and read with no chunk missing."""

from __future__ import annotations

import contextlib
import json
import math
import os
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from pipeline.errors import BudgetError, IntegrityError, NotFoundError, OpenError, PipelineError, find_shortage
from pipeline.formatting import format_size
from pipeline.matrix.notice import read_notice
from pipeline.memory import budget
from pipeline.storage.listing import hurried, read_key
from pipeline.storage.locations import AccessError, Url, name_store, plain, say_failure
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray
    from zarr.abc.store import Store

    from pipeline.storage.locations import Location

_LISTED = 10
"""Names that an error lists at most."""


def open_array(path: Path) -> zarr.Array[Any]:
    """Open the Zarr array in a folder, for reading; the errors of `open_folder`, and OpenError for a group."""
    import zarr

    node = open_folder(path)
    return node if isinstance(node, zarr.Array) else refuse_group(node, str(path))


def open_folder(path: Path) -> zarr.Array[Any] | zarr.Group:
    """Open the Zarr array or group in a folder, for reading.

    Raises
    ------
    NotFoundError
        If there is none.
    OpenError
        If it is no folder, or metadata are absent or cannot be parsed.
    """
    if not os.path.lexists(path):
        raise NotFoundError(f"a matrix is there before it is opened; nothing is at {path}; check the path")
    if not path.is_dir():
        raise OpenError(f"a Zarr array is a folder; {path} is none; name another")
    if not any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup")):
        raise OpenError(f"a Zarr array has a zarr.json or .zarray; {path} has neither; name a folder that has")
    return open_node(path)


def open_stored(store: Store, name: str) -> zarr.Array[Any]:
    """Open the Zarr array at the root of a store, for reading; the errors of `open_root`, and OpenError for a group."""
    import zarr

    node = open_root(store, name)
    return node if isinstance(node, zarr.Array) else refuse_group(node, name)


@pinned_config()
def open_root(store: Store, name: str) -> zarr.Array[Any] | zarr.Group:
    """Open the Zarr array or group at the root of a store, by as few requests as there can be: one, for v3.

    Parameters
    ----------
    name
        For messages.

    Raises
    ------
    NotFoundError
        If there is none.
    OpenError
        If the store fails, metadata cannot be parsed, or an output is being replaced.
    """
    import zarr
    from zarr.storage import StorePath

    found, denied = None, None
    first = hurried(store)
    for key in ("zarr.json", ".zarray", ".zgroup"):
        try:
            found = read_key(first, key)
        except AccessError as error:
            # Who may not list a bucket is refused what is not there.
            denied = denied or error
        if found is not None:
            break
    if found is None:
        raise denied or NotFoundError(f"a matrix is there before it is opened; nothing is at {name}; check the name")
    if making := read_notice(found):
        raise OpenError(
            f"{name} holds an unfinished replacement that an older version left; the new output is whole beside it, in "
            f".partial/output-{making}: read that, or finish the replacement with the older version"
        )
    try:
        if key == "zarr.json" and (document := json.loads(found)).get("node_type") == "array":
            return zarr.Array.from_dict(StorePath(store), document)
        return zarr.open(store=store, mode="r", zarr_format=3 if key == "zarr.json" else 2)
    except Exception as error:  # noqa: BLE001 (zarr raises what its parsers raise)
        raise _unreadable(name, error) from plain(error)


@pinned_config()
def refuse_group(group: zarr.Group, name: str, rule: str = "a matrix is one Zarr array") -> NoReturn:
    """Raise OpenError for a group, naming the arrays in it; `rule` says why it is not taken."""
    import zarr

    names: list[str] = []
    # Web servers cannot tell what they have.
    with contextlib.suppress(Exception):
        names = sorted(each for each, member in group.members(max_depth=None) if isinstance(member, zarr.Array))
    held = f"with the arrays {', '.join(names[:_LISTED])}" if names else "without arrays"
    held += f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    # Of a result its windows, not what lies beside them.
    first = min(names, key=lambda each: each in ("places", "starts"), default="")
    way_out = f"write {name}/{first}" if names else "name another folder"
    raise OpenError(f"{rule}; {name} is a group {held}; {way_out}")


def _unreadable(name: str, error: Exception) -> PipelineError:
    return find_shortage(error) or OpenError(
        f"Zarr metadata are readable; {name}: {say_failure(error)[:200]}; restore them"
    )


@pinned_config()
def open_node(folder: Path) -> zarr.Array[Any] | zarr.Group:
    """Open the Zarr array or group in a folder; OpenError where there is none."""
    import zarr

    try:
        return zarr.open(store=folder.absolute(), mode="r")
    except Exception as error:  # zarr raises what its parsers raise
        raise _unreadable(str(folder), error) from error


@pinned_config()
def reading_config(array: zarr.Array[Any], *, fills: bool = False) -> zarr.Array[Any]:
    """Let an array decode without an event loop and within bounds, and raise where a key is absent, unless `fills`.

    Zarr gives the fill value for what a shard leaves out, all the same.
    """
    from zarr.core.array_spec import ArrayConfig

    from pipeline.matrix.bounded_codecs import bound_codecs

    # An array takes codecs and pipeline from the configuration in force when it is made, and keeps them when pickled.
    inner: Any = array.async_array
    metadata = bound_codecs(type(inner.metadata).from_dict(inner.metadata.to_dict()), name_store(array.store_path))
    return type(array)(type(inner)(metadata, inner.store_path, ArrayConfig.from_dict({"read_missing_chunks": fills})))


@pinned_config()
def without_attributes(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return the same array without its attributes, which in those of ours name every file: tasks carry it."""
    twin = copy(array.async_array)
    object.__setattr__(twin, "metadata", twin.metadata.update_attributes({}))
    return type(array)(twin)


@pinned_config()
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
            f"a chunk is decoded whole; one of {name} takes {format_size(nbytes)}, {allowed}"
            f"; write the array anew in smaller chunks"
        )
    return shape


def may_lack_chunks(array: zarr.Array[Any]) -> bool:
    """Tell whether its keys may leave out chunks, which zarr then fills: shards may."""
    from zarr.codecs import ShardingCodec

    return any(isinstance(codec, ShardingCodec) for codec in getattr(array.metadata, "codecs", ()))


@pinned_config()
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
    block = np.asarray(array[selection])
    if checked or not may_lack_chunks(array):
        return block
    if _read_otherwise_filled(array, selection).tobytes() != block.tobytes():
        raise IntegrityError(
            f"every chunk is there; a shard of {array.store_path} leaves some out at {selection}; write it with "
            "write_empty_chunks=True"
        )
    return block


@pinned_config()
def read_filled(array: zarr.Array[Any], selection: tuple[slice, ...]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Read part of an array of `reading_config` with `fills`, and tell which of its values are in absent chunks."""
    block = np.ascontiguousarray(array[selection])
    other = np.ascontiguousarray(_read_otherwise_filled(array, selection))
    size = block.dtype.itemsize
    differ = block.reshape(-1).view(np.uint8) != other.reshape(-1).view(np.uint8)
    return block, differ.reshape(-1, size).any(axis=1).reshape(block.shape)


def _read_otherwise_filled(array: zarr.Array[Any], selection: tuple[slice, ...]) -> NDArray[Any]:
    """Read part of an array, whatever is absent having another value than its fill value."""
    inner: Any = array.async_array
    fill: Any = array.metadata.dtype.cast_scalar(0)
    if np.asarray(array.fill_value).tobytes() == np.asarray(fill).tobytes() or array.fill_value is None:
        fill = array.metadata.dtype.cast_scalar(1)
    twin = copy(inner)
    object.__setattr__(twin, "metadata", replace(inner.metadata, fill_value=fill))
    return np.asarray(type(array)(twin)[selection])


def local_folder(array: zarr.Array[Any]) -> Path | None:
    """Folder that an array lies in; None where its store is not on a local disk."""
    from zarr.storage import LocalStore

    store = array.store_path.store
    return Path(store.root, array.path) if isinstance(store, LocalStore) else None


def locate_array(array: zarr.Array[Any]) -> Location | None:
    """Folder or URL that an array lies at; None where its store does not tell."""
    url = getattr(array.store, "url", None)
    return url.child(array.path) if isinstance(url, Url) else local_folder(array)


@pinned_config()
def count_nbytes(array: zarr.Array[Any]) -> int:
    """Count the bytes that an array takes in its store."""
    from zarr.storage import LocalStore

    store = array.store_path.store
    if not isinstance(store, LocalStore):
        try:
            return array.nbytes_stored()
        except Exception:  # noqa: BLE001 (a store raises what it likes, where it cannot be listed)
            return array.nbytes
    # The same number without a coroutine for each file.
    folders = os.walk(store.root / array.store_path.path)
    return sum(Path(folder, name).stat().st_size for folder, _, names in folders for name in names)
