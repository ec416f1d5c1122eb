"""What of each row is delivered, and as which dtype: columns chosen, values cast, none of them lost."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.arguments import check_dtype, check_numbers, show
from pipeline.errors import InputError, IntegrityError
from pipeline.matrix.formats import is_numeric
from pipeline.storage.checksums import digest_array

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, DTypeLike, NDArray

_NAMED = 8


class Part(NamedTuple):
    """Bytes of each row that are read alone."""

    first: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Columns of rows, and the dtype that they are cast to. Picklable; made by `select`."""

    stored_shape: tuple[int, ...]
    """Of a row of the matrix."""
    stored_dtype: np.dtype[Any]
    """Of the matrix's values in memory."""
    columns: slice | NDArray[np.int64] | None
    """Of the first axis of a row: a slice within it, of a positive step, or (c,) numbers, none negative."""
    dtype: np.dtype[Any]
    """Of the values as delivered."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        mine = (self.stored_shape, self.stored_dtype, self.dtype, self.row_shape, self.facts())
        return mine == (other.stored_shape, other.stored_dtype, other.dtype, other.row_shape, other.facts())

    __hash__ = None  # type: ignore[assignment]

    @property
    def count(self) -> int:
        """How many columns there are, those that are repeated counted again; 1 where rows have no axis."""
        if self.columns is None:
            return self.stored_shape[0] if self.stored_shape else 1
        if isinstance(self.columns, slice):
            return len(range(self.columns.start, self.columns.stop, self.columns.step))
        return len(self.columns)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row as delivered."""
        return self.stored_shape if self.columns is None else (self.count, *self.stored_shape[1:])

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row as delivered."""
        return int(np.prod(self.row_shape, dtype=object)) * self.dtype.itemsize

    @property
    def casts(self) -> bool:
        """Whether values get another dtype."""
        return self.dtype != self.stored_dtype

    @property
    def is_whole(self) -> bool:
        """Whether rows are delivered as they are."""
        every = isinstance(self.columns, slice) and self.columns == slice(0, self.stored_shape[0], 1)
        return not self.casts and (self.columns is None or every)

    @property
    def part(self) -> Part | None:
        """The bytes of a row that hold the columns and nothing else; None where they are not one run, or all of it."""
        if not isinstance(self.columns, slice) or self.columns.step != 1 or self.count == self.stored_shape[0]:
            return None
        entry = int(np.prod(self.stored_shape[1:], dtype=object)) * self.stored_dtype.itemsize
        return Part(self.columns.start * entry, self.count * entry)

    def within(self, part: Part | None) -> Selection | None:
        """What is left to do with rows of which only `part` was read; None: nothing."""
        left = self if part is None else replace(self, stored_shape=self.row_shape, columns=None)
        return None if left.is_whole else left

    def take(self, rows: NDArray[Any], numbers: Callable[[], NDArray[np.int64]]) -> NDArray[Any]:
        """Choose the columns of rows, and cast them.

        Parameters
        ----------
        rows
            (..., *stored_shape).
        numbers
            Gives the matrix row of each, all leading axes in one; -1 where nobody asked for it. Called on failure only.

        Returns
        -------
        ndarray
            (..., *row_shape) of `dtype`; it may be a view of `rows`.

        Raises
        ------
        IntegrityError
            If a value that was asked for is lost by more than rounding: names its row.
        """
        lead = rows.ndim - len(self.stored_shape)
        chosen = rows
        if isinstance(self.columns, slice):
            chosen = rows[(slice(None),) * lead + (self.columns,)]
        elif self.columns is not None:
            chosen = np.take(rows, self.columns, axis=lead)
        if not self.casts:
            return chosen
        with np.errstate(all="ignore"):
            cast = chosen.astype(self.dtype)
        if np.can_cast(self.stored_dtype, self.dtype, "safe"):
            return cast
        lost = find_lost(chosen, cast)
        if lost is not None:
            self._refuse_lost(chosen, lost, numbers())
        return cast

    def _refuse_lost(self, chosen: NDArray[Any], lost: NDArray[np.bool_], numbers: NDArray[np.int64]) -> None:
        """Raise IntegrityError where a value is lost in a row that was asked for."""
        lost = lost.reshape(len(numbers), -1)
        # Chunks are decoded, and spans read, with rows in them that no window has.
        wrong = np.flatnonzero(lost.any(axis=1) & (numbers >= 0))
        if len(wrong):
            value = chosen.reshape(len(numbers), -1)[wrong[0]][lost[wrong[0]]][0]
            raise IntegrityError(
                f"a cast loses no value but by rounding; row {numbers[wrong[0]]} has {value!s}, which {self.dtype} "
                "does not hold; give a wider dtype"
            )

    def facts(self) -> dict[str, str]:
        """What decides the bytes of a result, by name; empty where rows are delivered as they are."""
        facts = {}
        if isinstance(self.columns, slice):
            facts["columns"] = f"{self.columns.start}:{self.columns.stop}:{self.columns.step}"
        elif self.columns is not None:
            facts["columns"] = digest_array(self.columns)
        if self.casts:
            facts["dtype"] = self.dtype.str
        return {} if self.is_whole else facts

    def say(self) -> str:
        """Columns in words; empty where there are none to choose."""
        if self.columns is None:
            return ""
        if isinstance(self.columns, slice):
            step = "" if self.columns.step == 1 else f":{self.columns.step}"
            which = f"{self.columns.start}:{self.columns.stop}{step}"
        else:
            which = ", ".join(map(str, self.columns[:_NAMED])) + (", ..." if len(self.columns) > _NAMED else "")
        return f"{self.count:,} of {self.stored_shape[0]:,} ({which})"


def select(
    row_shape: tuple[int, ...],
    stored_dtype: np.dtype[Any],
    *,
    columns: slice | ArrayLike | None,
    dtype: DTypeLike | None,
) -> Selection:
    """Check what is asked for of each row.

    Raises
    ------
    InputError
        If columns are no whole numbers within the row, or none, or a slice begins or ends outside of it; if values
        cannot be cast within their kind.

    Examples
    --------
    >>> import numpy
    >>> chosen = select((100, 3), numpy.dtype("f8"), columns=slice(-10, None), dtype="f4")
    >>> chosen.row_shape, chosen.columns, chosen.row_nbytes
    ((10, 3), slice(90, 100, 1), 120)
    """
    chosen = None if columns is None else _check_columns(columns, row_shape)
    return Selection(row_shape, stored_dtype, chosen, _check_dtype(dtype, stored_dtype))


def _check_columns(columns: Any, row_shape: tuple[int, ...]) -> slice | NDArray[np.int64]:
    if not row_shape:
        raise InputError("columns are those of a row; each row of this matrix is one value; leave them out")
    size = row_shape[0]
    rule = f"columns are a slice, or a list of whole numbers from {-size} to {size - 1}"
    if isinstance(columns, slice):
        return _check_slice(columns, size, rule)
    numbers = check_numbers("columns", columns, f"a slice, or whole numbers from {-size} to {size - 1}")
    if numbers.ndim != 1:
        raise InputError(f"{rule}; got {show(columns)}; give such a list")
    if not numbers.size:
        raise InputError(f"{rule}, one at least; got none; choose some")
    wrong = (numbers < -size) | (numbers >= size)
    if wrong.any():
        raise InputError(f"{rule}; got {numbers[wrong][0]}; drop it")
    numbers = numbers.astype(np.int64)
    numbers[numbers < 0] += size
    steps = np.diff(numbers)
    step = int(steps[0]) if len(steps) else 1
    if step > 0 and (steps == step).all():
        # One spelling of the same columns.
        return slice(int(numbers[0]), int(numbers[-1]) + 1, step)
    return _freeze(numbers)


def _check_slice(columns: slice, size: int, rule: str) -> slice | NDArray[np.int64]:
    try:
        found = range(*columns.indices(size))
    except (TypeError, ValueError) as error:
        raise InputError(f"{rule}; got {columns}: {error}; write them such as slice(0, {size})") from error
    # NumPy would clip: whoever mistakes how many columns there are would get fewer than were asked for.
    lowest = -size - (found.step < 0)
    for bound in (columns.start, columns.stop):
        if bound is not None and not lowest <= operator.index(bound) <= size:
            raise InputError(
                f"columns {_say_slice(columns)} lie outside the {size:,} columns of a row; "
                f"stay within {-size} to {size}"
            )
    if not found:
        raise InputError(f"{rule}, one at least; {columns} has none of {size}; choose some")
    if found.step < 0 and len(found) > 1:
        return _freeze(np.array(found, np.int64))
    # Of the spellings of one slice, this one.
    return slice(found.start, found[-1] + 1, found.step if len(found) > 1 else 1)


def _say_slice(columns: slice) -> str:
    parts = [columns.start, columns.stop, *([] if columns.step is None else [columns.step])]
    return ":".join("" if part is None else str(part) for part in parts)


def _freeze(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    numbers.flags.writeable = False
    return numbers


def _check_dtype(dtype: DTypeLike | None, stored: np.dtype[Any]) -> np.dtype[Any]:
    if dtype is None:
        return stored
    wanted = check_dtype(dtype).newbyteorder("=")
    if not is_numeric(wanted) or not np.can_cast(stored, wanted, "same_kind"):
        raise InputError(
            f"values are cast within their kind (same_kind of numpy.can_cast), to at most 64 bits a component; "
            f"{stored} cannot become {wanted}; choose another dtype, or let apply convert them"
        )
    return wanted


def find_lost(made: NDArray[Any], cast: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Tell which values a `same_kind` cast has changed by more than rounding; None: none of them.

    Whole numbers must lie in the range that the other dtype holds exactly, finite numbers must stay finite.
    """
    if made.dtype.kind in "iu":
        if cast.dtype.kind in "iu":
            lowest, highest = int(np.iinfo(cast.dtype).min), int(np.iinfo(cast.dtype).max)
        else:
            highest = 2 ** (np.finfo(cast.dtype).nmant + 1)
            lowest = -highest
        if not made.size or (lowest <= int(made.min()) and int(made.max()) <= highest):
            return None
        return np.asarray((made < lowest) | (made > highest))
    if made.dtype.kind not in "fc":
        return None
    lost = np.isfinite(made) & ~np.isfinite(cast)
    return lost if lost.any() else None
