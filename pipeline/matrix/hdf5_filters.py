"""Filters that the chunks of an HDF5 data set passed: undone here, by libhdf5, or by a plug-in of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import itertools
import lzma
import math
import zlib
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import IntegrityError, OpenError
from pipeline.matrix.decompress import ExcessError, ceiling, check_declared, inflate
from pipeline.matrix.hdf5_references import find_filters, list_stored

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF, _BLOSC, _ZSTD = 1, 2, 3, 32000, 32001, 32015
"""Registered identifiers of the filters that are decoded here."""

_CHECKSUM_NBYTES = 4
"""Of Fletcher32, behind what it is of."""

_COMPRESSORS = {_DEFLATE: "zlib", _BLOSC: "blosc", _ZSTD: "zstd"}
"""As Zarr calls them."""

_SZIP, _NBIT, _SCALE_OFFSET, _BZIP2, _LZ4, _BITSHUFFLE = 4, 5, 6, 307, 32004, 32008
"""Filters that libhdf5 and its plug-ins undo, which take as much memory as the chunk or its filter says."""

_OWN_FILTERS = 256
"""Registered identifiers below this belong to libhdf5 itself, others to plug-ins."""

_DONT_FILTER_PARTIAL_CHUNKS = 2
"""Bit of a data set's chunk options."""

_BLOSC_SNAPPY = 3
"""Compressor of Blosc, by its number in the filter's parameters, that numcodecs is built without."""

FAILURES = (OSError, RuntimeError, KeyError, ValueError, EOFError, zlib.error, lzma.LZMAError)
"""What h5py and decoders raise for data that they cannot read."""


def can_decode(filters: Sequence[tuple[int, int, tuple[int, ...], bytes]]) -> bool:
    """Whether `undo_filter` gives what libhdf5 gives; of filters as h5py lists them."""
    identifiers = [f[0] for f in filters]
    snappy = any(f[0] == _BLOSC and f[2][6:7] == (_BLOSC_SNAPPY,) for f in filters)
    # Behind a checksum the bytes are no whole elements any more, which HDF5 shuffles in a way of its own.
    known = all(_is_known(code) for code in identifiers)
    return known and not snappy and _SHUFFLE not in identifiers[1:]


def _is_known(identifier: int) -> bool:
    return identifier in (*_COMPRESSORS, _SHUFFLE, _FLETCHER32) or (identifier == _LZF and _find_lzf() is not None)


def undo_filter(identifier: int, parameter: int, raw: Any, size: int) -> Any:
    """Undo one filter outside of h5py's lock, and outside of Python's.

    Raises
    ------
    ExcessError
        If it gives much more than the chunk, of `size` bytes; see `inflate`.
    ValueError, RuntimeError, OSError, EOFError, zlib.error
        If the bytes are damaged.
    """
    from numcodecs.fletcher32 import Fletcher32

    if identifier in _COMPRESSORS:
        return inflate(_COMPRESSORS[identifier], raw, size)
    if identifier == _LZF:
        return _undo_lzf(raw, size)
    if identifier == _SHUFFLE:
        # Not numcodecs' own, which holds Python's lock: copies in NumPy do not, and are faster.
        planes = np.frombuffer(raw, np.uint8).reshape(parameter, -1)
        elements = np.empty(planes.shape[::-1], np.uint8)
        for position, plane in enumerate(planes):
            elements[:, position] = plane
        return elements.reshape(-1)
    if len(raw) <= _CHECKSUM_NBYTES:
        # As an excess: libhdf5 is not asked, since it would read outside of its memory.
        raise ExcessError(f"it has {len(raw)} bytes, no more than its checksum")
    return Fletcher32().decode(raw)


@cache
def _find_lzf() -> Any:
    """h5py's own decoder of LZF, which takes a bound; None where its modules do not lend it."""
    import h5py

    try:
        decode = ctypes.CDLL(h5py.h5z.__file__, use_errno=True).lzf_decompress
    except (OSError, AttributeError):
        return None
    decode.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)
    decode.restype = ctypes.c_uint
    return decode


