"""`--performance-report`: one page that loads nothing, there when it is complete, and never in another's place."""

from __future__ import annotations

import html.parser
import os
import re
import sys
from urllib.request import urlopen

import pytest

import pipeline
from pipeline.cli.performance import check_report, performance_report
from pipeline.cluster.connect import dashboard_link
from tests.stranger import UID

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


class Page(html.parser.HTMLParser):
    """What a browser would load, and the page's title and texts."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.styles, self.tag = [], [], ""
        self.title = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        self.loads += [value for name, value in attrs if name in {"src", "href", "data", "action", "poster"} and value]

    def handle_endtag(self, tag):
        self.tag = ""

    def handle_data(self, data):
        if self.tag == "style":
            self.styles.append(data)
        if self.tag == "title":
            self.title += data


@pytest.fixture
def matrix(samples):
    return samples / "A.zarr"


def check_page(path, stage):
    """That the page needs no other file, and that tasks of a stage are in it."""
    text = path.read_text()
    page = Page(text)
    assert page.title == "Dask Performance Report"
    assert [each for each in page.loads if not each.startswith("data:")] == []
    assert not re.search(r"@import|url\((?!.{0,3}data:)", "".join(page.styles))
    assert len(text) > 500_000, "Bokeh's own code is in it"
    assert f'"{stage}"' in text
    return text


def test_of_a_run(cli, matrix, tmp_path):
    said = cli("run", matrix, "--count", 50, "--performance-report", "R.html", "--json")
    assert said.code == 0
    assert said.numbers["windows"] == 50
    text = check_page(tmp_path / "R.html", "read")
    assert f"pipeline run {matrix} --count 50" in text
    assert [each.name for each in tmp_path.iterdir()] == ["R.html"]


def test_of_a_matrix_that_is_made_and_verified(cli, samples, tmp_path):
    """The second takes the place of the first."""
    assert cli("create", samples / "A.npy", "B.zarr", "--performance-report", "R.html").code == 0
    check_page(tmp_path / "R.html", "create")
    assert cli("verify", "B.zarr", "--performance-report", "R.html").code == 0
    assert "pipeline create" not in check_page(tmp_path / "R.html", "verify")


def test_of_a_run_that_fails(cli, matrix, tmp_path):
    (tmp_path / "wrong.py").write_text("def late(block):\n    return block[: 1 if len(block) == 1 else -1]\n")
    said = cli("run", matrix, "--count", 50, "--apply", "wrong:late", "--performance-report", "R.html")
    assert said.code == 4
    assert said.err.splitlines()[-1].startswith("error: apply returns one entry a window")
    check_page(tmp_path / "R.html", "read")
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_run_has_none(tmp_path):
    with (
        pipeline.connect(dashboard_address=None),
        pytest.raises(KeyboardInterrupt),
        performance_report(tmp_path / "R.html"),
    ):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_one_that_cannot_be_had_fails_no_run(cli, matrix, tmp_path, monkeypatch):
    """Bokeh may be absent where the scheduler runs."""
    monkeypatch.setitem(sys.modules, "bokeh.models", None)
    (tmp_path / "R.html").write_text('<head><meta name="generator" content="random-windows">of a run before')
    said = cli("run", matrix, "--count", 50, "--performance-report", "R.html", "--json")
    assert said.code == 0
    assert said.numbers["windows"] == 50
    assert said.err.splitlines()[-1].startswith(f"no performance report in {tmp_path / 'R.html'}: ")
    assert (tmp_path / "R.html").read_text().endswith("of a run before")
    assert [each.name for each in tmp_path.iterdir()] == ["R.html"]


def test_no_dashboard_is_needed(cli, matrix, tmp_path):
    (tmp_path / "cluster.yaml").write_text("version: 1\nkwargs: {dashboard_address: null}\n")
    assert cli("run", matrix, "--count", 50, "--performance-report", "R.html").code == 0
    check_page(tmp_path / "R.html", "read")


def test_pages_that_wait_for_a_look_are_made_all_the_same(tmp_path):
    """The report loads Bokeh; the dashboard's own pages are made by their first request, later."""
    with pipeline.connect() as client:
        link = dashboard_link(client)
        with performance_report(tmp_path / "R.html"):
            assert client.submit(sum, [3, 4]).result() == 7
        application = client.cluster.scheduler.http_application
        assert application.applications == []
        with urlopen(link) as answer:
            assert b"Dask" in answer.read()
        assert len(application.applications) == 1
    check_page(tmp_path / "R.html", "sum")


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("R.txt", 2, "a performance report is a web page; got R.txt; name it .html"),
        ("absent/R.html", 3, "absent is not; make it first"),
        ("foreign.html", 7, "only a performance report of ours is replaced; foreign.html is none; name another"),
        ("folder.html", 7, "folder.html is none"),
        ("link.html", 7, "link.html is none"),
        ("dangling.html", 7, "dangling.html is none"),
        ("B.zarr/R.html", 7, "an output lies apart from its input"),
    ],
)
def test_refused_before_the_run(cli, samples, tmp_path, path, code, words):
    pipeline.create_matrix(samples / "A.npy", tmp_path / "B.zarr")
    (tmp_path / "foreign.html").write_text("<html><head><title>Dask Performance Report</title></head></html>")
    (tmp_path / "ours.html").write_text('<meta name="generator" content="random-windows">')
    (tmp_path / "link.html").symlink_to("ours.html")
    (tmp_path / "dangling.html").symlink_to("nowhere.html")
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    said = cli("run", "B.zarr", "--count", 5, "--out", "w.zarr", "--performance-report", path)
    assert said.code == code
    assert words in said.err
    assert said.err.count("\n") == 1, "no cluster was started"
    assert sorted(tmp_path.rglob("*")) == before


