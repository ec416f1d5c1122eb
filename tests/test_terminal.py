"""Names of others reach no terminal raw: not those of files, arrays, members, columns and hosts, nor what files say."""

import json
import logging

import h5py
import numpy as np
import pytest
import zarr

import pipeline
from pipeline.redaction import plain_words
from pipeline.runtime.report import Watch

EVIL = "a\x1b]0;gotcha\x07\x1b[2J\r\x9b\u202eb"
"""Sets a terminal's title, clears it, goes to the line's begin, begins a sequence of one byte, and turns the text."""


def assert_plain(*texts):
    for text in texts:
        assert all(line.isprintable() for line in text.replace("\xa0", " ").split("\n")), repr(text)


@pytest.fixture
def matrix(tmp_path):
    np.save(tmp_path / f"{EVIL}.npy", np.arange(800.0).reshape(80, 10))
    pipeline.create_matrix(tmp_path / f"{EVIL}.npy", tmp_path / f"{EVIL}.zarr")
    return tmp_path / f"{EVIL}.zarr"


LINES = [
    (0, ("info", "{}.zarr")),
    (0, ("info", "{}.npy")),
    (0, ("plan", "{}.zarr", "--count", "3")),
    (0, ("run", "{}.zarr", "--count", "3")),
    (0, ("run", "{}.zarr", "--count", "3", "--out", "{}-w.zarr")),
    (0, ("run", "{}.zarr", "--count", "3", "--out", "{}-w.npy", "-v")),
    (0, ("create", "{}.npy", "{}-b.zarr")),
    (0, ("verify", "{}.zarr")),
    (0, ("verify", "{}.npy", "--write-manifest", "{}.json")),
    (7, ("run", "{}.zarr", "--count", "3", "--out", "{}.zarr")),
    (3, ("info", "{}-absent.zarr")),
    (3, ("info", "{}-absent.zarr", "--debug")),
    (2, ("info", "{}.npy::{}")),
    (3, ("run", "{}.zarr", "--starts", "{}-absent.txt")),
    (3, ("run", "{}.zarr", "--starts", "{}.txt", "--length", "1")),
    (2, ("run", "{}.zarr", "--columns", "{}")),
    (2, ("run", "{}.zarr", "--apply", "{}:{}")),
    (2, ("run", "{}.zarr", "--{}")),
    (2, ("{}",)),
    (3, ("run", "{}.zarr", "--cluster", "{}.yaml")),
    (2, ("run", "{}.zarr", "--cluster", "keys.yaml")),
    (2, ("run", "{}.zarr", "--cluster", "hosts.yaml")),
    (2, ("run", "{}.zarr", "--performance-report", "{}.txt")),
    (0, ("run", "{}.zarr", "--count", "3", "--performance-report", "{}.html")),
]


@pytest.mark.parametrize(("code", "line"), LINES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_lines_of_every_verb(cli, tmp_path, matrix, code, line):
    (tmp_path / f"{EVIL}.txt").write_text(f"1\n{EVIL}\n")
    (tmp_path / "keys.yaml").write_text(json.dumps({"version": 1, EVIL: 1}))
    hosts = {"version": 1, "class": "SSHCluster", "kwargs": {"hosts": [EVIL], EVIL: 1}}
    (tmp_path / "hosts.yaml").write_text(json.dumps(hosts))
    said = cli(*(word.replace("{}", EVIL) for word in line))
    assert said.code == code, said.err
    assert_plain(said.out, said.err)
    assert said.code == 0 or "--debug" in line or said.err.count("\n") == 1


def test_strays_and_losses_that_verify_lists(cli, matrix):
    (matrix / EVIL).write_bytes(b"")
    said = cli("verify", matrix)
    assert said.code == 4
    assert_plain(said.out, said.err)
    assert "nobody wrote it" in said.out


def test_names_within_files(cli, tmp_path):
    with h5py.File(tmp_path / "A.h5", "w") as file:
        for name in (EVIL, f"{EVIL}2"):
            file[name] = np.arange(40.0).reshape(10, 4)
            file[name].attrs[EVIL] = EVIL
            file[name].dims[0].label = EVIL
    group = zarr.create_group(tmp_path / "G.zarr")
    for name in (EVIL, f"{EVIL}2"):
        made = group.create_array(name, data=np.arange(40.0).reshape(10, 4), chunks=(5, 4), dimension_names=["r", EVIL])
        made.attrs[EVIL] = EVIL
    found = []
    for line in (
        ("info", "A.h5"),
        ("info", f"A.h5::{EVIL}"),
        ("info", "A.h5::absent"),
        ("info", "G.zarr"),
        ("info", f"G.zarr/{EVIL}"),
        ("info", "G.zarr/absent"),
        ("run", f"G.zarr/{EVIL}", "--count", "3", "--length", "2", "--columns", EVIL),
        ("verify", "G.zarr"),
    ):
        said = cli(*line, *(["--length", "2"] if line[0] == "info" else []))
        assert_plain(said.out, said.err)
        found.append(said.out + said.err)
    assert sum("\\x1b" in each for each in found) >= 5


def test_values_in_a_session(tmp_path, matrix):
    opened = pipeline.open_matrix({"x": matrix, "y": tmp_path / f"{EVIL}.npy"})
    plan = pipeline.plan_windows(opened, [3, 1], length=2)
    single = pipeline.plan_windows(opened.members["x"], [3, 1], length=2)
    with pipeline.Report() as report:
        pipeline.store(plan, tmp_path / f"{EVIL}-w.zarr", progress=False)
    for value in (opened, opened.members["x"], plan, single, report):
        assert_plain(repr(value), str(value), value._repr_html_())


def test_lines_of_the_log(caplog, capsys):
    watch = Watch()
    with caplog.at_level(logging.WARNING, "pipeline"):
        watch.log(EVIL)
    assert_plain(caplog.messages[0])
    with pytest.warns(UserWarning, match="gotcha") as warned:
        watch.say(EVIL)
    assert_plain(str(warned[0].message))


def test_letters_of_all_languages_stay():
    text = "Größe\xa0\u3000\u65e5\u672c\u8a9e \u0440\u044f\u0434 e\u0301 \U0001f600"
    assert plain_words(text) == text
    assert plain_words("a\udcffb\u200b\ufeff") == "a\\udcffb\\u200b\\ufeff"
    assert plain_words(plain_words(EVIL)) == plain_words(EVIL)
    assert plain_words(EVIL).isprintable()
