"""What tasks cost: memory that reading and writing take. Pure arithmetic."""

from __future__ import annotations

_SLAB_NBYTES = 4 * 2**20
"""Bytes of whole chunks that are encoded and handed to the disk at once: they stay in the processor's cache, and the
disk writes them while the next are encoded."""
_ZARR_COPIES = 2
"""Writing a file through zarr holds as many times its bytes more."""


def slab_nbytes(file_nbytes: int, chunk_nbytes: int) -> int:
    """Bytes of a file's entries that `write_plain` asks for at once; it holds as many more, encoded."""
    return min(file_nbytes, max(1, _SLAB_NBYTES // chunk_nbytes) * chunk_nbytes)


def writing_nbytes(file_nbytes: int, chunk_nbytes: int, *, plain: bool) -> int:
    """Memory that writing a file takes beside its entries, by `write_plain` or through zarr."""
    return slab_nbytes(file_nbytes, chunk_nbytes) if plain else _ZARR_COPIES * file_nbytes
