"""Every damage to stored bytes is found, and right bytes pass."""

from __future__ import annotations

import json
import os
import shutil

import dask
import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

import pipeline
from pipeline.integrity.verify import prepare_verification
from pipeline.runtime.report import Watch
from pipeline.storage.base import Folder, checksum
from pipeline.storage.checksums import extend_crc32
from tests.layouts import LAYOUTS, STORES, distinct

CHECKED = {
    "default", "shards", "plain", "one-row-chunks", "zstd", "blosc-plain",
    "zarr-index-first", "zarr-crc",
}  # fmt: skip
"""Layouts with a crc32c behind each chunk."""
STARTS = [0, 195, 3, 3, 100, 8, 9, 10, 7, 64, 31, 32, 60, 150, 151, 152, 1, 195, 16, 17]


@pytest.fixture(autouse=True)
def no_client_of_another_test():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Folder with every layout; results of ours; and a manifest of each foreign one. Never to be changed."""
    folder = tmp_path_factory.mktemp("originals")
    for name, (_, write) in LAYOUTS.items():
        write(folder / f"{name}.zarr", distinct())
        if name not in CHECKED:
            pipeline.write_manifest(folder / f"{name}.zarr", folder / f"{name}.json")
    plan = pipeline.plan_windows(pipeline.open_matrix(folder / "shards.zarr"), STARTS * 3, length=16)
    pipeline.store(plan, folder / "windows.zarr")
    pipeline.store(plan, folder / "sorted.zarr", order="chunk", apply=means)
    # Several shards, whatever its size.
    array = zarr.create_array(
        str(folder / "foreign.zarr"), shape=(64, 6), dtype="i4", chunks=(8, 3), compressors=None, fill_value=-1
    )
    array[:] = distinct(64, (6,), "i4")
    pipeline.write_manifest(folder / "foreign.zarr", folder / "foreign.json")
    return folder


def means(block):
    return block.mean(axis=1)


@pytest.fixture
def copy(originals, tmp_path):
    """`copy(name)`: a target of one's own, and the manifest that it needs."""

    def make(name):
        target = tmp_path / f"{name}.zarr"
        source = originals / f"{name}.zarr"
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        manifest = originals / f"{name}.json"
        return target, manifest if manifest.exists() else None

    return make


def say(target, manifest=None, **options):
    return [str(problem) for problem in pipeline.verify(target, manifest=manifest, **options)]


