"""What a source was: the same in another process, and no longer the same as soon as anything of it changes."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import obstore
import pytest
import zarr
from zarr.storage import LocalStore, ObjectStore

import pipeline
from pipeline.matrix.fingerprint import fingerprint_matrix, fingerprint_source
from pipeline.matrix.formats import open_source
from tests.layouts import LAYOUTS, distinct, in_memory

LENGTH = 16
STARTS = np.array([0, 3, 44, 100])

SOURCES = {
    # name: (what is opened, its options, a file of it)
    "npy": ("A.npy", {}, "A.npy"),
    "fortran": ("F.npy", {}, "F.npy"),
    "raw": ("A.bin", {"dtype": "f8", "row_shape": (5, 3)}, "A.bin"),
    "hdf5": ("plain.h5", {}, "plain.h5"),
    "hdf5-chunks": ("chunks.h5", {}, "chunks.h5"),
    "hdf5-external": ("external.h5", {}, "A.bin"),
    "hdf5-virtual": ("virtual.h5", {}, "chunks.h5"),
    "zarr": ("shards.zarr", {}, "shards.zarr/c/3/0/0"),
    "zarr-v2": ("v2.zarr", {}, "v2.zarr/20.0.0"),
    "zarr-columns": ("columns.zarr", {}, "columns.zarr/c/20/2/1"),
    "stack": (["A.npy", "plain.h5", "shards.zarr"], {}, "shards.zarr/c/8/0/0"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stamped")
    a = distinct()
    for name in ("shards", "v2", "columns", "plain"):
        LAYOUTS[name][1](folder / f"{name}.zarr", a)
    np.save(folder / "A.npy", a)
    np.save(folder / "F.npy", np.asfortranarray(a))
    a.tofile(folder / "A.bin")
    with h5py.File(folder / "plain.h5", "w") as file:
        file["a"] = a
    with h5py.File(folder / "chunks.h5", "w") as file:
        file.create_dataset("a", data=a, chunks=(10, 5, 3), compression="gzip")
    with h5py.File(folder / "external.h5", "w") as file:
        file.create_dataset("a", a.shape, "f8", external=[(str(folder / "A.bin"), 0, a.nbytes)])
    with h5py.File(folder / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout(a.shape, "f8")
        layout[:] = h5py.VirtualSource("chunks.h5", "a", a.shape)
        file.create_virtual_dataset("a", layout)
    return folder


@pytest.fixture
def folder(kept, tmp_path):
    """A copy to be changed, times of change and all."""
    shutil.copytree(kept, tmp_path / "copy")
    with h5py.File(tmp_path / "copy/external.h5", "w") as file:
        a = distinct()
        file.create_dataset("a", a.shape, "f8", external=[(str(tmp_path / "copy/A.bin"), 0, a.nbytes)])
    return tmp_path / "copy"


def opened(folder, name):
    what, options, _ = SOURCES[name]
    return open_source([folder / each for each in what] if isinstance(what, list) else folder / what, **options)


PRINT = """
import sys
from tests import test_stamps as t
from pathlib import Path
print(*(t.fingerprint_source(t.opened(Path(sys.argv[1]), name)).digest for name in t.SOURCES))
print(*(t.fingerprint_matrix(t.pipeline.open_matrix(f"{sys.argv[1]}/{name}"), t.STARTS, t.LENGTH).digest for name in t.MATRICES))
"""
MATRICES = ["shards.zarr", "v2.zarr", "columns.zarr", "plain.zarr", "A.npy", "plain.h5"]


def test_digests_are_the_same_in_another_process_and_working_directory(kept):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PRINT, "."], cwd=kept, env=environment, capture_output=True, text=True, check=True
    )
    sources, matrices = (line.split() for line in done.stdout.splitlines())
    mine = [fingerprint_source(opened(kept, name)).digest for name in SOURCES]
    assert sources == mine
    assert matrices == [
        fingerprint_matrix(pipeline.open_matrix(kept / name), STARTS, LENGTH).digest for name in MATRICES
    ]
    assert len({*mine, *matrices}) == len(mine) + len(matrices)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in mine)


def test_a_link_to_the_same_files_is_the_same(kept, tmp_path):
    (tmp_path / "link").symlink_to(kept)
    for name in ("npy", "zarr", "stack"):
        assert (
            fingerprint_source(opened(tmp_path / "link", name)).digest == fingerprint_source(opened(kept, name)).digest
        )


def touch(path):
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def cut(path):
    """Another size, and the time of before."""
    status = path.stat()
    os.truncate(path, status.st_size - 1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def remove(path):
    path.unlink()


SECONDS = {"1902": -2_145_000_000, "1969": -1, "2262": 2**63 // 10**9, "2300": 10_413_792_000, "2445": 15_000_000_000}
"""Times that file systems know, by their years: ext4 ends in 2446, NumPy's nanoseconds in 2262."""


