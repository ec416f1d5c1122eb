"""What is said of a matrix beside its values: attributes, names of its dimensions, coordinates that lie beside it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.arrays import locate_array, open_array, open_stored, read_present, reading_config
from pipeline.errors import BudgetError, IntegrityError, NotFoundError, OpenError
from pipeline.journal import digest_array
from pipeline.locations import plain, say_failure
from pipeline.memory import budget, held_nbytes
from pipeline.record import ATTRIBUTE
from pipeline.sizes import format_size

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

    from pipeline.locations import Location

_SCALING = ("scale_factor", "add_offset", "_FillValue", "missing_value", "valid_range", "_Unsigned")
"""Attributes of the CF conventions by which a reader makes other values of those that are stored."""
ARRAY_NAME = re.compile(r"(?!__|zarr\.json$)[^./\\\x00-\x1f\ud800-\udfff][^/\\\x00-\x1f\ud800-\udfff]{0,199}")
"""What an array may be called in a Zarr group on the usual file systems."""
_OWN_DIMENSION = re.compile(r"(?:.*_)?(?:column|result)_\d+")
"""What results call dimensions that have no name."""
_DIMENSIONS = "_ARRAY_DIMENSIONS"
_OURS = {ATTRIBUTE, _DIMENSIONS, "coordinates"}
"""Attributes that speak of the array's own place, and would be wrong of another."""
_TAKEN = {"window", "row", "windows", "starts", "places"}
"""Names that a result gives to dimensions and arrays of its own."""


