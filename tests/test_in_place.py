"""Files read in place: `.npy`, raw binary, contiguous HDF5 and stacks of them give the windows that NumPy gives."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import dask
import h5py
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline
from pipeline.readers.choose import choose_reader
from tests.layouts import ROWS, distinct, stack

LENGTH = 16
STARTS = [195, 0, 3, 3, 64, 100, 8, 9, 10, 63, 31, 150, 195, 16]
CUTS = [0, 64, 65, 70, 100, 211]
"""Borders of parts; a window of 16 rows may lie in four of them."""


def write_hdf5(path, data, **options):
    with h5py.File(path, "w", **options) as file:
        file["before"] = np.arange(7, dtype="u1")
        file["group/test"] = data
        file["after"] = np.arange(100)


def open_npy(folder, a):
    np.save(folder / "A.npy", a)
    return pipeline.open_matrix(folder / "A.npy")


def open_npy_of_version_2(folder, a):
    with (folder / "A.npy").open("wb") as file:
        np.lib.format.write_array(file, a, version=(2, 0))
    return pipeline.open_matrix(str(folder / "A.npy"))


def open_raw(folder, a):
    a.tofile(folder / "A.bin")
    return pipeline.open_matrix(folder / "A.bin", dtype=a.dtype.str, row_shape=a.shape[1:])


def open_hdf5(folder, a):
    write_hdf5(folder / "A.h5", a)
    return pipeline.open_matrix(f"{folder / 'A.h5'}::group/test")


def open_hdf5_behind_a_userblock(folder, a):
    write_hdf5(folder / "A.h5", a, userblock_size=512)
    return pipeline.open_matrix(folder / "A.h5", dataset="group/test")


def save_parts(folder, a):
    paths = [folder / f"{number}.npy" for number in range(len(CUTS) - 1)]
    for path, first, stop in zip(paths, CUTS, CUTS[1:], strict=False):
        np.save(path, a[first:stop])
    return paths


def open_parts(folder, a):
    return pipeline.open_matrix(save_parts(folder, a))


def open_mixed_parts(folder, a):
    np.save(folder / "0.npy", a[:64])
    write_hdf5(folder / "1.h5", a[64:100])
    np.save(folder / "2.npy", a[100:])
    return pipeline.open_matrix((str(folder / "0.npy"), f"{folder / '1.h5'}::group/test", str(folder / "2.npy")))


def open_raw_parts(folder, a):
    for number, part in enumerate([a[:70], a[70:]]):
        part.tofile(folder / f"{number}.bin")
    return pipeline.open_matrix([folder / "0.bin", folder / "1.bin"], dtype=a.dtype, row_shape=list(a.shape[1:]))


WAYS = [
    open_npy,
    open_npy_of_version_2,
    open_raw,
    open_hdf5,
    open_hdf5_behind_a_userblock,
    open_parts,
    open_mixed_parts,
    open_raw_parts,
]


@pytest.fixture(autouse=True)
def no_client_of_another_test():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def cut_small(monkeypatch):
    """Many tasks from little data."""
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", 7)


@pytest.mark.usefixtures("cut_small")
@pytest.mark.parametrize("dtype", ["f8", "i2", "c16", "u1"])
@pytest.mark.parametrize("row_shape", [(5, 3), (), (7,)])
@pytest.mark.parametrize("open_way", WAYS)
def test_every_sink(open_way, row_shape, dtype, tmp_path):
    a = distinct(ROWS, row_shape, "f8").astype(dtype)
    (tmp_path / "in").mkdir()
    matrix = open_way(tmp_path / "in", a)
    assert (matrix.shape, matrix.dtype, matrix.layout.reader) == (a.shape, a.dtype, "direct")
    plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
    assert plan.chunk.tasks == 7
    assert plan.chunk.nbytes_read == plan.request.nbytes_read == plan.nbytes
    expected = stack(a, STARTS, LENGTH)
    np.testing.assert_array_equal(pipeline.gather(plan), expected, strict=True)
    for order in ("request", "chunk"):
        result = pipeline.store(plan, tmp_path / f"{order}.zarr", order=order)
        np.testing.assert_array_equal(result["windows"][:], stack(a, result["starts"][:], LENGTH), strict=True)


@pytest.mark.parametrize("open_way", WAYS)
def test_booleans_and_the_whole_matrix_as_one_window(open_way, tmp_path):
    a = np.random.default_rng(0).random((ROWS, 9)) < 0.5
    plan = pipeline.plan_windows(open_way(tmp_path, a), [0], length=ROWS)
    np.testing.assert_array_equal(pipeline.gather(plan), a[None], strict=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_request_of_any_parts(tmp_path, data):
    a = distinct(90, (3,))
    inner = data.draw(st.sets(st.integers(1, 89), max_size=12))
    cuts = [0, *sorted(inner), 90]
    paths = [tmp_path / f"{number}.npy" for number in range(len(cuts) - 1)]
    for path, first, stop in zip(paths, cuts, cuts[1:], strict=False):
        np.save(path, a[first:stop])
    length = data.draw(st.integers(1, 90))
    starts = data.draw(st.lists(st.integers(0, 90 - length), min_size=1, max_size=30))
    matrix = pickle.loads(pickle.dumps(pipeline.open_matrix(paths)))
    np.testing.assert_array_equal(matrix.parts, np.stack([cuts[:-1], cuts[1:]], axis=1))
    plan = pipeline.plan_windows(matrix, starts, length=length)
    assert plan.crossings() == sum(any(s < cut < s + length for cut in inner) for s in starts)
    np.testing.assert_array_equal(pipeline.gather(plan), stack(a, starts, length), strict=True)


def test_parts_keep_their_borders(tmp_path):
    matrix = open_parts(tmp_path, distinct())
    assert matrix.parts.dtype == np.int64
    starts = pipeline.draw_starts(matrix.rows, length=4, count=300, seed=0, within=matrix.parts)
    assert pipeline.plan_windows(matrix, starts, length=4).crossings() == 0
    assert pipeline.open_matrix(tmp_path / "0.npy").parts is None
    assert pipeline.open_matrix([tmp_path / "0.npy"]).parts.tolist() == [[0, 64]]


def test_only_the_windows_are_read(tmp_path, monkeypatch):
    a = distinct()
    matrix = open_parts(tmp_path, a)
    real, asked = os.preadv, []

    def counting(fd, buffers, offset):
        got = real(fd, buffers, offset)
        asked.append((Path(f"/proc/self/fd/{fd}").readlink(), offset, got))
        return got

    monkeypatch.setattr("os.preadv", counting)
    pipeline.gather(pipeline.plan_windows(matrix, [60], length=6))
    # Rows 60 to 65: four of part 0, all of part 1, one of part 2, each behind a header.
    header, row = (tmp_path / "1.npy").stat().st_size - a[0].nbytes, a[0].nbytes
    assert asked == [
        (tmp_path / "0.npy", header + 60 * row, 4 * row),
        (tmp_path / "1.npy", header, row),
        (tmp_path / "2.npy", header, row),
    ]


def test_few_of_many_parts_are_open_at_once(tmp_path, monkeypatch):
    a = distinct(150, (2,))
    for row in range(150):
        np.save(tmp_path / f"{row}.npy", a[row : row + 1])
    matrix = pipeline.open_matrix([tmp_path / f"{row}.npy" for row in range(150)])
    plan = pipeline.plan_windows(matrix, [0, 70, 140], length=10)
    real, most = os.preadv, [0]

    def counting(*arguments):
        links = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
        most[0] = max(most[0], sum(link.suffix == ".npy" for link in links))
        return real(*arguments)

    monkeypatch.setattr("os.preadv", counting)
    np.testing.assert_array_equal(pipeline.gather(plan), stack(a, [0, 70, 140], 10))
    np.testing.assert_array_equal(pipeline.gather(pipeline.plan_windows(matrix, [0], length=150)), a[None])
    assert 1 < most[0] <= 64


def test_worker_processes_find_files_named_in_another_folder(tmp_path, monkeypatch):
    a = distinct()
    np.save(tmp_path / "A.npy", a)
    with pipeline.connect(processes=True, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        monkeypatch.chdir(tmp_path)
        matrix = pipeline.open_matrix("A.npy")
        with client.as_current(), dask.config.set(scheduler="dask.distributed"):
            windows = pipeline.gather(pipeline.plan_windows(matrix, STARTS, length=LENGTH))
    np.testing.assert_array_equal(windows, stack(a, STARTS, LENGTH), strict=True)


def test_opening_and_planning_read_headers_only(tmp_path, monkeypatch):
    np.save(tmp_path / "A.npy", distinct())
    monkeypatch.setattr("os.preadv", lambda *_: pytest.fail("read"))
    monkeypatch.setattr("os.open", lambda *_: pytest.fail("opened"))
    matrix = pipeline.open_matrix(tmp_path / "A.npy")
    assert "none: 1 file read in place" in repr(matrix)
    repr(pipeline.plan_windows(matrix, STARTS, length=LENGTH))


def test_neither_zarr_nor_dask_is_needed_to_open(tmp_path):
    np.save(tmp_path / "A.npy", distinct())
    code = "import pipeline, sys; pipeline.open_matrix('A.npy'); print({'zarr', 'dask', 'h5py'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# files that changed


def append(path):
    with path.open("ab") as file:
        file.write(bytes(120))


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def rewrite(path):
    """Another content of the same size."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(0, 0))


