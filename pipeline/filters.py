"""Filters that the chunks of an HDF5 data set passed: undone here, by libhdf5, or by a plug-in of it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import OpenError
from pipeline.references import find_filters

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEFLATE, _SHUFFLE, _FLETCHER32, _BLOSC, _ZSTD = 1, 2, 3, 32001, 32015
"""Registered identifiers of the filters that are decoded here."""

_OWN_FILTERS = 256
"""Registered identifiers below this belong to libhdf5 itself, others to plug-ins."""

_DONT_FILTER_PARTIAL_CHUNKS = 2
"""Bit of a data set's chunk options."""

_BLOSC_SNAPPY = 3
"""Compressor of Blosc, by its number in the filter's parameters, that numcodecs is built without."""

FAILURES = (OSError, RuntimeError, KeyError, ValueError, zlib.error)
"""What h5py and decoders raise for data that they cannot read."""


def can_decode(filters: Sequence[tuple[int, int, tuple[int, ...], bytes]]) -> bool:
    """Whether `undo_filter` gives what libhdf5 gives; of filters as h5py lists them."""
    identifiers = [f[0] for f in filters]
    snappy = any(f[0] == _BLOSC and f[2][6:7] == (_BLOSC_SNAPPY,) for f in filters)
    # Behind a checksum the bytes are no whole elements any more, which HDF5 shuffles in a way of its own.
    known = {*identifiers} <= {_DEFLATE, _SHUFFLE, _FLETCHER32, _BLOSC, _ZSTD}
    return known and not snappy and _SHUFFLE not in identifiers[1:]


def undo_filter(identifier: int, parameter: int, raw: Any, size: int) -> Any:
    """Undo one filter outside of h5py's lock, and outside of Python's."""
    import numcodecs
    from numcodecs.fletcher32 import Fletcher32

    if identifier == _DEFLATE:
        # `size` is a guess that saves growing the result.
        return zlib.decompress(raw, bufsize=size + 4)
    if identifier == _SHUFFLE:
        # Not numcodecs' own, which holds Python's lock: copies in NumPy do not, and are faster.
        planes = np.frombuffer(raw, np.uint8).reshape(parameter, -1)
        elements = np.empty(planes.shape[::-1], np.uint8)
        for position, plane in enumerate(planes):
            elements[:, position] = plane
        return elements.reshape(-1)
    codecs = {_FLETCHER32: Fletcher32(), _BLOSC: numcodecs.Blosc(), _ZSTD: numcodecs.Zstd()}
    return codecs[identifier].decode(raw)


def filters_edges(properties: Any) -> bool:
    """Whether chunks that reach past the edge pass the filters, too; False where libhdf5 cannot be asked."""
    import h5py

    options = ctypes.c_uint()
    try:
        # h5py has no call for it. Its modules are linked to libhdf5, under whose lock it is called.
        ask = ctypes.CDLL(h5py.h5p.__file__).H5Pget_chunk_opts
        ask.argtypes, ask.restype = (ctypes.c_int64, ctypes.POINTER(ctypes.c_uint)), ctypes.c_int
        with h5py.h5p.phil:
            return ask(properties.id, options) >= 0 and not options.value & _DONT_FILTER_PARTIAL_CHUNKS
    except (OSError, AttributeError):
        return False


def load_plugins(dataset: Any) -> None:
    """Register hdf5plugin with libhdf5, where it is installed and a data set may need it."""
    # What a virtual data set maps may have any filter.
    if dataset.is_virtual or not dataset.id.get_create_plist().all_filters_avail():
        with contextlib.suppress(ImportError):
            import hdf5plugin  # noqa: F401


def absent_filters(file: Any, name: str) -> list[tuple[int, str]]:
    """Filters that libhdf5 lacks in this process, of a data set and of all that it takes values from."""
    import h5py

    return [(code, title) for code, title in find_filters(file, name) if not h5py.h5z.filter_avail(code)]


def check_filters(file: Any, name: str, dataset: Any) -> None:
    """Raise `OpenError` if h5py lacks a filter of a chunked data set; other data sets say so when they are read."""
    load_plugins(dataset)
    absent = absent_filters(file, name) if dataset.chunks else []
    if absent and dataset.id.get_num_chunks():
        # A chunk may have skipped the filter, or be stored without.
        corner = dataset.id.get_chunk_info(0).chunk_offset
        try:
            dataset[tuple(slice(c, c + 1) for c in corner)]
        except FAILURES as error:
            raise filter_error(file, name, absent) from error


def filter_error(file: Any, name: str, absent: Sequence[tuple[int, str]]) -> OpenError:
    """Name the first filter that is not available, and the way to it."""
    code, title = absent[0]
    if code < _OWN_FILTERS:
        way_out = "install an h5py whose libhdf5 has it"
    elif importlib.util.find_spec("hdf5plugin") is None:
        way_out = "pip install hdf5plugin"
    else:
        way_out = "hdf5plugin does not have it either: install its HDF5 plugin, and set HDF5_PLUGIN_PATH"
    return OpenError(
        f"the HDF5 filter {title!r} ({code}) is not available; {file.filename}::{name} needs it; {way_out}"
    )
