"""HTML for notebooks: every text escaped, nothing loaded from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest

import pipeline
from pipeline.formatting import html_table

NASTY = "<script>alert(1)</script> & \"quoted\" 'too'"


class Page(HTMLParser):
    """What a browser makes of a page: tags, attributes and words; tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.given, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.given += attrs
        self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check(text, *words):
    page = Page(text)
    assert set(page.tags) <= {"div", "table", "tbody", "tr", "th", "td", "span", "svg", "rect", "title"}
    assert {name for name, _ in page.given} <= {"style", "scope", "width", "height", "x", "fill", "aria-hidden"}
    assert "url(" not in text
    assert "http" not in text
    for each in words:
        assert any(each in said for said in page.words), each
    return page


def test_every_text_is_escaped():
    check(html_table(NASTY, {NASTY: NASTY, "b": "2"}, {NASTY: {"read": 1.0}}), NASTY)


def test_bars_have_one_scale():
    page = check(html_table("T", {"a": "1", "b": "2"}, {"a": {"read": 3.0, "idle": 1.0}, "b": {"asked": 2.0}}))
    widths = [float(value) for name, value in page.given if name == "width"]
    # Of each picture, and of its pieces.
    assert widths == [200, 150, 50, 200, 100]
    assert [value for name, value in page.given if name == "x"] == ["0.0", "150.0", "0.0"]


def test_bars_of_nothing():
    assert "rect" not in check(html_table("T", {"a": "1"}, {"a": {"read": 0.0}})).tags


@pytest.fixture
def nasty(tmp_path, values):
    folder = tmp_path / "<script>alert(1)<" / "script> & 'q'"
    folder.mkdir(parents=True)
    np.save(folder / "A.npy", values)
    return pipeline.create_matrix(folder / "A.npy", folder / "A.zarr", compress="zstd", chunk_rows=100)


def test_objects_of_a_nasty_path(nasty):
    plan = pipeline.plan_windows(nasty, [5, 900], length=16)
    check(nasty._repr_html_(), nasty.path, "(2,000, 20)")
    page = check(plan._repr_html_(), nasty.path, "2 of 16 rows")
    widths = [float(value) for name, value in page.given if name == "width"]
    # Asked for; decoded in either order, of a chunk a window: 100 rows for each 16.
    assert widths == [200, 32, 200, 200, 200, 200]
    with pipeline.Report() as report:
        pipeline.gather(plan)
    check(report._repr_html_(), "gather", "peak memory")


def test_members_of_nasty_names(nasty):
    group = pipeline.open_matrix({NASTY: nasty.path, "labels": nasty.path})
    check(group._repr_html_(), NASTY)
    check(pipeline.plan_windows(group, [5, 900], length=16)._repr_html_())
