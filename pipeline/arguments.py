"""Arguments of public functions, checked where they come in: one that cannot be used is one line, with its value.

NumPy is imported where it is needed: `pipeline --help` needs none.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeGuard

from pipeline.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

MOST_ROWS = 2**62
"""More than any matrix has; sums of two, and their floats rounded to integers, still fit 64 bits."""
_SHOWN = 80
"""Characters of a value in a message."""
_EXACT = 2**53
"""Floats tell whole numbers apart that are smaller."""


def show(value: object) -> str:
    """Write a value for a message: on one line, not long, whatever its `repr` does."""
    try:
        words = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 (Python writes no number of many digits; objects raise what they like)
        words = f"an object of type {type(value).__name__}"
    return words if len(words) <= _SHOWN else f"{words[: _SHOWN - 3]}..."


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of Python or NumPy; not so a truth value, or a duration, an integer to NumPy."""
    times = getattr(getattr(value, "dtype", None), "kind", "") == "m"
    return isinstance(value, Integral) and not isinstance(value, bool) and not times


def check_whole(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """Return a whole number of at least `least`, or raise InputError."""
    if not is_whole(value):
        raise InputError(f"{name} is a whole number; got {show(value)}; give one of at least {least}")
    if value < least:
        raise InputError(f"{name} is at least {least}; got {show(int(value))}; give a larger one")
    if most is not None and value > most:
        raise InputError(f"{name} {show(int(value))} is too large; give one of at most {most}")
    return int(value)


def check_flag(name: str, value: object) -> bool:
    """Return a truth value, or raise InputError: words such as "no" are true to Python."""
    import numpy as np

    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is True or False; got {show(value)}; choose one")
    return bool(value)


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return one of these words, or raise InputError."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} is {' or '.join(known)}; got {show(value)}; choose one")
    return value


def check_text(name: str, value: object) -> str:
    """Return text, or raise InputError."""
    if not isinstance(value, str):
        raise InputError(f"{name} is text; got {show(value)}; give a str")
    return value


def check_path(name: str, value: Any) -> str | os.PathLike[str]:
    """Return a path or URL as it is, or raise InputError where it can be none."""
    try:
        text = os.fspath(value)
    except Exception:  # noqa: BLE001 (an object raises what it likes)
        text = None
    if not isinstance(text, str):
        raise InputError(f"{name} is a path; got {show(value)}; give a str or a pathlib.Path")
    if "\0" in text:
        raise InputError(f"{name} {show(text)} has a NUL character, which no path can have; drop it")
    made: str | os.PathLike[str] = value
    return made


def check_mapping(name: str, value: object) -> Mapping[str, Any]:
    """Return a mapping whose keys are text, or raise InputError."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name} is a mapping of names to values; got {show(value)}; give a dict")
    return value


def check_dtype(value: Any) -> np.dtype[Any]:
    """Return the dtype that NumPy makes of a value, or raise InputError."""
    import numpy as np

    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except Exception as error:  # what is no dtype fails in many ways
        raise InputError(f"a dtype is a name that NumPy knows; got {show(value)}; write float32 or >f4") from error
    return dtype


def check_shape(name: str, value: object) -> tuple[int, ...]:
    """Return a shape as a tuple of sizes, none negative, or raise InputError."""
    if not (isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1) or isinstance(value, str | bytes):
        raise InputError(f"{name} is a list of whole numbers; got {show(value)}; give a tuple such as (2000,)")
    sizes: Any = value
    return tuple(check_whole(f"a size in {name}", size, least=0) for size in sizes)


def check_array(name: str, value: object, form: str) -> NDArray[Any]:
    """Return what NumPy makes of a value that is like an array; InputError where it is ragged, masked or no array.

    Parameters
    ----------
    name
        Of what it holds, in the plural.
    form
        What it should be, for messages, such as "a list of rows".
    """
    import numpy as np

    try:
        # What is masked has values beneath, which nobody asked for.
        masked = isinstance(value, np.ma.MaskedArray) and bool(np.ma.getmaskarray(value).any())
        given = np.asarray(value)
    except Exception as error:  # objects that are arrays by their own account raise what they like
        raise InputError(f"{name} are {form}; got {show(value)}, which is no array; correct it") from error
    if masked:
        raise InputError(f"{name} are masked in places: {show(value)}; drop those")
    return given


def check_numbers(name: str, value: object, form: str) -> NDArray[Any]:
    """Return an array of whole numbers as NumPy makes it, of any width; or empty, of whatever dtype.

    Parameters
    ----------
    name, form
        As `check_array` takes them.

    Raises
    ------
    InputError
        Where anything else is given, such as times or a mask, of which a cast to int64 would make wrong numbers.
    """
    given = check_array(name, value, form)
    if given.size and given.dtype.kind not in "iu":
        raise InputError(f"{name} {_say_wrong(name, given)}")
    return given


def _say_wrong(name: str, given: NDArray[Any]) -> str:
    """Say what an array holds instead of whole numbers, and what to do."""
    import numpy as np

    whole = np.zeros(given.shape, bool)
    match given.dtype.kind:
        case "b":
            return "are a mask of booleans; numpy.flatnonzero gives the numbers of what is True in it"
        case "f":
            with np.errstate(all="ignore"):
                whole = np.isfinite(given) & (given == np.floor(given)) & (np.abs(given) < _EXACT)
        case "O":
            whole = np.array([is_whole(each) and -(2**63) <= each < 2**63 for each in given.flat]).reshape(given.shape)
    if whole.all():
        return f"have dtype {given.dtype}, and every value is a whole number; give {name}.astype(numpy.int64)"
    place = int(np.argmin(whole))
    wrong = given.flat[place]
    if isinstance(wrong, np.datetime64 | np.timedelta64 | dt.date | dt.time | dt.timedelta):
        # Cast to numbers, of whatever unit, they would be rows that nobody meant.
        return (
            f"are times ({given.dtype}), such as {show(str(wrong))}; look the rows up by numpy.searchsorted on the "
            "time coordinate"
        )
    shown = show(wrong.item() if isinstance(wrong, np.generic) else wrong)
    return f"have {shown} at place {place} ({given.dtype}), which is not exactly a whole number of 64 bits"