def flip(path, bit):
    """Flip one bit of a file; doing it twice changes nothing."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def is_found(target, manifest):
    try:
        return bool(pipeline.verify(target, manifest=manifest))
    except pipeline.PipelineError:
        return True


@pytest.mark.parametrize("name", [*LAYOUTS, "windows", "sorted", "foreign"])
def test_right_bytes_pass(originals, name):
    manifest = originals / f"{name}.json"
    assert say(originals / f"{name}.zarr", manifest if manifest.exists() else None) == []


@pytest.mark.parametrize("scheduler", ["threads", "in-process", "processes"])
def test_every_scheduler(copy, scheduler):
    target, _ = copy("shards")
    for chunk in (1, 3, 4):
        flip(target / "c/2/0/0", 8 * (chunk * (4 * 15 * 8 + 4) + 3))
    (target / "c/5/0/0").unlink()
    with dask.config.set(scheduler="threads" if scheduler == "threads" else "synchronous"):
        expected = say(target)
    assert expected == [
        "c/2/0/0 has inner chunks 1, 3, 4 corrupt (rows 52 to 55, 60 to 67)",
        "c/5/0/0 is gone (rows 120 to 143)",
    ]
    if scheduler == "threads":
        return
    settings = {"processes": True, "n_workers": 2, "threads_per_worker": 1} if scheduler == "processes" else {}
    with dask.config.set(scheduler="dask.distributed"), pipeline.connect(dashboard_address=None, **settings):
        assert say(target) == expected


@pytest.mark.parametrize(("first", "count"), [(0, 100), pytest.param(100, 900, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["foreign", "zstd", "windows"])
def test_every_bit_counts(copy, name, first, count):
    """Each bit alone, of any file, metadata among them."""
    target, manifest = copy(name)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    ends = np.cumsum([path.stat().st_size * 8 for path in files])
    bits = np.random.default_rng(4).integers(ends[-1], size=1000)
    assert len({int(np.searchsorted(ends, bit, "right")) for bit in bits}) >= 5
    missed = []
    for bit in bits[first : first + count].tolist():
        number = int(np.searchsorted(ends, bit, "right"))
        within = bit - int(ends[number]) + files[number].stat().st_size * 8
        flip(files[number], within)
        if not is_found(target, manifest):
            missed.append((files[number], within))
        flip(files[number], within)
    assert missed == []
    assert say(target, manifest) == []


def cut(size):
    def damage(path):
        os.truncate(path, size(path.stat().st_size))

    return damage


def replace(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


FAULTS = {
    "removed": (replace(lambda path: None), "is gone"),
    "shorter by a byte": (cut(lambda size: size - 1), "bytes instead of"),
    "cut to half": (cut(lambda size: size // 2), "bytes instead of"),
    "emptied": (cut(lambda size: 0), "has 0 bytes instead of"),
    "zeroed": (lambda path: path.write_bytes(bytes(path.stat().st_size)), ""),
    "longer": (cut(lambda size: size + 1), "bytes instead of"),
    "a folder": (replace(lambda path: path.mkdir()), "is a folder"),
    "a FIFO": (replace(os.mkfifo), "is no file"),
    "a link to nothing": (replace(lambda path: path.symlink_to("nowhere")), "is a link to nothing"),
}
TARGETS = {
    "shards": ("c/2/0/0", "(rows 48 to 71)"),
    "blosc-plain": ("c/2/0/0", "(rows 18 to 26)"),
    "windows": ("windows/c/0/0/0/0", "(windows 0 to 59)"),
    "sorted": ("places/c/0", "(windows 0 to 59)"),
    "foreign": ("c/7/1", "(rows 56 to 63)"),
    "v2": ("20.0.0", "(rows 200 to 209)"),
    "columns-shards": ("c/10/1/0", "(rows 200 to 210)"),
    "npy": ("", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", TARGETS)
def test_faults_of_a_file(copy, name, fault):
    target, manifest = copy(name)
    key, rows = TARGETS[name]
    damage, words = FAULTS[fault]
    damage(target / key if key else target)
    if not key and fault in ("removed", "a folder", "a FIFO", "a link to nothing"):
        if fault == "a folder":
            assert say(target, manifest) == ["npy.zarr is gone"]
            return
        with pytest.raises(pipeline.OpenError):
            say(target, manifest)
        return
    [problem] = say(target, manifest)
    assert problem.startswith(f"{key or target.name} ")
    assert words in problem
    assert problem.endswith(rows)


@pytest.mark.parametrize(
    "fault", ["removed", "shorter by a byte", "cut to half", "emptied", "zeroed", "a folder", "a FIFO"]
)
@pytest.mark.parametrize("name", ["zarr-crc", "zarr-index-first"])
def test_faults_of_a_file_that_only_its_chunks_tell_of(copy, name, fault):
    target, _ = copy(name)
    FAULTS[fault][0](target / "c/1/0/0")
    [problem] = pipeline.verify(target)
    assert problem.key == "c/1/0/0"
    size = 10 if name == "zarr-crc" else 32
    # A shard with its index first, cut within its chunks, still says which of them are whole.
    assert problem.runs[-1][1] == 2 * size
    assert problem.runs[0][0] >= size


def test_files_that_nobody_wrote(copy):
    target, _ = copy("shards")
    (target / "c/9/0").mkdir(parents=True)
    (target / "c/9/0/0").write_bytes(b"x")
    (target / "note").symlink_to("nowhere")
    assert say(target) == ["c/9/0/0 is there, but nobody wrote it", "note is there, but nobody wrote it"]


def test_shards_that_are_whole_but_in_the_wrong_place(copy, tmp_path):
    target, _ = copy("shards")
    one, other = target / "c/1/0/0", target / "c/3/0/0"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    words = "is not the one that was written: another, or an older one, is in its place"
    assert say(target) == [f"c/1/0/0 {words} (rows 24 to 47)", f"c/3/0/0 {words} (rows 72 to 95)"]
    other.write_bytes(one.read_bytes())
    one.write_bytes(kept)
    assert say(target) == []
    np.save(tmp_path / "older.npy", distinct() + 0.5)
    pipeline.create_matrix(tmp_path / "older.npy", tmp_path / "older.zarr", shard_rows=24, chunk_rows=4)
    shutil.copy(tmp_path / "older.zarr/c/3/0/0", other)
    assert say(target) == [f"c/3/0/0 {words} (rows 72 to 95)"]
    # All of an older output, its record included, is an output that is whole.
    shutil.rmtree(target)
    shutil.copytree(tmp_path / "older.zarr", target)
    assert say(target) == []


def test_inner_chunks_are_named(copy):
    target, _ = copy("shards")
    chunk = 4 * 15 * 8 + 4
    for number in (0, 1, 4):
        flip(target / "c/2/0/0", (number * chunk + 17) * 8)
    flip(target / "c/8/0/0", 8 * (4 * chunk + 9))
    [shard, last] = pipeline.verify(target)
    assert str(shard) == "c/2/0/0 has inner chunks 0, 1, 4 corrupt (rows 48 to 55, 64 to 67)"
    assert shard.runs == ((48, 56), (64, 68))
    assert last.runs == ((208, 211),)
    assert last.facts() == {
        "file": "c/8/0/0",
        "problem": "has inner chunk 4 corrupt",
        "unit": "rows",
        "runs": [[208, 211]],
    }


def test_index_and_bytes_that_belong_to_no_chunk(copy):
    target, _ = copy("shards")
    path = target / "c/0/0/0"
    flip(path, 8 * (path.stat().st_size - 30))
    assert say(target) == ["c/0/0/0 has a corrupt index (rows 0 to 23)"]


@pytest.mark.parametrize("name", ["shards", "windows"])
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text.replace('"float64"', '"int64"'), "is not what was written"),
        (lambda text: text.replace('"little"', '"big"', 1), "is not what was written"),
        (lambda text: text.replace("16", "15").replace("211", "210"), "is not what was written"),
        (lambda text: text[:-40], None),
        (lambda text: "[]", None),
        (lambda text: "", None),
    ],
    ids=["dtype", "byte order", "shape", "truncated", "list", "empty"],
)
def test_metadata(copy, name, edit, words):
    """The root's own document is refused where it cannot be parsed; others are files as all are."""
    target, _ = copy(name)
    key = "zarr.json" if name == "shards" else "windows/zarr.json"
    text = (target / key).read_text()
    assert edit(text) != text
    (target / key).write_text(edit(text))
    if name == "shards" and words is None:
        with pytest.raises(pipeline.OpenError):
            say(target)
        return
    [problem] = say(target)
    assert problem.startswith(key)
    assert (words or "bytes instead of") in problem or "bytes instead of" in problem


