"""An `.npy` that we write: its header ends in a comment, the mark of the request that it is the finished result of.

NumPy reads the header as a Python literal, so that a comment means nothing to it. As in NumPy's own description of the
format, the header is padded with spaces, so that the data begin at a multiple of 64 bytes.
"""

from __future__ import annotations

import errno
import math
import re
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import DiskSpaceError
from pipeline.formatting import format_size
from pipeline.runtime.shared_memory import FileArray
from pipeline.storage.filesystem import flush, is_refused, open_regular, reserve, sync_path

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC = b"\x93NUMPY\x01\x00"
_LABEL = b"# random-windows "
_DIGEST = re.compile(rb"# random-windows ([0-9a-f]{64})\s*\n")
_DIGEST_NBYTES = 64
_ALIGNED_NBYTES = 64
_HEADER_NBYTES = 4096
"""No header of ours is longer."""


def create_npy(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Write the header of a new `.npy` that bears no mark yet, and reserve the blocks of its data.

    A memory map on a full disk kills the process that writes into it.

    Raises
    ------
    DiskSpaceError
        If the disk has no room.
    """
    header = _header(dtype, shape)
    nbytes = len(header) + math.prod(shape) * dtype.itemsize
    try:
        with path.open("wb") as file:
            file.write(header)
            file.flush()
            reserve(file.fileno(), len(header), nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskSpaceError(f"an output fits its disk; {path} of {format_size(nbytes)}: {error.strerror}") from error


def reopen_npy(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    """Write the header of an `.npy` that was begun once more, without a mark; False where it has not its size."""
    header = _header(dtype, shape)
    if not path.is_file() or path.stat().st_size != len(header) + math.prod(shape) * dtype.itemsize:
        return False
    if path.stat().st_nlink > 1:
        # A finished output, too, that was moved: nobody writes into it.
        path.unlink()
        return False
    with path.open("r+b") as file:
        file.write(header)
    return True


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    literal = repr({"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}).encode()
    text = literal + b" " + _LABEL + b"-" * _DIGEST_NBYTES
    length = -(-(len(_MAGIC) + 2 + len(text) + 1) // _ALIGNED_NBYTES) * _ALIGNED_NBYTES - len(_MAGIC) - 2
    return _MAGIC + struct.pack("<H", length) + text.ljust(length - 1) + b"\n"


def map_npy(path: Path, mode: Literal["r+", "c"]) -> Any:
    """Map an `.npy`: what is written into it goes to the file (`r+`), or stays in memory (`c`).

    Returns
    -------
    numpy.memmap or FileArray
        The latter where the file system maps no files.
    """
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except OSError as error:
        if not is_refused(error):
            raise
    offset, shape, dtype = _read_header(path)
    return FileArray(path, offset, shape, dtype, writable=mode == "r+")


def flush_npy(array: Any, path: Path) -> None:
    """Flush what was written into an array of `map_npy` to the disk."""
    try:
        array.flush()
    except OSError as error:
        if not is_refused(error):
            raise
        sync_path(path)


def is_whole_npy(path: Path) -> bool:
    """Whether an `.npy` is as long as its header says."""
    with suppress(ValueError):
        offset, shape, dtype = _read_header(path)
        return path.stat().st_size == offset + math.prod(shape) * dtype.itemsize
    return False


def _read_header(path: Path) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Where the data of an `.npy` of ours begin, their shape and dtype; ValueError where its header is none."""
    with open_regular(path) as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return file.tell(), shape, dtype


def mark_npy(path: Path, digest: str) -> None:
    """Put the mark of a request, 64 hexadecimal digits, into the header of an `.npy` of ours, and flush it."""
    with path.open("r+b") as file:
        file.seek(file.read(_HEADER_NBYTES).index(_LABEL) + len(_LABEL))
        file.write(digest.encode())
        file.flush()
        flush(file.fileno())


def read_mark(path: Path) -> str | None:
    """Digest of the request that an `.npy` is the finished result of; None where it is none of ours, or not finished.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "w.npy"
    >>> create_npy(path, np.dtype("f8"), (2, 3))
    >>> read_mark(path)
    >>> mark_npy(path, "0123456789abcdef" * 4)
    >>> read_mark(path)[:4]
    '0123'
    """
    with open_regular(path) as file:
        head: bytes = file.read(_HEADER_NBYTES)
    if not head.startswith(_MAGIC):
        return None
    (length,) = struct.unpack_from("<H", head, len(_MAGIC))
    found = _DIGEST.search(head[: len(_MAGIC) + 2 + length])
    return found[1].decode() if found else None
