"""Facts for people: numbers with units, text tables, and HTML for notebooks with every text escaped."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from pipeline.redaction import plain_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


MIB = 2**20


def count_of(count: int, noun: str) -> str:
    """Write a number of things.

    Examples
    --------
    >>> count_of(1, "shard"), count_of(2000, "shard")
    ('1 shard', '2,000 shards')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def list_some(names: Sequence[object], most: int = 10) -> str:
    """Write names in a row, so many at most.

    Examples
    --------
    >>> list_some(["a.h5", "b.h5", "c.h5"], 2)
    'a.h5, b.h5 and 1 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def format_size(nbytes: float) -> str:
    """Write a number of bytes with a binary prefix and three digits.

    Examples
    --------
    >>> format_size(2_560_000_000)
    '2.38 GiB'
    >>> format_size(999)
    '999 B'
    """
    if abs(nbytes) < 1024:
        return f"{nbytes:.0f} B"
    # Floats end where integers go on.
    value = float(min(nbytes, 1e300))
    units = ["KiB", "MiB", "GiB", "TiB", "PiB"]
    while units:
        unit, *units = units
        value /= 1024
        if abs(value) < 1000:
            break
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {unit}"


COLORS = {
    "asked": "#4c8dc9",
    "read": "#e08214",
    "decode": "#8c6bb1",
    "apply": "#35978f",
    "write": "#c7566a",
    "idle": "#9a9a9a",
}
"""Colours that are seen on white and on black, one meaning each in every picture."""
_WIDTH, _HEIGHT = 200, 11
type Bar = Mapping[str, float]
"""Lengths of its pieces, by keys of `COLORS`."""


def html_table(title: str, facts: Mapping[str, str], bars: Mapping[str, Bar] | None = None) -> str:
    """Write facts as a small table for a notebook.

    Colours and letters are the page's own, so that light and dark pages show it alike.

    Parameters
    ----------
    bars
        Drawn before the words of the fact of the same name; all have one scale.

    Examples
    --------
    >>> "<b>" in html_table("Matrix <b>", {"shape": "(3,)"})
    False
    """
    bars = bars or {}
    longest = max((sum(bar.values()) for bar in bars.values()), default=0.0) or 1.0
    rows = [
        _row(key, (_draw(bars[key], longest) if key in bars else "") + f"<span>{_escape(value)}</span>")
        for key, value in facts.items()
    ]
    return (
        "<div style='overflow-x:auto; max-width:70em; line-height:1.35'>"
        f"<div style='font-weight:600; padding:2px 0 4px; overflow-wrap:anywhere'>{_escape(title)}</div>"
        "<table style='border-collapse:collapse; border:none; margin:0; font-size:0.92em; background:none'>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(key: str, cell: str) -> str:
    """One row; a notebook's own style would stripe it and align it to the right."""
    style = "border:none; background:none; text-align:left; vertical-align:top; white-space:normal; padding:1px"
    return (
        "<tr style='background:none; border-top:1px solid rgba(128,128,128,0.25)'>"
        f"<th scope='row' style='{style} 14px 1px 0; font-weight:normal; opacity:0.65; white-space:nowrap'>"
        f"{_escape(key)}</th><td style='{style} 0; overflow-wrap:anywhere'>{cell}</td></tr>"
    )


def _draw(bar: Bar, longest: float) -> str:
    """Draw a bar as SVG; the longest of all takes the whole width."""
    drawn, left = [], 0.0
    for name, length in bar.items():
        width = _WIDTH * length / longest
        if width:
            drawn.append(
                f"<rect x='{left:.1f}' width='{max(width, 1):.1f}' height='{_HEIGHT}' fill='{COLORS[name]}'>"
                f"<title>{name}</title></rect>"
            )
        left += width
    return (
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' aria-hidden='true' style='vertical-align:middle; "
        f"margin-right:10px'>{''.join(drawn)}</svg>"
    )


def _escape(text: str) -> str:
    return html.escape(plain_words(text))


def text_table(title: str, facts: dict[str, str]) -> str:
    """Write facts in two columns below a title.

    Examples
    --------
    >>> print(text_table("Report", {"rate": "9 MB/s", "seconds": "1.00"}))
    Report
      rate     9 MB/s
      seconds  1.00
    """
    plain = {plain_words(key): plain_words(value) for key, value in facts.items()}
    width = max(map(len, plain), default=0)
    return "\n".join([title, *(f"  {key:<{width}}  {value}" for key, value in plain.items())])


def text_line(title: str, facts: dict[str, str]) -> str:
    """Write facts in one line behind a title.

    Examples
    --------
    >>> text_line("Matrix('A.zarr')", {"dtype": "float64"})
    "Matrix('A.zarr': dtype float64)"
    """
    return (
        f"{title.removesuffix(')')}: " + plain_words("; ".join(f"{key} {value}" for key, value in facts.items())) + ")"
    )