def remove(path):
    path.unlink()


def replace(path):
    path.unlink()
    path.mkdir()


CHANGES = [append, truncate, rewrite, remove, replace]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("number", [0, 4])
def test_a_file_that_changed_before_the_run(tmp_path, change, number):
    """Whether the windows touch it or not: with another part, it is another matrix."""
    matrix = open_parts(tmp_path, distinct())
    plan = pipeline.plan_windows(matrix, [1, 2], length=3)
    change(tmp_path / f"{number}.npy")
    for sink in (lambda: pipeline.gather(plan), lambda: pipeline.store(plan, tmp_path / "w.zarr")):
        with pytest.raises(pipeline.IntegrityError, match=rf"{number}\.npy"):
            sink()
    assert not list(tmp_path.glob("w.zarr*"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_under_the_run(tmp_path, change):
    matrix = open_parts(tmp_path, distinct())
    reader = choose_reader(matrix, row=0)
    change(tmp_path / "0.npy")
    out = np.zeros((1, 3, 5, 3))
    with pytest.raises(pipeline.IntegrityError, match=r"0\.npy"):
        reader.read_windows(np.array([1]), 3, out, np.array([0]))
    assert not out.any()


@pytest.mark.usefixtures("cut_small")
def test_a_task_that_finds_a_changed_file_ends_the_run(tmp_path):
    matrix = open_npy(tmp_path, distinct())
    plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)

    def apply(block):
        os.utime(tmp_path / "A.npy", ns=(0, 0))
        return block

    with pytest.raises(pipeline.IntegrityError, match="was changed"):
        pipeline.store(plan, tmp_path / "w.zarr", apply=apply)
    assert [path.name for path in tmp_path.iterdir()] == ["A.npy"]


# what is refused


def fortran(folder):
    np.save(folder / "A.npy", np.asfortranarray(distinct()))
    return folder / "A.npy"


def big_endian(folder):
    np.save(folder / "A.npy", distinct().astype(">f8"))
    return folder / "A.npy"


def chunked(folder):
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_dataset("test", data=distinct(), chunks=(10, 5, 3))
    return folder / "A.h5"


def compressed(folder):
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_dataset("test", data=distinct(), compression="gzip")
    return f"{folder / 'A.h5'}::test"


def never_written(folder):
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_dataset("test", (9, 4), "f8", fillvalue=2.5)
    return folder / "A.h5"


def virtual(folder):
    write_hdf5(folder / "B.h5", distinct())
    layout = h5py.VirtualLayout((ROWS, 5, 3), "f8")
    layout[:] = h5py.VirtualSource("B.h5", "group/test", (ROWS, 5, 3))
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_virtual_dataset("test", layout)
    return folder / "A.h5"


def big_endian_hdf5(folder):
    write_hdf5(folder / "A.h5", distinct().astype(">f8"))
    return f"{folder / 'A.h5'}::group/test"


def one_fortran_part(folder):
    np.save(folder / "B.npy", distinct())
    return [folder / "B.npy", fortran(folder)]


def zarr_part(folder):
    np.save(folder / "B.npy", distinct())
    zarr.create_array(str(folder / "A.zarr"), data=distinct())
    return [folder / "B.npy", folder / "A.zarr"]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (fortran, r"A\.npy is in Fortran order"),
        (big_endian, r"A\.npy holds >f8"),
        (chunked, r"A\.h5 is an HDF5 data set in chunks"),
        (compressed, r"A\.h5::test is an HDF5 data set in chunks"),
        (never_written, r"A\.h5 is an HDF5 data set that only h5py"),
        (virtual, r"A\.h5 takes values from other files"),
        (big_endian_hdf5, r"A\.h5::group/test holds >f8"),
        (one_fortran_part, r"A\.npy is in Fortran order"),
        (zarr_part, r"A\.zarr is a Zarr array"),
    ],
)
def test_create_is_the_way_out(write, words, tmp_path):
    source = write(tmp_path)
    with pytest.raises(pipeline.OpenError, match=f"{words}.*; make a matrix of it with: pipeline create SOURCE DEST$"):
        pipeline.open_matrix(source)
    made = pipeline.create_matrix(source, tmp_path / "made.zarr")
    assert made.rows % ROWS == 0 or made.rows == 9


