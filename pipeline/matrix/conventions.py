"""Attributes by which readers of CF, such as xarray, make other values of those that are stored.

They are as xarray writes them to Zarr v3: `_FillValue` as its `FillValueCoder` encodes it, of floats in base64.
"""

from __future__ import annotations

import base64
import binascii
import cmath
import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

_FILL, _MISSING, _UNSIGNED = "_FillValue", "missing_value", "_Unsigned"
_DECODING = ("scale_factor", "add_offset", _FILL, _MISSING, _UNSIGNED)
"""What decides the values that xarray reads."""
SCALING = (*_DECODING[:4], "valid_range", _UNSIGNED)
"""What may decide the values that any reader reads, in the order in which it is said."""
_DOUBLE = struct.Struct("<d")


class Labels(NamedTuple):
    """What is said of an array beside its values."""

    attributes: dict[str, Any]
    """As JSON has them."""
    names: tuple[str | None, ...]
    """Of its dimensions; None for one without a name."""

    def first(self, axis: int) -> Labels:
        """Labels of the same array, `axis` put before the others."""
        names = list(self.names)
        return Labels(self.attributes, (names.pop(axis), *names))


def common_labels(parts: Sequence[Labels]) -> Labels:
    """What is said of each of several arrays alike."""
    first, *others = parts
    attributes = {
        name: value
        for name, value in first.attributes.items()
        # As text: NaN equals itself.
        if all(name in each.attributes and _as_text(each.attributes[name]) == _as_text(value) for each in others)
    }
    names = tuple(
        name if all(each.names[axis] == name for each in others) else None for axis, name in enumerate(first.names)
    )
    return Labels(attributes, names)


def encode_fill(value: Any, dtype: np.dtype[Any]) -> Any:
    """Encode a fill value of an array of `dtype` as xarray does for Zarr v3; None where no value can be equal to it."""
    if not isinstance(value, bool | int | float | complex | np.number | np.bool_):
        return None
    if dtype.kind == "c":
        return [_encode_double(complex(value).real), _encode_double(complex(value).imag)]
    if isinstance(value, complex | np.complexfloating):
        return None
    if dtype.kind == "f":
        return _encode_double(value)
    if not np.isfinite(value) or int(value) != value:
        return None
    return bool(value) if dtype.kind == "b" else int(value)


def _encode_double(value: Any) -> str:
    return base64.b64encode(_DOUBLE.pack(float(value))).decode()


def decode_fill(value: Any, dtype: np.dtype[Any]) -> bool | float | complex | None:
    """Decode `_FillValue` of an array of `dtype`; plain numbers are taken, too; None for what is no number."""
    if isinstance(value, bool | int | float):
        return value
    try:
        if dtype.kind == "c":
            real, imaginary = value
            return complex(_decode_double(real), _decode_double(imaginary))
        return _decode_double(value) if dtype.kind == "f" else None
    except (TypeError, ValueError, binascii.Error, struct.error):
        return None


def _decode_double(value: str) -> float:
    number: float = _DOUBLE.unpack(base64.b64decode(value))[0]
    return number


def cast_attributes(attributes: dict[str, Any], stored: np.dtype[Any], cast: np.dtype[Any]) -> dict[str, Any]:
    """Return the attributes of values that were cast: a fill value becomes what the values that equal it have become.

    A fill value that no value of the cast can equal goes. Where a cast changes what scaling makes of a value (negative
    numbers that `_Unsigned` means otherwise are those of one width alone), all scaling goes, and the units with it.
    """
    unsigned = attributes.get(_UNSIGNED)
    if (stored.kind, unsigned) in {("i", "true"), ("u", "false")}:
        return {name: value for name, value in attributes.items() if name not in {*SCALING, "units"}}
    kept = {name: value for name, value in attributes.items() if name != _UNSIGNED}
    if _FILL in kept:
        fill = _cast_number(decode_fill(kept.pop(_FILL), stored), stored, cast)
        if fill is not None:
            kept[_FILL] = encode_fill(fill, cast)
    if _MISSING in kept:
        given = kept.pop(_MISSING)
        numbers = [_cast_number(each, stored, cast) for each in (given if isinstance(given, list) else [given])]
        if left := [each for each in numbers if each is not None]:
            kept[_MISSING] = left if isinstance(given, list) else left[0]
    return kept


def _cast_number(value: Any, stored: np.dtype[Any], cast: np.dtype[Any]) -> Any:
    """Cast a number as values are cast; None if no stored value equals it, or such a value would be lost."""
    if not isinstance(value, bool | int | float | complex):
        return None
    if cmath.isnan(value):
        return value if stored.kind in "fc" else None
    with np.errstate(all="ignore"):
        try:
            own = np.asarray(value).astype(stored)
        except (OverflowError, TypeError):
            return None
        made = own.astype(cast)
        # Floats round, as values do; whole numbers may not.
        same = np.isfinite(made) or not np.isfinite(own) if stored.kind in "fc" else made.astype(stored) == own
    return made.item() if own == value and same else None


def decoding(attributes: dict[str, Any], dtype: np.dtype[Any]) -> dict[str, str]:
    """Return what decides the values that xarray reads, as text by name: equal if it makes the same of equal values."""
    return _say_each(attributes, dtype, _DECODING)


def say_scaling(attributes: dict[str, Any], dtype: np.dtype[Any]) -> str:
    """Name the attributes by which other readers would change values; empty where there are none."""
    found = [f"{name} {_shorten(text)}" for name, text in _say_each(attributes, dtype, SCALING).items()]
    return f"{', '.join(found)}: not applied, values are as stored" if found else ""


def _say_each(attributes: dict[str, Any], dtype: np.dtype[Any], names: Sequence[str]) -> dict[str, str]:
    texts = {name: _as_text(attributes[name]) for name in names if name in attributes}
    if _FILL in texts:
        fill = decode_fill(attributes[_FILL], dtype)
        if (fill is not None and cmath.isnan(fill)) or texts[_FILL] == '"NaN"':
            # xarray writes it to every array of floats; it changes nothing.
            del texts[_FILL]
        elif fill is not None and dtype.kind in "fc":
            with np.errstate(over="ignore"):
                texts[_FILL] = str(dtype.type(fill))
    return texts


def _as_text(value: Any) -> str:
    return " ".join(json.dumps(value, sort_keys=True).split())


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


ATTRIBUTE = "random-windows"
"""Key of our own attributes in what we write: says what it is, and what its files hold."""
