"""Whatever is given as whatever argument: an error that is documented, on one line, or it works. Never anything else.

`FUZZ_EXAMPLES=5000 uv run pytest tests/test_arguments.py` looks further than CI does.
"""

from __future__ import annotations

import datetime as dt
import decimal
import fractions
import inspect
import json
import os
import pathlib
import warnings

import click
import dask
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline
from pipeline.arguments import show
from pipeline.cli.main import cli as commands
from pipeline.errors import InputError, OpenError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
pytestmark = pytest.mark.timeout(max(300, 3 * EXAMPLES))
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)  # fmt: skip


class Hostile:
    """Raises whatever it is asked."""

    def _fail(self, *_):
        raise ZeroDivisionError("hostile")

    # Hypothesis itself wants to show it.
    __repr__ = object.__repr__
    __str__ = __eq__ = __lt__ = __len__ = __iter__ = __bool__ = __index__ = __int__ = __float__ = _fail
    __fspath__ = __array__ = __getitem__ = __contains__ = _fail
    __hash__ = object.__hash__


def generator():
    yield from (3, 5)


INTEGERS = [0, 1, 2, 3, 7, 16, 299, 300, 1000, -1, -16, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(2**63), -(10**30)]  # fmt: skip
FLOATS = [0.0, -0.0, 0.5, 1.0, 16.0, -1.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")]
TEXTS = ["", " ", "x", "2", "-1", "1e9", "nan", "8GB", "é", "\udcff", "\0", "a\nb", "x" * 5000, "..", "/", "~", "absent.npy", "absent.zarr", "A.npy", "A.zarr", "w.npy", "w.zarr", "A.npy::x", "::", "random:", "random:0x3", "random:9x9x9", "s3:/", "s3://", "://x", "memory://a.zarr", "nosuch://a/b.zarr", "chunk", "request", "error", "fill", "zstd", "blocks", "float32", "datetime64[s]", "O", ">f4", "f4,f4", "parts", "train"]  # fmt: skip
ARRAYS = [
    np.arange(4), np.array([1.5, 2.0]), np.array([1.0, 2.0]), np.array([np.nan, np.inf]), np.array([True, False]), np.array([2, None, "x"], dtype=object), np.array([[1, 2], [3]], dtype=object),
    np.array(["2020-01-01", "NaT"], "M8[s]"), np.array([3, 5], "m8[D]"), np.array(["1", "2"]), np.array([b"1"]), np.zeros(2, [("a", "i4")]), np.empty(0), np.array(5), np.arange(6).reshape(3, 2),
    np.array([2**63], np.uint64), np.array([-128], np.int8), np.array([1j]), np.ma.masked_array([1, 2, 3], [0, 1, 0]), np.array([[0, 100], [100, 300]]), np.zeros((2, 16, 3)), np.zeros((2, 16, 3))[::-1], np.array([10**30], dtype=object),
]  # fmt: skip
SCALARS = [np.int8(-1), np.uint64(2**64 - 1), np.int64(16), np.float32("nan"), np.float64(0.5), np.True_, np.datetime64("2020-01-01"), np.datetime64("NaT", "s"), np.timedelta64(3, "s"), np.str_("x"), np.bytes_(b"x"), np.complex64(1j)]  # fmt: skip
OTHERS = [
    None, True, False, ..., NotImplemented, b"", b"A.npy", bytearray(b"x"), 1j, decimal.Decimal("0.5"), fractions.Fraction(1, 2), dt.datetime(2020, 1, 1, tzinfo=dt.UTC), dt.date(2020, 1, 1), dt.timedelta(1), [dt.date(2020, 1, 1)],
    [], (), {}, set(), {1}, [[1], [2, 3]], [[]], [1, [2]], [None], ["a"], ["A.npy", "A.npy"], ["A.npy", 3], [b"x"], [{}], {"x": 1}, {1: 2}, {"": "A.npy"}, {"x": None}, {"x": "A.npy"}, {None: None}, {"train": 0.8, "test": 0.2}, [0.5, 0.5], [True], (0.5, "0.2"), [float("nan")], [10**400], {"x": "absent"}, {"x": [1, 2]},
    slice(None), slice(0, 2), slice("a", None), slice(10**400), slice(5, 0), slice(0, 2, 0), range(3), range(0), object(), object, int, len, str, pathlib.Path(), pathlib.Path("absent.zarr"), pathlib.Path("w.npy"), memoryview(b"xy"), Hostile(), Hostile, [Hostile()], {"x": Hostile()}, pytest,
    lambda block: block, lambda block: block * np.nan, lambda *_: 1 // 0, lambda: None, lambda block: None, lambda block: "x", lambda block: block[:0], lambda block: Hostile(), np.float32, np.dtype("f4"), np.dtype("O"), [("a", "f4")],
]  # fmt: skip
WILD = [*INTEGERS, *FLOATS, *TEXTS, *ARRAYS, *SCALARS, *OTHERS]
# Some are used up, or changed, by who takes them: they are made anew.
MADE = st.sampled_from([generator, lambda: iter([1, 2]), lambda: (each for each in "ab"), lambda: np.arange(5).view(np.ma.MaskedArray)]).map(lambda make: make())  # fmt: skip
wild = st.one_of(st.sampled_from(WILD), st.sampled_from(WILD), MADE, st.lists(st.sampled_from(WILD), max_size=3), st.dictionaries(st.sampled_from(["x", "y", "train", "version"]), st.sampled_from(WILD), max_size=2), st.integers(-5, 400), st.floats())  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arguments")
    # What underflows where it is cast, and what does not fit.
    values = np.arange(1.0, 901).reshape(300, 3)
    values[5] = [1e-300, 1e-310, 5e-324]
    np.save(folder / "A.npy", values)
    values.tofile(folder / "A.bin")
    settings = {"shard_rows": 64, "chunk_rows": 16}
    pipeline.create_matrix(folder / "A.npy", folder / "A.zarr", **settings)
    pipeline.create_matrix(folder / "A.npy", folder / "C.zarr", compress="zstd", **settings)
    np.save(folder / "y.npy", np.arange(300))
    return folder


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """The working directory, with what calls need; no cluster starts, none is reached."""
    for name in ("A.npy", "A.bin", "A.zarr", "C.zarr", "y.npy"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise OpenError("nothing is started here")

    for name in ("_start", "_reach"):
        monkeypatch.setattr(f"pipeline.cluster.connect.{name}", refuse)
    # What nobody writes is not waited for.
    for name in ("_FILE_SECONDS", "_TORN_SECONDS"):
        monkeypatch.setattr(f"pipeline.cluster.resolve.{name}", 0)
    return tmp_path


def plan(name="A.npy", **how):
    return pipeline.plan_windows(pipeline.open_matrix(name), [0, 5, 200], length=16, **how)


def batches(**how):
    return pipeline.iter_batches(plan(), **how)


def enter_and_leave(**how):
    with pipeline.connect(**how):
        pass


def call_state(**parts):
    made = batches(batch_size=2)
    made.load_state_dict(made.state_dict() | parts)


def take_first(**how):
    with pipeline.iter_batches(**how) as made:
        return next(iter(made))


def call_method(make, name):
    def call(**how):
        return getattr(make(), name)(**how)

    return call


CALLS = {
    "open_matrix": (pipeline.open_matrix, {"source": "A.zarr", "storage_options": None, "check_reads": False, "missing_chunks": "error", "dtype": None, "row_shape": None, "dataset": None, "members": None}),
    "open_matrix of raw binary": (pipeline.open_matrix, {"source": "A.bin", "dtype": "f8", "row_shape": (3,)}),
    "open_matrix of several": (pipeline.open_matrix, {"source": {"x": "A.zarr", "y": "y.npy"}, "members": ["x"]}),
    "open_matrix of a URL": (pipeline.open_matrix, {"source": "memory://absent/a.zarr", "storage_options": {}}),
    "create_matrix": (pipeline.create_matrix, {"source": "A.npy", "dest": "w.zarr", "dtype": None, "row_shape": None, "dataset": None, "outside_files": False, "axis": 0, "seed": 0, "length": 16, "shard_rows": None, "chunk_rows": None, "compress": None, "memory": None, "resume": False, "overwrite": True, "storage_options": None, "progress": None}),
    "create_matrix of raw binary": (pipeline.create_matrix, {"source": "A.bin", "dest": "w.zarr", "dtype": "f8", "row_shape": (3,), "axis": 0, "overwrite": True}),
    "create_matrix of random": (pipeline.create_matrix, {"source": "random:40x3", "dest": "w.zarr", "dtype": "f4", "seed": 3, "axis": 0, "overwrite": True}),
    "draw_starts": (pipeline.draw_starts, {"rows": 300, "length": 16, "count": 5, "seed": 0, "replace": True, "overlap": True, "within": None}),
    "draw_starts disjoint": (pipeline.draw_starts, {"rows": 300, "length": 16, "count": 5, "seed": 0, "overlap": False, "within": [[0, 100], [100, 300]]}),
    "grid_starts": (pipeline.grid_starts, {"rows": 300, "length": 16, "stride": 10, "within": None, "offset": 0}),
    "split_rows": (pipeline.split_rows, {"rows": 300, "fractions": (0.5, 0.5), "length": 4, "seed": 0, "by": "blocks", "within": None, "block_rows": None}),
    "split_rows in order": (pipeline.split_rows, {"rows": 300, "fractions": {"a": 0.5, "b": 0.5}, "length": 4, "by": "order", "within": [[0, 100], [100, 300]]}),
    "plan_windows": (lambda **how: pipeline.plan_windows(**how).facts(), {"matrix": lambda: pipeline.open_matrix("A.zarr"), "starts": [0, 5], "length": 16, "memory": None, "columns": None, "dtype": None}),
    "plan_windows of several": (lambda **how: pipeline.plan_windows(matrix=pipeline.open_matrix({"x": "A.zarr", "y": "y.npy"}), **how).facts(), {"starts": [0, 5], "length": 16, "memory": None, "columns": None, "dtype": None}),
    "gather": (pipeline.gather, {"plan": plan, "apply": None, "out": None, "resume": False, "overwrite": False, "progress": None}),
    "gather into a file": (pipeline.gather, {"plan": plan, "apply": None, "out": "w.npy", "resume": False, "overwrite": True}),
    "gather of a cast": (lambda columns, dtype: pipeline.gather(plan("C.zarr", columns=columns, dtype=dtype)), {"columns": [0, -1], "dtype": "f4"}),
    "store": (pipeline.store, {"plan": plan, "path": "w.zarr", "apply": None, "order": "request", "resume": False, "overwrite": True, "storage_options": None, "progress": None}),
    "build_tasks": (pipeline.build_tasks, {"plan": plan, "apply": None, "order": "chunk"}),
    "iter_batches": (take_first, {"plan": plan, "batch_size": 2, "apply": None, "shuffle": False, "seed": 0, "epoch": 0, "drop_last": False, "rank": 0, "world_size": 1, "prefetch": None}),
    "Batches.set_epoch": (call_method(lambda: batches(batch_size=2), "set_epoch"), {"epoch": 1}),
    "Batches.load_state_dict": (call_method(lambda: batches(batch_size=2), "load_state_dict"), {"state": {}}),
    "Batches.load_state_dict, its parts": (call_state, {"version": 2, "epoch": 0, "batch": 0, "request": {}}),
    "WindowDataset": (pipeline.WindowDataset, {"plan": plan, "apply": None, "keep": None}),
    "WindowDataset[]": (call_method(lambda: pipeline.WindowDataset(plan("C.zarr")), "__getitem__"), {"place": 0}),
    "WindowDataset.__getitems__": (call_method(lambda: pipeline.WindowDataset(plan()), "__getitems__"), {"places": [0]}),
    "ChunkBatchSampler": (lambda **how: list(pipeline.ChunkBatchSampler(**how)), {"plan": lambda: plan("C.zarr"), "batch_size": 2, "seed": 0, "blocks": 16, "drop_last": False, "rank": 0, "world_size": 1}),
    "ChunkBatchSampler.set_epoch": (call_method(lambda: pipeline.ChunkBatchSampler(plan("C.zarr"), 2), "set_epoch"), {"epoch": 1}),
    "ChunkBatchSampler.amplification": (call_method(lambda: pipeline.ChunkBatchSampler(plan("C.zarr"), 2), "amplification"), {"kept": True}),
    "connect": (enter_and_leave, {"cluster": None, "workers": None, "threads": None, "scheduler_address": None, "scheduler_file": None, "insecure": False}),
    "connect by Dask's keywords": (enter_and_leave, {"n_workers": 1, "processes": False, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None, "silence_logs": 50}),
    "verify": (pipeline.verify, {"path": "A.zarr", "subset": 1.0, "seed": 0, "manifest": None, "storage_options": None, "progress": None}),
    "write_manifest": (pipeline.write_manifest, {"path": "A.npy", "manifest": "m.json", "storage_options": None, "progress": None}),
    "Matrix.check_length": (call_method(lambda: pipeline.open_matrix("A.zarr"), "check_length"), {"length": 16}),
    "MatrixGroup.check_length": (call_method(lambda: pipeline.open_matrix({"x": "A.zarr"}), "check_length"), {"length": 16}),
    "Plan.cost": (call_method(plan, "cost"), {"order": "chunk"}),
    "GroupPlan.cost": (call_method(lambda: pipeline.plan_windows(pipeline.open_matrix({"x": "A.zarr"}), [3], length=16), "cost"), {"order": "chunk"}),
}  # fmt: skip
"""What is called, and with what; a function that makes an argument is called for it."""


def test_every_public_function_and_parameter_is_tried():
    tried = {}
    for name, (_, arguments) in CALLS.items():
        tried.setdefault(name.split(" ")[0], set()).update(arguments)
    for name in pipeline.__all__:
        thing = getattr(pipeline, name)
        if inspect.isfunction(thing) or name in {"WindowDataset", "ChunkBatchSampler"}:
            parameters = {
                key for key, each in inspect.signature(thing).parameters.items() if each.kind is not each.VAR_KEYWORD
            }
            assert parameters - {"self"} <= tried[name], name


def ready(arguments):
    return {key: value() if key in ("plan", "matrix") else value for key, value in arguments.items()}


def check(call, arguments, *changes):
    """Call with the arguments changed so: an error of ours on one line, or none."""
    raised = None
    try:
        call(**ready(arguments) | dict(changes))
    except pipeline.PipelineError as error:
        raised = str(error)
    except IndexError as error:
        # Of a data set, as of any sequence.
        raised = str(error)
        assert "a place is" in raised
    assert raised is None or (raised.strip() and "\n" not in raised and len(raised) < 8000), raised


@pytest.mark.parametrize("name", CALLS)
@fuzzed
@given(data=st.data())
def test_any_arguments(here, name, data):
    call, arguments = CALLS[name]
    keys = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True))
    changes = [(key, data.draw(wild, label=key)) for key in keys]
    for path in here.glob("*.json"):
        path.unlink()
    strict = data.draw(st.booleans(), label="numpy.seterr(all='raise')")
    with warnings.catch_warnings(), np.errstate(all="raise" if strict else "warn"):
        # What Dask, Zarr or NumPy warn of is not what is looked at here.
        warnings.simplefilter("ignore")
        check(call, arguments, *changes)


