"""Every exit code on every verb, with `--json` and without: one line, or one object, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest

import pipeline
from pipeline.cli.main import cli as commands
from pipeline.cluster.signals import Terminated

LINES = {
    "create": "create A.npy X.zarr -q",
    "info": "info A.zarr",
    "plan": "plan A.zarr --count 3",
    "run": "run A.zarr --count 3 --out w.npy -q",
    "verify": "verify A.zarr -q",
    "demo": "demo made -q",
    "bench": "bench made -q",
}
"""What each verb does when all is well."""

FLOWS = {
    "create": "pipeline.sinks.create.plan_creation",
    "info": "pipeline.cli.request.open_matrix",
    "plan": "pipeline.cli.request.open_matrix",
    "run": "pipeline.cli.request.open_matrix",
    "verify": "pipeline.integrity.verify.prepare_verification",
    "demo": "pipeline.cli.demo.run_demo",
    "bench": "pipeline.bench.run.run_bench",
}
"""What each verb calls, after the command line is read."""


@pytest.fixture
def here(cli, samples, tmp_path):
    """The working directory: a matrix, damaged ones, and what must not be touched."""
    shutil.copytree(samples, tmp_path, dirs_exist_ok=True)
    shutil.copytree(samples / "A.zarr", tmp_path / "torn.zarr")
    (tmp_path / "torn.zarr/c/0/0").unlink()
    shutil.copytree(samples / "A.zarr", tmp_path / "flipped.zarr")
    with (tmp_path / "flipped.zarr/c/7/0").open("r+b") as file:
        file.seek(20)
        byte = file.read(1)[0]
        file.seek(20)
        file.write(bytes([byte ^ 1]))
    (tmp_path / "made.zarr").mkdir()
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy/A.npy").write_text("mine")
    (tmp_path / "loud.py").write_text("def fail(block): raise ValueError('no')\n")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "A.npy").read_bytes()[:-1])
    return tmp_path


def check(said, code, *words):
    """One line on stderr, and nothing on stdout but, with --json, one object that says the same."""
    assert (said.code, said.err.count("\n")) == (code, 1), said
    assert said.err.startswith("error: ")
    assert [word for word in words if word not in said.err] == [], said.err
    if said.out:
        assert said.numbers["exit_code"] == code
        assert f"error: {said.numbers['error']}\n" == said.err


def test_every_verb_has_its_rows():
    assert set(commands.commands) - {"config"} == set(LINES) == set(FLOWS)


@pytest.mark.parametrize("verb", ["create", "info", "plan", "run", "verify"])
def test_0(cli, here, verb):
    said = cli(*shlex.split(LINES[verb]))
    assert (said.code, said.err) == (0, "")
    # With -q a run says nothing; what was asked for is still printed.
    assert bool(said.out) is (verb in {"info", "plan"})
    shutil.rmtree(here / "X.zarr", ignore_errors=True)
    (here / "w.npy").unlink(missing_ok=True)
    said = cli(*shlex.split(LINES[verb]), "--json")
    assert (said.code, said.err) == (0, "")
    assert "error" not in said.numbers


def caused(error, cause):
    error.__cause__ = cause
    return error


RAISED = [
    *((getattr(pipeline, name)("rule; what; way out"), getattr(pipeline, name).exit_code, "rule; what; way out") for name in pipeline.__all__ if name.endswith("Error")),
    (ZeroDivisionError("by zero"), 1, "a bug of ours; ZeroDivisionError: by zero"),
    (RecursionError("two\nlines"), 1, "two lines"),
    (click.UsageError("no such thing"), 2, "no such thing"),
    (click.FileError("a.txt", "why"), 2, "a.txt"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 3, "a.txt"),
    (PermissionError(errno.EACCES, "Permission denied", "a.txt"), 3, "a.txt"),
    (OSError(errno.EMFILE, "Too many open files"), 3, "Too many open files"),
    (MemoryError(), 5, "memory"),
    (ImportError("a.so: failed to map segment from shared object"), 5, "a.so: failed to map segment"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 5, "Cannot allocate memory"),
    (RuntimeError("can't start new thread"), 5, "can't start new thread"),
    (caused(pipeline.OpenError("metadata"), ImportError("b.so: failed to map segment")), 5, "b.so: failed"),
    (caused(ValueError("a"), MemoryError("Unable to allocate 8 EiB")), 5, "Unable to allocate 8 EiB"),
    (caused(pipeline.IntegrityError("broken"), MemoryError()), 4, "broken"),
    (OSError(errno.ENOSPC, "No space left on device", "a.txt"), 5, "a.txt"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 5, "quota"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (click.Abort(), 130, "interrupted"),
    (Terminated(), 143, "terminated"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "words"), RAISED, ids=[type(error).__name__ for error, _, _ in RAISED])
def test_whatever_is_raised_in_any_verb(cli, here, monkeypatch, error, code, words):
    def fail(*_, **__):
        raise error

    before = set(here.rglob("*"))
    for verb, flow in FLOWS.items():
        monkeypatch.setattr(flow, fail)
        for flags in ([], ["--json"]):
            said = cli(*shlex.split(LINES[verb]), *flags)
            assert bool(said.out) == bool(flags), verb
            check(said, code, words)
    assert set(here.rglob("*")) == before


@pytest.mark.parametrize("verb", FLOWS)
def test_a_traceback_only_where_it_is_asked_for(cli, here, monkeypatch, verb):
    def fail(*_, **__):
        raise pipeline.OpenError("rule; what; way out") from ValueError("the cause")

    monkeypatch.setattr(FLOWS[verb], fail)
    said = cli(*shlex.split(LINES[verb]), "--debug", "--json")
    assert said.numbers == {"error": "rule; what; way out", "exit_code": 3}
    assert said.err.startswith("ValueError: the cause\n")
    assert "Traceback (most recent call last)" in said.err
    assert said.err.splitlines()[-1] == "error: rule; what; way out"


FAILURES = [
    *((2, f"{line} --no-such-flag", ["--no-such-flag", "--help"]) for line in LINES.values()),
    *((2, f"{verb} --length x", ["'x'"]) for verb in ("create A.npy X.zarr", "info A.zarr", "plan A.zarr", "run A.zarr")),
    (2, "verify A.zarr --subset 0%", ["0%"]),
    (2, "bench made --scenario all", ["all", "seed"]),
    (2, "verify", ["TARGET", "--help"]),
    (2, "--json", ["--json", "--help"]),
    (2, "nothing", ["'nothing'", "--help"]),
    (3, "create absent.npy X.zarr", ["absent.npy"]),
    (3, "create cut.npy X.zarr", ["cut.npy"]),
    *((3, f"{verb} absent.zarr", ["absent.zarr"]) for verb in ("info", "plan", "run", "verify")),
    *((3, f"{verb} cut.npy", ["cut.npy"]) for verb in ("info", "plan", "run")),
    *((3, f"{line} --cluster absent.yaml", ["absent.yaml"]) for verb, line in LINES.items() if verb not in ("info", "plan")),
    (4, "create torn.zarr X.zarr -q", ["torn.zarr"]),
    *((4, f"{verb} torn.zarr", ["torn.zarr/c/0/0", "rows 0 to 255"]) for verb in ("plan", "run")),
    *((4, f"{verb} A.zarr --apply loud:fail", ["ValueError: no", "row"]) for verb in ("plan", "run")),
    (4, "run flipped.zarr --check-reads -q", ["flipped.zarr", "rows"]),
    (5, "create A.npy X.zarr --memory 1MB", ["--memory allows 977 KiB"]),
    *((5, f"{verb} A.zarr --memory 1MB", ["--memory allows 977 KiB"]) for verb in ("plan", "run")),
    (5, "create random:1000000000x2000 X.zarr", ["free some"]),
    (7, "create A.npy made.zarr", ["made.zarr exists"]),
    *((7, f"{verb} A.zarr --out made.zarr", ["made.zarr exists"]) for verb in ("plan", "run")),
    (7, "demo busy -q", ["busy/A.npy exists"]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "line", "words"), FAILURES, ids=[line for _, line, _ in FAILURES])
def test_failures(cli, here, code, line, words):
    for flags in ([], ["--json"]):
        said = cli(*shlex.split(line), *flags)
        assert bool(said.out) == ("--json" in [*flags, line])
        check(said, code, *words)


def test_4_of_verify_is_its_report(cli, here):
    """What is wrong goes to stdout: it is what was asked for."""
    said = cli("verify", "flipped.zarr", "-q")
    assert (said.code, said.err.count("\n")) == (4, 1)
    assert "c/7/0" in said.out
    said = cli("verify", "flipped.zarr", "-q", "--json")
    check(said, 4, "flipped.zarr")
    assert "c/7/0" in said.out


@pytest.mark.parametrize("verb", ["create", "run"])
def test_5_where_the_disk_fills_under_way(cli, here, monkeypatch, verb):
    line = LINES[verb].replace("w.npy", "w.zarr")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    check(cli(*shlex.split(line), "--json"), 5, "No space left on device")
    assert not (here / "X.zarr").exists()
    assert not (here / "w.zarr").exists()


@pytest.mark.parametrize(
    ("verb", "module"), [("run", "sinks.store"), ("run", "runtime.placement"), ("create", "sinks.create")]
)
def test_6(cli, here, monkeypatch, verb, module):
    def lost(*_, **__):
        raise pipeline.IncompleteError("every task is done; one is not; look at the workers' logs")
        yield

    monkeypatch.setattr(f"pipeline.{module}.run_tasks", lost)
    line = LINES[verb].replace("w.npy", "w.zarr" if module == "sinks.store" else "w.npy")
    check(cli(*shlex.split(line), "--json"), 6, "every task is done")
    assert not (here / "X.zarr").exists()
    assert not list(here.glob("w.*[yr]"))


ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PIPELINE_")}


def console(program, folder, line, **streams):
    """Call the real program; streams that are not given are read."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | streams
    return subprocess.run([program, *shlex.split(line)], cwd=folder, text=True, check=False, env=ENVIRONMENT, **given)


