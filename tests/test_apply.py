"""`apply` is somebody else's code: whatever it does, no value is wrong, and what it did is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import dask
import numpy as np
import pytest
from distributed.protocol import pickle as dask_pickle

import pipeline
from pipeline.cli import request
from pipeline.runtime.tasks import prepare_work
from tests.layouts import distinct, stack

LENGTH = 16
STARTS = [7, 150, 31, 90, 64]
"""The probe sees the window at row 7; each of the others is a task of its own."""
LATER = 150


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apply")
    np.save(folder / "A.npy", distinct())
    return pipeline.create_matrix(folder / "A.npy", folder / "A.zarr", shard_rows=64, chunk_rows=8)


@pytest.fixture
def plan(matrix, monkeypatch):
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", len(STARTS))
    made = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
    assert made.chunk.tasks == len(STARTS)
    return made


@pytest.fixture(params=["synchronous", "threads", "in-process"])
def scheduler(request):
    if request.param == "in-process":
        with pipeline.connect(threads_per_worker=2, dashboard_address=None):
            yield request.param
    else:
        with dask.config.set(scheduler=request.param):
            yield request.param


def first_rows(block):
    """Row of the matrix that each window of a block starts at."""
    return (block[:, 0, 0, 0] - 1) / 15


def later(change, otherwise=lambda block: block):
    """An `apply` that does `change` to the window at row 150, and `otherwise` to all others."""
    return lambda block: change(block) if LATER in first_rows(block) else otherwise(block)


def expect_refusal(plan, apply, *words, kind=pipeline.IntegrityError):
    with pytest.raises(kind) as raised:
        pipeline.gather(plan, apply=apply)
    said = " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert [word for word in words if word not in said] == [], said
    assert "\n" not in said


def unlock(block):
    block.flags.writeable = True
    block[:] = 0
    return block


@pytest.mark.parametrize(
    "write",
    [
        lambda block: block.__setitem__(0, 0),
        lambda block: block.sort(),
        lambda block: np.add(block, 1, out=block),
        lambda block: block.reshape(-1).__setitem__(3, 0),
        unlock,
    ],
)
def test_its_input_cannot_be_changed(plan, write):
    for apply in (write, later(write)):
        expect_refusal(plan, apply, "let it copy what it changes")


@pytest.mark.parametrize("order", ["request", "chunk"])
def test_an_exception_names_the_task_and_its_first_window(plan, scheduler, order):
    tasks = pipeline.build_tasks(plan, apply=later(lambda _: {}["speed"]), order=order)
    with pytest.raises(pipeline.IntegrityError) as raised:
        dask.compute(*tasks)
    number = sorted(STARTS).index(LATER) if order == "chunk" else STARTS.index(LATER)
    assert "on 1 window, the first at row 150 (place 1), it raised KeyError: 'speed'" in str(raised.value)
    assert raised.value.__notes__ == [f"task {number}: 1 windows that start at rows 150 to 150"]
    assert isinstance(raised.value.__cause__, KeyError)


class Odd(BaseException):
    """What a careful `except Exception` lets through."""


class SpeechlessError(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize("kind", [SystemExit, Odd, GeneratorExit, SpeechlessError, StopIteration, RecursionError])
def test_whatever_it_raises(plan, scheduler, kind):
    def leave(_):
        raise kind

    if scheduler == "synchronous" and kind in (Odd, GeneratorExit):
        pytest.skip("in the main thread a signal may have raised it")
    expect_refusal(plan, later(leave), kind.__name__, "row 150", "task 4")


class ClingyError(Exception):
    """Pickles neither, since it holds a lock, nor could be made of its words again."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")
        self.lock = threading.Lock()


def test_a_failure_arrives_though_its_cause_cannot(plan, scheduler):
    def fail(_):
        raise ClingyError(1, 2)

    def cling(_):
        try:
            fail(_)
        except ClingyError as error:
            raise ValueError("on top of it") from error

    expect_refusal(plan, later(cling), "ValueError: on top of it", "row 150", "task 4")
    expect_refusal(plan, later(fail), "ClingyError: 1 and 2", "row 150", "task 4")


def test_only_a_real_interrupt_is_one(plan, scheduler):
    def leave(_):
        raise KeyboardInterrupt

    if scheduler == "synchronous":
        with pytest.raises(KeyboardInterrupt):
            pipeline.gather(plan, apply=later(leave))
    else:
        expect_refusal(plan, later(leave), "KeyboardInterrupt", "row 150")