@pytest.mark.parametrize("seconds", SECONDS.values(), ids=SECONDS)
@pytest.mark.parametrize("name", SOURCES)
def test_any_time_of_a_file_is_as_good(name, seconds, folder):
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(0, seconds * 10**9 + 7))
            if path.stat().st_mtime_ns != seconds * 10**9 + 7:
                pytest.skip("the file system has no such times")
    source = opened(folder, name)
    stamp = fingerprint_source(source)
    pickle.loads(pickle.dumps(stamp)).check()
    assert fingerprint_source(opened(folder, name)).digest == stamp.digest
    path = folder / SOURCES[name][2]
    touch(path)
    with pytest.raises(pipeline.IntegrityError, match=re.escape(str(path))):
        stamp.check()
    assert fingerprint_source(opened(folder, name)).digest != stamp.digest


@pytest.mark.parametrize("seconds", SECONDS.values(), ids=SECONDS)
@pytest.mark.parametrize("name", ["shards.zarr", "A.npy", "plain.h5"])
def test_runs_on_files_of_any_time(name, seconds, folder):
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(0, seconds * 10**9 + 7))
    plan = pipeline.plan_windows(pipeline.open_matrix(folder / name), STARTS, length=LENGTH)
    windows = pipeline.gather(plan)
    np.testing.assert_array_equal(pipeline.gather(plan, out=folder / "w.npy"), windows)
    np.testing.assert_array_equal(pipeline.store(plan, folder / "w.zarr")["windows"][:], windows)
    made = pipeline.create_matrix(folder / name, folder / "made.zarr")
    np.testing.assert_array_equal(made.array[:], pipeline.create_matrix(folder / name, folder / "again.zarr").array[:])


@pytest.mark.parametrize("change", [touch, cut, remove])
@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_changed_is_named(name, change, folder):
    source = opened(folder, name)
    stamp = fingerprint_source(source)
    stamp.check()
    path = folder / SOURCES[name][2]
    size = path.stat().st_size
    change(path)
    words = {touch: f"{size} bytes now", cut: f"{size - 1} bytes now", remove: "absent now"}[change]
    with pytest.raises(pipeline.IntegrityError, match=rf"{re.escape(str(path))} was changed \({size} bytes .*{words}"):
        pickle.loads(pickle.dumps(stamp)).check()
    if change is touch:
        assert fingerprint_source(opened(folder, name)).digest != stamp.digest


@pytest.mark.parametrize(
    ("name", "document"), [("zarr", "shards.zarr/zarr.json"), ("zarr-v2", "v2.zarr/.zarray"), ("stack", "shards.zarr/zarr.json")]
)  # fmt: skip
def test_metadata_that_changed(name, document, folder):
    stamp = fingerprint_source(opened(folder, name))
    path = folder / document
    text = path.read_bytes()
    touch(path)
    stamp.check()
    path.write_bytes(text + b"\n")
    with pytest.raises(pipeline.IntegrityError, match=f"{path.name} of file://.* was changed"):
        stamp.check()
    assert fingerprint_source(opened(folder, name)).digest != stamp.digest
    path.unlink()
    with pytest.raises(pipeline.IntegrityError, match=path.name):
        stamp.check()


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_matrix_that_was_replaced_since_it_was_opened(tmp_path, kind, form):
    """Read by the old layout, the new one's bytes would be garbage."""
    store = LocalStore(tmp_path / "A.zarr") if kind == "local" else zarr.storage.MemoryStore()

    def write(dtype, **attributes):
        values = np.arange(1, 401).reshape(100, 4).astype(dtype)
        array = zarr.create_array(
            store, shape=(100, 4), chunks=(50, 4), dtype=dtype, zarr_format=form, compressors=None, overwrite=True
        )
        array.attrs.update(attributes)
        array[:] = values
        return array

    matrix = pipeline.open_matrix(write("f8"))
    plan = pipeline.plan_windows(matrix, [0, 60], length=3)
    before = pipeline.gather(plan)
    write("f8", units="m")
    np.testing.assert_array_equal(pipeline.gather(plan), before)
    write("i8")
    for sink in (pipeline.gather, lambda plan: pipeline.store(plan, tmp_path / "w.zarr")):
        with pytest.raises(pipeline.IntegrityError, match=r"(zarr.json|\.zarray) of .* was changed; open it again"):
            sink(plan)
    assert not (tmp_path / "w.zarr").exists()


