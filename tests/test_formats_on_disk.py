"""What this program has once written is opened for ever: the folders of `tests/formats`, which `make.py` there wrote."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import pipeline
from tests.formats import make

pytestmark = pytest.mark.versions

VERSIONS = sorted(each for each in Path(make.__file__).parent.glob("v*") if each.is_dir())
STARTS = [50, 3, 17, 44, 0, 56, 9, 31, 22, 38, 5, 48, 27, 12, 41, 19]
LENGTH, TASKS = 8, 4
MATRIX = "memory://formats/A.zarr"
CHANGED_NS = 1_700_000_000_123_456_789
"""Time of the last change that every file gets: fingerprints hold it."""
WIDE = np.array([[1 + 100 * row + column for column in range(16)] for row in range(64)], np.int32)
"""The first 16 columns of `A.zarr`; all others are zero."""
NARROW = np.array([[0.5 + 6 * row + column for column in range(6)] for row in range(64)])
WINDOWS = np.stack([WIDE[start : start + LENGTH, :3] for start in STARTS])
_hosts = (f"formats-{number}" for number in count())


@pytest.fixture(params=VERSIONS, ids=lambda each: each.name)
def version(request):
    """Folder of a version; never to be changed."""
    make.load_matrices(request.param / "matrices")
    return request.param


@pytest.fixture
def copy(version, tmp_path):
    """Copy of a version's files, as one user's, all of them changed at one time."""
    folder = tmp_path / "copy"
    shutil.copytree(version, folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.utime(path, ns=(CHANGED_NS, CHANGED_NS))
    return folder


@pytest.fixture
def bucket(version):
    """Put objects of a version below a URL of their own."""

    def put(name):
        host = next(_hosts)
        make.put_objects(host, make.read_tree(version / "objects" / name))
        return host

    return put


@pytest.fixture
def run(cli, tmp_path):
    """Run the request that all results are of."""
    (tmp_path / "starts.txt").write_text("\n".join(map(str, STARTS)))

    def call(out, *flags, matrix=MATRIX):
        request = ("--starts", tmp_path / "starts.txt", "--length", LENGTH, "--columns", "0:3")
        return cli("run", matrix, *request, "--out", out, "--json", "-q", *flags)

    return call


def flipped(content, at):
    changed = bytearray(content)
    changed[at] ^= 0x10
    return bytes(changed)


def flip(path, at):
    path.write_bytes(flipped(path.read_bytes(), at))


def is_found(target, **given):
    """Whether `verify` finds a fault, or refuses to read."""
    try:
        return bool(pipeline.verify(target, progress=False, **given))
    except (pipeline.IntegrityError, pipeline.OpenError):
        return True


def read_windows(out):
    """What a result holds, in the order of the starts, read by Zarr or NumPy alone."""
    if out.suffix == ".npy":
        return np.load(out)
    group = zarr.open_group(out, mode="r")
    np.testing.assert_array_equal(group["starts"][:], STARTS if "places" not in group else sorted(STARTS))
    windows = group["windows"][:]
    if "places" in group:
        windows[group["places"][:]] = windows.copy()
    return windows


def digest(*parts):
    """Fingerprint of a source: SHA-256 of what it is made of, each after its length."""
    found = hashlib.sha256()
    for part in parts:
        for each in part:
            content = each if isinstance(each, bytes) else str(each).encode()
            found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()


def stats(root, *names):
    """What a fingerprint holds of files in a folder."""
    sizes = [(root / name).stat().st_size for name in names]
    changed = [CHANGED_NS] * len(names)
    return (
        "_Stats",
        root.resolve(),
        "\0".join(names),
        np.array(sizes, "<i8").tobytes(),
        np.array(changed, "<i8").tobytes(),
    )


def set_fact(journal, name, fact):
    first, rest = journal.read_text().split("\n", 1)
    header = json.loads(first)
    assert name in header["request"]
    header["request"][name] = fact
    journal.write_text(json.dumps(header) + "\n" + rest)


class TestMatrices:
    @pytest.mark.parametrize(("name", "expected"), [("A.zarr", WIDE), ("plain.zarr", NARROW), ("source.npy", NARROW)])
    def test_windows(self, copy, name, expected):
        matrix = pipeline.open_matrix(copy / "matrices" / name)
        plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
        windows = pipeline.gather(plan, progress=False)
        np.testing.assert_array_equal(
            windows[:, :, : expected.shape[1]], np.stack([expected[start : start + LENGTH] for start in STARTS])
        )
        assert not windows[:, :, expected.shape[1] :].any()

    def test_labels(self, copy):
        array = zarr.open_array(copy / "matrices" / "plain.zarr", mode="r")
        assert array.attrs["units"] == "m"
        assert array.metadata.dimension_names == ("time", "channel")

    @pytest.mark.parametrize("name", ["A.zarr", "plain.zarr"])
    def test_checksums(self, copy, name):
        root = copy / "matrices" / name
        assert pipeline.verify(root, progress=False) == []
        files = [path for path in root.rglob("*") if path.is_file()]
        assert len(files) == 5
        for path in files:
            content = path.read_bytes()
            flip(path, len(content) // 2)
            assert is_found(root)
            path.write_bytes(content)
        assert pipeline.verify(root, progress=False) == []

    @pytest.mark.parametrize(
        ("name", "file"), [("source.npy", ""), ("plain.zarr", "c/3/0"), ("plain.zarr", "zarr.json")]
    )
    def test_manifests(self, copy, name, file):
        target, manifest = copy / "matrices" / name, copy / "matrices" / f"{name}.json"
        assert pipeline.verify(target, manifest=manifest, progress=False) == []
        flip(target / file, -9)
        assert is_found(target, manifest=manifest)
        flip(target / file, -9)
        flip(manifest, -9)
        with pytest.raises(pipeline.PipelineError):
            pipeline.verify(target, manifest=manifest, progress=False)


class TestResults:
    @pytest.mark.parametrize("name", ["windows.zarr", "sorted.zarr", "windows.npy"])
    def test_windows(self, copy, run, name):
        out = copy / "results" / name
        np.testing.assert_array_equal(read_windows(out), WINDOWS, strict=True)
        order = ("--order", "chunk") if name == "sorted.zarr" else ()
        before = make.read_tree(copy / "results")
        said = run(out, "--resume", *order)
        assert said.code == 0, said.err
        assert said.numbers["finished_before"]
        assert make.read_tree(copy / "results") == before
        said = run(out, *order)
        assert said.code == 7
        assert "--overwrite" in said.out

    def test_several_arrays(self, copy):
        group = zarr.open_group(copy / "results" / "pair.zarr", mode="r")
        np.testing.assert_array_equal(group["x"][:], WINDOWS, strict=True)
        np.testing.assert_array_equal(group["y"][:], np.stack([NARROW[start : start + LENGTH] for start in STARTS]))
        assert group["y"].attrs["units"] == "m"

    @pytest.mark.parametrize("name", ["windows.zarr", "sorted.zarr", "pair.zarr"])
    def test_checksums(self, copy, name):
        root = copy / "results" / name
        assert pipeline.verify(root, progress=False) == []
        for path in [path for path in root.rglob("*") if path.is_file()]:
            content = path.read_bytes()
            flip(path, len(content) // 2)
            assert is_found(root), path
            path.write_bytes(content)

    def test_a_finished_result_that_changed_is_not_taken(self, copy, run):
        flip(copy / "results" / "windows.zarr" / "windows/c/2/0/0", 100)
        said = run(copy / "results" / "windows.zarr", "--resume")
        assert said.code == 4
        assert "windows/c/2/0/0" in said.out


class TestPartial:
    @pytest.mark.parametrize(("name", "kept"), [("windows.zarr", 2), ("windows.npy", 1)])
    def test_goes_on(self, copy, run, name, kept):
        out = copy / "partial" / name
        said = run(out)
        assert said.code == 7
        assert f"{name}.partial holds an interrupted run's remains; pass --resume" in said.out
        said = run(out, "--resume")
        assert said.code == 0, said.err
        assert (said.numbers["tasks_kept"], said.numbers["finished_before"]) == (kept, False)
        np.testing.assert_array_equal(read_windows(out), WINDOWS, strict=True)
        assert not out.with_name(f"{name}.partial").exists()
        if name == "windows.zarr":
            assert pipeline.verify(out, progress=False) == []
            changed = [(out / f"windows/c/{number}/0/0").stat().st_mtime_ns == CHANGED_NS for number in range(TASKS)]
            assert changed == [True, True, False, False]

    @pytest.mark.parametrize(("name", "kept"), [("windows.zarr", 1), ("windows.npy", 0)])
    def test_a_task_whose_bytes_changed_is_done_again(self, copy, run, name, kept):
        out = copy / "partial" / name
        (staged,) = out.with_name(f"{name}.partial").glob("output-*")
        if name == "windows.zarr":
            flip(staged / "windows/c/1/0/0", 100)
        else:
            # Task 0 is of the windows that start first.
            flip(staged, -(len(STARTS) - STARTS.index(0)) * LENGTH * 3 * 4)
        said = run(out, "--resume")
        assert (said.code, said.numbers["tasks_kept"]) == (0, kept)
        np.testing.assert_array_equal(read_windows(out), WINDOWS, strict=True)

    def test_another_request_is_refused(self, copy, run):
        said = run(copy / "partial" / "windows.zarr", "--resume", "--as-dtype", "int64")
        assert said.code == 7
        assert re.search(r"differs in .*result", said.out)

    def test_a_matrix_on_a_disk(self, copy, run):
        """Its fingerprint holds its path, and sizes and times of its files."""
        root, out = copy / "matrices" / "A.zarr", copy / "partial" / "windows.zarr"
        document = hashlib.sha256((root / "zarr.json").read_bytes()).hexdigest()
        chunks = stats(root, *(f"c/{number}/0" for number in range(4)))
        mark = digest(("_Words", (64, 32_768), "<i4"), ("_Document", "zarr.json", document), chunks)
        set_fact(out.with_name("windows.zarr.partial") / "journal", "matrix", mark)
        said = run(out, "--resume", matrix=root)
        assert said.code == 0, said.err
        assert said.numbers["tasks_kept"] == 2
        np.testing.assert_array_equal(read_windows(out), WINDOWS, strict=True)

    def test_create(self, copy, cli):
        """The fingerprint of a file holds its path, size and time."""
        source, out = copy / "matrices" / "source.npy", copy / "partial" / "matrix.zarr"
        words = ("_Words", "FileSource", 128, (64, 6), "<f8", False, 0)
        mark = digest(words, stats(source.parent, source.name))
        set_fact(out.with_name("matrix.zarr.partial") / "journal", "source", mark)
        said = cli("create", source, out, "--shard-rows", 16, "--chunk-rows", 8, "--resume", "--json", "-q")
        assert said.code == 0, said.err
        assert said.numbers["tasks_kept"] == 2
        np.testing.assert_array_equal(zarr.open_array(out, mode="r")[:], NARROW)
        assert pipeline.verify(out, progress=False) == []
        assert (out / "c/1/0").stat().st_mtime_ns == CHANGED_NS


class TestClaims:
    """Of a run on a file system without locks."""

    @staticmethod
    def say_it_is_here(partial, process, born):
        """Let the claim be of a process of this machine."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        found = json.loads((partial / "claim-1").read_text())
        (partial / "claim-1").write_text(json.dumps(found | {"process": process, "born": born, "place": place}))

    def test_of_a_process_that_is_gone(self, copy, run):
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            ended.wait()
        out = copy / "partial" / "claimed.zarr"
        self.say_it_is_here(out.with_name("claimed.zarr.partial"), ended.pid, "1")
        said = run(out, "--resume")
        assert said.code == 0, said.err
        assert said.numbers["tasks_kept"] == 2
        np.testing.assert_array_equal(read_windows(out), WINDOWS, strict=True)

    def test_of_a_process_that_runs(self, copy, run):
        out = copy / "partial" / "claimed.zarr"
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
            born = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
            self.say_it_is_here(out.with_name("claimed.zarr.partial"), other.pid, born)
            said = run(out, "--resume")
            other.communicate(b"\n")
        assert said.code == 7
        assert (
            f"another run is writing {out} at this moment (process {other.pid} on elsewhere, since 2026-01-01 00:00:00)"
            in said.out
        )


