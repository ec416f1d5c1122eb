"""Names that somebody else gives to something else while a run goes on: nothing of it is written, moved or removed."""

import os
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline.errors import OutputExistsError, PipelineError
from pipeline.outputs import folder as staging
from pipeline.outputs.folder import stage_output
from pipeline.outputs.journal import Request
from pipeline.storage import filesystem
from tests.test_filesystems import refuse

REQUEST = Request({"kind": "windows", "starts": "0"})
NAMES = ("a", "journal", "lock", "holder", "claim-1", "replaced", "moving", "zarr.json", "deep/b", "output-0123abcd/c")


@pytest.fixture
def victim(tmp_path):
    """A folder of the user's own, with names of ours among its files."""
    folder = tmp_path / "victim"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("dear")
    return folder


def held(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared" / "w.zarr"


def stage(path, *, overwrite=False):
    return stage_output(path, REQUEST, cut=1, nbytes=0, resume=False, overwrite=overwrite)


def finish(staged):
    staged.output.mkdir(exist_ok=True)
    (staged.output / "zarr.json").write_text("{}")


RENAME = os.rename


def swap(name, target):
    RENAME(name, f"{name}.away")
    Path(name).symlink_to(target)


@pytest.mark.parametrize("done", [0, 1])
@pytest.mark.parametrize("level", ["folder", "parent"])
@pytest.mark.parametrize("fails", [True, False])
def test_a_staging_folder_that_becomes_a_link(place, victim, done, level, fails):
    before = held(victim)
    if level == "parent":
        # What lies there under the same names is the user's own, too.
        for name in NAMES:
            path = victim / "w.zarr.partial" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("dear")
        before = held(victim)
    with pytest.raises(RuntimeError) if fails else nullcontext(), stage(place) as staged:
        finish(staged)
        swap(f"{place}.partial" if level == "folder" else place.parent, victim)
        for number in range(done):
            staged.finish((number, ()))
        if fails:
            raise RuntimeError
    assert held(victim) == before
    where = Path(f"{place}.partial.away") if level == "folder" else Path(f"{place.parent}.away") / "w.zarr.partial"
    if fails and done:
        assert '"task": 0' in (where / "journal").read_text()
    if not fails:
        assert (Path(f"{place.parent}.away", place.name) if level == "parent" else place).is_dir()


def test_remains_that_become_a_link_once_they_were_looked_at(place, victim, monkeypatch):
    with suppress(RuntimeError), stage(place) as staged:
        finish(staged)
        staged.finish((0, ()))
        raise RuntimeError
    real = staging.check_destination

    def check(path, **given):
        real(path, **given)
        swap(f"{place}.partial", victim)

    monkeypatch.setattr(staging, "check_destination", check)
    before = held(victim)
    with pytest.raises(OutputExistsError, match=r"w\.zarr\.partial is a link"), stage(place, overwrite=True):
        pass
    assert held(victim) == before


@pytest.fixture
def result(place, tmp_path):
    np.save(tmp_path / "A.npy", np.arange(2000.0).reshape(200, 10))
    plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.npy"), [3, 1, 2], length=4)
    pipeline.store(plan, place)
    return plan


CALLS = [None, "renameat2", "rename of folders"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["folder", "link", "parent"])
def test_a_result_that_becomes_something_else_under_way_is_not_removed(result, place, victim, monkeypatch, kind, call):
    """Somebody who can write the folder has renamed another one of the user's, which he could not have emptied."""
    (victim / "w.zarr").mkdir()
    (victim / "w.zarr" / "a").write_text("dear")
    before = held(victim)
    if call:
        refuse("renameat2", monkeypatch, 38)
        refuse(call, monkeypatch, 38)
    with (
        nullcontext() if kind == "parent" else pytest.raises(OutputExistsError),
        stage(place, overwrite=True) as staged,
    ):
        finish(staged)
        staged.finish((0, ()))
        if kind == "folder":
            RENAME(place, f"{place}.away")
            RENAME(victim, place)
        else:
            swap(place if kind == "link" else place.parent, victim)
    assert held(place if kind == "folder" else victim) == before


def test_a_copy_in_the_place_of_a_rename_is_written_through_no_link(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("dear")
    (tmp_path / "new").write_text("new")
    (tmp_path / "name").symlink_to("victim")
    refuse("rename", monkeypatch, 38)
    filesystem.move_file(tmp_path / "new", tmp_path / "name")
    assert (tmp_path / "victim").read_text() == "dear"
    assert (tmp_path / "name").read_text() == "new"
    assert not (tmp_path / "name").is_symlink()


def test_an_error_names_the_folder_as_the_user_does(place):
    def lose():
        with stage(place) as staged:
            (staged.held_output.parent / "journal").unlink()
            staged.finish((0, ()))

    with pytest.raises(FileNotFoundError) as caught:
        lose()
    assert not isinstance(caught.value, PipelineError)
    assert caught.value.filename == f"{place}.partial/journal"
