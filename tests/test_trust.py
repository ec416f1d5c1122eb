"""What others prepare in folders that they can write: nothing of it is used, followed or removed."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline.errors import OpenError, OutputExistsError
from pipeline.integrity.manifest import Checksums, Manifest
from pipeline.integrity.record import parse_record, read_record
from pipeline.outputs.folder import stage_output
from pipeline.outputs.journal import Journal, Request
from pipeline.outputs.lock import find_holder, hold
from pipeline.storage.trust import read_document

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
STRANGER = 12345
REQUEST = Request({"kind": "windows", "starts": "0"})


@pytest.fixture
def shared(tmp_path):
    """A folder that everybody can write, with remains of an interrupted run, and files of the victim beside it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    partial = folder / "w.zarr.partial"
    partial.mkdir(mode=0o700)
    Journal.create(partial / "journal", REQUEST, 1)
    (partial / "output-0123abcd").mkdir()
    (partial / "output-0123abcd" / "c0").write_bytes(b"chunk")
    victim = tmp_path / "victim"
    (victim / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        (victim / name).write_text("dear")
    return partial


def unharmed(partial):
    victim = partial.parent.parent / "victim"
    return [(victim / name).read_text() for name in ("a", "deep/b")] == ["dear", "dear"]


def stage(path, **flags):
    flags = {"resume": False, "overwrite": False} | flags
    with stage_output(path, REQUEST, cut=1, nbytes=0, **flags) as staged:
        staged.output.mkdir(exist_ok=True)
        (staged.output / "zarr.json").write_text("{}")


def link(name, target):
    def prepare(partial):
        place = partial / name
        if place.exists():
            place.rename(partial.parent / "away")
        place.symlink_to(partial.parent.parent / "victim" / target)

    return prepare


def fifo(name):
    def prepare(partial):
        (partial / name).unlink(missing_ok=True)
        os.mkfifo(partial / name)

    return prepare


def whole_folder_is_a_link(partial):
    partial.rename(partial.parent / "moved")
    partial.symlink_to(partial.parent / "moved")


def folder_that_others_write(partial):
    partial.chmod(0o777)


def of_a_stranger(name):
    return lambda partial: os.chown(partial / name, STRANGER, STRANGER)


PREPARED = {
    "holder": link("holder", "a"),
    "lock": link("lock", "a"),
    "journal": link("journal", "a"),
    "journal.partial": link("journal.partial", "a"),
    "claim": link("claim-1", "a"),
    "output": link("output-0123abcd", "."),
    "inside the output": link("output-0123abcd/deep", "deep"),
    "file inside the output": link("output-0123abcd/c1", "a"),
    "replaced": link("replaced", "."),
    "folder": whole_folder_is_a_link,
    "writable": folder_that_others_write,
    "fifo as journal": fifo("journal"),
    "fifo as lock": fifo("lock"),
    "fifo as holder": fifo("holder"),
    "fifo in the output": fifo("output-0123abcd/c1"),
    "folder of a stranger": of_a_stranger("."),
    "journal of a stranger": of_a_stranger("journal"),
    "chunk of a stranger": of_a_stranger("output-0123abcd/c0"),
}
OF_ROOT = {name for name in PREPARED if "stranger" in name}


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}, {}])
@pytest.mark.parametrize("name", [pytest.param(name, marks=ROOT if name in OF_ROOT else ()) for name in PREPARED])
def test_prepared_remains_are_refused_and_left_alone(shared, name, flags):
    PREPARED[name](shared)
    before = sorted(str(path) for path in shared.parent.rglob("*"))
    with pytest.raises(OutputExistsError) as caught:
        stage(shared.parent / "w.zarr", **flags)
    assert "\n" not in str(caught.value)
    assert unharmed(shared)
    assert sorted(str(path) for path in shared.parent.rglob("*")) == before


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}])
def test_own_remains_are_used_as_ever(shared, flags):
    stage(shared.parent / "w.zarr", **flags)
    assert not shared.exists()


def test_a_run_writes_into_a_folder_of_its_own_alone(tmp_path):
    with hold(tmp_path / "w.partial"):
        assert stat.S_IMODE((tmp_path / "w.partial").stat().st_mode) & 0o077 == 0


def test_file_systems_that_show_all_files_alike_are_used(shared, monkeypatch):
    """As CIFS and FUSE do: all files are another user's, and everybody may write them, a new folder, too."""
    real = os.lstat

    def shown(path, **given):
        status = real(path, **given)
        return os.stat_result((status.st_mode | 0o777, *status[1:4], STRANGER, STRANGER, *status[6:]))

    monkeypatch.setattr(os, "lstat", shown)
    monkeypatch.setattr(Path, "lstat", shown)
    stage(shared.parent / "w.zarr", resume=True)
    assert not shared.exists()


@pytest.fixture
def result(tmp_path):
    np.save(tmp_path / "A.npy", np.arange(2000.0).reshape(200, 10))
    plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.npy"), [3, 1, 2], length=4)
    pipeline.store(plan, tmp_path / "w.zarr")
    return plan, tmp_path / "w.zarr"