class TestObjects:
    def test_a_claim_is_recognised(self, bucket, run):
        host = bucket("unfinished")
        before = make.objects(host)
        said = run(f"memory://{host}/out.zarr")
        assert said.code == 7
        assert "process 4000000, host elsewhere, since 2026-01-01 00:00:00" in said.out
        assert "--resume" in said.out
        assert make.objects(host) == before

    def test_goes_on(self, bucket, run):
        host = bucket("unfinished")
        said = run(f"memory://{host}/out.zarr", "--resume")
        assert said.code == 0, said.err
        assert said.numbers["tasks_kept"] == 2
        self.assert_finished(host)

    def test_an_object_that_changed_is_put_again(self, bucket, run):
        host = bucket("unfinished")
        found = make.objects(host)
        chunk = next(key for key in found if "/windows/c/" in key)
        make.put_objects(host, found | {chunk: flipped(found[chunk], -1)})
        said = run(f"memory://{host}/out.zarr", "--resume")
        assert (said.code, said.numbers["tasks_kept"]) == (0, 1)
        self.assert_finished(host)

    def test_finished(self, bucket, run):
        host = bucket("finished")
        before = make.objects(host)
        said = run(f"memory://{host}/out.zarr", "--resume", "--order", "chunk")
        assert said.code == 0, said.err
        assert said.numbers["finished_before"]
        assert make.objects(host) == before
        self.assert_finished(host)
        for key, content in before.items():
            make.put_objects(host, before | {key: flipped(content, 40)})
            assert is_found(f"memory://{host}/out.zarr"), key

    @pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",), ("--resume", "--overwrite")])
    def test_a_notice_is_recognised(self, bucket, run, flags):
        """That of a replacement, which versions before this one did."""
        host = bucket("replaced")
        before = make.objects(host)
        [staged] = {key.split("/")[1] for key in before if key.startswith("out.zarr.partial/output-")}
        with pytest.raises(pipeline.OpenError, match=f"unfinished replacement .*partial/{staged}"):
            pipeline.open_matrix(f"memory://{host}/out.zarr")
        said = run(f"memory://{host}/out.zarr", *flags)
        assert said.code == 7
        assert f"the new output is whole at memory://{host}/out.zarr.partial/{staged}" in said.out
        assert make.objects(host) == before
        # It is read as any other.
        windows = pipeline.open_matrix(f"memory://{host}/out.zarr.partial/{staged}/windows")
        np.testing.assert_array_equal(windows.array[:], WINDOWS, strict=True)

    @staticmethod
    def assert_finished(host):
        assert pipeline.verify(f"memory://{host}/out.zarr", progress=False) == []
        group = zarr.open_group(zarr.storage.ManagedMemoryStore(host), path="out.zarr", mode="r")
        windows = group["windows"][:]
        if "places" in group:
            windows[group["places"][:]] = windows.copy()
        np.testing.assert_array_equal(windows, WINDOWS, strict=True)
        assert not [key for key in make.objects(host) if not key.startswith("out.zarr/")]


