"""Tables as one picture."""

from __future__ import annotations

from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from pipeline.bench.rounds import Table

_COLORS = {"ours": "#d95f02", "peer": "#7a8fa6"}
_DASHES = {"limit_storage": "-", "limit_decode": "--", "limit_memory": ":", "limit_store": "-"}
_BACKGROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
"""Behind text, so that no line crosses it."""
_REASON, _LINE = 50, 130
"""Letters of a reason, and of a line, that the picture has room for."""
_LOGARITHMIC = 20
"""Ratio of the slowest to the fastest from which a linear axis hides all but the slow."""


def draw_tables(tables: Sequence[Table], machine: str, path: Path) -> None:
    """Draw bars of median seconds, fastest on top, with whiskers for the range and lines for the limits."""
    heights = [max(2, len(table.ranked())) * 0.3 + 1.9 for table in tables]
    figure = Figure(figsize=(10, sum(heights) + 0.8), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for table, axes in zip(tables, panels, strict=True):
        _draw(table, axes)
    figure.supxlabel(machine, fontsize=9, color="#444444")
    figure.savefig(path, dpi=130)


def _draw(table: Table, axes: Axes) -> None:
    title = f"{table.title} page cache:\n{table.scenario.describe()}"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    if not table.ranked():
        axes.text(0.5, 0.5, "nobody was timed", ha="center", transform=axes.transAxes)
        return
    limits = table.limits()
    for score in limits:
        label = f"limit, {score.contender.label}: {score.median:.3g} s"
        axes.axvline(score.median, color="black", lw=1.3, ls=_DASHES[score.contender.key], label=label, zorder=3)
    # After the lines, so that they do not cross its text.
    _draw_bars(table, axes)
    if limits:
        # Pads are in units of the font, whatever the height of the panel.
        below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 0), "borderaxespad": 4.3}
        axes.legend(**below, ncols=len(limits), fontsize=9, frameon=False)
    untimed = [
        f"{score.contender.label} ({shorten(score.reason, _REASON, placeholder=' ...')})"
        for score in table.untimed()
        if score.state != "skipped"
    ]
    if untimed:
        text = fill("not timed: " + "; ".join(untimed), _LINE)
        below = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(text, (0, 0), xytext=(0, -58), **below, fontsize=8, va="top")


def _draw_bars(table: Table, axes: Axes) -> None:
    scores = table.ranked()
    places = range(len(scores))
    medians = np.array([score.median for score in scores])
    least, most = np.array([(min(score.seconds), max(score.seconds)) for score in scores]).T
    axes.barh(places, medians, color=[_COLORS[score.contender.kind] for score in scores], height=0.7)
    whiskers = [medians - least, most - medians]
    axes.errorbar(medians, places, xerr=whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=3)
    shown = [*medians, *(score.median for score in table.limits())]
    if max(shown) > _LOGARITHMIC * min(shown):
        axes.set_xscale("log")
        axes.set_xlim(min([*least, *shown]) / 1.5, most.max() * 4)
    else:
        axes.set_xlim(0, most.max() * 1.3)
    for place, (score, end) in enumerate(zip(scores, most, strict=True)):
        ratio = table.ratio(score)
        text = f"{score.median:.3g} s" + ("" if ratio is None else f"   {ratio:.2f} x")
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
        axes.annotate(text, (end, place), xytext=(6, 0), **beside, fontsize=9, bbox=_BACKGROUND)
    axes.set_yticks(places, [score.contender.label for score in scores], fontsize=9)
    for tick, score in zip(axes.get_yticklabels(), scores, strict=True):
        tick.set_fontweight("bold" if score.contender.kind == "ours" else "normal")
    axes.invert_yaxis()
    scale = ", logarithmic" * (axes.get_xscale() == "log")
    axes.set_xlabel(f"seconds{scale}, median and range of the rounds; x: times this project on its cluster", fontsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.spines[["top", "right"]].set_visible(False)