def test_inside_of_the_output_to_be(tmp_path):
    (tmp_path / "w.zarr").mkdir()
    with pytest.raises(pipeline.OutputExistsError):
        check_report(str(tmp_path / "w.zarr" / "R.html"), [tmp_path / "w.zarr"])


def test_secrets_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pipeline", "run", "https://ann:secret@host/A.zarr", "<script>"])
    with pipeline.connect(dashboard_address=None), performance_report(tmp_path / "R.html"):
        pass
    text = (tmp_path / "R.html").read_text()
    assert "secret" not in text
    assert "pipeline run https://host/A.zarr" in text
    assert "A.zarr <script>" not in text


def test_without_a_cluster_there_is_none(tmp_path):
    with performance_report(tmp_path / "R.html"):
        pass
    assert list(tmp_path.iterdir()) == []


MARK = '<meta name="generator" content="random-windows">'


@pytest.mark.parametrize("level", ["file", "folder"])
def test_what_becomes_a_link_under_way_is_not_written_through(tmp_path, capsys, level):
    (tmp_path / "shared").mkdir()
    (tmp_path / "victim").mkdir()
    dear = tmp_path / "victim" / "R.html"
    dear.write_text(MARK + "dear")
    with pipeline.connect(dashboard_address=None), performance_report(tmp_path / "shared" / "R.html"):
        if level == "file":
            (tmp_path / "shared" / "R.html").symlink_to(dear)
        else:
            (tmp_path / "shared").rename(tmp_path / "away")
            (tmp_path / "shared").symlink_to(tmp_path / "victim")
    assert dear.read_text() == MARK + "dear"
    assert list((tmp_path / "victim").iterdir()) == [dear]
    if level == "file":
        assert "is not a performance report of this program" in capsys.readouterr().err
    else:
        assert MARK in (tmp_path / "away" / "R.html").read_text()


@pytest.mark.parametrize("kind", ["fifo", pytest.param("stranger", marks=ROOT)])
def test_what_somebody_else_put_there_is_left_alone(tmp_path, kind):
    place = tmp_path / "R.html"
    if kind == "fifo":
        os.mkfifo(place)
    else:
        place.write_text(MARK)
        os.chown(place, UID, UID)
    with pytest.raises(pipeline.OutputExistsError, match="only a performance report of ours is replaced"):
        check_report(str(place), [])
