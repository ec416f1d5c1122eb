"""What is said of a matrix beside its values: attributes, names of its dimensions, coordinates that lie beside it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import BudgetError, IntegrityError, NotFoundError, OpenError, find_shortage
from pipeline.formatting import count_of, format_size
from pipeline.matrix.arrays import locate_array, open_array, open_stored, read_filled, read_present, reading_config
from pipeline.matrix.conventions import ATTRIBUTE, Labels, encode_fill
from pipeline.matrix.layout import array_files
from pipeline.memory import budget, held_nbytes
from pipeline.storage.checksums import digest_array
from pipeline.storage.locations import plain, say_failure

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

    from pipeline.storage.locations import Location

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
    filled: int = 0
    """Of its values, those in absent chunks, which read as its fill value."""

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

    def facts(self) -> dict[str, str]:
        """What decides the bytes of a result, by name; empty where nothing travels."""
        facts = {}
        if self.attributes or any(self.names):
            words = json.dumps([self.attributes, self.names], sort_keys=True)
            facts["attributes"] = hashlib.sha256(words.encode()).hexdigest()
        digests = " ".join(each.digest for each in self.coordinates)
        return facts | ({"coordinates": digests} if digests else {})


NOTHING = Description({}, ())


def array_labels(array: zarr.Array[Any]) -> Labels:
    """What is said of an array, as for a copy in Zarr v3, where xarray reads the same values of it."""
    return Labels(user_attributes(array), dimension_names(array))


def user_attributes(array: zarr.Array[Any]) -> dict[str, Any]:
    """Attributes of an array, but for those that would be wrong of a copy in Zarr v3."""
    given = array.attrs.asdict()
    attributes = {name: value for name, value in given.items() if name not in _OURS}
    if array.metadata.zarr_format == 3:
        return attributes
    # What NCZarr keeps for itself; xarray hides it, in this format only.
    attributes = {name: value for name, value in attributes.items() if not name.lower().startswith("_nc")}
    fill = attributes.pop("_FillValue", None)
    if _DIMENSIONS in given and array.fill_value is not None:
        # xarray takes the array's own for it. Without names of dimensions it reads no such array.
        fill = array.fill_value
    encoded = encode_fill(fill, np.dtype(array.dtype))
    return attributes if encoded is None else attributes | {"_FillValue": encoded}


def dimension_names(array: zarr.Array[Any]) -> tuple[str | None, ...]:
    """Names of the dimensions, as Zarr v3 has them, or, of v2, as xarray writes them; None for one without a name."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.asdict().get(_DIMENSIONS)
    if not isinstance(names, list | tuple) or len(names) != array.ndim:
        return (None,) * array.ndim
    return tuple(name if isinstance(name, str) and name else None for name in names)


def describe(labels: Labels, array: zarr.Array[Any] | None, *, columns: Any, memory: int | None = None) -> Description:
    """Tell what travels into a result, and read the coordinates: arrays beside `array` that are named as a dimension.

    Parameters
    ----------
    labels
        Of the values as they are delivered.
    array
        The matrix; None where files are read in place, of which coordinates do not travel.
    columns
        Index of the first axis of a row; None for all of it.
    memory
        Limit in bytes that the user set.

    Raises
    ------
    IntegrityError
        If a coordinate has a corrupt chunk, or an absent one; see `Coordinate.filled`.
    BudgetError
        If it does not fit in memory.
    """
    first, *others = labels.names
    names = tuple(name if name and _may_keep(name) and others.count(name) == 1 else None for name in others)
    found = Description(labels.attributes, names)
    if array is None:
        return found
    found = replace(found, rows=_read_coordinate(array, first, 0, memory))
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
    values, filled = _read_values(beside, where, fills=array.async_array.config.read_missing_chunks)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return Coordinate(name, values, user_attributes(beside), filled)


def _read_values(array: zarr.Array[Any], where: str, *, fills: bool) -> tuple[NDArray[Any], int]:
    """Read a coordinate, and count its values in absent chunks.

    Writers leave out a chunk that equals the fill value, as that of `level = [0]`; but a chunk may be lost, too. It is
    taken for the former where the user allows that, or where the values are then in order, each once.
    """
    import zarr

    way_out = "restore it, or allow absent chunks with --missing-chunks fill (missing_chunks=)"
    try:
        try:
            return np.ascontiguousarray(read_present(reading_config(array), (slice(None),))), 0
        except (IntegrityError, zarr.errors.ChunkNotFoundError):
            block, absent = read_filled(reading_config(array, fills=True), (slice(None),))
    except Exception as error:  # noqa: BLE001 (zarr, its codecs and stores raise what they like)
        raise find_shortage(error) or IntegrityError(
            f"{where} cannot be read: {say_failure(error)[:200]}; {way_out}"
        ) from plain(error)
    files = replace(array_files(array), fills=True)
    problem = files.find_problem(np.arange(files.grid[0]))
    if problem is not None:
        raise IntegrityError(f"{where} cannot be read: {problem.name} {problem.words}; restore it")
    filled = int(absent.sum())
    if fills or (array.metadata.fill_value is not None and _is_strict(block)):
        return np.ascontiguousarray(block), filled
    reason = "has no fill value"
    if array.metadata.fill_value is not None:
        reason = f"is not strictly monotonic with the fill value {array.fill_value} in their place"
    raise IntegrityError(
        f"{where} lacks chunks ({filled:,} of {count_of(len(block), 'value')}) and {reason}; {way_out}"
    )


def _is_strict(values: NDArray[Any]) -> bool:
    """Whether values ascend or descend, none of them twice and none NaN; or there is only one."""
    return len(values) == 1 or bool((values[1:] > values[:-1]).all() or (values[1:] < values[:-1]).all())


def _open(place: Location) -> zarr.Array[Any]:
    if isinstance(place, Path):
        return open_array(place)
    from pipeline.storage.stores import open_store

    return open_stored(open_store(place, read_only=True), str(place))