@pytest.mark.parametrize(
    "how", [pytest.param("owner", marks=ROOT), pytest.param("a file's owner", marks=ROOT), "link", "fifo"]
)
def test_a_result_that_somebody_prepared_is_not_replaced(result, tmp_path, how):
    plan, place = result
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "a").write_text("dear")
    if how == "owner":
        os.chown(place, STRANGER, STRANGER)
    elif how == "a file's owner":
        os.chown(place / "zarr.json", STRANGER, STRANGER)
    elif how == "link":
        (place / "more").symlink_to(tmp_path / "victim")
    else:
        os.mkfifo(place / "more")
    with pytest.raises(OutputExistsError, match="choose another name, or remove it yourself"):
        pipeline.store(plan, place, overwrite=True)
    assert (tmp_path / "victim" / "a").read_text() == "dear"
    assert (place / "zarr.json").exists()


def test_a_result_that_a_group_shares_is_replaced(result):
    plan, place = result
    for path in (place, *place.rglob("*")):
        path.chmod(path.stat().st_mode | 0o020)
    pipeline.store(plan, place, overwrite=True)


HEADER = json.dumps({"version": 1, "cut": 1, "request": REQUEST.facts})
DEEP = "[" * 100_000 + "]" * 100_000
HEADERS = [
    f'{{"version": 1, "cut": 1, "request": {DEEP}}}',
    DEEP,
    '{"version": 1, "cut": Infinity, "request": {}}',
    '{"version": 1, "cut": 1e999, "request": {}}',
    '{"version": 1, "cut": 0, "request": {}}',
    f'{{"version": 1, "cut": {2**70}, "request": {{}}}}',
    '{"version": 1, "cut": "1", "request": {}}',
    '{"version": 1, "cut": 1, "request": {"a": ["b"]}}',
    "\x00",
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_journal_that_nobody_wrote_so_is_none(tmp_path, header):
    (tmp_path / "journal").write_text(HEADER + "\n")
    assert Journal.read(tmp_path / "journal").facts == REQUEST.facts
    (tmp_path / "journal").write_text(header + "\n")
    assert Journal.read(tmp_path / "journal") is None


ENTRIES = [
    f'{{"task": 1, "files": {DEEP}}}',
    '{"task": -1, "files": []}',
    '{"task": Infinity, "files": []}',
    '{"task": 1, "files": [["../../a", 1, 1]]}',
    '{"task": 1, "files": [["/etc/passwd", 1, 1]]}',
    '{"task": 1, "files": [["c/\\n0", 1, 1]]}',
    '{"task": 1, "files": [["c/0", -1, 1]]}',
    '{"task": 1, "files": [["c/0", 1]]}',
]


@pytest.mark.parametrize("entry", ENTRIES, ids=range(len(ENTRIES)))
def test_lines_that_nobody_wrote_so_end_a_journal(tmp_path, entry):
    good = '{"task": 0, "files": [["c/0", 3, 4]]}'
    (tmp_path / "journal").write_text(f"{HEADER}\n{good}\n{entry}\n{good.replace('0', '2', 1)}\n")
    journal = Journal.read(tmp_path / "journal")
    assert [*journal.done] == [0]


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a\nb", "\x1b[2J", ""])
def test_documents_name_no_file_outside(tmp_path, result, key):
    _, place = result
    (tmp_path / "outside").write_text("x")
    document = json.loads((place / "zarr.json").read_bytes())
    document["attributes"]["random-windows"]["files"][key] = [1, "00000000"]
    with pytest.raises(OpenError) as caught:
        parse_record(json.dumps(document).encode(), "zarr.json")
    assert str(caught.value).isprintable()
    manifest = tmp_path / "m.json"
    Manifest("A.npy", {key: Checksums(0, ())}).write(manifest)
    with pytest.raises(OpenError) as caught:
        Manifest.read(manifest)
    assert str(caught.value).isprintable()
    assert read_record(place) is not None


def test_what_another_run_says_of_itself_is_printed_plainly(tmp_path):
    folder = tmp_path / "w.partial"
    with hold(folder):
        (folder / "holder").write_text(json.dumps({"process": 1, "host": "\x1b]0;gotcha\x07", "since": "a\nb"}))
        assert find_holder(folder) == "process 1 on \\x1b]0;gotcha\\x07, since a\\nb"


def test_documents_are_files_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.storage.trust.DOCUMENT_NBYTES", 10)
    (tmp_path / "a").write_bytes(b"0123456789")
    assert read_document(tmp_path / "a") == b"0123456789"
    (tmp_path / "b").write_bytes(b"0123456789a")
    (tmp_path / "c").symlink_to("a")
    os.mkfifo(tmp_path / "d")
    for name in "bcd":
        with pytest.raises(OSError, match="not a file|more than 10 bytes|symbolic"):
            read_document(tmp_path / name)