def test_fortran_order_of_one_long_axis_is_c_order(tmp_path):
    header = {"descr": "<f8", "fortran_order": True, "shape": (20, 1)}
    with (tmp_path / "A.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.arange(20.0).tobytes())
    matrix = pipeline.open_matrix(tmp_path / "A.npy")
    windows = pipeline.gather(pipeline.plan_windows(matrix, [3, 15], length=5))
    np.testing.assert_array_equal(windows[:, :, 0], [np.arange(3.0, 8), np.arange(15.0, 20)])


def truncated(folder):
    np.save(folder / "A.npy", distinct())
    truncate(folder / "A.npy")


def headless(folder):
    (folder / "A.npy").write_bytes(b"\x93NUMPY\x01\x00v")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def objects(folder):
    np.save(folder / "A.npy", np.array([Bomb(), 1], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("write", "error", "words"),
    [
        (truncated, pipeline.OpenError, "25447 of the 25448 bytes"),
        (headless, pipeline.OpenError, "header"),
        (objects, pipeline.OpenError, "never unpickled"),
        (lambda folder: np.save(folder / "A.npy", np.array(["a"])), pipeline.InputError, "<U1"),
        (lambda folder: np.save(folder / "A.npy", np.zeros((0, 3))), pipeline.InputError, r"\(0, 3\)"),
        (lambda folder: np.save(folder / "A.npy", np.array(3.0)), pipeline.InputError, "single number"),
        (lambda folder: (folder / "A.npy").symlink_to("nowhere"), pipeline.NotFoundError, r"A\.npy"),
    ],
)
def test_files_that_are_no_matrix(write, error, words, tmp_path):
    write(tmp_path)
    with pytest.raises(error, match=words):
        pipeline.open_matrix(tmp_path / "A.npy")


def test_raw_binary_is_of_whole_rows(tmp_path):
    (tmp_path / "A.bin").write_bytes(bytes(25))
    with pytest.raises(pipeline.OpenError, match="1 bytes more"):
        pipeline.open_matrix(tmp_path / "A.bin", dtype="f4", row_shape=(3,))
    with pytest.raises(pipeline.InputError, match="--dtype and --row-shape"):
        pipeline.open_matrix(tmp_path / "A.bin")


@pytest.mark.parametrize("options", [{"dtype": "f8"}, {"row_shape": (5, 3)}, {"dataset": "test"}])
def test_options_that_do_not_fit(tmp_path, options):
    np.save(tmp_path / "A.npy", distinct())
    pipeline.create_matrix(tmp_path / "A.npy", tmp_path / "A.zarr")
    flag = f"--{next(iter(options))}".replace("_", "-")
    for source in (tmp_path / "A.npy", tmp_path / "A.zarr", zarr.open_array(tmp_path / "A.zarr")):
        with pytest.raises(pipeline.InputError, match=f"leave {flag} out"):
            pipeline.open_matrix(source, **options)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ([], pipeline.InputError),
        (["absent.npy"], pipeline.NotFoundError),
        ("absent.h5::test", pipeline.NotFoundError),
        ("random:10x5", pipeline.NotFoundError),
        (np.zeros((3, 3)), pipeline.InputError),
        ([np.zeros((3, 3))], pipeline.InputError),
    ],
    ids=str,
)
def test_what_is_no_matrix(source, error):
    with pytest.raises(error):
        pipeline.open_matrix(source)