class Coordinate(NamedTuple):
    """A one-dimensional array of the name of a dimension, such as `time`."""

    name: str
    values: NDArray[Any]
    attributes: dict[str, Any]

    @property
    def digest(self) -> str:
        """What it says, in one short word."""
        words = json.dumps([self.name, self.values.dtype.str, self.attributes], sort_keys=True)
        return hashlib.sha256(f"{words} {digest_array(self.values)}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Description:
    """What travels from a matrix into a result. Made by `describe`."""

    attributes: dict[str, Any]
    names: tuple[str | None, ...]
    """Of the axes of a row; None for one that has none, or one that a result uses otherwise."""
    rows: Coordinate | None = None
    """Of the matrix's rows."""
    columns: tuple[Coordinate, ...] = ()
    """Of the axes of a row."""

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """All of them."""
        return self.columns if self.rows is None else (self.rows, *self.columns)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(each.values.nbytes for each in self.coordinates)

    @property
    def names_beside(self) -> list[str]:
        """Names of its coordinates."""
        return [each.name for each in self.coordinates]

    def of_rows(self) -> Description:
        """What is left of it where values were made into others: what is known of the rows."""
        return Description({}, (), self.rows)

    def facts(self) -> dict[str, str]:
        """What decides the bytes of a result, by name; empty where nothing travels."""
        facts = {}
        if self.attributes or any(self.names):
            words = json.dumps([self.attributes, self.names], sort_keys=True)
            facts["attributes"] = hashlib.sha256(words.encode()).hexdigest()
        digests = " ".join(each.digest for each in self.coordinates)
        return facts | ({"coordinates": digests} if digests else {})


NOTHING = Description({}, ())


def say_scaling(array: zarr.Array[Any]) -> str:
    """Name the attributes by which other readers would change values; empty where there are none."""
    given = array.attrs.asdict()
    if _is_nan(given.get("_FillValue"), array):
        # xarray writes it to every array of floats; it changes nothing.
        del given["_FillValue"]
    found = [f"{name} {_shorten(given[name])}" for name in _SCALING if name in given]
    return f"{', '.join(found)}: not applied, values are as stored" if found else ""


def _is_nan(value: Any, array: zarr.Array[Any]) -> bool:
    if isinstance(value, str) and value != "NaN" and array.dtype.kind == "f":
        # As xarray writes values of Zarr v3: little-endian float64, in base64.
        with contextlib.suppress(ValueError, struct.error):
            [value] = struct.unpack("<d", base64.b64decode(value))
    return value == "NaN" or (isinstance(value, float) and math.isnan(value))


def _shorten(value: Any) -> str:
    words = " ".join(json.dumps(value).split())
    return words if len(words) <= 40 else f"{words[:37]}..."


def user_attributes(array: zarr.Array[Any]) -> dict[str, Any]:
    """Attributes of an array, but for those that would be wrong of a copy in Zarr v3."""
    attributes = {name: value for name, value in array.attrs.asdict().items() if name not in _OURS}
    fill = attributes.get("_FillValue")
    if array.metadata.zarr_format == 2 and array.dtype.kind == "f" and isinstance(fill, int | float):
        # A number there, which xarray takes for base64 here.
        attributes["_FillValue"] = base64.b64encode(struct.pack("<d", fill)).decode()
    return attributes


def dimension_names(array: zarr.Array[Any]) -> tuple[str | None, ...]:
    """Names of the dimensions, as Zarr v3 has them, or, of v2, as xarray writes them; None for one without a name."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.asdict().get(_DIMENSIONS)
    if not isinstance(names, list | tuple) or len(names) != array.ndim:
        return (None,) * array.ndim
    return tuple(name if isinstance(name, str) and name else None for name in names)


def describe(array: zarr.Array[Any], *, columns: Any, casts: bool, memory: int | None = None) -> Description:
    """Tell what travels into a result, and read the coordinates: arrays beside `array` that are named as a dimension.

    Parameters
    ----------
    columns
        Index of the first axis of a row; None for all of it.
    casts
        Whether values get another dtype: `_FillValue` is a value of the old one.
    memory
        Limit in bytes that the user set.

    Raises
    ------
    IntegrityError
        If a coordinate has an absent or corrupt chunk.
    BudgetError
        If it does not fit in memory.
    """
    attributes = user_attributes(array)
    if casts:
        attributes.pop("_FillValue", None)
    first, *others = dimension_names(array)
    names = tuple(name if name and _may_keep(name) and others.count(name) == 1 else None for name in others)
    found = Description(attributes, names, _read_coordinate(array, first, 0, memory))
    for axis, name in enumerate(names, start=1):
        beside = None if name == first else _read_coordinate(array, name, axis, memory)
        if beside is not None:
            values = beside.values if columns is None or axis > 1 else beside.values[columns]
            found = replace(found, columns=(*found.columns, beside._replace(values=values)))
    # A dimension of the result, and an array that has others, cannot have one name.
    if found.rows is not None and found.rows.name in names:
        found = replace(found, rows=None)
    return found


def _may_keep(name: str) -> bool:
    """Whether a result may give this name to a dimension that has it in the matrix."""
    return name not in _TAKEN and not _OWN_DIMENSION.fullmatch(name)


def _read_coordinate(array: zarr.Array[Any], name: str | None, axis: int, memory: int | None) -> Coordinate | None:
    """Read the array beside another that has the name of its dimension; None where there is none that fits."""
    place = locate_array(array)
    if (
        name is None
        or not _may_keep(name)
        or not ARRAY_NAME.fullmatch(name)
        or place is None
        or place.name in ("", name)
    ):
        return None
    try:
        beside = _open(place.parent / name if isinstance(place, Path) else place.parent.child(name))
    except (NotFoundError, OpenError):
        return None
    if beside.shape != (array.shape[axis],) or beside.dtype.kind not in "biuf":
        return None
    where = f"the coordinate {name} beside {array.store_path}"
    allowed = budget(memory)
    if beside.nbytes > allowed.nbytes - held_nbytes():
        raise BudgetError(
            f"coordinates fit in memory; {where} takes {format_size(beside.nbytes)}, {allowed}"
            f"; raise the limit, or take it away from there"
        )
    try:
        values = np.ascontiguousarray(
            read_present(reading_config(beside, fills=array.async_array.config.read_missing_chunks), (slice(None),))
        )
    except IntegrityError:
        raise
    except Exception as error:  # noqa: BLE001 (zarr, its codecs and stores raise what they like)
        raise IntegrityError(
            f"every chunk is there, and whole; {where} cannot be read: {say_failure(error)[:200]}; restore it, or "
            "allow absent chunks with --missing-chunks fill (missing_chunks=)"
        ) from plain(error)
    return Coordinate(name, values.astype(values.dtype.newbyteorder("="), copy=False), user_attributes(beside))


def _open(place: Location) -> zarr.Array[Any]:
    if isinstance(place, Path):
        return open_array(place)
    from pipeline.stores import open_store

    return open_stored(open_store(place, read_only=True), str(place))
