"""Every verb: what it says, where it says it, and what it leaves behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import zarr

import pipeline
from pipeline import errors
from pipeline.cli import demo
from pipeline.cli.main import cli as commands
from pipeline.runtime import progress
from pipeline.runtime.tasks import Receipt

WAITS = """
import sys
def wait(block):
    if len(block) > 1:
        sys.stderr.write("MARKER\\n")
        sys.stderr.flush()
        open("fifo").read()
    return block
"""


def cut(values, starts, length=16):
    return np.stack([values[start : start + length] for start in starts])


def units(starts, length, rows):
    """How many runs of `rows` rows the windows touch."""
    return len({row // rows for start in starts for row in range(start, start + length)})


def stored_nbytes(path):
    return sum(each.stat().st_size for each in (path / "c").rglob("*") if each.is_file())


@pytest.fixture
def matrix(samples):
    return samples / "A.zarr"


def columns(text):
    """Two columns of a report as a dict."""
    rows = [line.split("  ", 1) for line in text.splitlines()]
    return {key: value.strip() for key, value in rows}


def test_create(cli, samples, values, tmp_path):
    said = cli("create", samples / "A.npy", "A.zarr", "--shard-rows", 512, "--chunk-rows", 8, "--json")
    assert said.code == 0
    numbers = said.numbers
    assert {key: numbers[key] for key in ("path", "shape", "dtype", "nbytes", "nbytes_read", "tasks")} == {
        "path": "A.zarr",
        "shape": [2000, 20],
        "dtype": "float64",
        "nbytes": values.nbytes,
        "nbytes_read": values.nbytes,
        "tasks": 4,
    }
    assert set(numbers) == {
        "path",
        "shape",
        "dtype",
        "nbytes",
        "nbytes_read",
        "referred_files",
        "tasks",
        *RESUMED,
        *RUN_NUMBERS,
    }
    assert said.err == f"dashboard: {numbers['dashboard']}\n"
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "A.zarr", mode="r")[:], values)
    assert [path.name for path in tmp_path.iterdir()] == ["A.zarr"]


RESUMED = {"tasks_kept", "retries", "workers_lost", "tasks_rerun", "finished_before", "file_system_lacks"}
RUN_NUMBERS = {
    *(f"{stage}_seconds" for stage in ("plan", "startup", "work", "read", "decode", "apply", "write")),
    "seconds",
    "bytes_per_second",
    "peak_memory",
    "dashboard",
}


def test_create_says_it_in_words(cli, samples):
    said = cli("create", samples / "A.npy", "A.zarr", "--compress", "zstd")
    facts = columns(said.out)
    assert (facts["shape"], facts["codecs"]) == ("(2,000, 20)", "bytes + zstd + crc32c")
    assert facts["seconds"].count(" ") > 3


def test_create_dry_run(cli, samples, tmp_path):
    said = cli("create", samples / "A.npy", "A.zarr", "--shard-rows", 512, "--chunk-rows", 8, "--dry-run", "--json")
    assert (said.code, said.err, list(tmp_path.iterdir())) == (0, "", [])
    # 250 chunks of 8 rows with a crc32c each; 4 shards with 16 bytes of index for each of 64 chunks, and its crc32c. The
    # last 48 of 2048 rows are beyond the matrix; zarr leaves out chunks that hold nothing else.
    written = 250 * (8 * 160 + 4) + 4 * (64 * 16 + 4)
    numbers = said.numbers
    assert (numbers["nbytes_read"], numbers["nbytes_written"], numbers["files"]) == (320_000, written, 4)
    counts = {"nbytes_read", "nbytes_written", "files", "tasks", "task_nbytes"}
    assert set(numbers) == {*counts, "disk_free", "referred_files"}
    assert "free" in columns(cli("create", samples / "A.npy", "A.zarr", "--dry-run").out)["disk"]
    cli("create", samples / "A.npy", "A.zarr", "--shard-rows", 512, "--chunk-rows", 8, "-q")
    assert stored_nbytes(tmp_path / "A.zarr") == written


def test_create_raw_binary_and_random(cli, values, tmp_path):
    values.astype(">f4").tofile(tmp_path / "raw.bin")
    assert cli("create", "raw.bin", "raw.zarr", "--dtype", ">f4", "--row-shape", "4,5", "-q").code == 0
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "raw.zarr")[:], values.reshape(2000, 4, 5))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cli("create", "random:100x3", f"{name}.zarr", "--seed", seed, "-q").code == 0
    a, b, c = (zarr.open_array(tmp_path / f"{name}.zarr")[:] for name in "abc")
    assert (a == b).all()
    assert (a != c).all()
    assert 0 <= a.min() < a.max() < 1


def test_parts(cli, values, tmp_path):
    np.save(tmp_path / "a.npy", values[:30])
    np.save(tmp_path / "b.npy", values[30:100])
    assert cli("create", "a.npy", "b.npy", "P.zarr", "-q").code == 0
    assert cli("info", "P.zarr", "--json").numbers["parts"] == [[0, 30], [30, 100]]
    crossing = cli("run", "P.zarr", "--count", 500, "--out", "all.zarr", "--json", "-q").numbers["crossings"]
    starts = zarr.open_group(tmp_path / "all.zarr")["starts"][:]
    assert crossing == ((starts < 30) & (starts + 16 > 30)).sum() > 0
    said = cli("run", "P.zarr", "--count", 500, "--within", "parts", "--out", "P.out.zarr", "--json", "-q")
    starts = zarr.open_group(tmp_path / "P.out.zarr")["starts"][:]
    assert said.numbers["crossings"] == 0
    assert set(starts) == {*range(15), *range(30, 85)}
    assert "crossings" in columns(cli("run", "P.zarr", "--count", 500).out)


def test_info(cli, matrix):
    said = cli("info", matrix, "--json", "--length", 5)
    assert (said.code, said.err) == (0, "")
    assert said.numbers == {
        "path": str(matrix),
        "shape": [2000, 20],
        "dtype": "float64",
        "byteorder": "little",
        "chunk_rows": 8,
        "shard_rows": 256,
        "codecs": ["bytes", "crc32c"],
        "reader": "direct",
        "files_present": 8,
        "files": 8,
        "first_problem": None,
        "nbytes": 320_000,
        "nbytes_stored": stored_nbytes(matrix),
        "length": 5,
        "window_nbytes": 800,
        "window_nbytes_read": 800,
        "window_amplification": 1.0,
        "parts": None,
        "scaling": None,
    }
    facts = columns(cli("info", matrix).out)
    assert (facts["present"], facts["chunks"]) == ("8 of 8 shards", "8 rows (1.25 KiB) in 8 shards of 256 rows")


def test_info_of_what_others_wrote(cli, values, tmp_path):
    zarr.create_array(tmp_path / "v2.zarr", data=values.astype(">f4"), chunks=(50, 20), zarr_format=2)
    (tmp_path / "v2.zarr/3.0").unlink()
    numbers = cli("info", "v2.zarr", "--json").numbers
    assert (numbers["reader"], numbers["byteorder"], numbers["shard_rows"]) == ("decoded", "big", None)
    assert (numbers["files_present"], numbers["files"]) == (39, 40)
    # A start in 50 lies so that the window of 16 touches a second chunk in 15.
    assert numbers["window_amplification"] == pytest.approx((35 * 50 + 15 * 100) / 50 / 16)


@pytest.mark.parametrize(
    "form", [{"chunks": (50, 20)}, {"chunks": (10, 20), "shards": (50, 20)}, {"chunks": (50, 10), "zarr_format": 2}]
)
def test_info_says_what_to_do_about_absent_files(cli, values, tmp_path, form):
    zarr.create_array(tmp_path / "A.zarr", data=values, **form)
    folder = "" if form.get("zarr_format") == 2 else "c/"
    joint = "/" if folder else "."
    for number in (3, 7):
        (tmp_path / f"A.zarr/{folder}{number}{joint}0").unlink()
    total = 40 * (2 if form["chunks"][1] == 10 else 1)
    numbers = cli("info", "A.zarr", "--json").numbers
    assert (numbers["files_present"], numbers["files"]) == (total - 2, total)
    first = f"{tmp_path}/A.zarr/{folder}3{joint}0 (rows 150 to 199) is absent"
    assert numbers["first_problem"] == first
    shown = first.removesuffix(" is absent")
    present = columns(cli("info", "A.zarr").out)["present"]
    assert f"2 absent, the first problem: {shown}; restore" in present
    assert "--missing-chunks fill" in present
    version = {"zarr_format": form.get("zarr_format", 3)}
    zarr.create_group(tmp_path / "G.zarr", **version)
    (tmp_path / "A.zarr").rename(tmp_path / "G.zarr/A")
    zarr.create_array(tmp_path / "G.zarr/B", data=values, chunks=(50, 20), **version)
    facts = columns(cli("info", "G.zarr").out)
    assert f"2 absent, the first problem: {shown.replace('A.zarr', 'G.zarr/A')}; restore" in facts["A"]
    assert "absent" not in facts["B"]


def test_plan(cli, matrix, tmp_path):
    starts = [0, 1984, 250, 7, 250]
    (tmp_path / "s.txt").write_text(" ".join(map(str, starts)))
    said = cli("plan", matrix, "--starts", "s.txt", "--out", "w.zarr", "--order", "chunk", "--json")
    assert (said.code, said.err) == (0, "")
    numbers = said.numbers
    index = 16 * 32 + 4
    nbytes_read = 5 * 16 * 160 + units(starts, 16, 256) * index
    cost = {
        "tasks": 1,
        "chunks": units(starts, 16, 8),
        "nbytes_read": nbytes_read,
        "amplification": nbytes_read / (5 * 16 * 160),
        "spans": False,
        "requests": 0,
    }
    assert numbers.pop("peak_memory") > 2**20
    assert numbers.pop("disk_free") > 0
    assert numbers == {
        "windows": 5,
        "length": 16,
        "nbytes_wanted": 5 * 16 * 160,
        "result_shape": [5, 16, 20],
        "result_nbytes": 5 * (16 * 160 + 16),
        "crossings": 0,
        "orders": {"chunk": cost, "request": cost},
        "order": "chunk",
        "disk_needed": 5 * (16 * 160 + 16),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["s.txt"]
    facts = columns(cli("plan", matrix, "--count", 3).out)
    assert (facts["this run"], facts["disk"][:5]) == ("order chunk", "none:")


def test_plan_foresees_what_run_reads(cli, matrix):
    for order in ("chunk", "request"):
        line = [matrix, "--count", 3000, "--out", f"{order}.zarr", "--order", order, "--json", "-q"]
        foreseen = cli("plan", *line).numbers
        done = cli("run", *line).numbers
        # The checksums between chunks are skipped within a call, which counts them.
        assert foreseen["orders"][order]["nbytes_read"] == pytest.approx(done["nbytes_read"], rel=0.005)
        assert foreseen["orders"][order]["tasks"] == done["tasks"] > 1
        assert foreseen["result_nbytes"] == done["nbytes_delivered"]
        assert done["peak_memory"] < 2 * foreseen["peak_memory"]


def test_run_keeps_nothing_without_out(cli, matrix, tmp_path):
    said = cli("run", matrix, "--count", 40, "--length", 5)
    facts = columns(said.out)
    assert said.code == 0
    assert facts["kept"].startswith("nothing; name a file with --out")
    assert facts["result"] == "(40, 5, 20) float64, 31.2 KiB"
    assert said.err.startswith("dashboard: http://127.0.0.1:")
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_run_to_npy(cli, matrix, values, tmp_path):
    starts = np.array([1984, 0, 250, 250, 77])
    np.save(tmp_path / "s.npy", starts)
    said = cli("run", matrix, "--starts", "s.npy", "--out", "w.npy", "--json", "-q")
    assert (said.code, said.err) == (0, "")
    numbers = said.numbers
    expected = {"matrix": str(matrix), "windows": 5, "length": 16, "out": "w.npy", "result_shape": [5, 16, 20]}
    assert {key: numbers[key] for key in expected} == expected
    counts = {
        *RESUMED,
        "checked_reads",
        "filled_coordinates",
        "nbytes_delivered",
        "nbytes_read",
        "amplification",
        "crossings",
        "nonfinite",
        "tasks",
    }
    assert set(numbers) == {*expected, *counts, *RUN_NUMBERS, "limit", "shares"}
    assert numbers["limit"] in {"storage", "decode", "apply", "write", "tasks", "checks", "Dask", "unknown"}
    assert sum(numbers["shares"].values()) == pytest.approx(1)
    assert numbers["seconds"] >= numbers["plan_seconds"] + numbers["startup_seconds"] + numbers["work_seconds"]
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), cut(values, starts))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.npy", "w.npy"]


@pytest.mark.parametrize("order", ["chunk", "request", None])
def test_run_to_zarr(cli, matrix, values, tmp_path, order):
    starts = [1984, 0, 250, 250, 77]
    flag = ["--order", order] if order else []
    said = cli("run", matrix, "--starts", "-", "--out", "w.zarr", *flag, stdin="1984\n0 250\r\n250\n+77\n")
    assert said.code == 0
    assert columns(said.out)["kept"] == "w.zarr"
    group = zarr.open_group(tmp_path / "w.zarr", mode="r")
    places = [1, 4, 2, 3, 0] if order == "chunk" else range(5)
    assert set(group) == {"windows", "starts", "places"} if order == "chunk" else {"windows", "starts"}
    np.testing.assert_array_equal(group["starts"][:], [starts[place] for place in places])
    np.testing.assert_array_equal(group["windows"][:], cut(values, [starts[place] for place in places]))
    if order == "chunk":
        np.testing.assert_array_equal(group["places"][:], places)


QUIET = [
    "create A.npy X.zarr",
    "create A.npy X.zarr --dry-run",
    "info A.zarr",
    "plan A.zarr --count 5",
    "run A.zarr --count 5",
    "run P.zarr --count 500 --out w.npy",
    "run A.zarr --count 5 --out w.zarr",
    "verify A.zarr",
    "verify A.npy --write-manifest A.json",
    "demo folder",
    "config",
]


@pytest.mark.parametrize("line", QUIET)
def test_quiet_says_nothing_but_errors(cli, samples, small_demo, tmp_path, values, line):
    """Also where a run has something to say; one JSON object is printed where it is asked for."""
    for name in ("A.npy", "A.zarr"):
        (tmp_path / name).symlink_to(samples / name)
    if "P.zarr" in line:
        np.save(tmp_path / "a.npy", values[:30])
        pipeline.create_matrix(["a.npy", "a.npy"], "P.zarr")
    said = cli(*line.split(), "-q")
    assert (said.code, said.out, said.err) == (0, "", "")
    again = line.replace("folder", "other").replace("X.zarr", "Y.zarr").replace("w.", "v.").replace("A.json", "B.json")
    said = cli(*again.split(), "--quiet", "--json")
    assert (said.code, said.err) == (0, "")
    assert said.numbers
    wrong = cli(*line.split(), "-q", "--no-such-option")
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (2, "", 1)


def test_quiet_is_tried_for_every_verb():
    assert {line.split()[0] for line in QUIET} == set(commands.commands) - {"bench"}


def test_a_quiet_bench_says_nothing(cli, monkeypatch):
    run = types.ModuleType("pipeline.bench.run")
    run.run_bench = lambda *_, say, **__: (say("a line"), ("words", {"a": 1}))[1]
    monkeypatch.setitem(sys.modules, "pipeline.bench.run", run)
    said = cli("bench", "-q")
    assert (said.code, said.out, said.err) == (0, "", "")
    assert cli("bench", "-q", "--json").numbers == {"a": 1}
    said = cli("bench")
    assert (said.out, said.err) == ("words\n", "a line\n")


@pytest.mark.parametrize("verb", commands.commands)
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("PIPELINE_WORKRES", "did you mean PIPELINE_WORKERS?"),
        ("PIPELINE_SCHEDULER_ADDRESS", "sets no option"),
        ("PIPELINE_OUT", "--out is for the command line alone"),
        ("PIPELINE_OVERWRITE", "--overwrite is for the command line alone"),
        ("PIPELINE_DRY_RUN", "--dry-run is for the command line alone"),
        ("PIPELINE_memory", "did you mean PIPELINE_MEMORY?"),
        ("PIPELINE_", "sets no option"),
    ],
)
def test_a_variable_that_sets_no_option_is_refused(cli, tmp_path, monkeypatch, verb, name, hint):
    """By each verb, of which it need not be an option; its value may be a secret."""
    monkeypatch.setenv(name, "SESAME")
    line = [verb, *{"create": ["A.npy", "X.zarr"], "demo": ["X"], "bench": ["X"], "config": []}.get(verb, ["A.zarr"])]
    said = cli(*line)
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert f"the environment variable {name} sets no option" in said.err
    assert hint in said.err
    assert "SESAME" not in said.err
    assert list(tmp_path.iterdir()) == []
    assert cli(verb, "--help").code == 0


def test_variables_of_others_and_of_other_verbs_are_let_be(cli, matrix, monkeypatch):
    for name in ("PIPELINE_WORKSPACE", "PIPELINE_SHARD_ROWS", "MY_PIPELINE_WORKRES"):
        monkeypatch.setenv(name, "7")
    assert cli("info", matrix).code == 0


def test_seed(cli, matrix, values, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert cli("run", matrix, "--count", 50, "--seed", seed, "--out", f"{name}.zarr", "-q").code == 0
    a, b, c = (zarr.open_group(tmp_path / f"{name}.zarr") for name in "abc")
    assert (a["starts"][:] == b["starts"][:]).all()
    assert (a["starts"][:] != c["starts"][:]).any()
    np.testing.assert_array_equal(c["windows"][:], cut(values, c["starts"][:]))


def test_apply_from_the_working_directory(cli, matrix, values, tmp_path):
    (tmp_path / "rows.py").write_text("def mean(block):\n    return block.mean(axis=2)\n")
    (tmp_path / "s.txt").write_text("1000 3")
    said = cli("run", matrix, "--starts", "s.txt", "--apply", "rows:mean", "--out", "w.npy", "--json", "-q")
    assert said.numbers["result_shape"] == [2, 16]
    assert said.numbers["nbytes_delivered"] == 2 * 16 * 8
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), cut(values, [1000, 3]).mean(axis=2))


@pytest.mark.parametrize("name", ["w.npy", "w.zarr"])
def test_overwrite(cli, matrix, values, tmp_path, name):
    for start in (5, 9):
        (tmp_path / "s.txt").write_text(str(start))
        assert cli("run", matrix, "--starts", "s.txt", "--out", name, "--overwrite", "-q").code == 0
    assert cli("run", matrix, "--count", 1, "--out", name, "-q").code == 7
    path = tmp_path / name
    result = np.load(path) if name == "w.npy" else zarr.open_group(path)["windows"][:]
    np.testing.assert_array_equal(result, cut(values, [9]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.txt", name]


def test_environment(cli, matrix, tmp_path, monkeypatch):
    for name, value in {"COUNT": "7", "LENGTH": "3", "SEED": ""}.items():
        monkeypatch.setenv(f"PIPELINE_{name}", value)
    assert cli("plan", matrix, "--json").numbers["result_shape"] == [7, 3, 20]
    assert cli("plan", matrix, "--json", "--count", 8).numbers["result_shape"] == [8, 3, 20]
    (tmp_path / "w.npy").write_bytes(b"\x93NUMPY")
    assert cli("run", matrix, "--json", "-q").numbers["out"] is None
    assert cli("run", matrix, "--out", "w.npy").code == 7
    monkeypatch.setenv("PIPELINE_MEMORY", "1MiB")
    assert cli("plan", matrix).code == 5
    assert cli("plan", matrix, "--memory", "4GB").code == 0
    monkeypatch.setenv("PIPELINE_COUNT", "many")
    said = cli("plan", matrix)
    assert (said.code, "PIPELINE_COUNT" in said.err or "--count" in said.err) == (2, True)


def test_cluster_file(cli, matrix, tmp_path):
    (tmp_path / "cluster.yaml").write_text("version: 1\nkwargs: {dashboard_address: null}\n")
    (tmp_path / "other.yaml").write_text("version: 1\nkwargs: {n_worker: 1}\n")
    assert cli("run", matrix, "--count", 3, "--json", "-q").numbers["dashboard"] is None
    assert cli("run", matrix, "--count", 3, "--cluster", "other.yaml").code == 2


@pytest.mark.parametrize("kind", [*(vars(errors)[name] for name in dir(errors) if name.endswith("Error"))])
def test_exit_codes(cli, matrix, monkeypatch, kind):
    error = kind("rule;\nwhat was got; the way out")
    error.add_note("task 3")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("pipeline.cli.request.open_matrix", fail)
    said = cli("info", matrix)
    assert (said.code, said.out) == (kind.exit_code, "")
    assert said.err == "error: rule;\\nwhat was got; the way out; task 3\n"


def test_bug_of_ours(cli, matrix, monkeypatch):
    monkeypatch.setattr("pipeline.cli.request.open_matrix", lambda *_, **__: 1 / 0)
    said = cli("info", matrix)
    assert (said.code, said.out, said.err.count("\n")) == (1, "", 1)
    assert said.err.startswith("error: a bug of ours; ZeroDivisionError")
    said = cli("info", matrix, "--debug")
    assert said.err.startswith("Traceback")
    assert said.err.splitlines()[-1].startswith("error: a bug of ours; ZeroDivisionError")


@pytest.mark.parametrize("verb", [None, *commands.commands])
def test_help(cli, verb):
    said = cli(*[verb] if verb else [], "--help")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("Usage: pipeline")
    if verb is None:
        assert all(name in said.out for name in commands.commands)


def test_help_is_a_page_in_sections(cli):
    """Every option stands under a heading of its own; a new one that has none would come under the last."""
    for verb in commands.commands:
        said = cli(verb, "--help").out
        assert "Other options" not in said, verb
        assert re.search(r"What is said:\n(  .*\n)*  -h, --help", said)
    lines = cli("run", "--help").out.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[:2] == ["Examples:", "Which windows:"]
    assert lines.index("Which windows:") < next(n for n, line in enumerate(lines) if line.startswith("  --count"))


@pytest.mark.parametrize(
    ("words", "found"),
    [("pipeline ru", "plain,run"), ("pipeline run --che", "plain,--check-reads"), ("pipeline info A", "file,A")],
)
def test_a_shell_completes(program, words, found):
    asked = {"_PIPELINE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([program], env=os.environ | asked, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [found]
    assert done.stderr == ""


def test_verbose_run_succeeds(cli, matrix):
    assert cli("run", matrix, "--count", 3, "-v", "--json").numbers["windows"] == 3


def test_name_that_is_no_text(cli, samples, tmp_path):
    name = os.fsdecode(b"caf\xe9.zarr")
    (tmp_path / name).symlink_to(samples / "A.zarr")
    for verb in ("info", "plan", "run"):
        assert cli(verb, name, "--json").code == 0
        assert cli(verb, name).code == 0


class Stream(io.StringIO):
    """Says when something was written."""

    def __init__(self, *, tty):
        super().__init__()
        self.written = threading.Event()
        self.isatty = lambda: tty

    def write(self, text):
        if "\n" in text:
            self.written.set()
        return super().write(text)


def test_plain_line_every_ten_seconds(monkeypatch):
    assert progress._SECONDS == 10
    monkeypatch.setattr(progress, "_SECONDS", 0.001)
    monkeypatch.setattr(sys, "stderr", Stream(tty=False))
    with progress.ShownWatch("windows", quiet=False) as watch:
        watch.begin(4, 1000, 8000)
        assert sys.stderr.written.wait(10)
        watch.task_done(Receipt(0, 250, 2000, 0.1, 0.0))
        sys.stderr.written.clear()
        assert sys.stderr.written.wait(10)
    lines = sys.stderr.getvalue().splitlines()
    assert re.match(r"\d\d:\d\d:\d\d 0 of", lines[0])
    lines = [line[len("hh:mm:ss ") :] for line in lines]
    assert lines[0].startswith("0 of 1,000 windows (0%), 0 of 4 tasks, 0 B/s, time left not known yet")
    assert any(line.startswith("250 of 1,000 windows (25%), 1 of 4 tasks, ") for line in lines)
    assert re.fullmatch(r".*, \d+ s left, [\d.]+ MiB of memory", lines[-1])
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def test_quiet_shows_no_progress(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.001)
    monkeypatch.setattr(sys, "stderr", Stream(tty=True))
    with progress.ShownWatch("windows", quiet=True) as watch:
        watch.begin(1, 10, 10)
        watch.task_done(Receipt(0, 10, 10, 0.1, 0.0))
    assert sys.stderr.getvalue() == ""


def on_a_terminal(cli, monkeypatch, *arguments):
    """Run the command line with a terminal as its stderr; also what that got."""
    parent, child = os.openpty()
    termios.tcsetwinsize(child, (24, 100))
    with monkeypatch.context() as patch, os.fdopen(child, "w") as terminal:
        patch.setattr(sys, "stderr", terminal)
        said = cli(*arguments)
    shown = b""
    with contextlib.suppress(OSError):  # How a terminal ends on Linux.
        while piece := os.read(parent, 65536):
            shown += piece
    os.close(parent)
    return said, shown.decode()


@pytest.mark.parametrize("how", ["--no-progress", "-q", "variable"])
def test_no_bar_on_a_terminal(cli, samples, small_demo, tmp_path, monkeypatch, how):
    """Of any verb; the report is printed all the same, but with -q."""
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    (tmp_path / "A.zarr").symlink_to(samples / "A.zarr")
    flags = [how]
    if how == "variable":
        monkeypatch.setenv("PIPELINE_PROGRESS", "0")
        flags = []
    for line in ("run A.zarr --count 40", "verify A.zarr", "demo folder", "create A.zarr X.zarr"):
        said, shown = on_a_terminal(cli, monkeypatch, *line.split(), *flags)
        assert said.code == 0
        assert "%|" not in shown
        assert (said.out == "") == (how == "-q")
        assert ("dashboard: " in shown) == (how != "-q")


@pytest.mark.parametrize(("flag", "bars"), [("--progress", 1), (None, 0)])
def test_a_flag_goes_over_the_variable(cli, matrix, monkeypatch, flag, bars):
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    monkeypatch.setenv("PIPELINE_PROGRESS", "0")
    line = ["run", matrix, "--count", 40, *([flag] if flag else [])]
    _, shown = on_a_terminal(cli, monkeypatch, *line)
    assert shown.count("| 0/40 [") == bars
    assert cli("config", "--json").numbers["progress"] == {"value": False, "origin": "PIPELINE_PROGRESS"}


def test_a_demo_shows_a_bar_for_each_run(cli, small_demo, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    _, shown = on_a_terminal(cli, monkeypatch, "demo", "folder")
    for bar in ("| 0/5000 [", "| 0/300 ["):
        assert bar in shown


def test_bar_on_a_terminal(cli, matrix, monkeypatch):
    """On a terminal: a bar, removed at the end, without escape codes where NO_COLOR is set; stdout is untouched."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    said, shown = on_a_terminal(cli, monkeypatch, "run", matrix, "--count", 40, "--json")
    assert said.numbers["windows"] == 40
    assert "dashboard: http" in shown
    assert shown.count("| 0/40 [") == 1
    assert " windows/s]" in shown
    assert "\x1b" not in shown
    assert shown.endswith("\r")


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(demo, "ROWS", 5000)
    monkeypatch.setattr(demo, "COLUMNS", 7)
    monkeypatch.setattr(demo, "COUNT", 300)