def test_what_is_drawn_or_read_in_another_way_is_another_source(kept):
    sources = [
        *(open_source("random:10x3", seed=seed) for seed in (0, 1)),
        open_source("random:10x3", dtype="f4"),
        open_source("random:3x10"),
        open_source(kept / "A.bin", dtype="f8", row_shape=(5, 3)),
        open_source(kept / "A.bin", dtype="i8", row_shape=(5, 3)),
        open_source(kept / "A.bin", dtype=">f8", row_shape=(5, 3)),
        open_source(kept / "A.bin", dtype="f8", row_shape=(3, 5)),
        *(open_source(kept / "shards.zarr", axis=axis) for axis in range(3)),
        *(open_source(kept / "chunks.h5", axis=axis) for axis in range(3)),
        *(open_source([kept / "A.npy"] * count) for count in (1, 2)),
    ]
    assert len({fingerprint_source(source).digest for source in sources}) == len(sources)
    for source in sources:
        fingerprint_source(source).check()


def test_files_of_one_size_and_time_in_two_folders_are_two_sources(kept, tmp_path):
    """As archives unpack them: every file of one time."""
    digests = set()
    for name in ("one", "two"):
        shutil.copytree(kept / "shards.zarr", tmp_path / name)
        for path in (tmp_path / name).rglob("*"):
            os.utime(path, ns=(1, 1))
        digests.add(fingerprint_source(open_source(tmp_path / name)).digest)
    assert len(digests) == 2