LOOK_UP = "searchsorted on the time coordinate"
NO_NUMBERS = [
    (np.array([True, False, True]), "numpy.flatnonzero"),
    ([True, False], "numpy.flatnonzero"),
    (np.array(["2020-01-01", "2020-01-02"], "M8[ns]"), LOOK_UP),
    (np.array([1, 2], "m8[s]"), LOOK_UP),
    ([dt.date(2020, 1, 1)], LOOK_UP),
    ([3, 5.25], "5.25 at place 1"),
    ([3.0, float("nan")], "nan at place 1"),
    ([3.0, float("inf")], "inf at place 1"),
    ([1.0, 2.0**53], "at place 1"),
    ([3, None], "None at place 1"),
    ([3, 10**30], f"{10**30} at place 1"),
    (["3", "5"], "'3' at place 0"),
    ([3.0, 5.0], "every value is a whole number"),
    (np.ma.masked_array([3, 5], [False, True]), "masked"),
    ([[3], [5, 6]], "no array"),
]
"""What is taken for numbers of rows, columns or places, and the advice: none of it may make wrong numbers."""
TAKERS = {
    "starts": lambda numbers: pipeline.plan_windows(pipeline.open_matrix("A.npy"), numbers, length=16),
    "columns": lambda numbers: plan(columns=numbers),
    "places": lambda numbers: pipeline.WindowDataset(plan())[numbers],
    "several places": lambda numbers: pipeline.WindowDataset(plan()).__getitems__(numbers),
    "intervals": lambda numbers: pipeline.draw_starts(300, length=16, count=2, seed=0, within=pairs(numbers)),
    "intervals of a grid": lambda numbers: pipeline.grid_starts(300, length=16, stride=2, within=pairs(numbers)),
    "intervals of a split": lambda numbers: pipeline.split_rows(300, [1.0], length=16, within=pairs(numbers)),
}