def test_demo(cli, small_demo, tmp_path):
    said = cli("demo", "kept/here", "--json")
    numbers = said.numbers
    assert set(numbers["seconds"]) == {"write", "create", "gather", "store", "check"}
    assert (numbers["checked"], numbers["count"], numbers["nbytes_delivered"]) == (True, 300, 300 * 16 * 7 * 8)
    assert [line[:4] for line in said.err.splitlines()] == ["dash", *(f"{step}/5 " for step in range(1, 6))]
    folder = tmp_path / "kept/here"
    assert sorted(path.name for path in folder.iterdir()) == ["A.npy", "A.zarr", "windows.zarr"]
    group = zarr.open_group(folder / "windows.zarr")
    np.testing.assert_array_equal(group["windows"][:], cut(np.load(folder / "A.npy"), group["starts"][:]))
    again = cli("demo", "kept/here", "-q")
    assert (again.code, again.out) == (7, "")


def test_demo_leaves_nothing_without_a_folder(cli, small_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said = cli("demo")
    assert said.code == 0
    assert columns(said.out)["checked"] == "every value, of both, equal to plain NumPy's"
    # Dask's own folder for what it spills may stay, empty.
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".npy", ".zarr", ".json")]


def test_demo_notices_a_wrong_value(cli, small_demo, monkeypatch):
    def wrong(plan, **options):
        windows = pipeline.gather(plan, **options)
        windows[299, 15, 6] += 1
        return windows

    monkeypatch.setattr(demo, "gather", wrong)
    said = cli("demo", "-q")
    assert (said.code, said.out) == (4, "")


