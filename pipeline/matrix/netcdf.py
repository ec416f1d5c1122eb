"""Attributes of an HDF5 data set, and names of its dimensions, as netCDF-4 gives them to xarray."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.matrix.conventions import Labels, encode_fill

_INTERNAL = {"CLASS", "NAME", "DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST", "coordinates"}
"""Attributes by which HDF5 keeps its dimension scales, and one that speaks of the array's own place in its file."""
_INTERNAL_PREFIXES = ("_nc", "_netcdf4", "_array_dimensions", "random-windows")


def read_labels(dataset: Any) -> Labels:
    """Read the attributes of a data set, and the names of its dimensions from its dimension scales.

    Parameters
    ----------
    dataset
        An `h5py.Dataset`.

    Returns
    -------
    Labels
        Attributes of which JSON has no like (references, compounds, opaque bytes) are left out.
    """
    attributes = {}
    for name in dataset.attrs:
        if name in _INTERNAL or name.lower().startswith(_INTERNAL_PREFIXES):
            continue
        try:
            value = dataset.attrs[name]
        except (OSError, TypeError, ValueError, KeyError, RuntimeError):
            # Of a type that h5py cannot read.
            continue
        found = _fill_value(value, dataset.dtype) if name == "_FillValue" else _plain(value)
        if found is not None:
            attributes[_text(name)] = found
    return Labels(attributes, tuple(_name(dataset, axis) for axis in range(dataset.ndim)))


def _fill_value(value: Any, dtype: np.dtype[Any]) -> Any:
    """Encode a fill value, which netCDF-4 keeps as an array of one; None for what is no number."""
    numbers = np.asarray(value).reshape(-1)
    return encode_fill(numbers[0], dtype) if numbers.size == 1 and dtype.kind in "biufc" else None


def _plain(value: Any) -> Any:
    """Make of an attribute what JSON has, an array of one being its value; None where there is no like."""
    array = np.asarray(value)
    flat = [_scalar(each) for each in array.reshape(-1).tolist()]
    if not flat or None in flat:
        return None
    if array.size == 1:
        return flat[0]
    values = np.empty(len(flat), object)
    values[:] = flat
    return values.reshape(array.shape).tolist()


def _scalar(value: Any) -> Any:
    if isinstance(value, str | bytes):
        return _text(value)
    if isinstance(value, np.floating):
        # Wider than float64, for which Python has no number.
        return float(value)
    return value if isinstance(value, bool | int | float) else None


def _text(value: str | bytes) -> str:
    """Text that JSON can hold: h5py gives bytes that are no UTF-8 as surrogates."""
    raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return raw.decode("utf-8", "replace")


def _name(dataset: Any, axis: int) -> str | None:
    """Name of a dimension: that of its scale, as netCDF-4 has it, else its label."""
    try:
        dimension = dataset.dims[axis]
        if len(dimension):
            name = dimension[0].name
        elif dataset.is_scale and dataset.ndim == 1:
            name = dataset.name
        else:
            name = dimension.label
    except (OSError, ValueError, KeyError, RuntimeError):
        # The scale was deleted.
        return None
    return _text(name.rpartition("/")[2]) or None if name else None