def test_parts_that_do_not_agree(tmp_path):
    for name, array in {"a": distinct(), "b": distinct(row_shape=(5, 4)), "c": distinct(dtype="f4")}.items():
        np.save(tmp_path / f"{name}.npy", array)
    for other in "bc":
        with pytest.raises(pipeline.InputError, match=rf"{other}\.npy"):
            pipeline.open_matrix([tmp_path / "a.npy", tmp_path / f"{other}.npy"])


@pytest.mark.parametrize("link", [False, True])
def test_an_output_is_never_its_input(tmp_path, link):
    paths = save_parts(tmp_path, distinct())
    before = [path.read_bytes() for path in paths]
    plan = pipeline.plan_windows(pipeline.open_matrix(paths), STARTS, length=LENGTH)
    out = paths[3]
    if link:
        (tmp_path / "folder").symlink_to(tmp_path)
        out = tmp_path / "folder" / "3.npy"
    with pytest.raises(pipeline.OutputExistsError, match="apart|only an output of ours"):
        pipeline.gather(plan, out=out, overwrite=True)
    assert [path.read_bytes() for path in paths] == before


# the command line


@pytest.fixture
def files(tmp_path, values):
    """`A.npy`, `A.bin` and, among others, `A.h5::test`, in the working directory of `cli`."""
    np.save(tmp_path / "A.npy", values)
    values.astype("f4").tofile(tmp_path / "A.bin")
    with h5py.File(tmp_path / "A.h5", "w") as file:
        file["other"] = values[:3]
        file["test"] = values
    return tmp_path