@pytest.mark.slow
def test_ci_demo_at_full_size(program, tmp_path):
    done = subprocess.run([program, "demo", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checked"] is True
    assert list(tmp_path.iterdir()) == []


def clean_environment():
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIPELINE_")}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1"}


def test_streams_of_a_real_process(matrix, tmp_path):
    line = [sys.executable, "-m", "pipeline", "run", matrix, "--count", "20", "--json"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, env=clean_environment())
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["windows"] == 20
    assert done.stderr == f"dashboard: {numbers['dashboard']}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
@pytest.mark.parametrize("out", ["w.npy", "w.zarr"])
def test_signal(program, matrix, tmp_path, name, out):
    """While a block is in the hands of `apply`, however long that takes."""
    (tmp_path / "waits.py").write_text(WAITS)
    os.mkfifo(tmp_path / "fifo")
    line = [program, "run", matrix, "--count", "50", "--apply", "waits:wait", "--out", out]
    with subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
    ) as process:
        try:
            assert process.stderr.readline().startswith("dashboard: ")
            assert process.stderr.readline() == "MARKER\n"
            process.send_signal(name)
            said, complained = process.communicate(timeout=9)
        finally:
            process.kill()
    assert process.returncode == 128 + name
    assert (said, complained.count("\n")) == ("", 1)
    assert complained.startswith("error: ")
    assert "no task was finished" in complained
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "waits.py"]


def test_reader_of_our_output_has_gone(program, matrix):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run([program, "info", matrix], stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_under_our_output(program, matrix):
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([program, "info", matrix], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "bug" not in done.stderr


def test_version(program):
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"pipeline, version {pipeline.__version__}\n"
    assert pipeline.__version__ == importlib.metadata.version("random-windows")


def test_without_a_verb_the_help_is_shown(cli):
    said = cli()
    assert (said.code, said.err) == (0, "")
    assert "create" in said.out


@pytest.mark.parametrize("line", [["plan", "A.zarr"], ["plan", "A.zarr", "--count", "-1"]])
def test_garbage_is_collected_after_loading(samples, line):
    """Only what was loaded before is set aside; a process that had NumPy of its own keeps its garbage."""
    for before, frozen in ((), True), (("import numpy",), False):
        script = [
            "import gc, sys",
            *before,
            "from pipeline.cli.main import main",
            f"sys.argv = ['pipeline', *{line!r}]",
            "try: main()",
            "except SystemExit: pass",
            "print(gc.isenabled(), gc.get_freeze_count() > 0)",
        ]
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(script)], cwd=samples, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == f"True {frozen}"
