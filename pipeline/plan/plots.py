"""Pictures: where windows fall, what reading them costs, where a run's time went. Matplotlib is imported when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import InputError
from pipeline.formatting import COLORS, count_of, format_size
from pipeline.plan.split import check_intervals, name_parts, split_rows
from pipeline.plan.starts import draw_starts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

    from pipeline.plan.split import By

type Curve = tuple[Sequence[float], Sequence[float]]
"""Seconds, ascending, and what had been delivered by then."""

_PARTS = ("#4c8dc9", "#e08214", "#35978f", "#8c6bb1", "#c7566a")
_STRIPS = 2000
"""Into so many strips rows are cut: more than a picture has pixels."""
_BINS = 100
_MOST_MARKED = 400
"""Windows that are shown one by one; more are shown as a density."""
_LEAST_WIDTH = 1 / 600
"""Of a window's mark, as a part of the picture's width."""
_LANE = 0.72


def plot_starts(
    starts: ArrayLike | Mapping[str, ArrayLike],
    *,
    rows: int,
    length: int,
    within: ArrayLike | Mapping[str, ArrayLike] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw where windows fall: a lane for each part, its intervals as bands, its windows as marks below them.

    Parameters
    ----------
    starts
        (n,) rows; or by the name of a part. More than 400 windows of a part are drawn as their density.
    rows
        Rows of the matrix.
    length
        Rows of a window.
    within
        (m, 2) intervals of rows, or by the same names. Default: the whole matrix. What lies in none stays white.
    ax
        Default: of a new figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If matplotlib is not installed, or an interval is none.

    Examples
    --------
    >>> import pipeline
    >>> from pipeline.plan.plots import plot_starts
    >>> starts = pipeline.draw_starts(1000, length=16, count=20, seed=0, within=[[0, 300], [500, 900]])
    >>> plot_starts(starts, rows=1000, length=16, within=[[0, 300], [500, 900]]).get_xlabel()
    'row of the matrix'
    """
    lanes = starts if isinstance(starts, Mapping) else {"": starts}
    bands = within if isinstance(within, Mapping) else dict.fromkeys(lanes, [[0, rows]] if within is None else within)
    if list(lanes) != list(bands):
        raise InputError(f"starts and intervals have the same names; got {list(lanes)} and {list(bands)}; mend them")
    checked = {name: check_intervals(band, rows) for name, band in bands.items()}
    ax = ax or _new_axes(1, height=0.9 + 0.75 * len(lanes))[0]
    edges = np.linspace(0, rows, min(_STRIPS, rows) + 1)
    labels = []
    for lane, (name, each) in enumerate(lanes.items()):
        color, intervals, first = _PARTS[lane % len(_PARTS)], checked[name], np.asarray(each)
        passed = np.cumsum(intervals[:, 1] - intervals[:, 0])
        known = np.stack([np.append(0, passed[:-1]), passed], axis=1)
        covered = np.diff(np.interp(edges, intervals.ravel(), known.ravel())) / np.diff(edges)
        floor = len(lanes) - 1 - lane
        top = floor + _LANE
        ax.stairs(top - 0.4 * _LANE * (1 - covered), edges, baseline=top - 0.4 * _LANE, fill=True, color=color, lw=0)
        _mark_windows(ax, first, length, rows, floor=floor, color=color)
        share = f"{count_of(int(passed[-1]), 'row')}, {passed[-1] / rows:.0%}"
        labels.append("\n".join(filter(None, [name, share, count_of(len(first), "window")])))
    ax.set_yticks([len(lanes) - 1 - lane + _LANE / 2 for lane in range(len(lanes))], labels, fontsize=9)
    ax.set_xlim(0, rows)
    ax.set_ylim(-0.12, len(lanes))
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_xlabel("row of the matrix")
    _group_digits(ax.xaxis)
    return ax


def _mark_windows(ax: Axes, starts: NDArray[Any], length: int, rows: int, *, floor: float, color: str) -> None:
    """Mark windows in the lower part of a lane."""
    height = 0.5 * _LANE
    if len(starts) <= _MOST_MARKED:
        width = max(length, rows * _LEAST_WIDTH)
        ax.broken_barh([(start, width) for start in starts.tolist()], (floor, height), color=color, alpha=0.75, lw=0)
        return
    counts, edges = np.histogram(starts, bins=min(4 * _BINS, rows), range=(0, rows))
    ax.stairs(floor + height * counts / counts.max(), edges, baseline=floor, fill=True, color=color, alpha=0.75, lw=0)


