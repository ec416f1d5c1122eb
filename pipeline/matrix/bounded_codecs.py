"""Zarr's own decoding within bounds: each codec of an array that may make many bytes of few, behind one that may not.

Imported where an array is opened: the classes are Zarr's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numcodecs.abc import Codec
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import ShardingCodec
from zarr.core.metadata.v2 import ArrayV2Metadata

from pipeline.errors import OpenError
from pipeline.matrix.decompress import COMPRESSORS, inflate

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer

_ITEM_NBYTES = 16
"""No number is wider; a filter of Zarr v2 may leave wider ones to the compressor than the array has."""
_SELF_SIZED = frozenset({"categorize", "json2", "msgpack2", "pickle", "vlen-array", "vlen-bytes", "vlen-utf8"})
"""Codecs for objects: what they decode says its own shape and type, so that nothing bounds them."""
_DTYPES = ("dtype", "astype", "encode_dtype", "decode_dtype")
"""Settings by which a codec widens values."""


def bound_codecs(metadata: Any, name: str) -> Any:
    """Return metadata of an array whose chunks cannot decode to much more than they hold.

    Codecs that neither Zarr nor numcodecs has are left as they are: who installed them trusts them.

    Parameters
    ----------
    metadata
        Of Zarr, v2 or v3.
    name
        Of the array, for messages.

    Raises
    ------
    OpenError
        If a codec cannot be bounded.
    """
    if not isinstance(metadata, ArrayV2Metadata):
        for codec in metadata.codecs:
            _check_codec(codec.to_dict(), name)
        return _replaced(metadata, codecs=_bound_each(metadata.codecs))
    codecs = [*(metadata.filters or ()), *([metadata.compressor] if metadata.compressor else [])]
    for codec in codecs:
        settings = codec.get_config()
        _check_codec({"name": settings["id"], "configuration": settings}, name)
    dtype = np.dtype(metadata.dtype.to_native_dtype())
    width = max(dtype.itemsize, _ITEM_NBYTES) if metadata.filters else dtype.itemsize
    size = math.prod(metadata.chunks) * width
    bounded = [BoundedNumcodec(codec, size) if codec.codec_id in COMPRESSORS else codec for codec in codecs]
    compressor = bounded.pop() if metadata.compressor else None
    return _replaced(metadata, filters=tuple(bounded) or None, compressor=compressor)


def _replaced(metadata: Any, **fields: Any) -> Any:
    for field, value in fields.items():
        # Zarr would make the codecs anew.
        object.__setattr__(metadata, field, value)
    return metadata


def _check_codec(described: Any, name: str) -> None:
    kind, settings = _plain(described["name"]), described.get("configuration") or {}
    if kind in _SELF_SIZED:
        raise OpenError(f"{name} has the codec {kind}, which is for objects, not for numbers; write the array without")
    for field in _DTYPES if kind not in ("cast_value", "bytes") else ():
        text = settings.get(field)
        if text is not None and np.dtype(text).itemsize > _ITEM_NBYTES:
            raise OpenError(
                f"{name} has the codec {kind} with {field} {str(text)[:40]!r}, wider than any number; write the array "
                "without"
            )
    for inner in (*settings.get("codecs", ()), *settings.get("index_codecs", ())) if kind == "sharding_indexed" else ():
        _check_codec(inner, name)


def _plain(name: str) -> str:
    return name.removeprefix("numcodecs.")


def _bound_each(codecs: Any) -> tuple[Any, ...]:
    return tuple(map(_bound, codecs))


def _bound(codec: Any) -> Any:
    if isinstance(codec, ShardingCodec):
        return BoundedSharding(
            chunk_shape=codec.chunk_shape,
            codecs=_bound_each(codec.codecs),
            index_codecs=codec.index_codecs,
            index_location=codec.index_location,
        )
    if isinstance(codec, BytesBytesCodec) and _plain(str(codec.to_dict()["name"])) in COMPRESSORS:
        return BoundedCodec(codec)
    return codec


class BoundedSharding(ShardingCodec):
    """Shards whose inner chunks are bounded, after pickling, too: Zarr then makes their codecs anew."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        object.__setattr__(self, "codecs", _bound_each(self.codecs))


@dataclass(frozen=True)
class BoundedCodec(BytesBytesCodec):
    """A compressor of Zarr v3; its name and settings are those of the codec within."""

    codec: Any

    def to_dict(self) -> dict[str, Any]:
        """See `BytesBytesCodec`."""
        described: dict[str, Any] = self.codec.to_dict()
        return described

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        """See `BytesBytesCodec`."""
        return replace(self, codec=self.codec.evolve_from_array_spec(array_spec))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """See `BytesBytesCodec`."""
        nbytes: int = self.codec.compute_encoded_size(input_byte_length, chunk_spec)
        return nbytes

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        described = self.codec.to_dict()
        size = math.prod(chunk_spec.shape) * np.dtype(chunk_spec.dtype.to_native_dtype()).itemsize
        encoded = np.ascontiguousarray(chunk_bytes.as_numpy_array()).view(np.uint8)
        decoded = inflate(_plain(described["name"]), encoded, size, described.get("configuration"))
        return chunk_spec.prototype.buffer.from_array_like(np.frombuffer(decoded, np.uint8))

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        import asyncio

        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _encode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        encoded: Buffer | None = self.codec._encode_sync(chunk_bytes, chunk_spec)  # noqa: SLF001 (Zarr's own protocol)
        return encoded

    async def _encode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        encoded: Buffer | None = await self.codec._encode_single(chunk_bytes, chunk_spec)  # noqa: SLF001
        return encoded


class BoundedNumcodec(Codec):  # type: ignore[misc]
    """A compressor of Zarr v2, whose decoded bytes are known to be `size` at most, but for what other codecs add."""

    codec_id = ""
    """Of each instance that of the codec within."""

    def __init__(self, codec: Any, size: int) -> None:
        self.codec, self.size = codec, size
        self.codec_id = codec.codec_id

    def encode(self, buf: Any) -> Any:
        """See `Codec`."""
        return self.codec.encode(buf)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """See `Codec`."""
        assert out is None
        encoded = np.ascontiguousarray(buf).reshape(-1).view(np.uint8)
        return inflate(self.codec_id, encoded, self.size, self.codec.get_config())

    def get_config(self) -> Any:
        """See `Codec`."""
        return self.codec.get_config()

    def __repr__(self) -> str:
        return repr(self.codec)
