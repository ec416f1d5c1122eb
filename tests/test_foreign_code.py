"""Files that lie beside the data, or where everybody may write, are not run; those that `--apply` names are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import cloudpickle
import dask
import numpy as np
import pytest

import pipeline
from pipeline import memory
from pipeline.bench import scale
from pipeline.cli import request
from pipeline.cluster import security
from pipeline.cluster.startup import safe_path
from pipeline.storage import trust

PROCESSES = ["--workers", "2"]
FUNCTIONS = {
    "features.py": """
        import sys
        import numpy as np
        import scaling
        from shapes.middle import centre
        HERE = list(sys.path)
        def mean(block): return np.asarray(scaling.double(centre(block).mean(axis=2)))
        def late(block):
            import seldom
            return seldom.twice(block)
    """,
    "scaling.py": "FACTOR = [2]\ndef double(block): return block * FACTOR[0]",
    "seldom.py": "def twice(block): return block * 2",
    "shapes/__init__.py": "",
    "shapes/middle.py": "from .ends import first\ndef centre(block): return block - first(block)",
    "shapes/ends.py": "def first(block): return block[:, :1]",
    "below/features.py": "def mean(block): return block.mean(axis=1)",
}


def write_modules(folder, modules):
    for name, text in modules.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        lines = text.splitlines()
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        path.write_text("\n".join(line[indent:] for line in lines) + "\n")


@pytest.fixture
def traps(tmp_path):
    """A file that names whatever module of `tmp_path` ran: there is one for each that Python or a package has."""
    log = tmp_path.with_name(f"{tmp_path.name}-ran")
    own = {name.partition(".")[0] for name in FUNCTIONS}
    names = {*sys.stdlib_module_names, *metadata.packages_distributions(), "sitecustomize", "usercustomize"} - own
    text = f"import os\nwith open({str(log)!r}, 'a') as file: print(__name__, os.getpid(), file=file)\n"
    for name in names:
        if name.isidentifier():
            (tmp_path / f"{name}.py").write_text(text)
    return log


@pytest.fixture
def here(cli, samples, tmp_path):
    (tmp_path / "A.zarr").symlink_to(samples / "A.zarr")
    (tmp_path / "s.txt").write_text("1000 3")
    write_modules(tmp_path, FUNCTIONS)
    return tmp_path


@pytest.fixture
def expected(values):
    blocks = np.stack([values[start : start + 16] for start in (1000, 3)])
    return 2 * (blocks - blocks[:, :1]).mean(axis=2)


def ran(log):
    return log.read_text() if log.exists() else ""


def call(command, here, **variables):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIPELINE_")}
    kept |= {"PYTHONDONTWRITEBYTECODE": "1", **variables}
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=False, env=kept)


@pytest.mark.parametrize("where", [[], PROCESSES], ids=["in-process", "processes"])
@pytest.mark.parametrize("way", ["program", "module"])
def test_nothing_beside_the_data_replaces_a_module(program, here, traps, expected, where, way):
    if way == "module":
        # Python has looked for these before the package is there; `python -P -m` is for who cannot trust the folder.
        for name in (
            "runpy",
            "importlib",
            "typing",
            "os",
            "threading",
            "contextlib",
            "types",
            "pkgutil",
            "collections",
        ):
            (here / f"{name}.py").unlink(missing_ok=True)
        for path in here.glob("*.py"):
            if path.stem in sys.stdlib_module_names and path.stem not in ("json", "socket", "pickle", "tempfile"):
                path.unlink()
    line = [program] if way == "program" else [sys.executable, "-m", "pipeline"]
    line += ["run", "A.zarr", "--starts", "s.txt", "--apply", "features:mean", "--out", "w.npy", "-q", *where]
    done = call(line, here)
    assert (done.returncode, ran(traps)) == (0, ""), done.stderr
    np.testing.assert_array_equal(np.load(here / "w.npy"), expected, strict=True)


@pytest.mark.parametrize("line", ["create A.zarr B.zarr --workers 2", "verify A.zarr", "info A.zarr", "config"])
def test_nor_in_another_verb(program, here, traps, line):
    done = call([program, *line.split(), "-q"], here)
    assert (done.returncode, ran(traps)) == (0, ""), done.stderr


def test_nor_in_the_child_that_tries_what_memory_allows(here, traps, monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**28, 2**28))
    memory.check_address_space()
    assert ran(traps) == ""


def test_nor_in_the_processes_of_a_measurement(here, traps):
    with scale._started(here, "scheduler"):
        pass
    assert ran(traps) == ""


@pytest.mark.parametrize("verb", ["-m", "-c"])
def test_nor_in_a_job_or_on_a_host(here, traps, verb):
    """Python is started there in the working directory by a shell that ran these lines before."""
    (here / "mine.py").write_text("")
    command = f"{sys.executable} {verb} {'json.tool --help' if verb == '-m' else 'import socket'}"
    for lines, expected in (([], True), (security.guard_lines(), False)):
        done = call(["sh", "-c", "\n".join([*lines, command])], here)
        assert bool(ran(traps)) is expected, done.stderr
        traps.unlink(missing_ok=True)


def test_the_path_is_as_before(here, monkeypatch):
    before = list(sys.path)
    for name in ("features:mean", "features:absent", "fails:mean", "leaves:mean", "absent:mean", ".features:mean"):
        (here / "fails.py").write_text("import absent_from_everywhere")
        (here / "leaves.py").write_text("raise SystemExit")
        with ExitStack() as stack:
            if name != "features:mean":
                stack.enter_context(pytest.raises(pipeline.InputError))
            request._load_function(name)
        assert sys.path == before
    assert [*before, str(here)] == sys.modules["features"].HERE
    (here / "stops.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        request._load_function("stops:mean")
    assert sys.path == before
    # Of the user's own will it stays.
    monkeypatch.syspath_prepend(str(here))
    before = list(sys.path)
    request._load_function("features:late")
    assert sys.path == before


@pytest.mark.parametrize("name", ["statistics:mean", "statistics.deep:mean", "json:loads", "zarr:open", "sys:exit"])
def test_a_module_that_an_installed_one_hides_is_named(cli, here, name):
    top = name.partition(":")[0].partition(".")[0]
    (here / f"{top}.py").write_text("def mean(block): raise AssertionError")
    said = cli("plan", "A.zarr", "--starts", "s.txt", "--apply", name)
    assert said.code == 2
    assert str(here / f"{top}.py") in said.err
    assert "rename it" in said.err


def test_a_package_below_the_folder(cli, here, values):
    line = ["run", "A.zarr", "--starts", "s.txt", "--out", "w.npy", "-q"]
    assert cli(*line, "--apply", "below.features:mean").code == 0
    blocks = np.stack([values[start : start + 16] for start in (1000, 3)])
    np.testing.assert_array_equal(np.load(here / "w.npy"), blocks.mean(axis=1), strict=True)


def test_an_import_inside_of_a_function_says_what_to_do(cli, here):
    said = cli("run", "A.zarr", "--starts", "s.txt", "--apply", "features:late", "-q")
    assert said.code == 4
    assert "No module named 'seldom'" in said.err
    assert "import it where its module begins" in said.err


def test_code_of_the_folder_is_sent_and_no_other(here):
    function = request._load_function("features:mean")
    sent = cloudpickle.dumps(function)
    assert cloudpickle.list_registry_pickle_by_value() >= {"features", "scaling", "shapes"}
    assert not cloudpickle.list_registry_pickle_by_value() & {"numpy", "pipeline"}
    (here / "sent").write_bytes(sent)
    code = "import pickle, sys, numpy as np; f = pickle.loads(open(sys.argv[1], 'rb').read())\n"
    code += "print(f(np.arange(24.0).reshape(2, 3, 4)).tolist())\n"
    code += "print({'features', 'scaling', 'shapes', 'shapes.middle'} & {*sys.modules})"
    done = call([sys.executable, "-P", "-c", code, here / "sent"], "/")
    assert done.stdout == "[[0.0, 8.0, 16.0], [0.0, 8.0, 16.0]]\nset()\n", done.stderr


def test_a_run_goes_on_with_the_same_function(program, here):
    line = [program, "run", "A.zarr", "--starts", "s.txt", "--apply", "features:mean", "--out", "w.npy", "--json", "-q"]
    assert call(line, here).returncode == 0
    again = call([*line, "--resume", *PROCESSES], here)
    assert json.loads(again.stdout)["finished_before"] is True, again.stderr
    (here / "features.py").write_text((here / "features.py").read_text() + "# another\n")
    assert call([*line, "--resume"], here).returncode == 7


def test_an_error_shows_its_line(cli, here):
    (here / "wrong.py").write_text("import scaling\ndef mean(block): return scaling.absent\n")
    said = cli("run", "A.zarr", "--starts", "s.txt", "--apply", "wrong:mean", "-q", "--debug")
    assert said.code == 4
    assert "return scaling.absent" in said.err
    assert sys.path.count(str(here)) == 0


def test_processes_get_the_path_and_the_environment_of_the_user(here, monkeypatch):
    """The variable that keeps the working directory off is no other child's."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with pipeline.connect(workers=1, processes=True, dashboard_address=None) as client:
        look = lambda: (sys.path, os.environ.get("PYTHONSAFEPATH"))  # noqa: E731
        [(path, variable)] = client.run(look).values()
        assert "PYTHONSAFEPATH" not in os.environ
    assert not variable
    assert not {"", ".", str(here)} & {*path}