def pairs(numbers):
    if isinstance(numbers, np.ndarray):
        return (np.ma if isinstance(numbers, np.ma.MaskedArray) else np).stack([numbers, numbers], axis=1)
    return [[number] * 2 for number in numbers] if numbers != [[3], [5, 6]] else [[3], [5, 6]]


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(("numbers", "advice"), NO_NUMBERS, ids=[advice for _, advice in NO_NUMBERS])
def test_what_is_no_number_of_a_row_is_not_made_one(here, taker, numbers, advice):
    with pytest.raises(InputError) as caught:
        TAKERS[taker](numbers)
    said = str(caught.value)
    if taker.startswith("intervals"):
        # Each number stands there twice.
        advice = advice.replace("place 1", "place 2")
    assert advice in said
    assert "\n" not in said
    assert ("int64" in said) == (advice == "every value is a whole number")


@pytest.mark.parametrize("wrong", [[True], ["0.5"], np.array([1], "M8[s]"), np.array([True]), [None], [float("nan")], [0.5, -0.1], [float("inf")], [10**400], [[0.5]], 0.5, "0.5"], ids=str)  # fmt: skip
def test_what_is_no_fraction(wrong):
    with pytest.raises(InputError, match="fractions are"):
        pipeline.split_rows(300, wrong, length=4)


