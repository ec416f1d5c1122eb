"""Values of an HDF5 data set that lie in other files: found, whole, watched; never the fill value in their place."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
from h5py import h5d, h5p, h5s

import pipeline
from pipeline.errors import IntegrityError, NotFoundError, OpenError, OutputExistsError
from pipeline.matrix import hdf5_references as references
from pipeline.matrix.fingerprint import fingerprint_source
from pipeline.matrix.formats import open_source
from pipeline.matrix.hdf5 import Hdf5Source
from pipeline.matrix.sources import FileSource

WIDTH = 3


def values(number, rows=10):
    """Rows whose values all differ, and from those of any other number."""
    return 1000.0 * number + np.arange(1.0, rows * WIDTH + 1).reshape(rows, WIDTH)


def save(path, data, name="t", **options):
    with h5py.File(path, "a") as file:
        file.create_dataset(name, data=data, **options)


def save_virtual(path, sources, *, rows=10, name="v", of="t", **options):
    """Stack sources of (10, WIDTH), by their names."""
    layout = h5py.VirtualLayout((rows * len(sources), WIDTH), "f8")
    for i, source in enumerate(sources):
        layout[rows * i : rows * i + rows] = h5py.VirtualSource(source, of, (10, WIDTH))[:rows]
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset(name, layout, **{"fillvalue": -1, **options})


def endless(step):
    """A selection of rows without an end: in blocks of `step`, numbered sources; or in one block (0)."""
    space = h5s.create_simple((0, WIDTH), (h5s.UNLIMITED, WIDTH))
    if step:
        space.select_hyperslab((0, 0), (h5s.UNLIMITED, 1), stride=(step, WIDTH), block=(step, WIDTH))
    else:
        space.select_hyperslab((0, 0), (1, 1), stride=(1, WIDTH), block=(h5s.UNLIMITED, WIDTH))
    return space


def save_endless(path, mappings, name="v"):
    properties = h5p.create(h5p.DATASET_CREATE)
    for space, file, source, selection in mappings:
        properties.set_virtual(space, os.fsencode(file), source.encode(), selection)
    shape = h5s.create_simple((0, WIDTH), (h5s.UNLIMITED, WIDTH))
    with h5py.File(path, "a") as file:
        h5d.create(file.id, name.encode(), h5py.h5t.NATIVE_DOUBLE, shape, properties)


def ten_rows(kind="all"):
    space = h5s.create_simple((10, WIDTH))
    if kind != "all":
        space.select_hyperslab((0, 0), (1, 1), stride=(1, 1), block=(10, WIDTH))
    return space


# Each kind makes A.h5 in a folder, and returns the data set and the files that it needs beside A.h5.


def virtual(folder):
    for i in range(3):
        save(folder / f"s{i}.h5", values(i))
    save_virtual(folder / "A.h5", [f"s{i}.h5" for i in range(3)])
    return "v", ["s0.h5", "s1.h5", "s2.h5"]


def virtual_of_absolute_names(folder):
    save(folder / "s0.h5", values(0), chunks=(4, 2), compression="gzip")
    save_virtual(folder / "A.h5", [folder / "s0.h5"])
    return "v", ["s0.h5"]


def virtual_by_columns(folder):
    layout = h5py.VirtualLayout((10, WIDTH), "f8")
    for i in range(WIDTH):
        save(folder / f"s{i}.h5", values(i)[:, 0])
        layout[:, i] = h5py.VirtualSource(f"s{i}.h5", "t", (10,))
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_virtual_dataset("v", layout, fillvalue=-1)
    return "v", ["s0.h5", "s1.h5", "s2.h5"]


def virtual_of_every_second_row(folder):
    layout = h5py.VirtualLayout((10, WIDTH), "f8")
    for i in range(2):
        save(folder / f"s{i}.h5", values(i))
        layout[i::2] = h5py.VirtualSource(f"s{i}.h5", "t", (10, WIDTH))[1::2]
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_virtual_dataset("v", layout, fillvalue=-1)
    return "v", ["s0.h5", "s1.h5"]


def nested(folder):
    virtual(folder)
    (folder / "A.h5").rename(folder / "inner.h5")
    save(folder / "A.h5", values(7))
    layout = h5py.VirtualLayout((40, WIDTH), "f8")
    layout[:30] = h5py.VirtualSource("inner.h5", "v", (30, WIDTH))
    layout[30:] = h5py.VirtualSource(".", "t", (10, WIDTH))
    with h5py.File(folder / "A.h5", "a") as file:
        file.create_virtual_dataset("v", layout, fillvalue=-1)
    return "v", ["inner.h5", "s0.h5", "s1.h5", "s2.h5"]


def nested_in_one_file(folder):
    save(folder / "s0.h5", values(0))
    save_virtual(folder / "A.h5", ["s0.h5"], name="inner")
    save_virtual(folder / "A.h5", ["."], of="inner")
    return "v", ["s0.h5"]


def virtual_of_a_link(folder):
    save(folder / "s0.h5", values(0))
    with h5py.File(folder / "links.h5", "w") as file:
        file["far"] = h5py.ExternalLink("s0.h5", "/t")
        file["t"] = h5py.SoftLink("/far")
    save_virtual(folder / "A.h5", ["links.h5"])
    return "v", ["links.h5", "s0.h5"]


def virtual_of_external_storage(folder):
    with h5py.File(folder / "s0.h5", "w") as file:
        file.create_dataset("t", data=values(0), external=[(folder / "raw.bin", 16, 240)])
    save_virtual(folder / "A.h5", ["s0.h5"])
    return "v", ["raw.bin", "s0.h5"]


def numbered_files(folder):
    (folder / "100%").mkdir()
    for i in range(12):
        save(folder / "100%" / f"s-{i}-{i}.h5", values(i))
    save_endless(folder / "A.h5", [(endless(10), "100%%/s-%b-%b.h5", "t", ten_rows())])
    return "v", [f"100%/s-{i}-{i}.h5" for i in range(12)]


def numbered_data_sets(folder):
    for i in range(3):
        save(folder / "s.h5", values(i), name=f"block {i}")
    save_endless(folder / "A.h5", [(endless(10), "s.h5", "block %b", ten_rows("hyperslab"))])
    return "v", ["s.h5"]


def endless_source(folder):
    save(folder / "s0.h5", values(0, 17), maxshape=(None, WIDTH))
    save_endless(folder / "A.h5", [(endless(0), "s0.h5", "t", endless(0))])
    return "v", ["s0.h5"]


def external_storage(folder):
    with h5py.File(folder / "A.h5", "w") as file:
        parts = [(folder / "a.bin", 0, 48), (folder / "b.bin", 100, 96), (folder / "c.bin", 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("x", data=values(0), external=parts)
    return "x", ["a.bin", "b.bin", "c.bin"]


def link(folder):
    save(folder / "s0.h5", values(0))
    with h5py.File(folder / "A.h5", "w") as file:
        file["far"] = h5py.ExternalLink("s0.h5", "/t")
    return "far", ["s0.h5"]


def links_one_behind_the_other(folder):
    save(folder / "s0.h5", values(0), name="deep/t", chunks=(4, 2))
    with h5py.File(folder / "middle.h5", "w") as file:
        file["group"] = h5py.ExternalLink("s0.h5", "/deep")
    with h5py.File(folder / "A.h5", "w") as file:
        file["far"] = h5py.ExternalLink("middle.h5", "/group")
        file["here/near"] = h5py.SoftLink("/far")
    return "here/near/t", ["middle.h5", "s0.h5"]


def link_there_and_back(folder):
    save(folder / "A.h5", values(0))
    with h5py.File(folder / "middle.h5", "w") as file:
        file["t"] = h5py.ExternalLink("A.h5", "/t")
    with h5py.File(folder / "A.h5", "a") as file:
        file["back"] = h5py.ExternalLink("middle.h5", "/t")
    return "back", ["middle.h5"]


def link_to_a_virtual_data_set(folder):
    virtual(folder)
    (folder / "A.h5").rename(folder / "B.h5")
    with h5py.File(folder / "A.h5", "w") as file:
        file["far"] = h5py.ExternalLink("B.h5", "/v")
    return "far", ["B.h5", "s0.h5", "s1.h5", "s2.h5"]


KINDS = [
    virtual,
    virtual_of_absolute_names,
    virtual_by_columns,
    virtual_of_every_second_row,
    nested,
    nested_in_one_file,
    virtual_of_a_link,
    virtual_of_external_storage,
    numbered_files,
    numbered_data_sets,
    endless_source,
    external_storage,
    link,
    links_one_behind_the_other,
    link_there_and_back,
    link_to_a_virtual_data_set,
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request, folder):
    name, needed = request.param(folder)
    return f"{folder / 'A.h5'}::{name}", [folder / file for file in needed]


def read_h5py(text):
    path, name = text.split("::")
    with h5py.File(path) as file:
        return file[name][()]


@pytest.mark.parametrize("axis", [0, 1])
def test_values_and_files(kind, axis):
    text, needed = kind
    expected = np.moveaxis(read_h5py(text), axis, 0)
    assert (expected > 0).all()
    source = open_source(text, axis=axis)
    assert not isinstance(source, FileSource)
    assert [reference.stamp.path for reference in source.data.references] == sorted(needed)
    rows = len(expected)
    for start, stop in ((0, rows), (1, 2), (rows - 1, rows)):
        np.testing.assert_array_equal(source.read_rows(start, stop), expected[start:stop])


def test_every_file_that_is_missing_is_named(kind):
    text, needed = kind
    for path in needed:
        if path.name in ("s-11-11.h5", "s-0-0.h5"):
            continue  # numbered sources: the last may not have been made yet; of the first see below
        away = path.rename(path.with_suffix(".away"))
        with pytest.raises(NotFoundError, match=path.name) as caught:
            open_source(text)
        assert "\n" not in str(caught.value)
        away.rename(path)


def test_every_file_that_is_too_short_is_named(kind):
    text, needed = kind
    for path in needed:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises((OpenError, IntegrityError), match=path.name):
            open_source(text)
        path.write_bytes(content)
    open_source(text)


def test_every_file_is_part_of_the_fingerprint(kind):
    text, needed = kind
    stamp = fingerprint_source(open_source(text))
    assert fingerprint_source(open_source(text)).digest == stamp.digest
    for path in needed:
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000_000))
        assert fingerprint_source(open_source(text)).digest != stamp.digest
        with pytest.raises(IntegrityError, match=path.name):
            stamp.check()
        os.utime(path, ns=(0, path.stat().st_mtime_ns - 1_000_000_000))
        stamp.check()


def test_a_file_that_changes_while_it_is_copied(kind, folder, monkeypatch):
    text, needed = kind
    read = Hdf5Source.read_rows

    def read_and_touch(self, start, stop):
        rows = read(self, start, stop)
        needed[0].touch()
        return rows

    monkeypatch.setattr(Hdf5Source, "read_rows", read_and_touch)
    with pytest.raises(IntegrityError, match=needed[0].name):
        pipeline.create_matrix(text, folder / "A.zarr")
    assert not (folder / "A.zarr").exists()


def test_exit_codes(folder):
    virtual(folder)
    command = [sys.executable, "-m", "pipeline", "create", f"{folder / 'A.h5'}::v", str(folder / "A.zarr")]
    (folder / "s1.h5").rename(folder / "away.h5")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "s1.h5" in done.stderr) == (3, True)
    save(folder / "s1.h5", values(1)[:6])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "s1.h5" in done.stderr) == (4, True)
    assert not (folder / "A.zarr").exists()


# sources that are there, but not what the mapping takes


@pytest.mark.parametrize("part", [slice(None), slice(0, 6)], ids=["whole", "six rows"])
@pytest.mark.parametrize("chunks", [None, (2, 2)])
def test_source_that_became_smaller(folder, part, chunks):
    layout = h5py.VirtualLayout((len(range(10)[part]), WIDTH), "f8")
    layout[:] = h5py.VirtualSource("s0.h5", "t", (10, WIDTH))[part]
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_virtual_dataset("v", layout, fillvalue=-1)
    for rows in (1, 5):
        (folder / "s0.h5").unlink(missing_ok=True)
        save(folder / "s0.h5", values(0)[:rows], chunks=chunks and (1, 2))
        with pytest.raises(IntegrityError, match=r"s0\.h5::/?t has shape"):
            open_source(folder / "A.h5")
    (folder / "s0.h5").unlink()
    save(folder / "s0.h5", values(0), chunks=chunks)
    np.testing.assert_array_equal(open_source(folder / "A.h5").read_rows(0, layout.shape[0]), values(0)[part])


def test_endless_source_that_ends_before_another(folder):
    for i, rows in enumerate((8, 6)):
        save(folder / f"s{i}.h5", values(i, rows)[:, :1], maxshape=(None, 1))
    mappings = []
    for i in range(2):
        space = h5s.create_simple((0, WIDTH), (h5s.UNLIMITED, WIDTH))
        space.select_hyperslab((0, i), (1, 1), stride=(1, 1), block=(h5s.UNLIMITED, 1))
        selection = h5s.create_simple((0, 1), (h5s.UNLIMITED, 1))
        selection.select_hyperslab((0, 0), (1, 1), stride=(1, 1), block=(h5s.UNLIMITED, 1))
        mappings.append((space, f"s{i}.h5", "t", selection))
    save_endless(folder / "A.h5", mappings)
    with pytest.raises(IntegrityError, match=r"s1\.h5::/?t has shape \(6, 1\)"):
        open_source(folder / "A.h5")


@pytest.mark.parametrize("instead", [None, "a group", "another name"])
def test_data_set_that_is_missing_in_its_file(kind, folder, instead):
    text, needed = kind
    for path in needed:
        if path.suffix != ".h5":
            continue
        content = path.read_bytes()
        with h5py.File(path, "a") as file:
            for name in list(file):
                if instead == "another name":
                    file.move(name, f"{name} away")
                else:
                    del file[name]
                    if instead:
                        file.create_group(name)
        with pytest.raises((NotFoundError, OpenError), match=path.name):
            open_source(text)
        path.write_bytes(content)


def test_virtual_data_set_of_itself(folder):
    save_virtual(folder / "A.h5", ["."], name="v", of="w")
    save_virtual(folder / "A.h5", ["."], name="w", of="v")
    with pytest.raises(IntegrityError, match="made of itself"):
        open_source(f"{folder / 'A.h5'}::v")


def test_links_in_a_circle(folder):
    with h5py.File(folder / "A.h5", "w") as file:
        file["a"] = h5py.SoftLink("/b")
        file["b"] = h5py.ExternalLink("A.h5", "/a")
    with pytest.raises(IntegrityError, match="circle"):
        open_source(f"{folder / 'A.h5'}::a")


# numbered sources


@pytest.mark.parametrize(
    ("make", "gone"), [(numbered_files, 5), (numbered_data_sets, 1), (numbered_files, 0), (numbered_data_sets, 0)]
)
def test_numbered_source_that_is_missing_before_others(folder, make, gone):
    name, _ = make(folder)
    if make is numbered_files:
        missing = f"s-{gone}-{gone}.h5"
        (folder / "100%" / missing).unlink()
    else:
        missing = f"block {gone}"
        with h5py.File(folder / "s.h5", "a") as file:
            del file[missing]
    with pytest.raises(NotFoundError, match=missing):
        open_source(f"{folder / 'A.h5'}::{name}")


def test_numbered_sources_end_with_the_last(folder):
    numbered_files(folder)
    (folder / "100%" / "s-11-11.h5").unlink()
    (folder / "100%" / "s-99-98.h5").touch()
    source = open_source(f"{folder / 'A.h5'}::v")
    np.testing.assert_array_equal(source.read_rows(0, 110), np.concatenate([values(i) for i in range(11)]))


# what no mapping speaks of


def test_rows_without_a_mapping_are_the_fill_value(folder):
    save(folder / "s0.h5", values(0))
    layout = h5py.VirtualLayout((20, WIDTH), "f8")
    layout[5:15] = h5py.VirtualSource("s0.h5", "t", (10, WIDTH))
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_virtual_dataset("v", layout, fillvalue=-7)
    expected = np.full((20, WIDTH), -7.0)
    expected[5:15] = values(0)
    np.testing.assert_array_equal(open_source(folder / "A.h5").read_rows(0, 20), expected)


def test_chunks_of_a_source_that_were_never_written_are_its_fill_value(folder):
    with h5py.File(folder / "s0.h5", "w") as file:
        file.create_dataset("t", (10, WIDTH), "f8", chunks=(2, 3), fillvalue=5)[:4] = values(0)[:4]
    save_virtual(folder / "A.h5", ["s0.h5"])
    expected = np.concatenate([values(0)[:4], np.full((6, WIDTH), 5.0)])
    np.testing.assert_array_equal(open_source(folder / "A.h5").read_rows(0, 10), expected)


# where libhdf5 looks


@pytest.mark.parametrize(("make", "variable"), [(virtual, "HDF5_VDS_PREFIX"), (link, "HDF5_EXT_PREFIX")])
def test_folders_of_the_environment_come_first(folder, tmp_path, monkeypatch, make, variable):
    name, needed = make(folder)
    for number, other in enumerate(("one", "two")):
        (tmp_path / other).mkdir()
        for file in needed:
            save(tmp_path / other / file, values(50 + number))
    (tmp_path / "one" / needed[0]).unlink()
    monkeypatch.setenv(variable, f":{tmp_path / 'one'}:{tmp_path / 'two'}")
    text = f"{folder / 'A.h5'}::{name}"
    source = open_source(text)
    expected = read_h5py(text)
    assert expected[0, 0] == values(51)[0, 0]
    np.testing.assert_array_equal(source.read_rows(0, len(expected)), expected)
    found = {reference.stamp.path for reference in source.data.references}
    assert found == {tmp_path / ("one" if i else "two") / file for i, file in enumerate(needed)}
    monkeypatch.delenv(variable)
    references._check_found.cache_clear()
    with pytest.raises(IntegrityError, match="other files"):
        source.read_rows(0, 1)


@pytest.mark.parametrize("prefix", ["${ORIGIN}", "/nowhere"])
def test_folder_of_external_storage(folder, prefix):
    # libhdf5 reads this variable when it is loaded.
    with contextlib.chdir(folder), h5py.File("A.h5", "w") as file:
        file.create_dataset("x", data=values(0), external=[("a.bin", 0, 240)])
    code = "import sys, pipeline.matrix.formats as s; print(s.open_source(sys.argv[1]).read_rows(0, 10).sum())"
    done = subprocess.run(
        [sys.executable, "-c", code, f"{folder / 'A.h5'}::x"],
        env={**os.environ, "HDF5_EXTFILE_PREFIX": prefix},
        capture_output=True,
        text=True,
        check=False,
    )
    if prefix == "/nowhere":
        assert "NotFoundError: /nowhere/a.bin is missing" in done.stderr
    else:
        assert float(done.stdout) == values(0).sum()


@pytest.mark.parametrize("make", [virtual, link, external_storage])
def test_other_working_directory(folder, tmp_path, monkeypatch, make):
    """Files that were found from the working directory are not looked for in another one."""
    monkeypatch.chdir(folder)
    if make is external_storage:
        name, needed = "x", ["a.bin"]
        with h5py.File("A.h5", "w") as file:
            file.create_dataset("x", data=values(0), external=[("a.bin", 0, 240)])
    else:
        name, needed = make(folder)
    away = tmp_path / "away"
    away.mkdir()
    shutil.move(folder / "A.h5", away)
    source = open_source(f"{away / 'A.h5'}::{name}", outside_files=True)
    assert {reference.stamp.path for reference in source.data.references} == {folder / file for file in needed}
    rows = source.shape[0]
    np.testing.assert_array_equal(source.read_rows(0, rows), read_h5py(f"{away / 'A.h5'}::{name}"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError):
        source.read_rows(0, rows)


def test_symlink_to_the_file(folder, tmp_path):
    virtual(folder)
    (tmp_path / "link.h5").symlink_to(folder / "A.h5")
    source = open_source(f"{tmp_path / 'link.h5'}::v")
    np.testing.assert_array_equal(source.read_rows(20, 30), values(2))


# files outside the folder


def virtual_within(folder):
    """An outer virtual data set, beside which the inner one lies, whose source does not."""
    save(folder / "s0.h5", values(0))
    (folder / "inside").mkdir()
    save_virtual(folder / "inside" / "inner.h5", [folder / "s0.h5"])
    save_virtual(folder / "inside" / "A.h5", ["inner.h5"], of="v")
    return "v", "s0.h5"


def virtual_above(folder):
    save(folder / "s0.h5", values(0))
    (folder / "inside").mkdir()
    save_virtual(folder / "inside" / "A.h5", ["../s0.h5"])
    return "v", "s0.h5"


def link_away(folder):
    save(folder / "s0.h5", values(0))
    (folder / "inside").mkdir()
    with h5py.File(folder / "inside" / "A.h5", "w") as file:
        file["far"] = h5py.ExternalLink(folder / "s0.h5", "/t")
    return "far", "s0.h5"


def bytes_away(folder):
    values(0).tofile(folder / "s0.bin")
    (folder / "inside").mkdir()
    with h5py.File(folder / "inside" / "A.h5", "w") as file:
        file.create_dataset("x", data=values(0), external=[(folder / "s0.bin", 0, 240)])
    return "x", "s0.bin"


def through_a_symbolic_link(folder):
    save(folder / "s0.h5", values(0))
    (folder / "inside").mkdir()
    (folder / "inside" / "s1.h5").symlink_to(folder / "s0.h5")
    save_virtual(folder / "inside" / "A.h5", ["s1.h5"])
    return "v", "s0.h5"


def through_a_symbolic_link_to_a_folder(folder):
    save(folder / "s0.h5", values(0))
    (folder / "inside").mkdir()
    (folder / "inside" / "sources").symlink_to(folder)
    save_virtual(folder / "inside" / "A.h5", ["sources/s0.h5"])
    return "v", "s0.h5"


OUTSIDE = [
    virtual_within,
    virtual_above,
    link_away,
    bytes_away,
    through_a_symbolic_link,
    through_a_symbolic_link_to_a_folder,
]


@pytest.mark.parametrize("make", OUTSIDE)
def test_a_file_outside_the_folder_is_refused_without_the_switch(make, folder):
    name, outside = make(folder)
    text = f"{folder / 'inside' / 'A.h5'}::{name}"
    for call in (
        open_source,
        pipeline.open_matrix,
        lambda text: pipeline.create_matrix(text, folder / "A.zarr"),
        lambda text: open_source([text]),
    ):
        with pytest.raises(OpenError) as caught:
            call(text)
        assert str(folder / outside) in str(caught.value)
        assert "--outside-files (outside_files=True)" in str(caught.value)
    assert not (folder / "A.zarr").exists()
    matrix = pipeline.create_matrix(text, folder / "A.zarr", outside_files=True)
    np.testing.assert_array_equal(matrix.array[:], values(0))


@pytest.mark.parametrize("make", OUTSIDE)
def test_a_file_that_is_refused_is_not_opened(make, folder):
    """Nor waited for, as a pipe would be."""
    name, outside = make(folder)
    (folder / outside).unlink()
    os.mkfifo(folder / outside)
    with pytest.raises(OpenError):
        open_source(f"{folder / 'inside' / 'A.h5'}::{name}")


def test_files_of_the_folder_and_below_need_no_switch(folder, monkeypatch):
    (folder / "below").mkdir()
    save(folder / "below" / "s0.h5", values(0))
    save_virtual(folder / "A.h5", ["below/s0.h5"])
    np.testing.assert_array_equal(open_source(folder / "A.h5").read_rows(0, 10), values(0))


def test_a_folder_that_the_user_names_to_libhdf5_needs_no_switch(folder, tmp_path):
    save(folder / "s0.h5", values(0))
    (tmp_path / "other").mkdir()
    save_virtual(tmp_path / "other" / "A.h5", ["s0.h5"])
    code = "import sys, pipeline.matrix.formats as s; print(s.open_source(sys.argv[1]).read_rows(0, 10).sum())"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "other" / "A.h5"],
        env=os.environ | {"HDF5_VDS_PREFIX": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) == values(0).sum()


def command(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_refuses_and_names_the_files_that_it_takes_values_from(folder):
    name, outside = virtual_above(folder)
    text = f"inside/A.h5::{name}"
    for arguments in (["create", text, "A.zarr"], ["create", text, "A.zarr", "--dry-run"], ["info", text]):
        code, out, error = command(*arguments, cwd=folder)
        assert (code, out) == (3, "")
        assert len(error.splitlines()) == 1
        assert str(folder / outside) in error
        assert "--outside-files" in error
    arguments = ["create", text, "A.zarr", "--outside-files"]
    for more in (["--dry-run"], []):
        code, out, _ = command(*arguments, *more, "--json", cwd=folder)
        assert code == 0
        assert json.loads(out)["referred_files"] == [str(folder / outside)]
    code, out, _ = command(*arguments, "--overwrite", cwd=folder)
    assert code == 0
    [line] = [line for line in out.splitlines() if line.startswith("refers to")]
    assert str(folder / outside) in line


def test_info_names_the_files_that_a_data_set_takes_values_from(folder):
    virtual(folder)
    code, _, error = command("info", "A.h5::v", cwd=folder)
    assert code == 3
    for name in ("s0.h5", "s1.h5", "s2.h5"):
        assert str(folder / name) in error


def test_no_output_replaces_a_file_that_values_come_from(folder):
    values(0).tofile(folder / "x.zarr")
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_dataset("x", data=values(0), external=[(folder / "x.zarr", 0, 240)])
    before = (folder / "x.zarr").read_bytes()
    for settings in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputExistsError):
            pipeline.create_matrix(folder / "A.h5", folder / "x.zarr", **settings)
    pipeline.create_matrix("random:10x3", folder / "y.zarr")
    (folder / "x.zarr").rename(folder / "y.zarr" / "x.bin")
    with h5py.File(folder / "A.h5", "w") as file:
        file.create_dataset("x", data=values(0), external=[(folder / "y.zarr" / "x.bin", 0, 240)])
    with pytest.raises(OutputExistsError, match="apart"):
        pipeline.create_matrix(folder / "A.h5", folder / "y.zarr", overwrite=True)
    assert (folder / "y.zarr" / "x.bin").read_bytes() == before


# locks


def test_source_that_another_process_locks(folder):
    virtual(folder)
    source = open_source(folder / "A.h5")
    np.testing.assert_array_equal(source.read_rows(10, 20), values(1))
    with (folder / "s1.h5").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        np.testing.assert_array_equal(source.read_rows(0, 10), values(0))
        with pytest.raises(OpenError, match=r"s1\.h5 .*HDF5_USE_FILE_LOCKING=FALSE"):
            source.read_rows(5, 15)
        with pytest.raises(OpenError, match=r"s1\.h5 .*HDF5_USE_FILE_LOCKING=FALSE"):
            open_source(folder / "A.h5")
    np.testing.assert_array_equal(source.read_rows(0, 30), np.concatenate([values(i) for i in range(3)]))


def test_file_that_another_process_locks(folder):
    save(folder / "A.h5", values(0))
    with (folder / "A.h5").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OpenError, match=r"A\.h5 is locked by another process.*HDF5_USE_FILE_LOCKING=FALSE"):
            open_source(folder / "A.h5")


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def without_locks(request):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    return [strace, "-f", "-qq", "-o", "/dev/null", "-e", "trace=flock", "-e", f"inject=flock:error={request.param}"]


@pytest.mark.parametrize("setting", [None, "TRUE", "FALSE"])
def test_file_system_without_locks(folder, without_locks, setting):
    virtual(folder)
    code = "import sys, pipeline.matrix.formats as s; print(s.open_source(sys.argv[1]).read_rows(0, 30).sum())"
    env = {key: value for key, value in os.environ.items() if key != "HDF5_USE_FILE_LOCKING"}
    done = subprocess.run(
        [*without_locks, sys.executable, "-c", code, f"{folder / 'A.h5'}::v"],
        env=env | ({"HDF5_USE_FILE_LOCKING": setting} if setting else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in done.stderr.lower():
        pytest.skip("may not trace")
    if setting == "TRUE":
        # The user insists on locks.
        assert "OpenError" in done.stderr
        assert "HDF5_USE_FILE_LOCKING=FALSE" in done.stderr
    else:
        assert float(done.stdout) == sum(values(i).sum() for i in range(3)), done.stderr


@pytest.mark.parametrize("locking", [None, False, True, "best-effort"])
def test_file_that_this_process_has_open(folder, locking):
    virtual(folder)
    with h5py.File(folder / "A.h5", "r", locking=locking):
        np.testing.assert_array_equal(open_source(folder / "A.h5").read_rows(10, 20), values(1))