@pytest.mark.parametrize(
    ("line", "code", "object_too"),
    [("info A.zarr", 0, False), ("info A.zarr --json", 0, True), ("rum --json", 2, True), ("info B.zarr", 3, False)],
)
def test_the_real_program(program, samples, line, code, object_too):
    done = console(program, samples, line)
    assert done.returncode == code
    assert (done.stderr.count("\n"), done.stderr[:7]) == ((1, "error: ") if code else (0, ""))
    if object_too:
        assert json.loads(done.stdout).get("exit_code", 0) == code
    else:
        assert bool(done.stdout) == (code == 0)


def closing(*descriptors):
    """Start a program without some of its streams."""
    return lambda: [os.close(each) for each in descriptors]


@pytest.mark.parametrize("flags", ["", " --json"])
def test_stdout_is_closed(program, samples, tmp_path, flags):
    """Before the work: its report would be lost, and the first file that is opened would take its place."""
    line = f"run {samples}/A.zarr --count 3 --out w.npy{flags}"
    done = console(program, tmp_path, line, stdout=None, preexec_fn=closing(1))
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "standard output; it is closed; name a file" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_streams_are_closed(program, samples, values, tmp_path):
    line = f"run {samples}/A.zarr --count 3 --seed 1 --out w.npy --json"
    done = console(program, tmp_path, line, stderr=None, stdin=None, preexec_fn=closing(0, 2))
    assert done.returncode == 0
    assert json.loads(done.stdout)["windows"] == 3
    starts = np.random.default_rng(1).integers(0, 1985, size=3)
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), np.stack([values[s : s + 16] for s in starts]))