@pytest.mark.parametrize("file", ["times.npy", "mask.npy", "floats.npy"])
@pytest.mark.parametrize("flag", ["--starts", "--within"])
def test_files_of_what_is_no_number(here, cli, home, flag, file):
    values = {
        "times": np.array(["2020-01-01", "2020-01-02"], "M8[s]"),
        "mask": np.array([True, False]),
        "floats": np.array([3, 5.25]),
    }
    advice = {"times": LOOK_UP, "mask": "numpy.flatnonzero", "floats": "5.25"}
    name = file.removesuffix(".npy")
    np.save(home / file, values[name] if flag == "--starts" else pairs(values[name]))
    said = cli("plan", home / "A.npy", flag, home / file)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert advice[name] in said.err
    assert "int64" not in said.err


@pytest.mark.parametrize("intervals", [1, 3])
def test_disjoint_windows_of_very_many_that_fit(intervals):
    """More than 10^9 fit, which is where NumPy's own counting of them ends."""
    rows = 10**12
    borders = np.linspace(0, rows, intervals + 1).astype(np.int64)
    within = np.stack([borders[:-1], borders[1:]], axis=1)
    how = {"length": 16, "count": 3000, "seed": 3, "overlap": False, "within": within}
    starts = pipeline.draw_starts(rows, **how)
    np.testing.assert_array_equal(starts, pipeline.draw_starts(rows, **how), strict=True)
    assert (np.diff(np.sort(starts)) >= 16).all()
    part = np.searchsorted(borders, starts, side="right") - 1
    assert (starts + 16 <= borders[part + 1]).all()
    # Each interval is of the same size: their shares are even, but for chance.
    assert (abs(np.bincount(part, minlength=intervals) - 3000 / intervals) < 200).all()


