"""Compressed bytes, decoded to what a chunk has and hardly more: its size decides, not what the bytes say of theirs.

A few bytes may decode to gigabytes. Headers that name a size (Blosc, LZ4, most of Zstandard) are looked at before
memory is taken; streams that name none are decoded up to the bound.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numcodecs import blosc, lz4, zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

_SLACK_NBYTES = 64 * 1024
"""What one codec may add to the bytes of another, such as checksums and headers, beside an eighth of them."""
_LZMA_NBYTES = 128 * 2**20
"""Memory of a decoder of LZMA: its strongest preset takes half of it."""


class ExcessError(ValueError):
    """A chunk decodes to more bytes than it may."""


def ceiling(size: int) -> int:
    """Most bytes that anything may take that is made of a chunk of `size` bytes, or that it is made of."""
    return size + size // 8 + _SLACK_NBYTES


def check_declared(nbytes: int, size: int) -> None:
    """Raise ExcessError where a chunk of `size` bytes is said to have many more."""
    if nbytes > ceiling(size):
        raise ExcessError(f"it holds {nbytes} bytes instead of {size}")


def inflate(name: str, encoded: Any, size: int, settings: Mapping[str, Any] | None = None) -> Any:
    """Undo one compressor.

    Parameters
    ----------
    name
        One of `COMPRESSORS`.
    encoded
        Bytes.
    size
        Bytes of the decoded chunk. Another codec may have added an eighth and 64 KiB before this one, not more.
    settings
        Of the codec, as Zarr's metadata have them.

    Returns
    -------
    bytes-like
        Of any size up to the bound.

    Raises
    ------
    ExcessError
        If it decodes to more; little more than the bound is ever allocated.
    ValueError, RuntimeError, OSError, EOFError, zlib.error, lzma.LZMAError
        If it cannot be decoded.
    """
    return COMPRESSORS[name](memoryview(encoded), size, settings or {})


def inflate_into(name: str | None, encoded: Any, values: NDArray[np.uint8]) -> None:
    """Undo one compressor, or none, and fill an array with what it gives.

    Raises
    ------
    ValueError
        If that is more or less than the array has bytes; others as of `inflate`.
    """
    size = values.nbytes
    if name == "blosc":
        _check_whole(blosc_nbytes(encoded), size)
        blosc.decompress(encoded, values)
    elif name == "zstd" and _zstd_declared(encoded) == size:
        # Of several frames it is the first's: all of them must fit into the array, or nothing is decoded.
        zstd.decompress(encoded, values)
    else:
        decoded = encoded if name is None else inflate(name, encoded, size)
        _check_whole(len(decoded), size)
        values[:] = np.frombuffer(decoded, np.uint8)


def _check_whole(nbytes: int, size: int) -> None:
    if nbytes != size:
        # A damaged header may name fewer bytes than the chunk has: the rest would be what was there before.
        raise (ExcessError if nbytes > size else ValueError)(f"it holds {nbytes} bytes instead of {size}")


_BLOSC_HEADER = struct.Struct("<4x I 4x I")
"""Decoded bytes and encoded ones, after versions, flags and the size of an item, around the size of a block."""


def blosc_nbytes(encoded: Any) -> int:
    """Bytes that a Blosc buffer decodes to, as its header says, which must fit: Blosc itself would read past its end.

    The header's layout: https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst
    """
    if len(encoded) < _BLOSC_HEADER.size:
        raise ValueError(f"it has {len(encoded)} bytes, less than a header")
    nbytes, stored = _BLOSC_HEADER.unpack_from(encoded)
    if stored != len(encoded):
        raise ValueError(f"it has {len(encoded)} bytes instead of {stored}")
    return int(nbytes)


def _inflate_blosc(encoded: memoryview, size: int, _: Mapping[str, Any]) -> Any:
    check_declared(blosc_nbytes(encoded), size)
    return blosc.decompress(encoded)


def _inflate_lz4(encoded: memoryview, size: int, _: Mapping[str, Any]) -> Any:
    # numcodecs puts four bytes of it before the block.
    check_declared(int.from_bytes(encoded[:4], "little"), size)
    return lz4.decompress(encoded)


def _inflate_zstd(encoded: memoryview, size: int, _: Mapping[str, Any]) -> Any:
    most, declared = _zstd_bound(encoded)
    if declared:
        check_declared(most, size)
    elif most > ceiling(size) + _ZSTD_BLOCK_NBYTES:
        # Many short blocks of unknown sizes: right only if they fill the chunk, whose size is then the bound.
        return zstd.decompress(encoded, np.empty(size, np.uint8))
    return zstd.decompress(encoded)


_ZSTD_MAGIC, _ZSTD_SKIPPABLE = 0xFD2FB528, 0x184D2A50
_ZSTD_HEADER_NBYTES = 18
"""No header of a frame is longer."""
_ZSTD_BLOCK_NBYTES = 128 * 1024
"""A block of Zstandard decodes to so many bytes at most (RFC 8878, 3.1.1.2.4)."""


def _zstd_header(encoded: Any, at: int = 0) -> tuple[int, int | None, bool]:
    """Where the blocks of a frame begin; bytes that it says it decodes to, if it does; whether a checksum ends it.

    The format: RFC 8878, 3.1.1.1.
    """
    if len(encoded) < at + 6 or int.from_bytes(encoded[at : at + 4], "little") != _ZSTD_MAGIC:
        raise ValueError("it is no frame of Zstandard")
    descriptor = int(encoded[at + 4])
    single = descriptor >> 5 & 1
    width = (single, 2, 4, 8)[descriptor >> 6]
    begin = at + 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    end = begin + width
    declared = int.from_bytes(encoded[begin:end], "little") + 256 * (width == 2) if width else None
    return end, declared, bool(descriptor >> 2 & 1)


def _zstd_declared(encoded: Any) -> int | None:
    # As bytes, of which slices cost a fifth of those of an array.
    return _zstd_header(memoryview(encoded)[:_ZSTD_HEADER_NBYTES].tobytes())[1]


def _zstd_bound(encoded: memoryview) -> tuple[int, bool]:
    """Bytes that frames decode to at most, and whether they all say that themselves."""
    at, most, all_declared = 0, 0, True
    while at < len(encoded):
        if int.from_bytes(encoded[at : at + 4], "little") & 0xFFFFFFF0 == _ZSTD_SKIPPABLE:
            at += 8 + int.from_bytes(encoded[at + 4 : at + 8], "little")
            continue
        at, declared, has_checksum = _zstd_header(encoded, at)
        nbytes, last = 0, 0
        while not last and at < len(encoded):
            block = int.from_bytes(encoded[at : at + 3], "little")
            last, kind, width = block & 1, block >> 1 & 3, block >> 3
            # Bytes as they are; one byte, repeated; compressed ones.
            nbytes += width if kind <= 1 else _ZSTD_BLOCK_NBYTES
            at += 3 + (1 if kind == 1 else width)
        at += 4 * has_checksum
        most += nbytes if declared is None else declared
        all_declared = all_declared and declared is not None
    return most, all_declared


def _inflate_stream(
    encoded: memoryview, size: int, settings: Mapping[str, Any], *, open_stream: Callable[..., Any], several: bool
) -> bytes:
    """Decode one stream, or several that follow each other."""
    left = ceiling(size) + 1
    parts: list[bytes] = []
    rest: Any = encoded
    while not parts or (several and rest):
        stream = open_stream(settings, left)
        parts.append(stream.decompress(rest, left))
        left -= len(parts[-1])
        if not left:
            raise ExcessError(f"it holds more than {ceiling(size)} bytes instead of {size}")
        if not stream.eof:
            raise EOFError("it ends within a stream")
        # As the modules of Python pass over zeros that fill a file up.
        rest = stream.unused_data.lstrip(b"\0") if several else b""
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _open_lzma(settings: Mapping[str, Any], size: int) -> lzma.LZMADecompressor:
    kind, chain = int(settings.get("format", lzma.FORMAT_XZ)), settings.get("filters")
    most = size + _LZMA_NBYTES
    if kind != lzma.FORMAT_RAW:
        return lzma.LZMADecompressor(kind, most, chain)
    if any(link.get("dict_size", 0) > most for link in chain or ()):
        raise ExcessError(f"its decoder takes more than {most} bytes")
    return lzma.LZMADecompressor(kind, None, chain)


def _stream(open_stream: Callable[..., Any], *, several: bool) -> Callable[..., bytes]:
    return partial(_inflate_stream, open_stream=open_stream, several=several)


COMPRESSORS: dict[str, Callable[..., Any]] = {
    "blosc": _inflate_blosc,
    "bz2": _stream(lambda *_: bz2.BZ2Decompressor(), several=True),
    "gzip": _stream(lambda *_: zlib.decompressobj(31), several=True),
    "lz4": _inflate_lz4,
    "lzma": _stream(_open_lzma, several=True),
    "zlib": _stream(lambda *_: zlib.decompressobj(), several=False),
    "zstd": _inflate_zstd,
}
"""By name: those of Zarr and numcodecs that may make many bytes of few."""
