"""Pipes, sockets and devices in the place of files: one line at once; nothing waits for somebody to write into them."""

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

import pipeline
from pipeline.storage.filesystem import open_regular


@pytest.fixture(autouse=True)
def _impatient():
    """Fail instead of waiting for ever."""

    def fail(*_):
        raise AssertionError("something waits for a pipe")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def unix_socket(path):
    # A path may be too long for one.
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)
        made.bind(path.name)
        os.chdir(here)


KINDS = pytest.mark.parametrize("make", [pipe, device, unix_socket])


@KINDS
@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("X.npy", 3, ("info", "X.npy")),
        ("X.h5", 3, ("info", "X.h5::a")),
        ("X.bin", 3, ("run", "X.bin", "--dtype", "f8", "--row-shape", "4", "--count", "1")),
        ("X.npy", 3, ("create", "X.npy", "B.zarr")),
        ("X.npy", 3, ("verify", "X.npy")),
        ("X.zarr/zarr.json", 3, ("info", "X.zarr")),
        ("X.zarr/.zarray", 3, ("info", "X.zarr")),
        ("X.zarr/zarr.json", 3, ("verify", "X.zarr")),
        ("X.npy", 3, ("run", "A.zarr", "--starts", "X.npy", "--length", "1")),
        ("X.txt", 3, ("run", "A.zarr", "--starts", "X.txt", "--length", "1")),
        ("X.txt", 3, ("run", "A.zarr", "--count", "1", "--length", "1", "--within", "X.txt")),
        ("X.npy", 3, ("run", "A.zarr", "--count", "1", "--length", "1", "--within", "X.npy")),
        ("X.yaml", 3, ("run", "A.zarr", "--count", "1", "--cluster", "X.yaml")),
        ("cluster.yaml", 3, ("run", "A.zarr", "--count", "1")),
        ("X.json", 3, ("verify", "A.npy", "--manifest", "X.json")),
        ("X.npy", 7, ("run", "A.zarr", "--count", "1", "--length", "1", "--out", "X.npy", "--overwrite")),
        ("X.npy", 7, ("run", "A.zarr", "--count", "1", "--length", "1", "--out", "X.npy", "--resume")),
        ("X.zarr/zarr.json", 7, ("run", "A.zarr", "--count", "1", "--length", "1", "--out", "X.zarr", "--overwrite")),
        ("X.zarr/zarr.json", 7, ("run", "A.zarr", "--count", "1", "--length", "1", "--out", "X.zarr", "--resume")),
        ("R.html", 7, ("run", "A.zarr", "--count", "1", "--length", "1", "--performance-report", "R.html")),
    ],
)
def test_one_line_at_once(cli, samples, tmp_path, make, name, code, line):
    shutil.copytree(samples / "A.zarr", tmp_path / "A.zarr")
    shutil.copy(samples / "A.npy", tmp_path / "A.npy")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    said = cli(*line)
    # Whoever can write into a device writes what is read from it.
    code = 2 if name == "cluster.yaml" and make is device else code
    assert said.code == code, said.err
    assert said.err.count("\n") == 1


@KINDS
def test_a_chunk_of_a_finished_result(samples, tmp_path, make):
    plan = pipeline.plan_windows(pipeline.open_matrix(samples / "A.zarr"), [3, 1, 2], length=1)
    pipeline.store(plan, tmp_path / "w.zarr")
    chunk = next(path for path in sorted((tmp_path / "w.zarr" / "windows").rglob("*")) if path.name == "0")
    chunk = chunk if chunk.is_file() else next(path for path in chunk.rglob("*") if path.is_file())
    chunk.unlink()
    make(chunk)
    with pytest.raises(pipeline.IntegrityError, match="in .*w.zarr 1 file changed"):
        pipeline.store(plan, tmp_path / "w.zarr", resume=True)
    assert [str(each.key) for each in pipeline.verify(tmp_path / "w.zarr")] == [
        str(chunk.relative_to(tmp_path / "w.zarr"))
    ]


def count_open():
    fds = Path("/proc/self/fd")
    return len([*fds.iterdir()]) if fds.is_dir() else 0


def test_a_file_is_opened_and_a_folder_is_none(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    before = count_open()
    for name in "ab":
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"abc"
    for path, follow, kind in ((tmp_path, True, IsADirectoryError), (tmp_path / "b", False, OSError)):
        with pytest.raises(kind):
            open_regular(path, follow=follow)
    assert count_open() == before
