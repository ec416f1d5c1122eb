"""Tables as one picture that can be read at a glance."""

from __future__ import annotations

from textwrap import fill, shorten
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from pipeline.bench.rounds import Table

_COLORS = {"ours": "#d95f02", "peer": "#7a8fa6"}
_DASHES = {"limit_storage": "-", "limit_decode": "--", "limit_memory": ":"}
_PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
"""Behind words, so that no line crosses them."""
_REASON, _LINE = 50, 130
"""Letters of a reason, and of a line, that the picture has room for."""
_LOGARITHMIC = 20
"""Where the slowest takes so many times the fastest, a linear axis hides all but the slow."""


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
    scenario, scores = table.scenario, table.ranked()
    axes.set_title(
        f"{scenario.name}, {'cold' if table.cold else 'warm'} page cache:\n{scenario.words()}",
        loc="left",
        fontsize=11,
        fontweight="bold",
    )
    if not scores:
        axes.text(0.5, 0.5, "nobody was timed", ha="center", transform=axes.transAxes)
        return
    medians = [score.median for score in scores]
    least = [min(score.seconds.values()) for score in scores]
    most = [max(score.seconds.values()) for score in scores]
    whiskers = [
        [m - a for m, a in zip(medians, least, strict=True)],
        [b - m for m, b in zip(medians, most, strict=True)],
    ]
    places = list(range(len(scores)))
    axes.barh(places, medians, color=[_COLORS[score.contender.kind] for score in scores], height=0.7)
    axes.errorbar(medians, places, xerr=whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=3)
    limits = table.limits()
    for score in limits:
        label = f"limit, {score.contender.label}: {score.median:.3g} s"
        axes.axvline(score.median, color="black", lw=1.3, ls=_DASHES[score.contender.key], label=label, zorder=3)
    shown = [*medians, *(score.median for score in limits)]
    if max(shown) > _LOGARITHMIC * min(shown):
        axes.set_xscale("log")
        axes.set_xlim(min([*least, *shown]) / 1.5, max(most) * 4)
    else:
        axes.set_xlim(0, max(most) * 1.3)
    for place, (score, end) in enumerate(zip(scores, most, strict=True)):
        ratio = table.ratio(score)
        words = f"{score.median:.3g} s" + ("" if ratio is None else f"   {ratio:.2f} x")
        axes.annotate(
            words, (end, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9, bbox=_PLATE
        )
    axes.set_yticks(places, [score.contender.label for score in scores], fontsize=9)
    for tick, score in zip(axes.get_yticklabels(), scores, strict=True):
        tick.set_fontweight("bold" if score.contender.kind == "ours" else "normal")
    axes.invert_yaxis()
    scale = ", logarithmic" * (axes.get_xscale() == "log")
    axes.set_xlabel(f"seconds{scale}, median and range of the rounds; x: times this project on its cluster", fontsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.spines[["top", "right"]].set_visible(False)
    if limits:
        # Pads are in units of the font, whatever the height of the panel.
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0, 0),
            borderaxespad=4.3,
            ncols=len(limits),
            fontsize=9,
            frameon=False,
        )
    left = [
        f"{score.contender.label} ({shorten(score.reason, _REASON, placeholder=' ...')})"
        for score in table.untimed()
        if score.state != "skipped"
    ]
    if left:
        axes.annotate(
            fill("not timed: " + "; ".join(left), _LINE),
            (0, 0),
            xycoords="axes fraction",
            xytext=(0, -58),
            textcoords="offset points",
            fontsize=8,
            va="top",
        )