def plot_split(
    rows: int,
    fractions: Mapping[str, float] | Sequence[float],
    *,
    length: int,
    count: int = 100,
    seed: int = 0,
    by: By = "blocks",
    within: ArrayLike | None = None,
    block_rows: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a split of rows, and where `count` windows of each part fall.

    Parameters
    ----------
    rows, fractions, length, seed, by, within, block_rows
        As of `split_rows`; parts without names get those that the command line gives them.
    count
        Windows to draw from each part.
    ax
        Default: of a new figure.

    Examples
    --------
    >>> from pipeline.plan.plots import plot_split
    >>> ax = plot_split(100_000, (0.8, 0.2), length=16)
    >>> [label.get_text().split()[0] for label in ax.get_yticklabels()]
    ['train', 'test']
    """
    if not isinstance(fractions, Mapping):
        fractions = dict(zip(name_parts(len(fractions)), fractions, strict=True))
    split = split_rows(rows, fractions, length=length, seed=seed, by=by, within=within, block_rows=block_rows)
    # Each part has a seed of its own: the same one would draw alike from parts that are spread alike.
    drawn = {
        name: draw_starts(rows, length=length, count=count, seed=seed + number, within=part)
        for number, (name, part) in enumerate(split.items())
    }
    return plot_starts(drawn, rows=rows, length=length, within=split, ax=ax)


def draw_spread(
    edges: NDArray[Any], asked: NDArray[Any], read: NDArray[Any], *, title: str, xlabel: str, ax: Axes | None
) -> Axes:
    """Draw the bytes that are asked for and read, by rows.

    Parameters
    ----------
    edges
        (b + 1,) rows, ascending.
    asked, read
        (b,) bytes of the windows that start between two edges, and what reading them takes.
    """
    ax = ax or _new_axes(1, height=3.0)[0]
    scale, unit = _unit(max(asked.max(initial=0), read.max(initial=0)))
    ax.stairs(asked / scale, edges, fill=True, color=COLORS["asked"], alpha=0.85, label="asked for")
    ax.stairs(read / scale, edges, color=COLORS["read"], lw=1.8, label="read", baseline=None)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(0, 1.12 * max(asked.max(initial=0), read.max(initial=0)) / scale)
    ax.set_ylabel(f"{unit} per {count_of(round(edges[1] - edges[0]), 'row')}")
    ax.set_xlabel(xlabel)
    ax.set_title(title, loc="left", fontsize=10)
    _group_digits(ax.xaxis)
    _tidy(ax)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9, borderaxespad=0.1)
    return ax


def draw_runs(
    stages: Mapping[str, Mapping[str, float]],
    curves: Mapping[str, Curve],
    *,
    seconds: float,
    axes: Sequence[Axes] | None,
) -> tuple[Axes, Axes]:
    """Draw where the threads' time went in each run, and the bytes a second that runs delivered.

    Parameters
    ----------
    stages
        Seconds of each stage, keys of `COLORS`, summed over threads, by the name of the run.
    curves
        Seconds and bytes delivered by then, by the same names.
    seconds
        Of the whole picture.
    axes
        Two; default: of a new figure.
    """
    height = 0.7 + 0.32 * len(stages)
    above, below = axes if axes is not None else _new_axes(2, height=height + 2.9, ratios=(height, 2.2))
    used = [name for name in COLORS if any(each.get(name) for each in stages.values())]
    places = np.arange(len(stages))[::-1]
    left = np.zeros(len(stages))
    for name in used:
        width = np.array([each.get(name, 0.0) for each in stages.values()])
        above.barh(places, width, left=left, height=0.7, color=COLORS[name], label=name)
        for place, begin, size in zip(places, left, width, strict=True):
            total = sum(list(stages.values())[len(stages) - 1 - place].values())
            if size > 0.08 * max(sum(each.values()) for each in stages.values()):
                above.text(
                    begin + size / 2, place, f"{size / total:.0%}", ha="center", va="center", fontsize=8, color="white"
                )
        left += width
    above.set_ylim(-0.6, len(stages) - 0.4)
    above.set_yticks(places, list(stages), fontsize=9)
    above.tick_params(axis="y", length=0)
    above.set_xlabel("seconds, summed over threads", fontsize=9)
    above.set_title("where the threads' time went", loc="left", fontsize=10)
    above.spines[["top", "right", "left"]].set_visible(False)
    if used:
        above.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=len(used), frameon=False, fontsize=9, borderaxespad=0.1,
            handlelength=0.9, columnspacing=1.2,
        )  # fmt: skip
    edges = np.linspace(0, seconds, _BINS + 1)
    rates = np.zeros(_BINS)
    for times, delivered in curves.values():
        rates += np.diff(np.interp(edges, times, delivered)) / np.diff(edges) / 1e6
    below.stairs(rates, edges, fill=True, color=COLORS["asked"], alpha=0.85)
    below.set_xlim(0, seconds)
    below.set_ylim(0, 1.15 * (rates.max() or 1))
    for name, (times, delivered) in curves.items():
        if times[-1] > times[0]:
            mean = delivered[-1] / (times[-1] - times[0]) / 1e6
            below.hlines(mean, times[0], times[-1], color=COLORS["read"], lw=1.6)
            if times[-1] - times[0] > 0.15 * seconds:
                words = f"{name}: {mean:,.0f} MB/s" if len(curves) > 1 else f"mean {mean:,.0f} MB/s"
                plate = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85}
                below.annotate(
                    words, (times[0], mean), xytext=(5, 4), textcoords="offset points", fontsize=8, bbox=plate
                )
    below.set_xlabel("seconds since the report began", fontsize=9)
    below.set_ylabel("MB/s delivered", fontsize=9)
    _tidy(below)
    return above, below


def _new_axes(count: int, *, height: float, ratios: tuple[float, ...] = (1,)) -> list[Axes]:
    """Make a figure of so many axes, one below the other; InputError without matplotlib."""
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise InputError("pictures are drawn by matplotlib; it is not installed; do: pip install matplotlib") from error
    _, axes = plt.subplots(count, 1, figsize=(8, height), layout="constrained", squeeze=False, height_ratios=ratios)
    return list(axes[:, 0])


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)


def _group_digits(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # Long numbers would touch.
    axis.set_major_locator(MaxNLocator(7 if axis.get_view_interval()[1] < 1e7 else 4, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _unit(nbytes: float) -> tuple[float, str]:
    """Bytes of the unit that `format_size` would choose, and its name."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    name = format_size(nbytes).split()[1]
    return 1024.0 ** units.index(name), name