def test_metadata_of_a_foreign_matrix(copy):
    target, manifest = copy("v2")
    (target / ".zarray").write_text((target / ".zarray").read_text().replace("<f8", ">f8"))
    flip(target / "3.0.0", 77)
    assert say(target, manifest) == [".zarray is not what was written", "3.0.0 is not what was written"]
    (target / ".zarray").unlink()
    assert say(target, manifest)[0] == ".zarray is gone"


@pytest.mark.parametrize("key", ["random-windows", "files", "attributes", "digest"])
def test_a_record_that_was_lost(copy, key):
    """Its chunks are whole, but it can no longer be said that they are the ones that were written."""
    target, _ = copy("shards")
    path = target / "zarr.json"
    text = path.read_text()
    flipped = key[:-1] + chr(ord(key[-1]) ^ 1)
    assert text.count(f'"{key}"') == 1
    path.write_text(text.replace(f'"{key}"', f'"{flipped}"'))
    assert [problem.split()[0] for problem in say(target)] == ["zarr.json"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_has_no_checksums_says_the_way_out(originals, tmp_path, name):
    """Layouts without the record: their own checksums tell, or nothing does."""
    target = tmp_path / "foreign.zarr"
    source = originals / f"{name}.zarr"
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    if (target / "zarr.json").exists():
        document = json.loads((target / "zarr.json").read_text())
        document["attributes"] = {}
        (target / "zarr.json").write_text(json.dumps(document))
    if name in CHECKED:
        assert say(target) == []
        return
    with pytest.raises(pipeline.InputError, match=r"--write-manifest FILE; compare with --manifest FILE"):
        say(target)
    flip(
        next(path for path in sorted(target.rglob("*")) if path.is_file() and not path.name.startswith((".z", "zarr")))
        if source.is_dir()
        else target,
        8 * 40 + 1,
    )
    manifest = originals / f"{name}.json"
    problems = say(target, manifest)
    assert any("is not what was written" in problem for problem in problems if "zarr.json" not in problem)


def test_a_group_of_another_writer(tmp_path):
    group = zarr.create_group(str(tmp_path / "G.zarr"))
    shards = ShardingCodec(chunk_shape=(4, 2), codecs=[BytesCodec(), ZstdCodec(), Crc32cCodec()])
    array = group.create_array("deep/a", shape=(20, 4), dtype="i8", chunks=(8, 4), serializer=shards, compressors=None)
    array[:] = distinct(20, (4,), "i8")
    assert say(tmp_path / "G.zarr") == []
    path = tmp_path / "G.zarr/deep/a/c/1/0"
    index = np.frombuffer(path.read_bytes()[-68:-4], "<u8").reshape(4, 2)
    flip(path, 8 * int(index[3, 0]))
    assert say(tmp_path / "G.zarr") == ["deep/a/c/1/0 has inner chunk 3 corrupt (rows 12 to 15)"]
    assert say(tmp_path / "G.zarr/deep/a") == ["c/1/0 has inner chunk 3 corrupt (rows 12 to 15)"]
    array[16:] = 0
    assert say(tmp_path / "G.zarr")[1] == "deep/a/c/2/0 is gone (rows 16 to 19)"
    array[8:12] = 0
    assert "inner chunks 0, 1 absent" in say(tmp_path / "G.zarr")[0]
    sparse = group.create_array("sparse", shape=(2**50,), dtype="i8", chunks=(1,), compressors=[Crc32cCodec()])
    sparse[7] = 7
    assert say(tmp_path / "G.zarr/sparse") == [f". lacks {2**50 - 1:,} of its {2**50:,} files"]
    group.create_array("bare", shape=(3,), dtype="i8")
    with pytest.raises(pipeline.InputError, match=r"G.zarr/bare add no crc32c"):
        say(tmp_path / "G.zarr")


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", ["zarr-crc", "zarr-index-first", "zstd", "columns"])
def test_other_stores(copy, tmp_path, name, store):
    target, _ = copy(name)
    opened = zarr.open_array(STORES[store](target), mode="r")
    pipeline.write_manifest(opened, tmp_path / "m.json")
    assert say(opened, tmp_path / "m.json") == []
    if name in CHECKED:
        assert say(opened) == []
    flip(target / "c/1/0/0", 8 * 50)
    (target / "c/2/0/0").unlink()
    opened = zarr.open_array(STORES[store](target), mode="r")
    for manifest in [tmp_path / "m.json", *([None] if name in CHECKED else [])]:
        problems = pipeline.verify(opened, manifest=manifest)
        assert [problem.key for problem in problems] == ["c/1/0/0", "c/2/0/0"]
        assert problems[1].problem == "is gone"


def test_subset(copy):
    target, _ = copy("one-row-chunks")
    files = len(list((target / "c").glob("*/0/0")))
    assert files == 31
    for path in (target / "c").glob("[0-9]*"):
        flip(path / "0/0", 99)
    drawn = [tuple(each.key for each in pipeline.verify(target, subset=0.1, seed=seed)) for seed in (0, 0, 1, 2)]
    assert [len(set(keys)) for keys in drawn] == [3, 3, 3, 3]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    watch = Watch()
    assert len(prepare_verification(target, subset=1e-9).run(watch)) == 1
    assert (watch.units, watch.done_units) == (1, 1)
    assert watch.nbytes_read == (target / "c/0/0/0").stat().st_size
    # Metadata and absent files are always looked at.
    (target / "c/5/0/0").unlink()
    assert any("c/5/0/0 is gone" in problem for problem in say(target, subset=1e-9))
    for wrong in (0, 1.1, -1, float("nan")):
        with pytest.raises(pipeline.InputError, match="subset .* is not a number above 0"):
            pipeline.verify(target, subset=wrong)


def test_every_byte_is_read_once(copy):
    target, _ = copy("shards")
    watch = Watch()
    assert prepare_verification(target).run(watch) == []
    stored = sum(path.stat().st_size for path in (target / "c").rglob("*") if path.is_file())
    assert watch.nbytes_read == stored


def test_a_large_file_is_read_in_ranges(tmp_path):
    """Sparse, so that it takes no disk; its parts differ all the same."""
    path = tmp_path / "A.npy"
    array = np.lib.format.open_memmap(path, "w+", "f8", (5 * 2**22,))
    array[:: 2**20] = np.arange(1, 21)
    array.flush()
    pipeline.write_manifest(path, tmp_path / "m.json")
    with dask.config.set(scheduler="threads"):
        assert say(path, tmp_path / "m.json") == []
        flip(path, 8 * (140 * 2**20))
        end = path.stat().st_size - 1
        assert say(path, tmp_path / "m.json") == [f"A.npy is not what was written at bytes {2**27} to {end}"]
        os.truncate(path, 2**20)
        assert say(path, tmp_path / "m.json") == [f"A.npy has {2**20} bytes instead of {end + 1}"]
    path.rename(tmp_path / "B.npy")
    assert say(tmp_path / "B.npy", tmp_path / "m.json") == [f"B.npy has {2**20} bytes instead of {end + 1}"]


def test_a_manifest_is_not_trusted_either(copy, tmp_path):
    target, kept = copy("foreign")
    manifest = tmp_path / "m.json"
    shutil.copy(kept, manifest)
    for bit in np.random.default_rng(1).integers(manifest.stat().st_size * 8, size=200).tolist():
        flip(manifest, bit)
        with pytest.raises(pipeline.PipelineError):
            pipeline.verify(target, manifest=manifest)
        flip(manifest, bit)
    assert say(target, manifest) == []
    for text in ("", "[]", "{}", '{"version": 1}', "[" * 100_000):
        manifest.write_text(text)
        with pytest.raises(pipeline.PipelineError):
            pipeline.verify(target, manifest=manifest)
    with pytest.raises(pipeline.NotFoundError):
        pipeline.verify(target, manifest=tmp_path / "none.json")


def test_a_manifest_is_written_once_and_apart(copy, tmp_path):
    target, _ = copy("foreign")
    (tmp_path / "taken.json").write_text("kept")
    for path in ("taken.json", "foreign.zarr/m.json", "foreign.zarr"):
        with pytest.raises(pipeline.OutputExistsError):
            pipeline.write_manifest(target, tmp_path / path)
    with pytest.raises(pipeline.OpenError, match="does not exist; create it first"):
        pipeline.write_manifest(target, tmp_path / "no/m.json")
    assert (tmp_path / "taken.json").read_text() == "kept"
    assert not (target / "m.json").exists()
    (target / "c/0/0").unlink()
    os.mkfifo(target / "c/0/0")
    with pytest.raises(pipeline.IntegrityError, match="c/0/0 is no file"):
        pipeline.write_manifest(target, tmp_path / "m.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.zarr", "taken.json"]


def test_links_are_followed_but_not_in_circles(copy, tmp_path):
    target, _ = copy("foreign")
    (target / "c").rename(tmp_path / "elsewhere")
    (target / "c").symlink_to(tmp_path / "elsewhere")
    (target / "again").symlink_to(target)
    pipeline.write_manifest(target, tmp_path / "m.json")
    flip(tmp_path / "elsewhere/3/1", 5)
    assert say(target, tmp_path / "m.json") == ["c/3/1 is not what was written (rows 24 to 31)"]


def test_what_cannot_be_verified(tmp_path):
    with pytest.raises(pipeline.NotFoundError):
        say(tmp_path / "none.zarr")
    with pytest.raises(pipeline.OpenError, match="is a folder without Zarr metadata"):
        say(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(pipeline.OpenError, match="neither"):
        say(tmp_path / "fifo")
    (tmp_path / "A.zarr").mkdir()
    os.mkfifo(tmp_path / "A.zarr/zarr.json")
    with pytest.raises(pipeline.OpenError, match="metadata are a file"):
        say(tmp_path / "A.zarr")
    with pytest.raises(pipeline.OpenError, match="the metadata .*zarr.json is no file"):
        pipeline.write_manifest(tmp_path / "A.zarr", tmp_path / "m.json")


def test_checksum_of_a_range(tmp_path):
    """The check value of the algorithm's catalogue."""
    (tmp_path / "a").write_bytes(b"xx123456789")
    with Folder(str(tmp_path)).open("a") as opened:
        assert checksum(opened, 2, 9, extend_crc32) == 0xCBF43926
        with pytest.raises(pipeline.IntegrityError, match="ends within"):
            checksum(opened, 2, 10, extend_crc32)


def test_command_line(cli, copy, tmp_path):
    target, _ = copy("one-row-chunks")
    said = cli("verify", target, "--json")
    assert (said.code, said.numbers["problems"], said.numbers["wrong_files"]) == (0, [], 0)
    assert (said.numbers["files"], said.numbers["ranges_read"], said.numbers["standard"]) == (32, 31, "record")
    part = cli("verify", target, "--subset", "10%", "--seed", 3, "--json", "-q").numbers
    assert (part["ranges"], part["ranges_read"]) == (31, 3)
    assert 0 < part["nbytes_read"] < part["nbytes"]
    assert "nothing" in cli("verify", target).out
    for path in (target / "c").glob("[0-9]*"):
        flip(path / "0/0", 99)
    said = cli("verify", target, "-q")
    lines = [line for line in said.out.splitlines() if line.startswith("c/")]
    assert (said.code, len(lines), lines[0]) == (4, 20, "c/0/0/0 has inner chunk 0 corrupt (rows 0 to 0)")
    assert said.out.endswith("and 11 more; --json lists all\n")
    assert said.err.startswith("error: stored bytes are what was written; ")
    assert "31 of 32 files are wrong" in said.err
    said = cli("verify", target, "--json", "-q")
    assert (said.code, said.numbers["exit_code"], len(said.numbers["problems"])) == (4, 4, 31)
    assert said.numbers["problems"][0] == {
        "file": "c/0/0/0", "problem": "has inner chunk 0 corrupt", "unit": "rows", "runs": [[0, 1]],
    }  # fmt: skip
    assert "31 of 32" in said.numbers["error"]


def test_command_line_with_a_manifest(cli, copy, tmp_path):
    target, _ = copy("npy")
    said = cli("verify", target, "-q")
    assert said.code == 2
    assert "--write-manifest" in said.err
    said = cli("verify", target, "--write-manifest", "m.json", "--json", "-q")
    assert (said.code, said.numbers["files"], said.numbers["nbytes"]) == (0, 1, target.stat().st_size)
    assert cli("verify", target, "--manifest", "m.json", "-q").code == 0
    assert cli("verify", target, "--write-manifest", "m.json", "-q").code == 7
    assert cli("verify", target, "--write-manifest", "n.json", "--subset", "10%").code == 2
    assert cli("verify", target, "--manifest", "m.json", "--subset", "ten").code == 2
    assert cli("verify", target, "--manifest", "none.json").code == 3
    assert cli("verify", "none.zarr").code == 3
    flip(target, 8 * 300)
    said = cli("verify", target, "--manifest", "m.json", "-q")
    assert (said.code, "npy.zarr is not what was written" in said.out) == (4, True)
