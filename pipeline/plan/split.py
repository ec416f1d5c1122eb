"""Intervals of rows: checked, and split into parts of which no two share a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args, overload

import numpy as np

from pipeline.arguments import MOST_ROWS, check_array, check_choice, check_numbers, check_whole, show
from pipeline.errors import InputError
from pipeline.formatting import count_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

By = Literal["blocks", "intervals", "order"]

_BLOCK_WINDOWS = 64
"""Windows that fit a block side by side: at a border between two parts the starts of one window are lost."""
_FEWEST_BLOCKS = 4
_MOST_BLOCKS = 10_000_000
"""Each takes some tens of bytes here."""
"""Blocks of the smallest part at least, where they do not become shorter than a window."""
_SUM_TOLERANCE = 1e-9
_NAMES = {1: ["train"], 2: ["train", "test"], 3: ["train", "validation", "test"]}


def check_intervals(
    within: ArrayLike, rows: int, *, where: Callable[[int], str] = "at place {}".format
) -> NDArray[np.int64]:
    """Sort intervals (m, 2) of rows; InputError where one is empty, leaves the matrix, or overlaps another.

    `where` names the place of an interval in messages.
    """
    given = check_numbers("intervals", within, "pairs of rows, [first, stop), of shape (m, 2)")
    if given.ndim != 2 or given.shape[1] != 2 or not len(given):
        raise InputError(
            f"intervals are whole numbers of shape (m, 2); got {given.dtype} of shape {given.shape}; give [first, stop)"
        )
    bad = (given < 0).any(axis=1) | (given > rows).any(axis=1) | (given[:, 0] >= given[:, 1])
    if bad.any():
        place = int(np.flatnonzero(bad)[0])
        first, stop = given[place]
        raise InputError(
            f"an interval lies inside the {rows} rows and is not empty; got [{first}, {stop}) {where(place)}; mend it"
        )
    order = np.argsort(given[:, 0], kind="stable")
    intervals = given[order].astype(np.int64)
    overlapping = np.flatnonzero(intervals[1:, 0] < intervals[:-1, 1])
    if len(overlapping):
        one, other = (f"{given[place].tolist()} {where(place)}" for place in order[overlapping[0] :][:2].tolist())
        raise InputError(f"intervals do not overlap; got {one} and {other}; merge or cut them")
    return intervals


def fitting_intervals(rows: int, length: int, within: ArrayLike | None) -> NDArray[np.int64]:
    """Sort the intervals (m, 2) that hold a window; InputError where none does.

    Parameters
    ----------
    within
        Default: one interval, the whole matrix.
    """
    if length > rows:
        raise InputError(
            f"a window lies inside the matrix; got length {show(length)} for {rows} rows; give 1 to {rows}"
        )
    intervals = np.array([[0, rows]]) if within is None else check_intervals(within, rows)
    fitting = intervals[intervals[:, 1] - intervals[:, 0] >= length]
    if not len(fitting):
        longest = (intervals[:, 1] - intervals[:, 0]).max(initial=0)
        raise InputError(
            f"a window lies inside an interval; the longest has {longest} rows, a window {length}; shorten it"
        )
    return fitting


@overload
def split_rows(
    rows: int,
    fractions: Mapping[str, float],
    *,
    length: int,
    seed: int = ...,
    by: By = ...,
    within: ArrayLike | None = ...,
    block_rows: int | None = ...,
) -> dict[str, NDArray[np.int64]]: ...
@overload
def split_rows(
    rows: int,
    fractions: Sequence[float],
    *,
    length: int,
    seed: int = ...,
    by: By = ...,
    within: ArrayLike | None = ...,
    block_rows: int | None = ...,
) -> list[NDArray[np.int64]]: ...
def split_rows(
    rows: int,
    fractions: Mapping[str, float] | Sequence[float],
    *,
    length: int,
    seed: int = 0,
    by: By = "blocks",
    within: ArrayLike | None = None,
    block_rows: int | None = None,
) -> dict[str, NDArray[np.int64]] | list[NDArray[np.int64]]:
    """Split rows into parts for training, validation and test, so that no window of one shares a row with another's.

    Each part is given as intervals: draw or lay its windows `within` them. The same arguments give the same split.

    Parameters
    ----------
    rows
        Rows of the matrix.
    fractions
        Of the rows, a part each, such as (0.8, 0.1, 0.1), or by name, such as {"train": 0.8, "test": 0.2}. Rows that
        they leave over belong to no part.
    length
        Rows of the windows that will be drawn.
    seed
        Not negative; of what is dealt at random.
    by
        `blocks`: runs of rows, dealt at random; each part has its fraction of the rows to within one block.
        `intervals`: whole intervals of `within`, such as recordings, dealt at random; each part has one at least that
        holds a window. `order`: the first rows to the first part, and so on, as forecasts need it; no seed.
    within
        (m, 2) intervals of rows, [first, stop), that do not overlap each other, and whose borders no window crosses;
        such as `matrix.parts`. Default: the whole matrix.
    block_rows
        Rows of a block, at least; less than twice as many where its interval has as many. Default: 64 windows, fewer
        where the smallest part would have less than four blocks, more where there would be over ten million blocks.
        Between two blocks of one part no window is lost.

    Returns
    -------
    list or dict of ndarray
        A part each: (m, 2) int64 intervals, ascending, which neither overlap nor cross a border of `within`. One that
        is shorter than a window may be among them; `draw_starts` and `grid_starts` pass over it.

    Raises
    ------
    InputError
        If a value is out of its range, or a part would hold no window.

    Examples
    --------
    >>> train, test = split_rows(1000, (0.8, 0.2), length=16, by="order")
    >>> train.tolist(), test.tolist()
    ([[0, 800]], [[800, 1000]])
    >>> parts = split_rows(100_000, {"train": 0.75, "test": 0.25}, length=16, seed=1)
    >>> {name: int((part[:, 1] - part[:, 0]).sum()) for name, part in parts.items()}
    {'train': 75258, 'test': 24742}
    """
    rows = check_whole("rows", rows, least=1, most=MOST_ROWS)
    length = check_whole("length", length, least=1)
    seed = check_whole("seed", seed, least=0)
    check_choice("by", by, get_args(By))
    if not isinstance(fractions, Mapping | Sequence | np.ndarray) or isinstance(fractions, str | bytes):
        raise InputError(f"fractions are a list, or a mapping of names to them; got {show(fractions)}; try (0.8, 0.2)")
    shares = _check_fractions(list(fractions.values()) if isinstance(fractions, Mapping) else fractions)
    names = list(fractions) if isinstance(fractions, Mapping) else list(map(str, range(len(fractions))))
    if block_rows is not None:
        block_rows = check_whole("block_rows", block_rows, least=length, most=MOST_ROWS)
        if by != "blocks":
            raise InputError(f"block_rows is of a split by blocks; got {block_rows} with by={by!r}; drop it")
    fitting_intervals(rows, length, within)
    intervals = np.array([[0, rows]]) if within is None else check_intervals(within, rows)
    total = int((intervals[:, 1] - intervals[:, 0]).sum())
    if by == "order":
        pieces, part = _cut_in_order(intervals, np.rint(np.cumsum(shares) * total).astype(np.int64))
    elif by == "intervals":
        pieces, part = intervals, _deal_whole(np.random.default_rng(seed), intervals, shares, length)
    else:
        pieces = _cut_blocks(intervals, _choose_block_rows(total, length, shares.min(), block_rows))
        part = _deal_blocks(np.random.default_rng(seed), pieces, shares)
    split = [_merge(pieces[part == number], intervals) for number in range(len(shares))]
    way_out = "give it a larger fraction, or more or longer intervals"
    if by == "intervals" and within is None:
        way_out = "name the intervals, such as recordings, by within (--within)"
    for name, each in zip(names, split, strict=True):
        if not len(each) or (each[:, 1] - each[:, 0]).max() < length:
            raise InputError(
                f"each part holds a window; part {name} of {count_of(total, 'row')}, split by {by}, has none of "
                f"{length} rows; {way_out}"
            )
    return dict(zip(names, split, strict=True)) if isinstance(fractions, Mapping) else split


def name_parts(count: int) -> list[str]:
    """Name the parts of a split that were given no names.

    Examples
    --------
    >>> name_parts(2), name_parts(4)
    (['train', 'test'], ['0', '1', '2', '3'])
    """
    return _NAMES.get(count, [str(number) for number in range(count)])


def _check_fractions(fractions: object) -> NDArray[np.float64]:
    given = check_array("fractions", fractions, "numbers such as 0.8, 0.1, 0.1")
    # What can be turned into floats need not be numbers: a mask can, and times.
    shares = given.astype(np.float64) if given.dtype.kind in "iuf" else np.array(np.nan)
    if (
        shares.ndim != 1
        or not shares.size
        or not ((shares > 0) & (shares < 2)).all()
        or (shares.sum() > 1 + _SUM_TOLERANCE)
    ):
        raise InputError(
            f"fractions are positive and their sum is at most 1; got {show(fractions)}; write them such as "
            "0.8, 0.1, 0.1"
        )
    if shares.sum() > 1 - _SUM_TOLERANCE:
        # Every row belongs to a part, whatever the sum was rounded to.
        shares /= shares.sum()
    return shares


def _cut_in_order(
    intervals: NDArray[np.int64], bounds: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut intervals where so many rows of them have passed; also the part of each piece."""
    passed = np.cumsum(intervals[:, 1] - intervals[:, 0])
    before = np.concatenate([[0], passed[:-1]])
    inside = np.unique(bounds[~np.isin(bounds, passed)])
    inside = inside[(inside > 0) & (inside < passed[-1])]
    at = np.searchsorted(passed, inside, side="right")
    cuts = intervals[at, 0] + inside - before[at]
    firsts = np.sort(np.concatenate([intervals[:, 0], cuts]))
    stops = np.sort(np.concatenate([intervals[:, 1], cuts]))
    pieces = np.stack([firsts, stops], axis=1)
    begun = np.cumsum(stops - firsts) - (stops - firsts)
    return pieces, np.searchsorted(bounds, begun, side="right")


