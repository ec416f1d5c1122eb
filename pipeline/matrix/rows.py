"""Arithmetic of rows and windows that plans, readers and samplers share. Pure NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def touched_units(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each number in any of the ranges [first[i], last[i]], ascending, once."""
    # Many windows in few units are many equal ranges, one after the other.
    changed = np.r_[True, (np.diff(first) != 0) | (np.diff(last) != 0)]
    first, last = first[changed], last[changed]
    counts = last - first + 1
    steps = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.unique(np.repeat(first, counts) + steps)


def count_touched(ascending: NDArray[np.int64], length: int, unit_rows: int) -> int:
    """How many units of `unit_rows` rows tasks touch, each counted once a task.

    Parameters
    ----------
    ascending
        (t, k) starts of the windows of each task, sorted.
    """
    first = ascending // unit_rows
    last = (ascending + (length - 1)) // unit_rows
    # Sorted windows of one length end in order, too: what the one before has touched is not new.
    shared = np.minimum(last[:, :-1] - first[:, 1:] + 1, last[:, 1:] - first[:, 1:] + 1)
    return int((last - first).sum()) + first.size - int(np.maximum(shared, 0).sum())


def asked_rows(ascending: NDArray[np.int64], length: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return rows of which no window has any as -1, and the others as they are.

    Parameters
    ----------
    ascending
        (k,) starts of the windows, sorted.
    """
    last = np.searchsorted(ascending, rows, side="right") - 1
    return np.where((last >= 0) & (rows - ascending[np.maximum(last, 0)] < length), rows, -1)


def window_rows(starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Rows of windows, one after the other: (k * length,)."""
    rows: NDArray[np.int64] = np.add.outer(starts, np.arange(length)).reshape(-1)
    return rows