def test_draws_that_would_lay_out_more_than_memory_has(monkeypatch):
    from pipeline.memory import Budget

    monkeypatch.setattr("pipeline.plan.starts.budget", lambda: Budget(2 * 10**7, "this test"))
    for how in ({"overlap": False}, {"replace": False}):
        with pytest.raises(pipeline.BudgetError, match="this test allows"):
            pipeline.draw_starts(10**7, length=2, count=250_000, seed=0, **how)
        assert len(pipeline.draw_starts(10**7, length=2, count=100_000, seed=0, **how)) == 100_000


@pytest.mark.parametrize("number", ["2", 2, 1])
def test_threads_that_dask_was_told_of(here, number):
    with dask.config.set(num_workers=number):
        assert pipeline.gather(plan()).shape == (3, 16, 3)
        assert pipeline.create_matrix("A.npy", "w.zarr", overwrite=True).rows == 300


@pytest.mark.parametrize("number", ["two", 0, -1, 2.5, True, "", [2]])
def test_threads_that_dask_cannot_have(here, number):
    with dask.config.set(num_workers=number), pytest.raises(InputError, match="num_workers"):
        pipeline.gather(plan())


def test_numbers_with_more_digits_than_python_writes():
    for change in (
        {"rows": 10**5000},
        {"count": 10**5000},
        {"length": 10**5000},
        {"within": [[0, 10**5000]]},
        {"seed": -(10**5000)},
    ):
        with pytest.raises(pipeline.PipelineError):
            pipeline.draw_starts(**{"rows": 300, "length": 16, "count": 5, "seed": 0} | change)


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint64])
def test_numbers_of_numpy_are_numbers(here, kind):
    """They count as those of Python do, and overflow nowhere."""
    for large in ({}, {"world_size": kind(np.iinfo(kind).max)}):
        how = {"rank": kind(1), "world_size": kind(2), "seed": kind(3), "prefetch": kind(2), "epoch": kind(1)} | large
        plain = {name: int(value) for name, value in how.items()}
        with (
            np.errstate(all="raise"),
            pipeline.iter_batches(plan(), kind(2), shuffle=True, **how) as made,
            pipeline.iter_batches(plan(), 2, shuffle=True, **plain) as expected,
        ):
            for got, want in zip(list(made), list(expected), strict=True):
                np.testing.assert_array_equal(got, want)