def _choose_block_rows(total: int, length: int, share: float, given: int | None) -> int:
    """Rows of a block; `share` of all rows are the smallest part's. InputError where blocks would be too many."""
    least = -(-total // _MOST_BLOCKS)
    if given is None:
        return max(length, least, min(_BLOCK_WINDOWS * length, int(total * share) // _FEWEST_BLOCKS))
    if given < least:
        raise InputError(
            f"blocks of {given:,} rows are too many, more than {_MOST_BLOCKS:,} of {total:,} rows; give block_rows of "
            f"at least {least:,}"
        )
    return given


def _cut_blocks(intervals: NDArray[np.int64], block_rows: int) -> NDArray[np.int64]:
    """Cut intervals into blocks of nearly the same size, of at least `block_rows` where they have as many."""
    sizes = intervals[:, 1] - intervals[:, 0]
    counts = np.maximum(1, sizes // block_rows)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    whole, more = np.repeat(sizes // counts, counts), np.repeat(sizes % counts, counts)
    firsts = np.repeat(intervals[:, 0], counts) + number * whole + np.minimum(number, more)
    return np.stack([firsts, firsts + whole + (number < more)], axis=1)


def _deal_blocks(
    generator: np.random.Generator, blocks: NDArray[np.int64], shares: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Part of each block: shuffled, laid end to end, and cut at the fractions; those left over come last."""
    order = generator.permutation(len(blocks))
    sizes = (blocks[:, 1] - blocks[:, 0])[order]
    middles = np.cumsum(sizes) - sizes / 2
    part = np.empty(len(blocks), dtype=np.int64)
    part[order] = np.searchsorted(np.cumsum(shares) * sizes.sum(), middles, side="right")
    return part


def _deal_whole(
    generator: np.random.Generator, intervals: NDArray[np.int64], shares: NDArray[np.float64], length: int
) -> NDArray[np.int64]:
    """Part of each interval, in random order to the part that lacks most; what is left over is a part, too."""
    sizes = intervals[:, 1] - intervals[:, 0]
    wanted = np.append(shares, max(0.0, 1 - shares.sum())) * sizes.sum()
    part = np.empty(len(intervals), dtype=np.int64)
    for number in generator.permutation(len(intervals)).tolist():
        part[number] = np.argmax(wanted)
        wanted[part[number]] -= sizes[number]
    fits = sizes >= length
    for empty in np.flatnonzero([not (fits & (part == number)).any() for number in range(len(shares))]).tolist():
        # The shortest of the part that can best spare one.
        counts = np.bincount(part[fits], minlength=len(wanted))
        giver = int(np.argmax(counts))
        if counts[giver] > 1:
            own = np.flatnonzero(fits & (part == giver))
            part[own[np.argmin(sizes[own])]] = empty
    return part


def _merge(pieces: NDArray[np.int64], intervals: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join neighbours that lie in the same interval."""
    if not len(pieces):
        return pieces
    apart = (pieces[1:, 0] != pieces[:-1, 1]) | np.isin(pieces[1:, 0], intervals[:, 0])
    return np.stack([pieces[np.append(True, apart), 0], pieces[np.append(apart, True), 1]], axis=1)