class TestOfWindows:
    @pytest.mark.parametrize(
        ("name", "touched", "others"),
        [
            # Rows 0 to 18, 44 to 59, 100 to 115.
            ("shards.zarr", ["c/0/0/0", "c/1/0/0", "c/2/0/0", "c/4/0/0"], ["c/3/0/0", "c/5/0/0", "c/8/0/0"]),
            ("v2.zarr", ["0.0.0", "1.0.0", "5.0.0", "11.0.0"], ["2.0.0", "3.0.0", "6.0.0", "9.0.0", "12.0.0"]),
            ("columns.zarr", ["c/0/0/0", "c/5/2/1", "c/11/1/0"], ["c/2/0/0", "c/12/2/1"]),
        ],
    )
    def test_only_what_windows_touch_matters(self, name, touched, others, folder):
        matrix = pipeline.open_matrix(folder / name)
        stamp = fingerprint_matrix(matrix, STARTS, LENGTH)
        for other in others:
            (folder / name / other).unlink()
        stamp.check()
        assert fingerprint_matrix(matrix, STARTS, LENGTH).digest == stamp.digest
        for path in touched:
            touch(folder / name / path)
            with pytest.raises(pipeline.IntegrityError, match=f"{path} was changed"):
                stamp.check()
            again = fingerprint_matrix(matrix, STARTS, LENGTH)
            assert again.digest != stamp.digest
            stamp = again

    def test_files_read_in_place_are_as_they_were_when_opened(self, folder):
        matrix = pipeline.open_matrix([folder / "A.npy"] * 2)
        touch(folder / "A.npy")
        with pytest.raises(pipeline.IntegrityError, match=r"A\.npy was changed"):
            fingerprint_matrix(matrix, STARTS, LENGTH).check()

    def test_of_parts_only_those_that_windows_touch(self, folder):
        for name in ("B", "C"):
            shutil.copy2(folder / "A.npy", folder / f"{name}.npy")
        matrix = pipeline.open_matrix([folder / f"{name}.npy" for name in "ABC"])
        stamp = fingerprint_matrix(matrix, np.array([200, 220]), LENGTH)
        touch(folder / "C.npy")
        stamp.check()
        touch(folder / "B.npy")
        with pytest.raises(pipeline.IntegrityError, match=r"B\.npy was changed"):
            stamp.check()

    def test_an_absent_chunk_that_appears(self, folder):
        path = folder / "v2.zarr/5.0.0"
        content = path.read_bytes()
        path.unlink()
        stamp = fingerprint_matrix(pipeline.open_matrix(folder / "v2.zarr", missing_chunks="fill"), STARTS, LENGTH)
        stamp.check()
        path.write_bytes(content)
        with pytest.raises(pipeline.IntegrityError, match=r"v2.zarr/5.0.0 was changed \(absent when .* bytes now\)"):
            stamp.check()

    def test_how_it_is_read_is_no_part_of_what_it_is(self, folder):
        stamps = [
            fingerprint_matrix(pipeline.open_matrix(folder / "shards.zarr", check_reads=checked), STARTS, LENGTH)
            for checked in (False, True)
        ]
        assert stamps[0].digest == stamps[1].digest

    def test_a_request_of_other_windows_is_another(self, kept):
        matrix = pipeline.open_matrix(kept / "shards.zarr")
        digests = {fingerprint_matrix(matrix, np.array([start]), LENGTH).digest for start in (0, 24, 48)}
        assert len(digests) == 3

    def test_a_folder_named_from_the_working_directory(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(folder)
        matrix = pipeline.open_matrix(zarr.open_array(LocalStore("shards.zarr"), mode="r"))
        stamp = fingerprint_matrix(matrix, STARTS, LENGTH)
        assert stamp.digest == fingerprint_matrix(pipeline.open_matrix(folder / "shards.zarr"), STARTS, LENGTH).digest


class TestStores:
    def objects(self, folder, name):
        store = ObjectStore(obstore.store.LocalStore(folder / name), read_only=True)
        return zarr.open_array(store, mode="r")

    @pytest.mark.parametrize("listed", [True, False])
    def test_an_object_of_the_same_size_is_another_one(self, listed, folder, monkeypatch):
        if not listed:
            monkeypatch.setattr("pipeline.matrix.keys._LISTED_KEYS", 0)
        array = self.objects(folder, "shards.zarr")
        stamps = [
            fingerprint_source(open_source(array)),
            fingerprint_matrix(pipeline.open_matrix(array), STARTS, LENGTH),
        ]
        monkeypatch.undo()
        # However the store was asked.
        assert fingerprint_source(open_source(array)).digest == stamps[0].digest
        path = folder / "shards.zarr/c/1/0/0"
        size = path.stat().st_size
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))
        for stamp in stamps:
            with pytest.raises(pipeline.IntegrityError, match=rf"c/1/0/0 was changed \({size} bytes .* {size} bytes"):
                stamp.check()

    def test_an_object_that_is_gone(self, folder):
        stamp = fingerprint_source(open_source(self.objects(folder, "v2.zarr")))
        (folder / "v2.zarr/7.0.0").unlink()
        with pytest.raises(pipeline.IntegrityError, match=r"7.0.0 was changed .* absent now"):
            stamp.check()

    def test_metadata_of_a_store(self, folder):
        stamp = fingerprint_source(open_source(self.objects(folder, "shards.zarr")))
        path = folder / "shards.zarr/zarr.json"
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(pipeline.IntegrityError, match="zarr.json of .* was changed"):
            stamp.check()

    def test_a_store_that_tells_sizes_where_it_is_asked(self, folder, monkeypatch):
        class OtherLocal(LocalStore):
            """Not a plain folder, for all that is known."""

        monkeypatch.setattr("pipeline.matrix.keys._LISTED_KEYS", 0)
        array = zarr.open_array(OtherLocal(folder / "shards.zarr"), mode="r")
        stamp = fingerprint_matrix(pipeline.open_matrix(array), STARTS, LENGTH)
        assert fingerprint_matrix(pipeline.open_matrix(array), STARTS, LENGTH).digest == stamp.digest
        cut(folder / "shards.zarr/c/1/0/0")
        with pytest.raises(pipeline.IntegrityError, match="c/1/0/0 was changed"):
            stamp.check()

    def test_a_store_that_tells_nothing(self, kept):
        store = in_memory(kept / "plain.zarr")
        matrix = pipeline.open_matrix(zarr.open_array(store, mode="r"))
        stamp = fingerprint_matrix(matrix, STARTS, LENGTH)
        pickle.loads(pickle.dumps(stamp)).check()
        stamp.check()
        del store._store_dict["c/0/0/0"]
        with pytest.raises(pipeline.IntegrityError, match=r"c/0/0/0 was changed \(there when .*, absent now\)"):
            stamp.check()

    def test_a_store_that_fails(self, kept, monkeypatch):
        array = zarr.open_array(in_memory(kept / "plain.zarr"), mode="r")
        source = open_source(array)
        stamp = fingerprint_source(source)

        async def fail(*_, **__):
            raise TimeoutError("no answer")

        monkeypatch.setattr(type(array.store), "get", fail)
        with pytest.raises(pipeline.OpenError, match="no answer"):
            stamp.check()
        with pytest.raises(pipeline.OpenError, match="no answer"):
            fingerprint_source(source)


def test_chunks_of_several_sizes(tmp_path):
    with zarr.config.set({"array.rectilinear_chunks": True}):
        array = zarr.create_array(str(tmp_path / "A.zarr"), shape=(30, 4), dtype="f8", chunks=((10, 20), (4,)))
        array[:] = distinct(30, (4,))
        stamp = fingerprint_source(open_source(array))
        stamp.check()
        touch(tmp_path / "A.zarr/c/1/0")
        with pytest.raises(pipeline.IntegrityError, match="c/1/0 was changed"):
            stamp.check()