def test_ranks_of_a_world_without_end(here):
    """Each has one window, from the beginning again where there are less; nothing is laid out for the others."""
    world = 10**18
    for rank in (0, 1, 2, 3, world - 1):
        with pipeline.iter_batches(plan(), 2, rank=rank, world_size=world) as made:
            [batch] = list(made)
        start = [0, 5, 200][rank % 3]
        assert batch[0, 0, 0] == np.load("A.npy")[start, 0]
        [[place]] = pipeline.ChunkBatchSampler(plan("C.zarr"), 2, rank=rank, world_size=world)
        assert place in range(3)


WORDS = [*[str(number) for number in INTEGERS[:-1]], *[str(number) for number in FLOATS], *[text for text in TEXTS if "\0" not in text], "0:2", "::", "1:x", "0,1,-1", "1,", ",", "0.8,0.2", "nan,0.3", "json:loads", "os:nothing", "nothing:at", "x=y:z", "10%", "1,2,3", "-", "A.bin", "tcp://127.0.0.1:1", "tls://x", "😀", "--", "-q"]  # fmt: skip
LINES = {
    "create": ["A.npy", "v.zarr"],
    "info": ["A.zarr"],
    "plan": ["A.zarr", "--count=3"],
    "run": ["A.zarr", "--count=3"],
    "verify": ["A.zarr"],
    "demo": ["made"],
    "bench": ["made"],
    "config": [],
}


def test_every_verb_is_tried():
    assert set(LINES) == set(commands.commands)


@pytest.mark.parametrize("verb", LINES)
@fuzzed
@given(data=st.data())
def test_any_command_line(here, cli, home, verb, data):
    """No line is a bug of ours: an exit code that is documented, and one line that says why."""
    with pytest.MonkeyPatch.context() as patch:
        for flow in ("pipeline.cli.demo.run_demo", "pipeline.bench.run.run_bench"):
            patch.setattr(flow, lambda *_, **__: (_ for _ in ()).throw(OpenError("nothing is made here")))
        for name in ("A.npy", "A.bin", "A.zarr"):
            if not os.path.lexists(name):
                pathlib.Path(name).symlink_to(home / name)
        flags = [
            each for each in commands.commands[verb].params if isinstance(each, click.Option) and each.name != "debug"
        ]
        chosen = data.draw(st.lists(st.sampled_from(flags), min_size=1, max_size=2, unique_by=lambda each: each.name))
        line = [verb, *LINES[verb]]
        for option in chosen:
            flag = max(option.opts, key=len)
            if option.is_flag:
                line.append(flag)
            else:
                choices = list(getattr(option.type, "choices", []))
                line.append(f"{flag}={data.draw(st.sampled_from([*choices, *WORDS]), label=flag)}")
        if data.draw(st.integers(0, 4), label="positional") == 0 and len(line) > 1:
            line[1] = data.draw(st.sampled_from(WORDS), label="the first argument")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = cli(*line)
    assert said.code in (0, 2, 3, 4, 5, 6, 7), said
    assert "Traceback" not in said.err
    if said.code:
        errors = [text for text in said.err.split("\n") if text.startswith("error: ")]
        assert len(errors) == 1
        assert said.err.endswith(errors[0] + "\n")
    if "--json" in line and said.out:
        json.loads(said.out)