@pytest.mark.parametrize(("stdin", "code", "words"), [(None, 2, "at least one"), (b"\xff\xfe", 3, "standard input")])
def test_starts_from_a_stream_that_is_closed_or_no_text(program, samples, stdin, code, words):
    source = {"preexec_fn": closing(0), "stdin": None}
    if stdin is not None:
        reader, writer = os.pipe()
        os.write(writer, stdin)
        os.close(writer)
        source = {"stdin": reader}
    done = console(program, samples, "plan A.zarr --starts - --json", **source)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert words in json.loads(done.stdout)["error"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("line", "code"), [("info A.zarr --json", 5), ("info B.zarr --json", 3)])
def test_stdout_cannot_be_written(program, samples, line, code):
    with Path("/dev/full").open("wb") as full:
        done = console(program, samples, line, stdout=full)
    assert (done.returncode, done.stderr.count("\n"), done.stderr[:7]) == (code, 1, "error: ")


@pytest.mark.parametrize(
    ("line", "code", "lines"), [("info A.zarr", 128 + signal.SIGPIPE, 0), ("info B.zarr --json", 3, 1)]
)
def test_whoever_read_it_has_gone(program, samples, line, code, lines):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = console(program, samples, line, stdout=closed)
    assert (done.returncode, done.stderr.count("\n")) == (code, lines)


def test_module_and_program_are_one(program, samples):
    line = [sys.executable, "-m", "pipeline", "info", "B.zarr", "--json"]
    done = subprocess.run(line, cwd=samples, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    again = console(program, samples, "info B.zarr --json")
    assert (done.returncode, done.stdout, done.stderr) == (again.returncode, again.stdout, again.stderr)


@pytest.mark.parametrize("mebibytes", [60, 100, 150, 200, 300, 400, 600])
@pytest.mark.parametrize("verb", ["info", "run", "config"])
def test_too_little_address_space(program, samples, verb, mebibytes):
    resource = pytest.importorskip("resource")

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))

    words = {"info": [samples / "A.zarr"], "run": [samples / "A.zarr", "--count", "9"], "config": []}[verb]
    done = subprocess.run([program, verb, *words], capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode in (0, 5), done.stderr
    if done.returncode:
        assert done.stderr.splitlines()[-1].startswith("error: ")
    assert done.returncode == 5 or mebibytes > 150
