"""A chunk's encoded bytes to its values, in the calling thread: zarr's codecs without zarr's event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from pipeline.matrix.chunks import CHECKSUM_NBYTES
from pipeline.matrix.decompress import inflate, inflate_into
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    from collections.abc import Callable

    import zarr
    from numpy.typing import NDArray

type Decode = Callable[[NDArray[np.uint8], NDArray[Any]], None]
"""Decodes a chunk, or an inner chunk of a shard, into an array of a chunk's shape, C-contiguous, native byte order."""

_COMPRESSORS = frozenset({"blosc", "gzip", "lz4", "zlib", "zstd"})
"""Their encoded bytes say how they are to be decoded, so that numcodecs needs no settings; zarr calls it, too."""


def chunk_decoder(array: zarr.Array[Any]) -> Decode | None:
    """Return what decodes one chunk of an array; None where zarr cannot without its event loop."""
    return _plain_decoder(array) or _zarr_decoder(array)


def fill_value(array: zarr.Array[Any]) -> Any:
    """Value of what a chunk lacks that is absent."""
    value = array.fill_value
    # Zarr v2 may leave it open.
    return array.metadata.dtype.default_scalar() if value is None else value


def _plain_decoder(array: zarr.Array[Any]) -> Decode | None:
    """Decode chunks that are rows as they lie in memory, compressed: with numcodecs alone, the least work a chunk."""
    stages = _stages(array)
    if stages is None:
        return None
    innermost = stages.pop(0) if stages and stages[0] != "crc32c" else None

    def decode(encoded: NDArray[np.uint8], into: NDArray[Any]) -> None:
        values = into.reshape(-1).view(np.uint8)
        made: Any = encoded
        for stage in reversed(stages):
            made = _undo_checksum(made) if stage == "crc32c" else inflate(stage, made, values.nbytes)
        inflate_into(innermost, made, values)

    return decode


def _stages(array: zarr.Array[Any]) -> list[str] | None:
    """Names of the codecs from bytes to bytes, in the order of encoding; None where other ones, too, make a chunk."""
    from zarr.core.metadata.v2 import ArrayV2Metadata

    if isinstance(array.metadata, ArrayV2Metadata):
        compressor: Any = array.metadata.compressor
        native = np.dtype(array.dtype).isnative
        if array.metadata.filters or array.metadata.order != "C" or not native or compressor is None:
            return None
        stages = [str(getattr(compressor, "codec_id", ""))]
    else:
        described: list[Any] = [codec.to_dict() for codec in array.metadata.codecs]
        if len(described) == 1 and described[0]["name"] == "sharding_indexed":
            described = list(described[0]["configuration"]["codecs"])
        first = described[0]
        plain = first["name"] == "bytes" and first.get("configuration", {}).get("endian", "little") == "little"
        if not plain or not np.little_endian:
            return None
        stages = [codec["name"] for codec in described[1:]]
    return stages if _COMPRESSORS.union({"crc32c"}).issuperset(stages) else None


def _undo_checksum(encoded: Any) -> Any:
    stored = np.frombuffer(encoded, np.uint8)
    body, checksum = stored[:-CHECKSUM_NBYTES], stored[-CHECKSUM_NBYTES:]
    if google_crc32c.value(body) != int.from_bytes(checksum.tobytes(), "little"):
        raise ValueError("its checksum, a crc32c, does not match")
    return body


@pinned_config()
def _zarr_decoder(array: zarr.Array[Any]) -> Decode | None:
    """Decode with the chain of codecs that zarr itself would run, other byte orders and filters included."""
    from zarr.codecs import ShardingCodec
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import cpu
    from zarr.core.codec_pipeline import FusedCodecPipeline
    from zarr.core.metadata.v2 import ArrayV2Metadata

    if isinstance(array.metadata, ArrayV2Metadata) and array.metadata.order != "C":
        return None
    prototype = cpu.buffer_prototype
    spec = ArraySpec(array.chunks, array.metadata.dtype, array.fill_value, array.config, prototype)
    pipeline = array.async_array.codec_pipeline
    if array.shards is not None:
        [sharding] = array.metadata.codecs if hasattr(array.metadata, "codecs") else [None]
        if not isinstance(sharding, ShardingCodec):
            return None
        pipeline = FusedCodecPipeline.from_codecs(sharding.codecs).evolve_from_array_spec(spec)
    transform = getattr(pipeline, "sync_transform", None)
    if transform is None or array.order != "C":
        return None

    @pinned_config()
    def decode(encoded: NDArray[np.uint8], into: NDArray[Any]) -> None:
        values = transform.decode_chunk(prototype.buffer.from_array_like(encoded), spec).as_numpy_array()
        into[...] = np.asarray(values).reshape(into.shape)

    return decode
