"""Which windows a command line asks for: of a file, drawn, or on a grid; within intervals, or a part of a split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import InputError
from pipeline.plan.rowfiles import load_intervals, load_starts
from pipeline.plan.split import By, check_intervals, name_parts, split_rows
from pipeline.plan.starts import check_starts, draw_starts, grid_starts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Rows(Protocol):
    """What has rows: a matrix, or several that share them."""

    @property
    def rows(self) -> int:
        """How many."""

    @property
    def parts(self) -> NDArray[np.int64] | None:
        """(m, 2), [first, stop) rows of each source; None where there was one."""


def select_starts(
    opened: Rows,
    *,
    matrix: str,
    length: int,
    count: int,
    seed: int,
    stride: int | None,
    within: str | None,
    split: str | None,
    part: str | None,
    split_by: By | None,
    split_seed: int | None,
    starts: str | None,
) -> NDArray[Any]:
    """Return the starts that the options of `run` name, each as on the command line."""
    if starts is not None:
        listed = load_starts(starts)
        return check_starts(listed.values, rows=opened.rows, length=length, where=listed.where)
    intervals = None
    if within == "parts":
        if opened.parts is None:
            raise InputError(f"--within parts is for a matrix of several sources; {matrix} has one; drop it")
        intervals = opened.parts
    elif within is not None:
        listed = load_intervals(within)
        intervals = check_intervals(listed.values, opened.rows, where=listed.where)
    if split is not None:
        intervals = _choose_part(opened.rows, length, intervals, split, part, split_by, split_seed)
    elif part is not None or split_by is not None or split_seed is not None:
        raise InputError("--part, --split-by and --split-seed are of a split; got no --split; name its fractions, too")
    if stride is not None:
        return grid_starts(opened.rows, length=length, stride=stride, within=intervals)
    return draw_starts(opened.rows, length=length, count=count, seed=seed, within=intervals)


def _choose_part(
    rows: int,
    length: int,
    within: NDArray[Any] | None,
    split: str,
    part: str | None,
    by: By | None,
    seed: int | None,
) -> NDArray[np.int64]:
    """Split the rows, and choose the intervals of one part."""
    try:
        fractions = [float(word) for word in split.split(",")]
    except ValueError as error:
        raise InputError(f"--split is fractions with commas; got {split!r}; write it such as 0.8,0.1,0.1") from error
    names = name_parts(len(fractions))
    known = {name: name for name in names} | {str(number): name for number, name in enumerate(names)}
    if part and part not in known:
        # The beginning of one name alone, such as val.
        begun = [name for name in names if name.startswith(part.lower())]
        known |= {part: begun[0]} if len(begun) == 1 else {}
    if part not in known:
        got = "none" if part is None else repr(part)
        raise InputError(f"--split goes with the --part to run; got {got}; give one of {', '.join(known)}")
    if by == "order" and seed is not None:
        raise InputError("--split-by order deals nothing at random; got --split-seed, too; drop one of the two")
    named = dict(zip(names, fractions, strict=True))
    return split_rows(rows, named, length=length, seed=seed or 0, by=by or "blocks", within=within)[known[part]]