def test_a_state_of_batches_goes_on(version):
    rest = json.loads((version / "batches" / "rest.json").read_text())
    with make.open_batches() as batches:
        batches.load_state_dict(json.loads((version / "batches" / "state.json").read_text()))
        assert make.read_starts(batches) == rest
    assert len(rest) == len(set(rest)) == 12


def schema(value: Any) -> Any:
    """What a document has, but for its values: names, and kinds of values."""
    if isinstance(value, dict):
        return {re.sub(r"\d+", "N", name): schema(each) for name, each in value.items()}
    if isinstance(value, list):
        return [each for each, _ in groupby(map(schema, value))]
    return type(value).__name__


def describe(path: str, content: bytes) -> Any:
    """Schema of a file; of an `.npy` of ours its header without the mark; of values nothing."""
    name = path.rpartition("/")[2]
    if content.startswith(b"\x93NUMPY"):
        return re.sub(rb"[0-9a-f]{64}", b"", content[: 10 + int.from_bytes(content[8:10], "little")])
    if name == "journal":
        return schema([json.loads(line) for line in content.splitlines()])
    if name.endswith(".json") or name == "holder" or name.startswith("claim-"):
        return schema(json.loads(content))
    return None


def describe_tree(root: Path) -> dict[str, Any]:
    """Schemas of all files, by path without numbers and made-up names: which tasks a killed run did is by chance."""
    found = {}
    for path, content in make.read_tree(root).items():
        name = re.sub(r"\d+", "N", re.sub(r"(output|done|probe)-[0-9a-f]{8}", r"\1-ID", path))
        each = describe(path, content)
        assert found.setdefault(name, each) == each
    return found


def test_todays_writer_writes_the_newest_version(tmp_path):
    """A format that changes needs a folder of a new version, and readers of all older ones."""
    make.make(tmp_path / "today")
    newest = describe_tree(VERSIONS[-1])
    # Nothing replaces an output on an object store any more.
    kept = {path: each for path, each in newest.items() if not path.startswith("objects/replaced/")}
    assert describe_tree(tmp_path / "today") == kept