def test_the_variable_is_set_while_a_process_starts_and_no_longer(monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with safe_path():
        with safe_path():
            assert os.environ["PYTHONSAFEPATH"] == "1"
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert "PYTHONSAFEPATH" not in os.environ
    monkeypatch.setenv("PYTHONSAFEPATH", "yes")
    with safe_path():
        pass
    assert os.environ["PYTHONSAFEPATH"] == "yes"


ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="takes on another user's files")


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """The folder for temporary files of all users of a machine."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.mark.parametrize("processes", [False, True], ids=["in-process", "processes"])
def test_temporary_files_lie_in_a_folder_of_the_users_own(shared, processes):
    """Dask puts it first on the path, and another user may have made the one that Dask would take."""
    (shared / "dask-scratch-space").mkdir()
    (shared / "dask-scratch-space").chmod(0o777)
    before = list(sys.path)
    with pipeline.connect(workers=1, processes=processes, dashboard_address=None) as client:
        paths = [sys.path, *client.run(lambda: sys.path).values()]
        added = {each for path in paths for each in path if each.startswith(str(shared))} - {*before}
        assert added
    for each in added:
        own = shared / Path(each).relative_to(shared).parts[0]
        assert own.stat().st_mode & 0o777 == 0o700
        assert own.stat().st_uid == os.geteuid()
    assert [*(shared / "dask-scratch-space").iterdir()] == []


def test_the_users_own_folder_stays_in_force(shared):
    with (
        dask.config.set({"temporary-directory": str(shared / "mine")}),
        pipeline.connect(dashboard_address=None) as client,
    ):
        [worker] = client.scheduler_info()["workers"].values()
        assert worker["local_directory"].startswith(str(shared / "mine"))
        assert security.guard_lines() == ["export PYTHONSAFEPATH=1"]


@pytest.mark.parametrize("prepare", ["absent", "own", "open", "link", pytest.param("another's", marks=ROOT)])
def test_a_folder_that_somebody_prepared_is_not_used(shared, prepare):
    place = shared / f"random-windows-{os.geteuid()}"
    (shared / "trap").mkdir(mode=0o700)
    if prepare == "link":
        place.symlink_to("trap")
    elif prepare != "absent":
        place.mkdir(mode=0o700)
    if prepare == "open":
        place.chmod(0o777)
    if prepare == "another's":
        os.chown(place, 12345, 12345)
    expected = prepare in ("absent", "own")
    found = [trust.private_folder()]
    if prepare != "open":
        # A shell cannot see the mode; nobody but its owner can have given it.
        done = call(["sh", "-c", "\n".join([*security.guard_lines(), 'echo "$DASK_TEMPORARY_DIRECTORY"'])], shared)
        found.append(Path(done.stdout.strip()))
    for each in found:
        assert (each == place) is expected
        assert each.is_dir()
        assert each.stat().st_mode & 0o777 == 0o700