def test_memory_that_it_does_not_get(plan, scheduler):
    def hoard(block):
        return np.empty((len(block), 2**45))

    expect_refusal(plan, later(hoard), "apply fits the memory", "row 150", "less", kind=pipeline.BudgetError)


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (lambda b: b[:, 0, 0, 0], lambda b: b[:, 0, 0, :1]),
        (lambda b: b[:, 0, 0, :1], lambda b: b[:, 0, 0, 0]),
        (lambda b: b[:, 0], lambda b: b[:, 0, :1]),
        (lambda b: b[:, 0], lambda b: b[:, 0, 0]),
        (lambda b: b[:, 0], lambda b: b[:, :1]),
        (lambda b: b[:, 0], lambda b: b[0, 0]),
        (lambda b: b[:, 0], lambda b: b[0, 0, 0, 0]),
        (lambda b: b[:, 0], lambda b: b[:0, 0]),
        (lambda b: b[:, 0], lambda b: None),
    ],
)
def test_nothing_is_broadcast(plan, first, other):
    expect_refusal(plan, later(other, first), "row 150 (place 1)", "task 4")


CASTS = [
    ("i1", "i8", 127, 127),
    ("i1", "i8", 128, None),
    ("i1", "i8", -129, None),
    ("u1", "u8", 255, 255),
    ("u1", "u8", 256, None),
    ("i8", "u8", 2**63 - 1, 2**63 - 1),
    ("i8", "u8", 2**63, None),
    ("u1", "i8", 5, None),
    ("i8", "f8", 5.0, None),
    ("?", "i1", 1, None),
    ("i2", "?", True, 1),
    ("f2", "i8", 2048, 2048),
    ("f2", "i8", 2049, None),
    ("f4", "i4", -(2**24), -(2**24)),
    ("f4", "i4", -(2**24) - 1, None),
    ("f8", "i8", 2**53 + 1, None),
    ("f8", "u4", 2**32 - 1, 2**32 - 1),
    ("f4", "f8", 0.1, np.float32(0.1)),
    ("f4", "f8", 1e300, None),
    ("f4", "f8", -np.inf, -np.inf),
    ("f2", "f4", 65520.0, None),
    ("f8", "g", np.longdouble(0.5), 0.5),
    ("f8", "c16", 1j, None),
    ("c8", "c16", 1 + 2j, 1 + 2j),
    ("c8", "c16", 1e300j, None),
    ("c8", "i8", 2**24 + 1, None),
    ("f8", ">f8", 0.1, 0.1),
    ("f8", "O", 5, None),
    ("f8", "U3", "5.0", None),
    ("i8", "M8[s]", 5, None),
    ("i8", "m8[s]", 5, None),
]


@pytest.mark.parametrize(("dtype", "other", "value", "expected"), CASTS)
def test_a_cast_keeps_the_value_or_is_refused(plan, dtype, other, value, expected):
    def apply(block):
        return np.full(len(block), value, other) if LATER in first_rows(block) else np.ones(len(block), dtype)

    if expected is None:
        expect_refusal(plan, apply, "same shape and dtype", "row 150 (place 1)", str(np.dtype(other)), "task 4")
    else:
        wanted = np.ones(len(STARTS), dtype)
        wanted[STARTS.index(LATER)] = expected
        np.testing.assert_array_equal(pipeline.gather(plan, apply=apply), wanted, strict=True)


def test_the_value_that_would_be_lost_is_named(plan):
    expect_refusal(plan, later(lambda b: b[:, 0, 0, 0].astype("i8") + 998, lambda b: np.ones(len(b), "i1")), "3249")
    expect_refusal(plan, later(lambda b: b[:, 0] * 1e300, lambda b: b[:, 0].astype("f4")), "e+303", "float32")


def test_a_result_in_the_other_byte_order(plan, tmp_path):
    expected = stack(distinct(), STARTS, LENGTH)
    windows = pipeline.gather(plan, apply=lambda block: block.astype(">f8"))
    np.testing.assert_array_equal(windows, expected, strict=True)
    stored = pipeline.store(plan, tmp_path / "w.zarr", apply=lambda block: block.astype(">f8"))
    np.testing.assert_array_equal(stored["windows"][:], expected, strict=True)


CODE = """
import os, threading
import numpy as np
lock = threading.Lock()
def holes(block):
    made = block[:, 0].copy()
    made[made % 7 == 0] = np.nan
    made[made % 5 == 0] = -np.inf
    return made
def complex_holes(block):
    with np.errstate(invalid="ignore"):
        return holes(block) + 1j * holes(block)
def counts(block): return block[:, 0].astype(int)
def talk(block):
    print("chatter of print")
    os.write(1, b"chatter of C\\n")
    os.system("echo chatter of a child")
    return block
def guarded(block):
    with lock:
        return block
print("chatter of the import")
"""


@pytest.fixture
def here(cli, samples, values, tmp_path):
    """The working directory, with a matrix, `A.npy` of it with a hole, and functions."""
    (tmp_path / "A.zarr").symlink_to(samples / "A.zarr")
    torn = values.copy()
    torn[3, 3] = np.nan
    np.save(tmp_path / "torn.npy", torn)
    (tmp_path / "code.txt").write_text(CODE)
    (tmp_path / "code_of_mine.py").write_text(CODE)
    return tmp_path