LINES = {
    "npy": ["A.npy"],
    "raw": ["A.bin", "--dtype", "float32", "--row-shape", "20"],
    "hdf5": ["A.h5::test"],
    "dataset": ["A.h5", "--dataset", "test"],
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_run_plan_and_info(cli, files, values, line):
    dtype = "float32" if "A.bin" in line else "float64"
    said = cli("run", *line, "--starts", "-", "--out", "w.npy", "--json", "-q", stdin="7 1984 7")
    assert said.code == 0, said.err
    assert (said.numbers["amplification"], said.numbers["matrix"]) == (1.0, line[0])
    expected = stack(values.astype(dtype), [7, 1984, 7], 16)
    np.testing.assert_array_equal(np.load(files / "w.npy"), expected, strict=True)
    assert cli("plan", *line, "--count", 9, "--json").numbers["orders"]["request"]["amplification"] == 1.0
    numbers = cli("info", *line, "--json").numbers
    nbytes = values.astype(dtype).nbytes
    expected_numbers = {"shape": [2000, 20], "dtype": dtype, "reader": "direct", "codecs": [], "shard_rows": None}
    expected_numbers |= {"files": 1, "files_present": 1, "nbytes": nbytes, "nbytes_stored": nbytes, "parts": None}
    assert {key: numbers[key] for key in expected_numbers} == expected_numbers
    assert numbers["window_amplification"] == 1.0


def test_info_says_what_create_would_add(cli, files, samples):
    [said] = [line for line in cli("info", "A.npy").out.splitlines() if line.startswith("create ")]
    assert [word for word in ("checksums", "64 KiB", "compression", "object stores", "312 KiB", "does not pay") if word not in said] == []  # fmt: skip
    assert not [line for line in cli("info", samples / "A.zarr").out.splitlines() if line.startswith("create ")]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("A.bin", 2, ["A.bin", "--dtype float32 --row-shape 2000"]),
        ("A.bin --dtype float32", 2, ["A.bin", "--row-shape"]),
        ("A.bin --dtype f4 --row-shape 7", 3, ["160000 bytes", "check --dtype"]),
        ("A.bin --dtype f4 --row-shape x", 2, ["'x'", "64,64"]),
        ("A.bin --dtype f4 --row-shape 20 --dataset test", 2, ["leave --dataset out"]),
        ("A.bin --dtype >f4 --row-shape 20", 3, [">f4", "pipeline create"]),
        ("A.npy --dtype f8", 2, ["A.npy is a .npy file", "leave --dtype out"]),
        ("A.npy::test", 2, ["A.npy is not HDF5"]),
        ("A.npy A.npy", 2, ["A.npy", "--help"]),
        ("A.npy --axis 1", 2, ["--axis"]),
        ("A.h5", 2, ["test", "--dataset"]),
        ("A.h5::absent", 3, ["'absent'", "test"]),
        ("A.h5::test --dataset test", 2, ["leave one out"]),
        ("A.zarr --dtype f8", 2, ["A.zarr is a Zarr array", "leave --dtype out"]),
    ],
)
def test_one_line_says_what_is_wrong(cli, files, line, code, words):
    zarr.create_array(files / "A.zarr", data=np.ones((30, 2)))
    for verb in ("run", "plan", "info"):
        said = cli(verb, *line.split())
        assert (said.code, said.out, said.err.count("\n")) == (code, "", 1)
        assert [word for word in words if word not in said.err] == [], said.err


def test_exit_codes_of_sizes_and_outputs(cli, files, monkeypatch):
    assert cli("run", "A.npy", "--out", "A.npy", "--overwrite").code == 7
    assert cli("run", "A.h5::test", "--out", "A.h5/w.npy").code == 3
    content = (files / "A.npy").read_bytes()
    (files / "A.npy").write_bytes(content[:-1])
    assert cli("run", "A.npy").code == 3
    (files / "A.npy").write_bytes(content)
    real = pipeline.plan_windows

    def changing(*arguments, **options):
        append(files / "A.npy")
        return real(*arguments, **options)

    monkeypatch.setattr("pipeline.cli.request.plan_windows", changing)
    said = cli("run", "A.npy", "--out", "w.npy")
    assert (said.code, "was changed" in said.err) == (4, True)
    assert not (files / "w.npy").exists()