def test_whatever_is_shown_of_a_value_is_one_short_line():
    class Mute:
        def __repr__(self):
            raise ValueError("no words")

    for value, words in (
        (Mute(), "Mute"),
        (10**5000, "int"),
        ("x" * 500, "..."),
        ("a\nb", "a\\nb"),
        (np.arange(10**4).reshape(100, 100), "array"),
    ):
        assert words in show(value)
        assert len(show(value)) <= 80
        assert "\n" not in show(value)


def everything(folder):
    """Call every public function once; what it gives."""
    matrix = pipeline.create_matrix("A.npy", folder / "m.zarr", compress="zstd")
    both = pipeline.open_matrix({"x": matrix, "y": "y.npy"})
    within = pipeline.split_rows(300, {"train": 0.7, "test": 0.3}, length=4, seed=1)["train"]
    starts = pipeline.draw_starts(300, length=4, count=20, seed=0, within=within)
    spread = pipeline.draw_starts(300, length=4, count=20, seed=0, overlap=False)
    grid = pipeline.grid_starts(300, length=4, stride=7)
    # A cast of values that underflow, and of whole numbers to floats.
    cast = pipeline.plan_windows(both, starts, length=4, dtype={"x": "f4", "y": "f8"}, columns={"x": [0, 2]})
    gathered = pipeline.gather(cast)
    applied = pipeline.gather(pipeline.plan_windows(matrix, [0, 4], length=4, dtype="f4"), apply=lambda block: block)
    narrowed = pipeline.gather(
        pipeline.plan_windows(matrix, [0, 4], length=4),
        apply=lambda block: block.astype("f4") if len(block) == 1 else block,
    )
    stored = pipeline.store(cast, folder / "s.zarr")
    with pipeline.Report() as report, pipeline.iter_batches(cast, 6, shuffle=True) as made:
        batch = next(iter(made))
    sampler = pipeline.ChunkBatchSampler(cast, 4)
    measured = [sampler.randomness(), sampler.amplification(), *map(tuple, sampler)]
    window = pipeline.WindowDataset(cast)[3]
    pipeline.write_manifest(folder / "m.zarr", folder / "m.json")
    wrong = [pipeline.verify(folder / "m.zarr", manifest=folder / "m.json"), pipeline.verify(folder / "s.zarr")]
    words = [repr(each) for each in (cast, both, cast.members["x"])]
    numbers = report.facts() is not None
    return [
        within,
        starts,
        spread,
        grid,
        gathered["x"],
        gathered["y"],
        applied,
        narrowed,
        stored["x"][:],
        batch["x"],
        window["y"],
        repr(measured),
        repr(wrong),
        numbers,
        words,
    ]


def test_numpy_told_to_raise_changes_nothing(here):
    with np.errstate(all="ignore"):
        (here / "1st").mkdir()
        expected = everything(here / "1st")
    with np.errstate(all="raise"):
        (here / "2nd").mkdir()
        got = everything(here / "2nd")
    for one, two in zip(expected, got, strict=True):
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, two, strict=True)
        else:
            assert str(one).replace("1st", "2nd") == str(two)


@pytest.mark.parametrize("line", ["info A.zarr", "plan A.zarr --count 3 --as-dtype float32", "plan C.zarr --count 3 --split 0.5,0.5 --part 0", "run A.zarr --count 0", "verify A.zarr --subset 0", "create A.npy v.zarr --dry-run"])  # fmt: skip
def test_exit_codes_where_numpy_was_told_to_raise(here, cli, line):
    codes = []
    for how in ("ignore", "raise"):
        with np.errstate(all=how):
            codes.append(
                cli(
                    *[str(here / word) if word in ("A.zarr", "C.zarr", "A.npy") else word for word in line.split()]
                ).code
            )
    assert codes[0] == codes[1] != 1