@pytest.mark.parametrize("out", ["w.npy", "w.zarr", None])
@pytest.mark.parametrize(("name", "parts"), [("holes", 1), ("complex_holes", 1), ("counts", 0), (None, 0)])
def test_values_that_are_not_finite_are_counted(cli, here, values, out, name, parts):
    line = ["run", "A.zarr", "--count", 3000, "--seed", 4, *(["--apply", f"code_of_mine:{name}"] if name else [])]
    said = cli(*line, "--json", *(["--out", out] if out else []))
    starts = pipeline.draw_starts(2000, length=16, count=3000, seed=4)
    first = values[starts]
    holes = int(((first % 7 == 0) | (first % 5 == 0)).sum())
    assert said.numbers["nonfinite"] == parts * holes
    if out is None:
        shown = cli(*line).out
        assert ("not finite" in shown) == (parts > 0)
        assert (f"{holes:,} values of the result" in shown) == (parts > 0)


def test_holes_of_the_matrix_are_its_own(cli, here):
    (here / "s.txt").write_text("0 1")
    assert cli("run", "torn.npy", "--starts", "s.txt", "--json", "-q").numbers["nonfinite"] == 0
    said = cli("run", "torn.npy", "--starts", "s.txt", "--json", "-q", "--apply", "code_of_mine:holes")
    first = np.load(here / "torn.npy")[[0, 1]]
    assert said.numbers["nonfinite"] == ((first % 7 == 0) | (first % 5 == 0)).sum()


def test_what_it_prints_goes_to_stderr(cli, here):
    for verb in ("run", "plan"):
        said = cli(verb, "A.zarr", "--count", 40, "--apply", "code_of_mine:talk", "--json")
        assert said.code == 0
        assert said.numbers["windows"] == 40
        assert "chatter of print" in said.err


def test_nor_when_it_fails(cli, here):
    (here / "loud.py").write_text("def fail(block):\n    print('chatter of print')\n    raise ValueError('no')\n")
    said = cli("run", "A.zarr", "--count", 40, "--apply", "loud:fail", "--json")
    assert (said.code, said.numbers["exit_code"]) == (4, 4)
    assert "chatter" in said.err


PROCESSES = "version: 1\nkwargs: {processes: true, n_workers: 1, threads_per_worker: 1, dashboard_address: null}\n"


@pytest.mark.parametrize("processes", [False, True], ids=["in-process", "processes"])
def test_whatever_way_it_prints(program, here, processes):
    """Through Python, the descriptor, or a child; in this process or in workers of their own."""
    if processes:
        (here / "cluster.yaml").write_text(PROCESSES)
    line = [program, "run", "A.zarr", "--count", "40", "--apply", "code_of_mine:talk", "--json", "-q"]
    done = subprocess.run(line, cwd=here, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["windows"] == 40
    for source in ("the import", "print", "C", "a child"):
        # Probe and task, in the one process or in two.
        assert done.stderr.count(f"chatter of {source}\n") >= (1 if source == "the import" else 2), done.stderr


def test_a_function_that_cannot_be_sent(cli, here):
    line = ["run", "A.zarr", "--count", 40, "--apply", "code_of_mine:guarded", "--out", "w.npy"]
    assert cli(*line, "-q").code == 0
    (here / "w.npy").unlink()
    (here / "cluster.yaml").write_text(PROCESSES)
    before = sorted(here.iterdir())
    said = cli(*line, "--json", "-q")
    assert (said.code, said.err.count("\n")) == (2, 1), said.err
    assert "cannot be pickled" in said.numbers["error"]
    assert "lock" in said.numbers["error"]
    assert "processes: false" in said.numbers["error"]
    assert sorted(here.iterdir()) == before


def test_code_of_the_working_directory_is_sent_itself(here, monkeypatch):
    """A worker elsewhere has no module of that name; Dask's own pickling would name it."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (here / "sent_code.py").write_text(
        "COUNT = [1]\n\ndef work(block):\n    COUNT[0] += 1\n    return block.sum(axis=(1, 2)) * COUNT[0]\n"
    )
    plan = pipeline.plan_windows(pipeline.open_matrix("A.zarr"), [3, 4], length=16)
    work = prepare_work(plan, request._load_function("sent_code:work"))
    (here / "sent").write_bytes(dask_pickle.dumps(work))
    code = (
        "import pickle, sys; import numpy as np\n"
        f"work = pickle.loads(open({str(here / 'sent')!r}, 'rb').read())\n"
        "assert 'sent_code' not in sys.modules\n"
        "assert work.apply.code == pickle.loads(pickle.dumps(work)).apply.code\n"
        "print(work.apply(np.ones((2, 5, 7))).tolist(), work.length, work.result.shape)\n"
        "print(work.apply(np.ones((2, 5, 7))).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    # What it remembers of one task it knows in the next.
    assert done.stdout == "[105.0, 105.0] 16 ()\n[140.0, 140.0]\n", done.stderr


def environment():
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIPELINE_")}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
