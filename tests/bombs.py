"""Chunks of a few kilobytes that decode to gigabytes, made without holding these, and the script that reads them."""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib

PART = 16 * 2**20
PARTS = 128
NBYTES = PART * PARTS
"""What each decodes to: 2 GiB."""


def deflate(wbits):
    """One stream; zeros, cut into parts that end in a full flush are alike."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    zeros = bytes(PART)
    first = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    next_one = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + next_one * (PARTS - 1) + zlib.compressobj(9, zlib.DEFLATED, -15).flush() + bytes(8)


def lzf(repeats):
    """Zero, then the longest matches: three bytes make 264."""
    return b"\x00\x00" + b"\xe0\xff\x00" * repeats


def zstd_frame(*, declared, nbytes=NBYTES):
    """Blocks of one byte that is repeated 131,072 times."""
    header = (
        struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 0x88, nbytes) if declared else struct.pack("<IBB", 0xFD2FB528, 0, 0x88)
    )
    block = 128 * 1024
    count = nbytes // block
    blocks = [struct.pack("<I", (number == count - 1) | 1 << 1 | block << 3)[:3] + b"\x07" for number in range(count)]
    return header + b"".join(blocks)


ENCODED = {
    "blosc": lambda: struct.pack("<4BIII", 2, 1, 0x21, 4, NBYTES, 2**18, 8192) + bytes(8176),
    "bz2": lambda: bz2.compress(bytes(PART)) * PARTS,
    "gzip": lambda: deflate(31),
    "gzip-members": lambda: zlib.compressobj(9, zlib.DEFLATED, 31).flush() + _member() * PARTS,
    "lz4": lambda: struct.pack("<I", NBYTES - 1) + bytes(64),
    "lzma": lambda: lzma.compress(bytes(PART), preset=0) * PARTS,
    "zlib": lambda: deflate(15),
    "zstd": lambda: zstd_frame(declared=True),
    "zstd-unknown": lambda: zstd_frame(declared=False),
    "zstd-frames": lambda: zstd_frame(declared=True, nbytes=PART) * PARTS,
}


def _member():
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(bytes(PART)) + packer.flush()


def read_all(cases):
    """Read each case in this process; return what was raised, and by how much the process's peak memory grew.

    The memory is measured, not limited: libraries that are refused an allocation end the process.

    Parameters
    ----------
    cases
        Maps a name to the way to read it and its path.
    """
    import os
    import resource

    import numpy as np

    import pipeline
    from pipeline.matrix.formats import open_source

    def gather(path):
        matrix = pipeline.open_matrix(path)
        return pipeline.gather(pipeline.plan_windows(matrix, np.array([0, 8]), length=4))

    def create(path):
        source = open_source(path)
        return source.read_rows(0, source.shape[0])

    def coordinate(path):
        return pipeline.store(
            pipeline.plan_windows(pipeline.open_matrix(path), [0, 8], length=4), f"{path}-{os.getpid()}.zarr"
        )

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    ways = {"gather": gather, "create": create, "coordinate": coordinate}
    raised = {}
    for name, (way, path) in cases.items():
        before = peak()
        try:
            ways[way](path)
        except Exception as error:  # noqa: BLE001 (to be looked at)
            raised[name] = [type(error).__name__, getattr(error, "exit_code", 1), str(error), peak() - before]
        else:
            raised[name] = ["nothing", 0, "", peak() - before]
    return raised


if __name__ == "__main__":
    import json
    import sys

    print(json.dumps(read_all(json.load(sys.stdin))))