def _undo_lzf(raw: Any, size: int) -> Any:
    encoded = np.frombuffer(raw, np.uint8)
    # Another filter may have added bytes before, such as a checksum or a header.
    decoded = np.empty(ceiling(size), np.uint8)
    nbytes = _find_lzf()(encoded.ctypes.data, encoded.nbytes, decoded.ctypes.data, decoded.nbytes)
    if not nbytes:
        if ctypes.get_errno() == errno.E2BIG:
            raise ExcessError(f"it holds more than {size} bytes")
        raise ValueError("its LZF is damaged")
    return decoded[:nbytes]


def refuse_excess(file: Any, name: str, where: tuple[slice, ...]) -> None:
    """Look at the chunks that h5py is to decode for a part of a data set: libhdf5 takes as much memory as they want.

    Raises
    ------
    ExcessError
        Naming a chunk that would be decoded to more than it has.
    """
    for dataset, part in list_stored(file, name, where):
        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(number) for number in range(properties.get_nfilters())]
        if not filters or not dataset.id.get_num_chunks():
            continue
        nbytes = math.prod(dataset.chunks) * dataset.id.get_type().get_size()
        grid = [range(p.start // n * n, p.stop, n) for p, n in zip(part, dataset.chunks, strict=True)]
        all_filtered = filters_edges(properties)
        for corner in itertools.product(*grid):
            ends = (c + n for c, n in zip(corner, dataset.chunks, strict=True))
            if not all_filtered and any(end > size for end, size in zip(ends, dataset.shape, strict=True)):
                # Stored as it is, and read as it is.
                continue
            try:
                _measure(filters, *read_stored(dataset, corner, nbytes), nbytes)
            except ExcessError as error:
                whose = f"{dataset.file.filename}::{dataset.name}"
                raise ExcessError(f"the chunk at {corner} of {whose}: {error}") from error
            except FAILURES:
                # What is damaged in another way libhdf5 finds itself.
                continue


def read_stored(dataset: Any, corner: tuple[int, ...], size: int) -> tuple[int, Any]:
    """Read a chunk of `size` decoded bytes as it is stored: the filters that it has skipped, as bits, and its bytes.

    Raises
    ------
    ExcessError
        If it is stored in more bytes than any filter makes of it.
    OSError, RuntimeError
        If it cannot be read, as one that was never written.
    """
    room = np.empty(ceiling(size), np.uint8)
    try:
        mask, stored = dataset.id.read_direct_chunk(corner, out=room)
    except ValueError as error:
        raise ExcessError(f"it is stored in more than {len(room)} bytes instead of {size}") from error
    return mask, stored


def _measure(filters: Sequence[tuple[int, int, tuple[int, ...], bytes]], mask: int, raw: Any, size: int) -> None:
    """Undo the filters of a chunk as far as libhdf5 alone can, and look at what that would take."""
    for position, (code, _, values, _) in reversed(tuple(enumerate(filters))):
        if mask >> position & 1:
            continue
        if code == _SHUFFLE:
            width = max((1, *values[:1]))
            shuffled = np.frombuffer(raw, np.uint8)
            whole = len(shuffled) // width * width
            if whole:
                raw = np.concatenate([undo_filter(code, width, shuffled[:whole], size), shuffled[whole:]])
        elif _is_known(code):
            raw = undo_filter(code, 0, raw, size)
        elif code == _BZIP2:
            raw = inflate("bz2", raw, size)
        else:
            check_declared(_declared(code, values, raw), size)
            # What is within cannot be known; it is rare that there is another compressor.
            return


def _declared(code: int, values: tuple[int, ...], raw: Any) -> int:
    """Bytes that a filter of libhdf5 or a plug-in of it takes for a chunk; 0 where none can be told."""
    import h5py

    if not h5py.h5z.filter_avail(code):
        # libhdf5 will say so, and decode nothing.
        return 0
    if code == _SZIP:
        return int.from_bytes(raw[:4], "little")
    if code == _LZ4 or (code == _BITSHUFFLE and any(values[4:5])):
        return int.from_bytes(raw[:8], "big")
    # Number of values, and size of one.
    return values[2] * values[4] if code in (_NBIT, _SCALE_OFFSET) and len(values) > 4 else 0


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
        cell = tuple(slice(c, c + 1) for c in corner)
        try:
            refuse_excess(file, name, cell)
            dataset[cell]
        except ExcessError as error:
            raise IntegrityError(f"{error}; restore the file") from error
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
