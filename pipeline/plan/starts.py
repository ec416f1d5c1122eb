"""Where windows start: drawn from a seed, or on a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.arguments import MOST_ROWS, check_flag, check_numbers, check_whole, show
from pipeline.errors import BudgetError, InputError
from pipeline.formatting import format_size
from pipeline.memory import budget
from pipeline.plan.split import fitting_intervals

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray


_DRAWN_NBYTES = 64
"""Memory that drawing and planning takes for each start."""
_LAID_OUT, _LAID_OUT_SHARE = 10_000, 50
"""Where `numpy.random.Generator.choice` without replacement takes memory for all that it chooses from."""
_MOST_MARGINALS = 10**9
"""`numpy.random.Generator.multivariate_hypergeometric` takes as many, less one."""


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
    rows, length = _check_window(rows, length)
    count = check_whole("count", count, least=1)
    seed = check_whole("seed", seed, least=0)
    check_flag("replace", replace)
    check_flag("overlap", overlap)
    _check_fit(count, "draw and run them in parts, each with a seed and an output of its own")
    fitting = fitting_intervals(rows, length, within)
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
        drawn = _draw_distinct(generator, total, count)
    ends = np.cumsum(choices)
    interval = np.searchsorted(ends, drawn, side="right")
    starts: NDArray[np.int64] = fitting[interval, 0] + drawn - (ends - choices)[interval]
    return starts


def grid_starts(
    rows: int, *, length: int, stride: int, within: ArrayLike | None = None, offset: int = 0
) -> NDArray[np.int64]:
    """Lay windows on a grid: one every `stride` rows, each whole.

    Parameters
    ----------
    rows
        Rows of the matrix.
    length
        Rows of a window.
    stride
        Rows from one start to the next: `length` for windows side by side, fewer for windows that overlap.
    within
        As of `draw_starts`; each interval has a grid of its own, from its first row.
    offset
        Rows of each interval before its first window.

    Returns
    -------
    ndarray
        (n,) int64, ascending: every window of the grids.

    Raises
    ------
    InputError
        If a value is out of its range, or no window fits.
    BudgetError
        If that many starts do not fit in memory.

    Examples
    --------
    >>> grid_starts(100, length=16, stride=32)
    array([ 0, 32, 64])
    >>> grid_starts(100, length=16, stride=16, within=[[0, 40], [50, 100]])
    array([ 0, 16, 50, 66, 82])
    """
    rows, length = _check_window(rows, length)
    stride = check_whole("stride", stride, least=1, most=MOST_ROWS)
    offset = check_whole("offset", offset, least=0, most=MOST_ROWS)
    fitting = fitting_intervals(rows, length, within)
    room = fitting[:, 1] - fitting[:, 0] - length - offset
    counts = np.where(room >= 0, room // stride + 1, 0)
    total = int(counts.sum())
    if not total:
        raise InputError(
            f"a grid has a window; with offset {offset} none of length {length} fits an interval; shorten the offset"
        )
    _check_fit(total, "take a longer stride, or lay and run them interval by interval")
    number = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    starts: NDArray[np.int64] = np.repeat(fitting[:, 0] + offset, counts) + number * stride
    return starts


def _check_window(rows: int, length: int) -> tuple[int, int]:
    return check_whole("rows", rows, least=1, most=MOST_ROWS), check_whole("length", length, least=1)


def _check_fit(count: int, way_out: str, *, more: int = 0) -> None:
    """Raise BudgetError where so many starts do not fit in memory, and `more` bytes beside them."""
    allowed, nbytes = budget(), count * _DRAWN_NBYTES + more
    if nbytes > allowed.nbytes:
        raise BudgetError(
            f"starts fit in memory; {show(count)} of them take {format_size(nbytes)}, {allowed}; {way_out}"
        )


def _draw_distinct(generator: np.random.Generator, total: int, count: int) -> NDArray[np.int64]:
    """Draw `count` of `total` numbers, each at most once, in random order; BudgetError where that does not fit."""
    # NumPy lays all of them out, unless it draws few of many.
    if total > _LAID_OUT and count > total // _LAID_OUT_SHARE:
        _check_fit(count, "draw fewer, or within parts of the rows", more=8 * total)
    return generator.choice(total, count, replace=False)


def _draw_disjoint(
    generator: np.random.Generator, intervals: NDArray[np.int64], length: int, count: int
) -> NDArray[np.int64]:
    """Shuffle disjoint windows: distinct points on a line shortened by what the windows before them take."""
    capacity = (intervals[:, 1] - intervals[:, 0]) // length
    if count > capacity.sum():
        raise InputError(
            f"windows that do not overlap: at most {capacity.sum()} fit, {count} were asked for; ask for fewer"
        )
    if (total := int(capacity.sum())) < _MOST_MARGINALS:
        # The "marginals" method counts one by one only over the intervals, so its cost does not grow with the rows.
        counts = generator.multivariate_hypergeometric(capacity, count, method="marginals")
    else:
        ends = np.cumsum(capacity)
        interval = np.searchsorted(ends, _draw_distinct(generator, total, count), side="right")
        counts = np.bincount(interval, minlength=len(capacity))
    starts = np.empty(count, dtype=np.int64)
    filled = 0
    for (first, stop), share in zip(intervals.tolist(), counts.tolist(), strict=True):
        points = np.sort(_draw_distinct(generator, stop - first - share * (length - 1), share))
        starts[filled : filled + share] = first + points + np.arange(share) * (length - 1)
        filled += share
    generator.shuffle(starts)
    return starts


def check_starts(
    starts: ArrayLike, *, rows: int, length: int, where: Callable[[int], str] = "at place {}".format
) -> NDArray[np.int64]:
    """Return starts as a read-only (n,) int64 copy; InputError unless each is a whole number in [0, rows - length].

    `where` names the place of a start in messages.
    """
    given = check_numbers("starts", starts, "a list of rows")
    if given.ndim != 1 or not given.size:
        raise InputError(f"starts are one-dimensional and at least one; got shape {given.shape}; give a list of rows")
    # Checked in their own dtype: a cast first would wrap 2**63 to a negative number, or a small dtype overflow.
    lowest, highest = int(given.min()), int(given.max())
    if lowest < 0 or highest > rows - length:
        worst = lowest if lowest < 0 else highest
        place = int(np.argmax(given == worst))
        raise InputError(
            f"a start is in 0 to {rows - length} ({rows} rows, length {length}); got {worst} {where(place)}; mend it"
        )
    checked = given.astype(np.int64)
    checked.flags.writeable = False
    return checked
