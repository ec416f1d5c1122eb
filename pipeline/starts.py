"""Where windows start: drawn from a seed, or read from a file."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import BudgetError, InputError, NotFoundError, OpenError
from pipeline.memory import budget
from pipeline.sizes import format_size

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


_DIGITS = 40
"""More digits than any 64-bit number is written with."""
_DRAWN_NBYTES = 64
"""Memory that drawing and planning takes for each start."""


def draw_starts(
    rows: int,
    *,
    length: int,
    count: int,
    seed: int,
    replace: bool = True,
    overlap: bool = True,
    within: ArrayLike | None = None,
) -> NDArray[np.int64]:
    """Draw the starts of random windows from `numpy.random.default_rng(seed)`.

    Parameters
    ----------
    rows
        Rows of the matrix.
    length
        Rows of a window.
    count
        Windows to draw.
    seed
        Not negative; the same seed gives the same starts.
    replace
        Whether a start may be drawn more than once.
    overlap
        Whether windows may share rows. Without overlap, the windows of one interval are spread uniformly over all
        their disjoint arrangements, and the intervals get windows in proportion to how many each can hold.
    within
        (m, 2) intervals of rows, [first, stop), that do not overlap each other; a window lies inside one of them.
        Such as `matrix.parts`. Default: the whole matrix.

    Returns
    -------
    ndarray
        (count,) int64, in random order, each in [0, rows - length].

    Raises
    ------
    InputError
        If a value is out of its range, or that many windows do not fit.
    BudgetError
        If that many starts do not fit in memory.

    Examples
    --------
    >>> draw_starts(1_000_000, length=16, count=4, seed=0)
    array([850611, 636952, 511128, 269782])
    """
    _check_whole(rows=(rows, 1), length=(length, 1), count=(count, 1), seed=(seed, 0))
    allowed = budget()
    if count * _DRAWN_NBYTES > allowed.nbytes:
        raise BudgetError(
            f"starts fit in memory; {count} of them take {format_size(count * _DRAWN_NBYTES)}, {allowed.source} allows "
            f"{format_size(allowed.nbytes)}; draw and run them in parts, each with a seed and an output of its own"
        )
    if length > rows:
        raise InputError(f"a window lies inside the matrix; got length {length} for {rows} rows; give 1 to {rows}")
    intervals = np.array([[0, rows]]) if within is None else check_intervals(within, rows)
    fitting = intervals[intervals[:, 1] - intervals[:, 0] >= length]
    if not len(fitting):
        longest = (intervals[:, 1] - intervals[:, 0]).max(initial=0)
        raise InputError(
            f"a window lies inside an interval; the longest has {longest} rows, a window {length}; shorten it"
        )
    generator = np.random.default_rng(seed)
    if not overlap:
        return _draw_disjoint(generator, fitting, length, count)
    choices = fitting[:, 1] - fitting[:, 0] - length + 1
    total = int(choices.sum())
    if replace:
        drawn = generator.integers(0, total, size=count)
    elif count > total:
        raise InputError(f"without replacement a start is drawn once; {count} of {total} were asked for; ask for fewer")
    else:
        drawn = generator.choice(total, size=count, replace=False)
    ends = np.cumsum(choices)
    interval = np.searchsorted(ends, drawn, side="right")
    starts: NDArray[np.int64] = fitting[interval, 0] + drawn - (ends - choices)[interval]
    return starts


def _draw_disjoint(
    generator: np.random.Generator, intervals: NDArray[np.int64], length: int, count: int
) -> NDArray[np.int64]:
    """Shuffle disjoint windows: distinct points on a line shortened by what the windows before them take."""
    capacity = (intervals[:, 1] - intervals[:, 0]) // length
    if count > capacity.sum():
        raise InputError(
            f"windows that do not overlap: at most {capacity.sum()} fit, {count} were asked for; ask for fewer"
        )
    # The "marginals" method counts one by one only over the intervals, so its cost does not grow with the rows.
    counts = generator.multivariate_hypergeometric(capacity, count, method="marginals")
    starts = np.empty(count, dtype=np.int64)
    filled = 0
    for (first, stop), share in zip(intervals.tolist(), counts.tolist(), strict=True):
        points = np.sort(generator.choice(stop - first - share * (length - 1), size=share, replace=False))
        starts[filled : filled + share] = first + points + np.arange(share) * (length - 1)
        filled += share
    generator.shuffle(starts)
    return starts


def check_intervals(within: ArrayLike, rows: int) -> NDArray[np.int64]:
    """Sort intervals (m, 2) of rows; InputError where one is empty, leaves the matrix, or overlaps another."""
    given = np.asarray(within)
    if given.ndim != 2 or given.shape[1] != 2 or not len(given) or given.dtype.kind not in "iu":
        raise InputError(
            f"intervals are whole numbers of shape (m, 2); got {given.dtype} of shape {given.shape}; give [first, stop)"
        )
    bad = (given < 0).any(axis=1) | (given > rows).any(axis=1) | (given[:, 0] >= given[:, 1])
    if bad.any():
        first, stop = given[bad][0]
        raise InputError(f"an interval lies inside the {rows} rows and is not empty; got [{first}, {stop}); mend it")
    intervals = given[np.argsort(given[:, 0], kind="stable")].astype(np.int64)
    overlapping = np.flatnonzero(intervals[1:, 0] < intervals[:-1, 1])
    if len(overlapping):
        one, other = intervals[overlapping[0]].tolist(), intervals[overlapping[0] + 1].tolist()
        raise InputError(f"intervals do not overlap; got {one} and {other}; merge or cut them")
    return intervals


def check_starts(starts: ArrayLike, *, rows: int, length: int) -> NDArray[np.int64]:
    """Return starts as a read-only (n,) int64 copy; InputError unless each is a whole number in [0, rows - length]."""
    given = np.asarray(starts)
    if given.ndim != 1 or not given.size:
        raise InputError(f"starts are one-dimensional and at least one; got shape {given.shape}; give a list of rows")
    if given.dtype.kind not in "iu":
        raise InputError(f"starts are whole numbers; got dtype {given.dtype}; convert them to int64")
    # Checked in their own dtype: a cast first would wrap 2**63 to a negative number, or a small dtype overflow.
    lowest, highest = int(given.min()), int(given.max())
    if lowest < 0 or highest > rows - length:
        worst = lowest if lowest < 0 else highest
        place = int(np.argmax(given == worst))
        raise InputError(
            f"a start is in 0 to {rows - length} ({rows} rows, length {length}); got {worst} at place {place}; mend it"
        )
    checked = given.astype(np.int64)
    checked.flags.writeable = False
    return checked


def load_starts(path: str | Path) -> NDArray[Any]:
    """Read starts from a `.npy`, a text file of one whole number a line, or `-`: such text on standard input.

    Raises
    ------
    NotFoundError
        If the file is not there.
    OpenError
        If it cannot be parsed; a pickled `.npy` is never loaded.
    """
    name = "standard input" if str(path) == "-" else str(path)
    path = Path(path)
    if str(path) != "-" and not os.path.lexists(path):
        raise NotFoundError(f"starts come from a file that is there; nothing is at {path}; check the path")
    try:
        if str(path) == "-":
            # None where it is closed.
            text = "" if sys.stdin is None else sys.stdin.read()
        elif path.suffix == ".npy":
            # Mapped first: reading would allocate whatever the header of a file says that was cut.
            return np.array(np.lib.format.open_memmap(path, mode="r"))
        else:
            text = path.read_text(encoding="utf-8")
    except (OSError, ValueError, SyntaxError, TypeError, EOFError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OpenError(
            f"starts come from a .npy or a text file; {name} cannot be read: {reason}; write it anew"
        ) from error
    return _parse_starts(text, name)


def _parse_starts(text: str, name: str) -> NDArray[Any]:
    values = []
    for number, word in enumerate(text.split()):
        if not re.fullmatch(r"[+-]?[0-9]+", word):
            raise OpenError(
                f"starts are whole numbers, one a line; {name} has {word[:40]!r} at place {number}; mend it"
            )
        # NumPy would turn what fits no 64-bit integer into objects or floats.
        if len(word) > _DIGITS or not -(2**63) <= int(word) < 2**63:
            raise InputError(f"a start is a row of the matrix; {name} has {word[:40]} at place {number}; mend it")
        values.append(int(word))
    return np.array(values, dtype=np.int64)


def _check_whole(**arguments: tuple[Any, int]) -> None:
    for name, (value, least) in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise InputError(f"{name} is a whole number; got {value!r}; give one of at least {least}")
        if value < least:
            raise InputError(f"{name} is at least {least}; got {value}; give a larger one")
