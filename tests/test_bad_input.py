"""What a careless or nasty user gives: one line with the value and the way out, and not a byte changed on disk."""

from __future__ import annotations

import json
import math
import os
import pickle
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

import pipeline
from pipeline.cli.main import cli as commands

FEATURES = """
import sys, threading, numpy as np
calls = 0
def mean(block): return block.mean(axis=(1, 2))
def fails(block): raise KeyError("no such column")
def quits(block): sys.exit(0)
def loses(block): return block[1:]
def scalar(block): return block.sum()
def names(block): return np.array(["a"] * len(block))
def ragged(block): return [[1], [2, 3]][:1] + [[1, 2]] * len(block)
def writes(block):
    block[:] = 0
    return block
def nothing(block): return block[:, :0]
def wide(block): return block.astype(np.longdouble)
def interrupts(block): raise KeyboardInterrupt if len(block) > 1 else ValueError("not a block")
def hoards(block): return np.empty((len(block), 2**45))
def extra(block): return block[:, None].repeat(2, axis=0)
def nothing_at_all(block): pass
lock = threading.Lock()
def guarded(block):
    with lock: return block
def fickle(block): return block[:, :2] if len(block) > 1 else block[:, :1]
"""


@pytest.fixture(scope="module")
def junk(tmp_path_factory, samples, values):
    """Folder with `A.npy`, `A.zarr`, and everything that rows below name."""
    folder = tmp_path_factory.mktemp("junk")
    shutil.copytree(samples, folder, dirs_exist_ok=True)
    starts = {
        "neg": [3, -1],
        "past": [3, 1985],
        "float": [1.0, 2.0],
        "nan": [np.nan],
        "bool": [True, False],
        "complex": [1j],
        "two": [[1, 2], [3, 4]],
        "none": np.empty(0, np.int64),
        "u64": np.array([2**63], np.uint64),
        "words": ["1", "2"],
        "dates": np.array(["2020-01-01"], "M8[D]"),
        "objects": np.array([1, None], dtype=object),
        "scalar": 3,
        "wide": values[:10, :19],
        "f4": values[:10].astype(np.float32),
        "zero": values[:0],
        "good": [0, 1984],
        "twice": [5, 5, 1984, 5],
        "u64good": np.array([1984, 0], np.uint64),
        "u64past": np.array([0, 1985], np.uint64),
        "point": np.array(3.5),
        "flat": values[:, 0],
        "records": np.zeros(30, [("a", "i4"), ("b", "f8")]),
        "spans": np.arange(30).astype("m8[s]"),
        "long": values[:30].astype(np.longdouble),
    }
    for name, array in starts.items():
        np.save(folder / f"{name}.npy", np.asarray(array))
    (folder / "cut.npy").write_bytes((folder / "A.npy").read_bytes()[:-1])
    (folder / "head.npy").write_bytes((folder / "A.npy").read_bytes()[:40])
    with (folder / "zip.npy").open("wb") as file:
        np.savez(file, a=[1, 2])
    said = (folder / "good.npy").read_bytes()
    (folder / "lies.npy").write_bytes(said.replace(b"(2,), }" + b" " * 12, b"(2000000000000,), }"))
    (folder / "pickled.npy").write_bytes(pickle.dumps(np.array([1, 2])))
    texts = {
        "header.txt": "start\n1\n2\n",
        "neg.txt": "3\n-1\n",
        "float.txt": "1.5\n",
        "signs.txt": "--5\n",
        "huge.txt": f"{10**30}\n",
        "digits.txt": "1" * 5000,
        "blank.txt": "\n\n",
        "table.csv": "a,b\n1,2\n",
        "features.py": FEATURES,
        "quits.py": "import sys\nsys.exit(0)\n",
        "syntax.py": "def mean(block) return\n",
        "unknown.yaml": "version: 1\nkwargs: {n_worker: 1}\n",
        "limit.yaml": "version: 1\nkwargs: {memory_limit: 4GB}\n",
        "torn.yaml": "version: [1\n",
        "evil.yaml": "version: 1\nmodule: os\nclass: system\n",
        "empty.yaml": "",
        "list.yaml": "- version: 1\n",
        "tab.yaml": "version: 1\n\tclass: LocalCluster\n",
        "twice.yaml": "version: 1\nkwargs: {n_workers: 1, n_workers: 2}\n",
        "scale.yaml": "version: 1\nscale: {workers: 0}\n",
        "none.yaml": "version: 1\nkwargs: {n_workers: 0}\n",
        "dask.yaml": "version: 1\ndistributed: {schedular: {}}\n",
        "tag.yaml": "version: 1\nkwargs: !!python/object/apply:os.system ['touch ran']\n",
        "processes.yaml": "version: 1\nkwargs: {processes: true, dashboard_address: null}\n",
        "notes.txt": "to do\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes(b"\xff\xfe1\n")
    (folder / "raw.bin").write_bytes(bytes(range(250)) * 4 + b"!")
    (folder / "empty.bin").write_bytes(b"")
    (folder / "any.pkl").write_bytes(pickle.dumps([1, 2, 3]))
    (folder / "plain.zarr").mkdir()
    (folder / "plain.zarr/keep.txt").write_text("keep")
    (folder / "mine.npy").write_text("not an array")
    os.mkfifo(folder / "pipe")
    for name, text in {"torn.zarr": '{"zarr_format": 3, ', "list.zarr": "[]", "bare.zarr": "{}"}.items():
        (folder / name).mkdir()
        (folder / name / "zarr.json").write_text(text)
    (folder / "link.zarr").symlink_to("A.zarr")
    (folder / "results.zarr").symlink_to("W.zarr")
    (folder / "home.zarr").mkdir()
    (folder / "home.zarr/.profile").write_text("umask 022\n")
    pipeline.create_matrix([folder / "A.npy", folder / "A.npy"], folder / "P.zarr", shard_rows=512, chunk_rows=8)
    zarr.create_group(folder / "G.zarr").create_array("inner", data=values)
    zarr.create_group(folder / "deep.zarr").create_group("below").create_array("inner", data=values)
    zarr.create_array(folder / "zero.zarr", shape=(0, 3), chunks=(1, 3), dtype="f8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns of dtypes that other programs may not know
        for name, dtype in {"text": "<U4", "dates": "M8[s]", "records": [("a", "i4"), ("b", "f8")]}.items():
            zarr.create_array(folder / f"{name}.zarr", shape=(30,), chunks=(10,), dtype=np.dtype(dtype))
    zarr.create_array(folder / "point.zarr", shape=(), chunks=(), dtype="f8")
    zarr.create_array(folder / "codec.zarr", data=values[:30])
    edit(folder / "codec.zarr/zarr.json", lambda metadata: metadata["codecs"][-1].update(name="lz77"))
    zarr.create_array(folder / "codec2.zarr", data=values[:30], zarr_format=2)
    edit(folder / "codec2.zarr/.zarray", lambda metadata: metadata.update(compressor={"id": "lz77"}))
    # 512 GiB, and a file for it that is there.
    for name, shape in {"huge": (2**36, 20), "broad": (2000, 2**25)}.items():
        zarr.create_array(folder / f"{name}.zarr", data=values[:30])
        edit(
            folder / f"{name}.zarr/zarr.json",
            lambda metadata, shape=shape: metadata["chunk_grid"]["configuration"].update(chunk_shape=shape),
        )
    forged = zarr.create_array(folder / "forged.zarr", data=values)
    forged.attrs["random-windows"] = {"kind": "matrix", "parts": [[0, 10], [20, 2000]]}
    plan = pipeline.plan_windows(pipeline.open_matrix(folder / "A.zarr"), [5, 3], length=16)
    pipeline.store(plan, folder / "W.zarr")
    return folder


@pytest.fixture
def rows(junk, cli, monkeypatch):
    """The same as `here`, one folder for all: each row sees that it changes nothing."""
    monkeypatch.chdir(junk)
    modules = set(sys.modules)
    yield junk
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(junk)):
            del sys.modules[name]


def edit(path, change):
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


@pytest.fixture
def here(junk, cli, tmp_path):
    """The working directory, with all of `junk` in it."""
    shutil.copytree(junk, tmp_path, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns("pipe"))
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def snapshot(folder):
    """Every path below a folder, with what tells whether it was written to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = ("link", str(path.readlink()))
        elif path.is_file():
            status = path.stat()
            found[path] = ("file", status.st_ino, status.st_size, status.st_mtime_ns)
        else:
            found[path] = ("folder" if path.is_dir() else "special", None)
    return found


def check(cli, folder, arguments, code, words):
    """Run a line that must fail: its code, its words, one line on stderr, nothing on stdout, nothing new on disk."""
    before = snapshot(folder)
    said = cli(*arguments)
    assert (said.code, said.err.count("\n")) == (code, 1), said
    assert said.err.startswith("error: ")
    assert not {"Traceback", "Usage:"} & set(said.err.split())
    assert [word for word in words if word not in said.err] == [], said.err
    if "--json" in arguments:
        line = said.err.removeprefix("error: ").rstrip("\n")
        # A name that is no UTF-8 is escaped by each of the two in its own way.
        numbers = said.numbers
        assert numbers.pop("error").encode(errors="backslashreplace").decode() == line
        assert numbers == {"exit_code": code}
    else:
        assert said.out == ""
    assert snapshot(folder) == before


LONG = "x" * 300

STARTS = [
    ("neg.npy", 2, ["-1 at place 1 of neg.npy", "0 to 1984"]),
    ("past.npy", 2, ["1985 at place 1", "0 to 1984"]),
    ("float.npy", 2, ["float64", "every value is a whole number", "int64"]),
    ("nan.npy", 2, ["nan at place 0"]),
    ("bool.npy", 2, ["mask", "flatnonzero"]),
    ("complex.npy", 2, ["complex128", "1j at place 0"]),
    ("words.npy", 2, ["<U1", "'1' at place 0"]),
    ("dates.npy", 2, ["datetime64", "2020-01-01", "searchsorted"]),
    ("two.npy", 2, ["(2, 2)", "one-dimensional"]),
    ("scalar.npy", 2, ["()", "one-dimensional"]),
    ("none.npy", 2, ["(0,)", "at least one"]),
    ("u64.npy", 2, ["9223372036854775808 at place 0", "0 to 1984"]),
    ("objects.npy", 3, ["objects.npy", "write it anew"]),
    ("cut.npy", 3, ["cut.npy", "write it anew"]),
    ("head.npy", 3, ["head.npy", "write it anew"]),
    ("zip.npy", 3, ["zip.npy", "write it anew"]),
    ("lies.npy", 3, ["lies.npy", "write it anew"]),
    ("pickled.npy", 3, ["pickled.npy", "write it anew"]),
    ("u64past.npy", 2, ["1985 at place 1", "0 to 1984"]),
    ("records.npy", 2, ["'a'", "at place 0"]),
    ("table.csv", 3, ["table.csv, line 1: 'a,b' is not a whole number"]),
    ("any.pkl", 3, ["any.pkl", "write it anew"]),
    ("mine.npy", 3, ["mine.npy", "write it anew"]),
    ("header.txt", 3, ["header.txt, line 1: 'start' is not a whole number"]),
    ("float.txt", 3, ["float.txt, line 1: '1.5' is not a whole number"]),
    ("neg.txt", 2, ["-1 at line 2 of neg.txt", "0 to 1984"]),
    ("signs.txt", 3, ["signs.txt", "--5"]),
    ("huge.txt", 2, ["huge.txt", str(10**30)]),
    ("digits.txt", 2, ["digits.txt", "1111"]),
    ("blank.txt", 2, ["at least one"]),
    ("latin.txt", 3, ["latin.txt", "write it anew"]),
    ("absent.npy", 3, ["absent.npy", "check the path"]),
    (".", 3, ["starts", "write it anew"]),
    (f"{LONG}.txt", 3, [LONG]),
    ("good.npy --count 5", 2, ["--count", "--starts", "drop one"]),
    ("good.npy --seed 5", 2, ["--seed", "--starts", "drop one"]),
    ("good.npy --length 17", 2, ["1984 at place 1", "0 to 1983"]),
]

REQUESTS = [
    ("A.zarr --length 0", 2, ["length 0", "1 to 2000"]),
    ("A.zarr --length -16", 2, ["length -16", "1 to 2000"]),
    ("A.zarr --length 2001", 2, ["length 2001", "1 to 2000"]),
    ("A.zarr --length 1e3", 2, ["1e3", "--help"]),
    (f"A.zarr --length {10**30}", 2, [str(10**30), "1 to 2000"]),
    ("A.zarr --count 0", 2, ["count", "got 0", "at least 1"]),
    ("A.zarr --count -1", 2, ["count", "got -1", "at least 1"]),
    (f"A.zarr --count {10**15}", 5, ["000"]),
    (f"A.zarr --count {10**30}", 5, ["000"]),
    ("A.zarr --seed -1", 2, ["seed", "got -1", "at least 0"]),
    ("A.zarr --seed x", 2, ["'x'", "--help"]),
    ("A.zarr --within parts", 2, ["--within parts", "A.zarr", "drop it"]),
    ("A.zarr --within files", 3, ["nothing is at files", "check the path"]),
    ("A.zarr --stride 0", 2, ["stride", "got 0", "at least 1"]),
    ("A.zarr --stride 16 --count 5", 2, ["--stride", "--count", "drop one"]),
    ("A.zarr --starts good.npy --split-by order", 2, ["--starts", "--split-by", "drop one"]),
    ("A.zarr --part train", 2, ["--part", "no --split"]),
    ("A.zarr --split-seed 1", 2, ["--split-seed", "no --split"]),
    ("A.zarr --split 0.8,0.2", 2, ["--part", "got none", "train, test, 0, 1"]),
    ("A.zarr --split 0.8,0.2 --part validation", 2, ["'validation'", "train, test, 0, 1"]),
    ("A.zarr --split 0.8,x --part 0", 2, ["'0.8,x'", "0.8,0.1,0.1"]),
    ("A.zarr --split 0.8,0.3 --part 0", 2, ["[0.8, 0.3]", "sum is at most 1"]),
    ("A.zarr --split nan,0.3 --part 0", 2, ["nan", "positive"]),
    ("A.zarr --split 0.8,0.2 --part 0 --split-seed -1", 2, ["seed", "got -1"]),
    ("A.zarr --split 0.8,0.2 --part 0 --split-by order --split-seed 1", 2, ["--split-seed", "drop one"]),
    ("A.zarr --split 0.8,0.2 --part 0 --split-by intervals", 2, ["part test", "--within"]),
    ("A.zarr --split 0.999,0.001 --part 0", 2, ["part test of 2,000 rows", "none of 16 rows"]),
    ("P.zarr --within parts --length 2001", 2, ["2000 rows", "2001"]),
    ("A.zarr --order chunk", 2, ["--order chunk", "--out", "drop it"]),
    ("A.zarr --order request --out W.npy", 2, ["--order request", "W.npy", "drop it"]),
    ("A.zarr --order sorted --out X.zarr", 2, ["sorted", "chunk"]),
    ("A.zarr --memory ''", 2, ["''", "8GB"]),
    ("A.zarr --memory -1GB", 2, ["'-1GB'", "8GB"]),
    ("A.zarr --memory 8XB", 2, ["'8XB'", "8GB"]),
    ("A.zarr --memory 0", 2, ["'0'", "8GB"]),
    ("A.zarr --memory nan", 2, ["'nan'", "8GB"]),
    (
        "A.zarr --memory 1MB",
        5,
        ["needs", "24.4 MiB for the array of 10,000", "--memory allows 977 KiB; raise the limit"],
    ),
    ("A.zarr --memory 1MiB", 5, ["64.0 MiB to run with", "--memory allows 1.00 MiB; raise the limit"]),
    (
        "A.zarr --count 5 --memory 10",
        5,
        [
            "the run needs",
            "12.5 KiB for the array of 5 windows",
            "allows 10 B (a number without a unit is bytes; write such as 8GB); raise",
        ],
    ),
    (
        "A.zarr --count 5 --memory 10 --out X.zarr",
        5,
        ["the run needs", "for one task of store", "allows 10 B (a number without a unit"],
    ),
    ("A.zarr --memory 1MiB --out X.npy", 5, ["one task", "--memory allows 1.00 MiB", "raise"]),
    ("A.zarr --memory 1MiB --out X.zarr", 5, ["one task", "--memory allows 1.00 MiB", "raise"]),
    ("A.zarr --out X.h5", 2, ["'X.h5'", ".zarr or .npy"]),
    ("A.zarr --out X", 2, ["'X'", ".zarr or .npy"]),
    ("A.zarr --out ''", 2, ["''", ".zarr or .npy"]),
    ("A.zarr --out /", 2, ["'/'", ".zarr or .npy"]),
    ("A.zarr --out .npy", 2, ["'.npy'", ".zarr or .npy"]),
    ("A.zarr --out X.NPY", 2, ["'X.NPY'", ".zarr or .npy"]),
    ("A.zarr --out absent/X.npy", 3, ["absent", "make it first"]),
    ("A.zarr --out absent/X.zarr", 3, ["absent", "make it first"]),
    ("A.zarr --out raw.bin/X.zarr", 3, ["raw.bin", "make it first"]),
    (f"A.zarr --out {LONG}.npy", 3, [LONG]),
    (f"A.zarr --out {LONG}.zarr", 3, [LONG]),
    ("A.zarr --out good.npy", 7, ["good.npy exists", "--overwrite"]),
    ("A.zarr --out W.zarr", 7, ["W.zarr exists", "--overwrite"]),
    ("A.zarr --out plain.zarr", 7, ["plain.zarr exists", "name another"]),
    ("A.zarr --out plain.zarr --overwrite", 7, ["plain.zarr is none", "name another"]),
    ("A.zarr --out G.zarr --overwrite", 7, ["G.zarr is none", "name another"]),
    ("A.zarr --out link.zarr --overwrite", 7, ["link.zarr", "name another"]),
    ("A.zarr --out results.zarr --overwrite", 7, ["results.zarr is none", "name another"]),
    ("A.zarr --out home.zarr --overwrite", 7, ["home.zarr is none", "name another"]),
    ("A.zarr --out A.npy --overwrite", 7, ["A.npy is none", "name another"]),
    ("A.zarr --out good.npy --overwrite", 7, ["good.npy is none", "name another"]),
    ("A.zarr --out . --overwrite", 2, ["'.'", ".zarr or .npy"]),
    ("A.zarr --out ~ --overwrite", 2, ["~", ".zarr or .npy"]),
    ("A.zarr --out mine.npy --overwrite", 7, ["mine.npy is none", "name another"]),
    ("A.zarr --out A.zarr", 7, ["A.zarr", "name another"]),
    ("A.zarr --out A.zarr --overwrite", 7, ["A.zarr", "name another"]),
    ("A.zarr --out ./plain.zarr/../A.zarr --overwrite", 7, ["A.zarr", "name another"]),
    ("link.zarr --out A.zarr --overwrite", 7, ["A.zarr", "name another"]),
    ("A.zarr --out A.zarr/X.zarr", 7, ["A.zarr", "name another"]),
    ("A.zarr --out A.zarr/c/X.npy", 7, ["A.zarr", "name another"]),
    ("W.zarr/windows --length 1 --out W.zarr --overwrite", 7, ["W.zarr", "name another"]),
    ("A.zarr --starts good.npy --out good.npy --overwrite", 7, ["good.npy", "name another"]),
    ("A.zarr --apply features", 2, ["'features'", "features:mean"]),
    ("A.zarr --apply features:", 2, ["'features:'", "features:mean"]),
    ("A.zarr --apply ''", 2, ["''", "features:mean"]),
    ("A.zarr --apply absent:mean", 2, ["absent", "ModuleNotFoundError"]),
    ("A.zarr --apply .features:mean", 2, [".features"]),
    ("A.zarr --apply features:man", 2, ["features", "'man'", "check its name"]),
    ("A.zarr --apply features:calls", 2, ["'calls'", "check its name"]),
    ("A.zarr --apply syntax:mean", 2, ["syntax", "SyntaxError"]),
    ("A.zarr --apply quits:mean", 2, ["quits", "SystemExit"]),
    ("A.zarr --apply features:fails", 4, ["KeyError", "no such column", "row", "mend it"]),
    ("A.zarr --apply features:quits", 4, ["SystemExit", "mend it"]),
    ("A.zarr --apply features:loses", 4, ["(0, 16, 20)", "keep the first axis"]),
    ("A.zarr --apply features:scalar", 4, ["shape ()", "keep the first axis"]),
    ("A.zarr --apply features:names", 4, ["<U1", "convert"]),
    ("A.zarr --apply features:ragged", 4, ["ValueError", "mend it"]),
    ("A.zarr --apply features:writes", 4, ["read-only", "let it copy what it changes"]),
    ("A.zarr --apply features:hoards", 5, ["apply fits the memory", "1 window, the first at row", "hold less"]),
    ("A.zarr --apply features:extra", 4, ["shape (2, 1, 16, 20)", "keep the first axis"]),
    ("A.zarr --apply features:nothing_at_all", 4, ["shape ()", "keep the first axis"]),
    ("A.zarr --apply features:nothing --out X.zarr", 4, ["(0, 20)"]),
    ("A.zarr --apply features:wide --out X.zarr", 4, ["float128", "convert"]),
]

MATRICES = [
    ("absent.zarr", 3, ["absent.zarr", "check the path"]),
    ("absent/deep/A.zarr", 3, ["absent/deep/A.zarr", "check the path"]),
    ("memory://nothing/A.zarr", 3, ["nothing is at memory://nothing/A.zarr"]),
    (f"{LONG}.zarr", 3, [LONG]),
    ("pipe", 3, ["pipe"]),
    ("deep.zarr", 3, ["deep.zarr is a group", "write deep.zarr/below/inner"]),
    ("plain.zarr", 3, ["plain.zarr", "zarr.json", "name a folder"]),
    ("torn.zarr", 3, ["torn.zarr", "restore"]),
    ("list.zarr", 3, ["list.zarr", "restore"]),
    ("bare.zarr", 3, ["bare.zarr"]),
    ("zero.zarr", 2, ["(0, 3)", "give another"]),
    ("text.zarr", 2, ["<U4", "convert"]),
    ("dates.zarr", 2, ["datetime64[s]", "convert"]),
    ("records.zarr", 2, ["'a'", "convert"]),
    ("point.zarr", 2, ["shape ()", "give another"]),
    ("codec.zarr", 3, ["codec.zarr", "lz77", "restore"]),
    ("codec2.zarr", 3, ["codec2.zarr", "lz77", "restore"]),
    ("notes.txt", 3, ["notes.txt is text", "numpy.loadtxt"]),
    ("words.npy", 2, ["<U1", "convert"]),
    ("dates.npy", 2, ["datetime64[D]", "convert"]),
    ("records.npy", 2, ["'a'", "convert"]),
    ("objects.npy", 3, ["objects.npy", "never unpickled", "plain numbers"]),
    ("long.npy", 2, ["float128", "convert"]),
    ("point.npy", 2, ["without axes"]),
    ("zero.npy", 2, ["(0, 20)"]),
    ("cut.npy", 3, ["cut.npy", "320127 of the 320128", "copy it again"]),
    ("forged.zarr", 3, ["forged.zarr", "[[0, 10], [20, 2000]]"]),
    ("''", 3, ["name a folder"]),
    ("'my matrix.zarr'", 3, ["my matrix.zarr", "check the path"]),
    (os.fsdecode(b"caf\xe9.zarr"), 3, ["caf", "check the path"]),
    ("'two\nlines.zarr'", 3, ["two\\nlines.zarr", "check the path"]),
]

CREATIONS = [
    ("absent.npy X.zarr", 3, ["absent.npy", "name of a file"]),
    ("absent/A.npy X.zarr", 3, ["absent/A.npy", "name of a file"]),
    ("memory://nothing/A.zarr X.zarr", 3, ["nothing is at memory://nothing/A.zarr"]),
    (f"{LONG}.npy X.zarr", 3, [LONG]),
    ("G.zarr X.zarr", 3, ["G.zarr is a group", "G.zarr/inner"]),
    ("plain.zarr X.zarr", 3, ["plain.zarr", "zarr.json", "name a folder"]),
    ("torn.zarr X.zarr", 3, ["torn.zarr", "restore"]),
    ("cut.npy X.zarr", 3, ["cut.npy", "320127 of the 320128", "copy it again"]),
    ("head.npy X.zarr", 3, ["head.npy", "numpy.save"]),
    ("mine.npy X.zarr", 3, ["mine.npy", "numpy.save"]),
    ("zip.npy X.zarr", 3, ["zip.npy is a ZIP archive", "unpack it"]),
    ("objects.npy X.zarr", 3, ["objects.npy", "never unpickled", "plain numbers"]),
    ("words.npy X.zarr", 2, ["<U1", "convert"]),
    ("dates.npy X.zarr", 2, ["datetime64[D]", "convert"]),
    ("spans.npy X.zarr", 2, ["timedelta64[s]", "convert"]),
    ("records.npy X.zarr", 2, ["'a'", "convert"]),
    ("long.npy X.zarr", 2, ["float128", "convert"]),
    ("text.zarr X.zarr", 2, ["<U4", "convert"]),
    ("dates.zarr X.zarr", 2, ["datetime64[s]", "convert"]),
    ("records.zarr X.zarr", 2, ["'a'", "convert"]),
    ("point.zarr X.zarr", 2, ["point.zarr", "without axes"]),
    ("zero.zarr X.zarr", 2, ["(0, 3)", "name another"]),
    ("codec.zarr X.zarr", 3, ["codec.zarr", "lz77", "restore"]),
    ("notes.txt X.zarr", 3, ["notes.txt is text", "numpy.loadtxt"]),
    ("lies.npy X.zarr", 3, ["lies.npy", "16000000000128 bytes", "copy it again"]),
    ("pickled.npy X.zarr", 3, ["pickled.npy", "numpy.save"]),
    *(
        (f"{name}.zarr X.zarr", 5, [f"{name}.zarr takes", "GiB", "allows", "smaller chunks"])
        for name in ("huge", "broad")
    ),
    ("zero.npy X.zarr", 2, ["(0, 20)", "name another"]),
    ("scalar.npy X.zarr", 2, ["scalar.npy", "without axes"]),
    ("any.pkl X.zarr", 3, ["any.pkl is a pickle", "numpy.save"]),
    ("table.csv X.zarr", 3, ["table.csv is text", "numpy.loadtxt"]),
    ("raw.bin X.zarr", 2, ["raw.bin", "--dtype"]),
    ("raw.bin X.zarr --dtype float32", 2, ["raw.bin", "--row-shape"]),
    ("raw.bin X.zarr --dtype f4 --row-shape 5", 3, ["1001 bytes", "50 rows", "1 bytes more", "check --dtype"]),
    ("raw.bin X.zarr --dtype f4 --row-shape 0", 2, ["(1, 0)"]),
    ("raw.bin X.zarr --dtype f4 --row-shape -5", 2, ["'-5'", "64,64"]),
    ("raw.bin X.zarr --dtype f4 --row-shape 5,", 3, ["1001 bytes"]),
    ("raw.bin X.zarr --dtype f4 --row-shape five", 2, ["'five'", "64,64"]),
    ("raw.bin X.zarr --dtype f99 --row-shape 5", 2, ["'f99'", "float32"]),
    ("raw.bin X.zarr --dtype O --row-shape 5", 2, ["'O'", "float32"]),
    ("empty.bin X.zarr --dtype f4 --row-shape 5", 2, ["(0, 5)"]),
    ("A.npy X.zarr --dtype f4", 2, ["--dtype", "A.npy", "leave --dtype out"]),
    ("A.npy X.zarr --dataset d", 2, ["--dataset", "A.npy", "leave --dataset out"]),
    ("A.npy::d X.zarr", 2, ["A.npy", "HDF5", "leave ::d out"]),
    ("A.npy X.zarr --axis 2", 2, ["(2000, 20)", "axis 2"]),
    ("A.npy wide.npy X.zarr", 2, ["wide.npy", "19", "20"]),
    ("A.npy f4.npy X.zarr", 2, ["f4.npy", "float32", "float64"]),
    ("A.npy absent.npy X.zarr", 3, ["absent.npy"]),
    ("pipe X.zarr --dtype f4 --row-shape 5", 3, ["pipe is neither", "copy it"]),
    ("A.npy X.zarr --length 0", 2, ["length", "got 0", "at least 1"]),
    ("A.npy X.zarr --chunk-rows 0", 2, ["chunk_rows", "got 0", "at least 1"]),
    ("A.npy X.zarr --shard-rows -1", 2, ["shard_rows", "got -1", "at least 0"]),
    ("A.npy X.zarr --shard-rows 9 --chunk-rows 2", 2, ["9 shard rows", "multiple of 2"]),
    (f"A.npy X.zarr --shard-rows {8 * 10**30}", 5, ["X.zarr"]),
    ("A.npy X.zarr --compress lz77", 2, ["lz77", "zstd"]),
    ("A.npy X.zarr --memory 1MiB", 5, ["one task", "--memory allows 1.00 MiB", "raise"]),
    ("A.npy X.zarr --memory x", 2, ["'x'", "8GB"]),
    ("random:10 X.zarr --seed -1", 2, ["seed", "got -1", "larger"]),
    ("random:10x X.zarr", 2, ["'random:10x'", "random:100000x500"]),
    ("random:0x5 X.zarr", 2, ["(0, 5)"]),
    ("random:10x5 X.zarr --dtype i4", 2, ["int32", "float64 or float32"]),
    ("random:999999999999x999999999999 X.zarr", 2, ["2**63"]),
    ("random:1000000000x2000 X.zarr", 5, ["14.6 TiB", "free some"]),
    ("A.npy X", 2, ["got X", ".zarr"]),
    ("A.npy X.npy", 2, ["got X.npy", ".zarr"]),
    ("A.npy W.zarr", 7, ["W.zarr exists", "--overwrite"]),
    ("A.npy plain.zarr", 7, ["plain.zarr exists", "name another"]),
    ("A.npy plain.zarr --overwrite", 7, ["plain.zarr is none", "name another"]),
    ("A.npy home.zarr --overwrite", 7, ["home.zarr is none", "name another"]),
    ("A.npy results.zarr --overwrite", 7, ["results.zarr is none", "name another"]),
    ("A.npy .", 2, ["name it .zarr"]),
    ("A.npy ~ --overwrite", 2, ["~", ".zarr"]),
    ("A.npy G.zarr --overwrite", 7, ["G.zarr is none", "name another"]),
    ("A.npy absent/X.zarr", 3, ["absent", "make it first"]),
    (f"A.npy {LONG}.zarr", 3, [LONG]),
    ("A.zarr A.zarr", 7, ["A.zarr", "name another"]),
    ("A.npy --memory 1MB X.zarr", 5, ["one task", "needs", "--memory allows 977 KiB", "raise"]),
    ("A.zarr A.zarr --overwrite", 7, ["apart", "A.zarr", "name another"]),
    ("A.zarr A.zarr/X.zarr", 7, ["apart", "A.zarr", "name another"]),
    ("link.zarr A.zarr --overwrite", 7, ["apart", "link.zarr", "name another"]),
    ("A.zarr P.zarr A.zarr --overwrite", 7, ["A.zarr", "name another"]),
    ("W.zarr/windows W.zarr --overwrite", 7, ["W.zarr", "name another"]),
]

LINES = [
    ("rum A.zarr", 2, ["'rum'", "pipeline --help"]),
    ("run", 2, ["MATRIX", "pipeline run --help"]),
    ("create", 2, ["DEST", "pipeline create --help"]),
    ("create A.npy", 2, ["SOURCE", "got A.npy alone"]),
    ("info", 2, ["MATRIX", "pipeline info --help"]),
    ("info A.zarr P.zarr", 2, ["P.zarr", "pipeline info --help"]),
    ("info A.zarr --lenght 3", 2, ["'--lenght'", "'--length'"]),
    ("info A.zarr --length 0", 2, ["length 0", "1 to 2000"]),
    ("run A.zarr --count", 2, ["--count", "--help"]),
    ("plan A.zarr --cluster x.yaml", 2, ["--cluster", "pipeline plan --help"]),
    ("run A.zarr --cluster absent.yaml", 3, ["absent.yaml", "correct its path"]),
    ("run A.zarr --cluster unknown.yaml", 2, ["'n_worker'", "unknown.yaml", "'n_workers'"]),
    ("run A.zarr --cluster limit.yaml", 2, ["'4GB'", "memory_limit=0"]),
    ("run A.zarr --cluster torn.yaml", 3, ["torn.yaml"]),
    ("run A.zarr --cluster evil.yaml", 2, ["os.system", "LocalCluster"]),
    ("run A.zarr --cluster .", 3, ["readable"]),
    ("run A.zarr --cluster empty.yaml", 3, ["empty.yaml", "cluster.yaml that comes with"]),
    ("run A.zarr --cluster list.yaml", 3, ["got list in list.yaml", "cluster.yaml that comes with"]),
    ("run A.zarr --cluster tab.yaml", 3, ["tab.yaml", "'\\t'", "line 2", "correct it"]),
    ("run A.zarr --cluster twice.yaml", 2, ["'n_workers' twice in twice.yaml", "line 2", "drop one"]),
    ("run A.zarr --cluster scale.yaml", 2, ["scale.yaml", "`int` >= 1", "correct it"]),
    ("run A.zarr --cluster none.yaml", 2, ["n_workers", "got 0", "larger"]),
    ("run A.zarr --cluster dask.yaml", 2, ["'schedular'", "dask.yaml", "'scheduler'"]),
    ("run A.zarr --cluster tag.yaml", 2, ["a tag", "tag.yaml, line 2", "write it out"]),
    ("run A.zarr --cluster any.pkl", 3, ["any.pkl", "readable"]),
    ("run A.zarr --cluster processes.yaml --apply features:guarded", 2, ["pickled", "lock", "processes: false"]),
    ("run A.zarr --cluster 'my file.yaml'", 3, ["my file.yaml", "correct its path"]),
    *((f"{verb} --workers 0", 2, ["--workers"]) for verb in ("run A.zarr", "create A.npy X.zarr", "demo absent")),
    *(
        (f"{verb} {name}.zarr", 5, [f"{name}.zarr takes", "allows"])
        for verb in ("run", "plan")
        for name in ("huge", "broad")
    ),
    ("create A.npy X.zarr --cluster absent.yaml", 3, ["absent.yaml", "correct its path"]),
    ("demo absent --cluster absent.yaml", 3, ["absent.yaml", "correct its path"]),
    ("demo raw.bin -q", 3, ["raw.bin"]),
    ("demo raw.bin/deep -q", 3, ["raw.bin"]),
]

ROWS = [
    *((f"plan A.zarr --starts {file}", code, words) for file, code, words in STARTS),
    *((f"plan {line}", code, words) for line, code, words in REQUESTS),
    *((f"{verb} {line}", code, words) for line, code, words in MATRICES for verb in ("info", "run")),
    *((f"create {line}", code, words) for line, code, words in CREATIONS),
    *LINES,
]


@pytest.mark.parametrize(
    ("line", "code", "words"), ROWS, ids=[ascii(line.replace(LONG, "x300")) for line, _, _ in ROWS]
)
def test_one_line_and_nothing_changed(cli, rows, line, code, words):
    arguments = shlex.split(line)
    check(cli, rows, arguments, code, words)
    if arguments and arguments[0] in commands.commands:
        check(cli, rows, [*arguments, "--json"], code, words)


@pytest.mark.parametrize("line", ["A.zarr --apply features:fails", "A.zarr --out plain.zarr --overwrite"])
def test_run_refuses_what_plan_refuses(cli, here, line):
    for verb in ("plan", "run"):
        check(cli, here, [verb, *line.split()], 4 if "apply" in line else 7, [])


@pytest.mark.parametrize(
    ("line", "starts", "out"),
    [
        ("A.zarr --starts twice.npy", [5, 5, 1984, 5], "w.npy"),
        ("A.zarr --starts u64good.npy", [1984, 0], "w.zarr"),
        ("'my matrix.zarr' --starts 'my starts.txt'", [3, 1984], "my w.npy"),
        ("'my matrix.zarr' --starts 'my starts.txt'", [3, 1984], "my w.zarr"),
        ("'two\nlines.zarr' --starts 'my starts.txt'", [3, 1984], "two\nw.npy"),
        ("'two\nlines.zarr' --starts 'my starts.txt'", [3, 1984], "two\nw.zarr"),
        (os.fsdecode(b"caf\xe9.zarr --starts caf\xe9.txt"), [3, 1984], os.fsdecode(b"\xe9.npy")),
        (os.fsdecode(b"caf\xe9.npy --starts caf\xe9.txt"), [3, 1984], os.fsdecode(b"\xe9.zarr")),
    ],
    ids=ascii,
)
def test_what_only_looks_bad(cli, here, values, line, starts, out):
    for name in ("my matrix.zarr", "two\nlines.zarr", os.fsdecode(b"caf\xe9.zarr")):
        (here / name).symlink_to("A.zarr")
    (here / os.fsdecode(b"caf\xe9.npy")).symlink_to("A.npy")
    for name in ("my starts.txt", os.fsdecode(b"caf\xe9.txt")):
        (here / name).write_text("3 1984")
    said = cli("run", *shlex.split(line), "--out", out, "--json", "-q")
    assert (said.code, said.err) == (0, "")
    assert said.numbers["out"] == out
    windows = np.load(out) if out.endswith(".npy") else zarr.open_group(here / out, mode="r")["windows"][:]
    np.testing.assert_array_equal(windows, np.stack([values[start : start + 16] for start in starts]))
    assert not list(here.glob("*.partial"))


@pytest.mark.parametrize("dtype", ["c8", "c16", "?", "f2", "u8", ">i2"])
@pytest.mark.parametrize("row_shape", [(), (4, 5)], ids=["1-d", "3-d"])
def test_dtypes_and_axes_that_work(cli, tmp_path, dtype, row_shape):
    rows = np.arange(100 * math.prod(row_shape)).reshape(100, *row_shape)
    rows = (rows * (1 - 2j) if "c" in dtype else rows % 3 if dtype == "?" else rows).astype(dtype)
    np.save(tmp_path / "A.npy", rows)
    assert cli("create", "A.npy", "A.zarr", "-q").code == 0
    (tmp_path / "s.txt").write_text("84 0 3")
    expected = np.stack([rows[start : start + 16] for start in (84, 0, 3)]).astype(rows.dtype.newbyteorder("="))
    for matrix, out in (("A.zarr", "w.npy"), ("A.zarr", "w.zarr"), ("A.npy", "v.npy"))[: 2 if ">" in dtype else 3]:
        assert cli("run", matrix, "--starts", "s.txt", "--out", out, "-q").code == 0
        windows = np.load(out) if out.endswith(".npy") else zarr.open_group(out, mode="r")["windows"][:]
        np.testing.assert_array_equal(windows, expected, strict=True)


def test_a_bad_cluster_file_that_nobody_named(cli, here):
    (here / "cluster.yaml").write_text("version: 1\nclas: LocalCluster\n")
    for line in ("run A.zarr", "create A.npy X.zarr", "demo absent"):
        check(cli, here, line.split(), 2, ["'clas'", "cluster.yaml", "'class'"])


def test_home_is_no_output(cli, here, monkeypatch):
    """Whatever it is called, and however it is written."""
    monkeypatch.setenv("HOME", str(here / "home.zarr"))
    for out in (here / "home.zarr", f"{here}/./home.zarr/", "plain.zarr/../home.zarr"):
        for line in (["run", "A.zarr", "--out", out], ["create", "A.npy", out]):
            check(cli, here, line, 7, ["home.zarr"])
            check(cli, here, [*line, "--overwrite"], 7, ["home.zarr is none", "name another"])


def test_a_result_that_cannot_be_replaced_survives(cli, here):
    """Our own is moved aside until the new one is complete."""
    assert cli("run", "A.zarr", "--count", 5, "--out", "w.npy", "-q").code == 0
    for out in ("w.npy", "W.zarr"):
        line = f"run A.zarr --count 5000 --apply features:fickle --out {out} --overwrite -q"
        before = (here / out).read_bytes() if out == "w.npy" else snapshot(here / out)
        assert cli(*line.split()).code == 4
        assert before == ((here / out).read_bytes() if out == "w.npy" else snapshot(here / out))


def test_apply_that_changes_its_mind(cli, here):
    # The probe sees one window, the first task thousands.
    line = "run A.zarr --apply features:fickle --out X.npy -q"
    check(cli, here, line.split(), 4, ["(1, 20)", "(2, 20)", "task ", "rows", "mend it"])


ROW_FILES = [
    # The bad line is the third: lines count from 1, as editors count, blank ones and such without a newline among them.
    ("starts", "7\n\nseven\n", 3, "rows.txt, line 3: 'seven' is not a whole number"),
    ("starts", "7 8\n9\n10 1x 11\n", 3, "rows.txt, line 3: '1x' is not a whole number (the line is '10 1x 11')"),
    ("starts", f"7\r\n8\r\n{2**63}\r\n", 2, f"rows.txt, line 3: '{2**63}' is no row"),
    ("starts", "7\n8\n1985", 2, "1985 at line 3 of rows.txt ('1985')"),
    ("starts", "7 8\n9\n10 -1 11\n", 2, "-1 at line 3 of rows.txt ('10 -1 11')"),
    ("starts", "7\x0c8\n9\n-1\n", 2, "-1 at line 3 of rows.txt ('-1')"),
    ("within", "0 40\n\n50 x\n", 3, "rows.txt, line 3: 'x' is not a whole number (the line is '50 x')"),
    ("within", "0 40\n\n50\n60 80\n90\n", 3, "rows.txt, line 3: '50' is not an interval"),
    ("within", "0 40\n50 90\n100 140 1\n150 190 1\n", 3, "rows.txt, line 3: '100 140 1' is not an interval"),
    ("within", "\n\n40 20\n", 2, "[40, 20) at line 3 of rows.txt ('40 20')"),
    ("within", "50 90\n0 40\n100 2001\n", 2, "[100, 2001) at line 3 of rows.txt ('100 2001')"),
    ("within", "\n50 90\n40 60\n", 2, "[40, 60] at line 3 of rows.txt ('40 60') and [50, 90] at line 2 of rows.txt"),
]


@pytest.mark.parametrize(("option", "text", "code", "words"), ROW_FILES)
@pytest.mark.parametrize("standard_input", [False, True])
def test_a_bad_line_is_named_as_editors_count(cli, here, option, text, code, words, standard_input):
    Path("rows.txt").write_bytes(text.encode())
    name, stdin = ("-", text.replace("\r\n", "\n")) if standard_input else ("rows.txt", "")
    said = cli("plan", "A.zarr", f"--{option}", name, stdin=stdin)
    assert (said.code, said.out) == (code, "")
    assert (words.replace("rows.txt", "standard input") if standard_input else words) in said.err


def test_a_bad_row_of_an_npy_is_named(cli, here):
    np.save("i.npy", [[0, 40], [50, 2001]])
    said = cli("plan", "A.zarr", "--within", "i.npy")
    assert said.code == 2
    assert "[50, 2001) at place 1 of i.npy" in said.err


def test_starts_on_standard_input_that_are_none(cli, here):
    for text, code, words in [
        ("", 2, "at least one"),
        ("1 two", 3, "standard input, line 1: 'two' is not"),
        ("7\n-1", 2, "-1 at line 2 of standard input"),
    ]:
        said = cli("plan", "A.zarr", "--starts", "-", stdin=text)
        assert (said.code, said.out) == (code, "")
        assert words in said.err


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint64, ">i4"])
def test_starts_of_any_width(cli, tmp_path, dtype):
    """A small dtype must not overflow: neither `start + length` nor byte offsets beyond 2**31."""
    rows = 2_000_000
    array = zarr.create_array(
        tmp_path / "sparse.zarr", shape=(rows, 200), chunks=(1000, 200), dtype="i8", compressors=None, fill_value=-1
    )
    last = min(int(np.iinfo(dtype).max), rows - 16)
    for chunk in {0, last // 1000, (last + 15) // 1000}:
        array[chunk * 1000 : (chunk + 1) * 1000] = np.arange(200_000).reshape(1000, 200) + chunk * 200_000
    starts = np.array([last, 3, last - 7], dtype)
    np.save(tmp_path / "starts.npy", starts)
    said = cli("run", "sparse.zarr", "--starts", "starts.npy", "--out", "w.npy", "-q")
    assert said.code == 0, said.err
    expected = np.stack([np.arange(s * 200, (s + 16) * 200).reshape(16, 200) for s in map(int, starts)])
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), expected)


LAYOUTS = {
    "shards": {"shard_rows": 256, "chunk_rows": 8},
    "plain": {"shard_rows": 0, "chunk_rows": 256},
    "compressed": {"shard_rows": 0, "chunk_rows": 256, "compress": "zstd"},
    "compressed shards": {"shard_rows": 256, "chunk_rows": 16, "compress": "blosc"},
}


def remove(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def grow(path):
    with path.open("ab") as file:
        file.write(b"x")


def make_folder(path):
    path.unlink()
    path.mkdir()


def dangle(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [remove, truncate, empty, grow, make_folder, dangle])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_file_is_named_and_never_the_fill_value(cli, samples, tmp_path, layout, damage):
    pipeline.create_matrix(samples / "A.npy", tmp_path / "A.zarr", **LAYOUTS[layout])
    damage(tmp_path / "A.zarr/c/3/0")
    # Rows 768 to 1023 lie in the damaged file; the first window needs one row of it.
    (tmp_path / "hit.txt").write_text("10 753 1500")
    (tmp_path / "miss.txt").write_text("10 752 1024")
    words = ["A.zarr/c/3/0", "rows 768 to 1023"]
    if layout == "compressed" and damage in (truncate, grow):
        # Only decoding tells, and it decodes several chunks in one call.
        words = ["A.zarr", "rows 768 to 1023", "checksum"]
    line = ["run", "A.zarr", "--starts", "hit.txt", "--out", "w.npy", "-q", "--json"]
    check(cli, tmp_path, line, 4, words)
    assert cli("run", "A.zarr", "--starts", "miss.txt", "--out", "w.npy", "-q").code == 0
