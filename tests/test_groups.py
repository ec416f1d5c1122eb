"""Several arrays that share rows: opened as one, planned as one, and windows of each at the same starts."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

import pipeline
from pipeline.matrix.opening import choose_members
from pipeline.runtime.report import Watch
from pipeline.sinks.gather import prepare_gathering
from pipeline.sinks.store import prepare_storing

ROWS, LENGTH = 600, 9
STARTS = np.random.default_rng(5).permutation(ROWS - LENGTH)[:48]
VALUES: dict[str, Any] = {
    "features": np.arange(1, ROWS * 6 + 1, dtype="f4").reshape(ROWS, 6),
    "labels": np.arange(1, ROWS + 1),
    "codes": (np.arange(ROWS * 15) % 251 - 125).astype("i1").reshape(ROWS, 5, 3),
    "signal": (np.arange(1, ROWS * 2 + 1) * (1 - 2j)).reshape(ROWS, 2),
}


def cut(a: Any, starts: Any = STARTS, length: int = LENGTH) -> Any:
    return np.stack([a[start : start + length] for start in np.asarray(starts).tolist()])


def check(found: Any, starts: Any = STARTS, names: Any = tuple(VALUES)) -> None:
    assert set(found) == set(names)
    for name in names:
        np.testing.assert_array_equal(found[name][:], cut(VALUES[name], starts), strict=True)


@pytest.fixture(autouse=True)
def no_client_of_another_test():
    with dask.config.set(scheduler="threads"):
        yield


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A group whose arrays have layouts of their own, and files; never to be changed."""
    folder = tmp_path_factory.mktemp("groups")
    group = zarr.create_group(folder / "G.zarr")
    settings: dict[str, Any] = {"config": {"write_empty_chunks": True}}
    group.create_array("features", data=VALUES["features"], chunks=(32, 6), **settings)
    group.create_array("labels", data=VALUES["labels"], chunks=(100,), compressors=None, **settings)
    group.create_array("codes", data=VALUES["codes"], chunks=(10, 5, 3), shards=(50, 5, 3), **settings)
    group.create_array("signal", data=VALUES["signal"], chunks=(64, 2), compressors=None, filters=None, **settings)
    for name, a in VALUES.items():
        np.save(folder / f"{name}.npy", a)
    pipeline.create_matrix(folder / "features.npy", folder / "F.zarr", shard_rows=64, chunk_rows=8)
    return folder


def mixed(folder: Path) -> dict[str, Any]:
    """Compressed, ours, and read in place, one of them in two files."""
    return {
        "features": folder / "F.zarr",
        "labels": str(folder / "labels.npy"),
        "codes": folder / "G.zarr" / "codes",
        "signal": pipeline.open_matrix(folder / "signal.npy"),
    }


@pytest.fixture(params=["group", "mapping"])
def opened(request, samples):
    return pipeline.open_matrix(samples / "G.zarr" if request.param == "group" else mixed(samples))


@pytest.fixture(scope="module")
def processes():
    with pipeline.connect(processes=True, n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        yield client


@pytest.fixture
def many_tasks(monkeypatch):
    monkeypatch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
    monkeypatch.setattr("pipeline.plan.plan._FEWEST_TASKS", 4)
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(params=["threads", "in-process", "processes"])
def any_scheduler(request):
    if request.param == "threads":
        with dask.config.set(scheduler="threads"):
            yield
    elif request.param == "in-process":
        with dask.config.set(scheduler="dask.distributed"), pipeline.connect(dashboard_address=None):
            yield
    else:
        client = request.getfixturevalue("processes")
        with client.as_current(), dask.config.set(scheduler="dask.distributed"):
            yield


# Opening.


def test_members_are_the_arrays_of_a_group(samples):
    group = pipeline.open_matrix(samples / "G.zarr")
    assert isinstance(group, pipeline.MatrixGroup)
    assert (group.rows, group.path, group.parts) == (ROWS, str(samples / "G.zarr"), None)
    assert {name: (each.shape, each.dtype) for name, each in group.members.items()} == {
        name: (a.shape, a.dtype) for name, a in VALUES.items()
    }
    assert group.members["labels"].row_shape == ()
    assert group.nbytes == sum(a.nbytes for a in VALUES.values())
    assert {each.layout.reader for each in group.members.values()} == {"decoded", "direct"}
    assert group.check_length(ROWS) == ROWS
    assert sorted(map(str, group.inputs())) == sorted(str(samples / "G.zarr" / name) for name in VALUES)
    assert "4 that share 600 rows" in repr(group)
    assert pickle.loads(pickle.dumps(group)).rows == ROWS


def test_a_member_is_chosen_and_a_path_below_the_group_opens_one(samples):
    assert set(pipeline.open_matrix(samples / "G.zarr", members=["labels", "codes"]).members) == {"labels", "codes"}
    assert pipeline.open_matrix(samples / "G.zarr" / "labels").shape == (ROWS,)
    assert list(pipeline.open_matrix(mixed(samples), members=["labels"]).members) == ["labels"]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_open_group_and_a_store(zarr_format):
    store = MemoryStore()
    group = zarr.create_group(store, zarr_format=zarr_format)
    group.create_array("a", data=VALUES["features"], chunks=(50, 6))
    group.create_array("b", data=VALUES["labels"], chunks=(50,))
    for source in (store, group):
        made = pipeline.open_matrix(source)
        found = pipeline.gather(pipeline.plan_windows(made, STARTS, length=LENGTH))
        np.testing.assert_array_equal(found["a"], cut(VALUES["features"]))
        np.testing.assert_array_equal(found["b"], cut(VALUES["labels"]))


def test_options_are_those_of_each(samples, tmp_path):
    both = {"a": samples / "F.zarr", "b": samples / "F.zarr"}
    assert all(each.layout.checked for each in pipeline.open_matrix(both, check_reads=True).members.values())
    with pytest.raises(pipeline.InputError, match=r"G\.zarr/.* has none; record them"):
        pipeline.open_matrix(samples / "G.zarr", check_reads=True)
    group = zarr.create_group(tmp_path / "S.zarr")
    group.create_array("a", shape=(ROWS, 2), chunks=(50, 2), dtype="f8", fill_value=7)
    plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "S.zarr", missing_chunks="fill"), [3], length=2)
    assert pipeline.gather(plan)["a"].tolist() == [[[7.0, 7.0], [7.0, 7.0]]]


def test_parts_that_agree(samples, tmp_path):
    np.save(tmp_path / "0.npy", VALUES["labels"][:100])
    np.save(tmp_path / "1.npy", VALUES["labels"][100:])
    stacked = [tmp_path / "0.npy", tmp_path / "1.npy"]
    alike = pipeline.open_matrix({"a": stacked, "b": stacked})
    assert alike.parts.tolist() == [[0, 100], [100, ROWS]]
    assert pipeline.plan_windows(alike, [95, 0], length=9).crossings() == 1
    assert pipeline.open_matrix({"a": stacked, "b": samples / "labels.npy"}).parts is None


def write(path: Path, arrays: dict[str, tuple[Any, ...]]) -> Path:
    """Write a group of arrays: shape, dtype and names of dimensions of each."""
    group = zarr.create_group(path)
    for name, (shape, dtype, *names) in arrays.items():
        count = int(np.prod(shape, dtype=int))
        values = np.arange(count).reshape(shape).astype(dtype)
        group.create_array(name, data=values, chunks=shape, dimension_names=names[0].split() if names else None)
    return path


@pytest.mark.parametrize(
    ("arrays", "members"),
    [
        # As xarray writes it: coordinates of both dimensions, one of them of equal length; a scalar.
        (
            {
                "x": ((9, 4), "f4", "time channel"),
                "y": ((9,), "i8", "time"),
                "time": ((9,), "i8", "time"),
                "channel": ((4,), "i8", "channel"),
                "gain": ((4,), "f8", "channel"),
                "crs": ((), "i4", ""),
            },
            {"x", "y"},
        ),
        ({"x": ((9, 9), "f4", "time channel"), "gain": ((9,), "f8", "channel")}, {"x"}),
        ({"x": ((9, 4), "f4"), "y": ((9,), "i8"), "names": ((9,), "<U3")}, {"x", "y"}),
        ({"y": ((9,), "i8", "time"), "time": ((9,), "i8", "time")}, {"y"}),
    ],
)
def test_coordinates_are_no_members(arrays, members, tmp_path):
    group = write(tmp_path / "C.zarr", arrays)
    assert set(pipeline.open_matrix(group).members) == members


def test_coordinates_of_xarray_in_version_2(tmp_path):
    xarray = pytest.importorskip("xarray")
    data = {"x": (("time", "channel"), np.ones((9, 4))), "y": ("time", np.arange(9))}
    made = xarray.Dataset(data, {"time": np.arange(9), "channel": [1, 2, 3, 4], "gain": ("channel", np.ones(4))})
    made.to_zarr(tmp_path / "X.zarr", zarr_format=2)
    assert set(pipeline.open_matrix(tmp_path / "X.zarr").members) == {"x", "y"}


def test_empty_groups_choose_nothing():
    assert choose_members({}) == {}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": ((9, 2), "f4"), "b": ((8, 2), "f4"), "c": ((9,), "f4")}, ["a has 9, b has 8, c has 9", "--member"]),
        ({"a": ((9, 2), "f4"), "b": ((8,), "f4")}, ["a has 9, b has 8"]),
        ({"a": ((9,), "<U2"), "b": ((), "f4")}, ["arrays of numbers", "a, b"]),
        ({}, ["without arrays", "name another"]),
    ],
)
def test_groups_that_share_no_rows(arrays, words, tmp_path):
    group = write(tmp_path / "B.zarr", arrays)
    with pytest.raises((pipeline.InputError, pipeline.OpenError)) as failed:
        pipeline.open_matrix(group)
    assert all(word in str(failed.value) for word in words), str(failed.value)


def test_arrays_that_lie_deeper_are_named(tmp_path):
    zarr.create_group(tmp_path / "D.zarr").create_group("inner").create_array("a", data=VALUES["features"])
    with pytest.raises(pipeline.OpenError, match=r"inner/a; write .*D\.zarr/inner/a"):
        pipeline.open_matrix(tmp_path / "D.zarr")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda given: given.clear(), "at least one array"),
        (lambda given: given.update(short=np.s_), "a matrix is a path"),
        (lambda given: given.update({"": given["labels"]}), "have names"),
        (lambda given: given.update({3: given["labels"]}), "have names; got 3"),
        (lambda given: given.update(labels="absent.npy"), "absent.npy"),
    ],
)
def test_mappings_that_are_refused(samples, change, words):
    given = mixed(samples)
    change(given)
    with pytest.raises((pipeline.InputError, pipeline.NotFoundError), match=words):
        pipeline.open_matrix(given)


def test_what_does_not_go_together(samples, tmp_path):
    np.save(tmp_path / "short.npy", VALUES["labels"][:-1])
    with pytest.raises(pipeline.InputError, match="a has 600, b has 599"):
        pipeline.open_matrix({"a": samples / "F.zarr", "b": tmp_path / "short.npy"})
    with pytest.raises(pipeline.OpenError, match="one Zarr array"):
        pipeline.open_matrix({"a": samples / "G.zarr"})
    with pytest.raises(pipeline.InputError, match="has no 'x'; it has codes"):
        pipeline.open_matrix(samples / "G.zarr", members=["x"])
    with pytest.raises(pipeline.InputError, match="one matrix"):
        pipeline.open_matrix(samples / "F.zarr", members=["x"])
    with pytest.raises(pipeline.InputError, match="give a list"):
        pipeline.open_matrix(samples / "G.zarr", members="labels")
    for source in (samples / "G.zarr", mixed(samples)):
        with pytest.raises(pipeline.InputError, match="--row-shape is for raw binary"):
            pipeline.open_matrix(source, row_shape=(2,))


# Planning.


def test_members_share_their_starts(opened):
    plan = pipeline.plan_windows(opened, STARTS, length=LENGTH)
    assert isinstance(plan, pipeline.GroupPlan)
    assert len(plan) == len(STARTS)
    assert (plan.length, plan.memory) == (LENGTH, None)
    assert plan.nbytes == sum(cut(a).nbytes for a in VALUES.values())
    for each in plan.members.values():
        assert each.starts is plan.starts
        assert each.sorted_starts is plan.sorted_starts
        assert each.sorted_places is plan.sorted_places
    np.testing.assert_array_equal(plan.starts, STARTS)
    assert plan.chunk.nbytes_read == sum(each.chunk.nbytes_read for each in plan.members.values())
    assert plan == pipeline.plan_windows(opened, STARTS, length=LENGTH)
    assert plan != pipeline.plan_windows(opened, STARTS[::-1], length=LENGTH)
    assert "of each of 4 arrays" in repr(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.copy(plan) == plan


def test_html_is_escaped(samples):
    group = pipeline.open_matrix({"<b>": samples / "F.zarr"})
    for shown in (group, pipeline.plan_windows(group, [1], length=2)):
        assert "&lt;b&gt;" in shown._repr_html_()
        assert "<b>" not in shown._repr_html_()


def test_columns_and_dtype_by_member(samples):
    group = pipeline.open_matrix(samples / "G.zarr", members=["features", "labels"])
    plan = pipeline.plan_windows(
        group, STARTS, length=LENGTH, columns={"features": slice(1, 4)}, dtype={"labels": "i4"}
    )
    found = pipeline.gather(plan)
    np.testing.assert_array_equal(found["features"], cut(VALUES["features"][:, 1:4]), strict=True)
    np.testing.assert_array_equal(found["labels"], cut(VALUES["labels"].astype("i4")), strict=True)
    with pytest.raises(pipeline.InputError, match="columns.*mapping"):
        pipeline.plan_windows(group, STARTS, length=LENGTH, columns=slice(1, 4))


# Values.


def test_gather_and_store_of_every_scheduler(opened, any_scheduler, tmp_path):
    plan = pipeline.plan_windows(opened, STARTS, length=LENGTH)
    check(pipeline.gather(plan))
    result = pipeline.store(plan, tmp_path / "w.zarr")
    assert set(result) == {*VALUES, "starts"}
    check({name: result[name] for name in VALUES})
    np.testing.assert_array_equal(result["starts"][:], STARTS)
    assert pipeline.verify(tmp_path / "w.zarr") == []
    assert [each.name for each in tmp_path.iterdir()] == ["w.zarr"]


def test_order_of_chunks(samples, tmp_path):
    plan = pipeline.plan_windows(pipeline.open_matrix(samples / "G.zarr"), STARTS, length=LENGTH)
    result = pipeline.store(plan, tmp_path / "w.zarr", order="chunk")
    places = result["places"][:]
    np.testing.assert_array_equal(result["starts"][:], np.sort(STARTS))
    np.testing.assert_array_equal(STARTS[places], np.sort(STARTS))
    check({name: result[name] for name in VALUES}, np.sort(STARTS))


def test_a_result_opens_in_xarray(samples, tmp_path):
    xarray = pytest.importorskip("xarray")
    plan = pipeline.plan_windows(pipeline.open_matrix(samples / "G.zarr"), STARTS, length=LENGTH)
    pipeline.store(plan, tmp_path / "w.zarr")
    with xarray.open_zarr(tmp_path / "w.zarr", consolidated=False, chunks=None) as made:
        check({name: made[name].values for name in VALUES})


def test_names_of_coordinates_are_free(tmp_path):
    """What travels beside one matrix would be in the way of an array of that name, also beside one called windows."""
    group = zarr.create_group(tmp_path / "X.zarr")
    group.create_array("windows", data=VALUES["features"], dimension_names=["time", "channel"], attributes={"a": "b"})
    group.create_array("time", data=VALUES["labels"], dimension_names=["time"])
    both = pipeline.open_matrix(tmp_path / "X.zarr", members=["windows", "time"])
    result = pipeline.store(pipeline.plan_windows(both, STARTS, length=LENGTH), tmp_path / "w.zarr")
    assert set(result) == {"windows", "time", "starts"}
    np.testing.assert_array_equal(result["windows"][:], cut(VALUES["features"]))
    np.testing.assert_array_equal(result["time"][:], cut(VALUES["labels"]))
    assert result["windows"].attrs["a"] == "b"


def test_apply_is_given_by_name(samples, tmp_path):
    plan = pipeline.plan_windows(pipeline.open_matrix(samples / "G.zarr"), STARTS, length=LENGTH)
    apply = {"features": lambda block: block.max(axis=(1, 2)), "labels": lambda block: block[:, -1:]}
    result = pipeline.store(plan, tmp_path / "w.zarr", apply=apply)
    for found in (pipeline.gather(plan, apply=apply), {name: result[name] for name in VALUES}):
        np.testing.assert_array_equal(found["features"][:], cut(VALUES["features"]).max(axis=(1, 2)), strict=True)
        np.testing.assert_array_equal(found["labels"][:], cut(VALUES["labels"])[:, -1:], strict=True)
        np.testing.assert_array_equal(found["codes"][:], cut(VALUES["codes"]), strict=True)
    with pytest.raises(pipeline.InputError, match="apply of several arrays is a mapping"):
        pipeline.gather(plan, apply=np.abs)
    with pytest.raises(pipeline.InputError, match="got 'other'; it has codes"):
        pipeline.store(plan, tmp_path / "x.zarr", apply={"other": np.abs})


def test_arrays_to_fill(samples, tmp_path):
    plan = pipeline.plan_windows(pipeline.open_matrix(samples / "G.zarr"), STARTS, length=LENGTH)
    out = {"labels": np.empty((len(STARTS), LENGTH), "i8"), "codes": np.empty((len(STARTS), LENGTH, 5, 3), "i1")}
    found = pipeline.gather(plan, out=out)
    check(found)
    assert found["labels"] is out["labels"]
    assert found["codes"] is out["codes"]
    for wrong, words in (
        (tmp_path / "w.npy", "name it X.zarr and use store"),
        (out["labels"], "mapping"),
        ({"labels": "w.npy"}, "give a NumPy array"),
        ({"labels": np.empty(3)}, r"shape \(48, 9\)"),
    ):
        with pytest.raises(pipeline.InputError, match=words):
            pipeline.gather(plan, out=wrong)
    with pytest.raises(pipeline.InputError, match="drop it"):
        pipeline.gather(plan, resume=True)
    twice = pipeline.open_matrix({"a": samples / "labels.npy", "b": samples / "labels.npy"})
    with pytest.raises(pipeline.InputError, match="a and b share memory"):
        pipeline.gather(
            pipeline.plan_windows(twice, STARTS, length=LENGTH), out={"a": out["labels"], "b": out["labels"]}
        )
    with pytest.raises(pipeline.InputError, match="build those of each"):
        pipeline.build_tasks(plan)
    assert not list(tmp_path.iterdir())


def test_all_together_must_fit(samples, monkeypatch):
    """Each alone fits; nothing is allocated where both do not."""
    names = ["features", "signal"]
    group = pipeline.open_matrix(samples / "G.zarr", members=names)
    many = np.zeros(2_000_000, dtype=int)
    need = {name: prepare_footprint(pipeline.plan_windows(group.members[name], many, length=LENGTH)) for name in names}
    both = prepare_footprint(pipeline.plan_windows(group, many, length=LENGTH))
    limit = max(need.values()) + (both - max(need.values())) // 2
    for name in names:
        prepare_footprint(pipeline.plan_windows(group.members[name], many, length=LENGTH, memory=limit))
    monkeypatch.setattr("pipeline.sinks.gather.new_array", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(pipeline.BudgetError, match="2 arrays of 2,000,000 windows, .* --out X.zarr"):
        pipeline.gather(pipeline.plan_windows(group, many, length=LENGTH, memory=limit))


def prepare_footprint(plan: Any) -> int:
    given: dict[str, Any] = {"apply": None, "out": None, "resume": False, "overwrite": False}
    return prepare_gathering(plan, **given).footprint().peak_nbytes


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "starts",
        "places",
        "row",
        "window",
        "zarr.json",
        ".hidden",
        "..",
        "__own",
        "a\nb",
        "x" * 300,
        "ä" * 200,
        "\ud800",
        "Good Name",
    ],
)
def test_names_that_a_result_cannot_have(samples, tmp_path, name):
    group = pipeline.open_matrix({name: samples / "F.zarr", "good name": samples / "labels.npy"})
    plan = pipeline.plan_windows(group, STARTS, length=LENGTH)
    assert set(pipeline.gather(plan)) == {name, "good name"}
    with pytest.raises(pipeline.InputError, match="another name|give it another"):
        pipeline.store(plan, tmp_path / "w.zarr")
    assert not list(tmp_path.iterdir())


def test_what_is_no_plan_or_matrix(samples, tmp_path):
    matrix = pipeline.open_matrix(samples / "F.zarr")
    with pytest.raises(pipeline.InputError, match="a plan is of a matrix; got str; open it"):
        pipeline.plan_windows("A.npy", STARTS, length=LENGTH)
    for function in (pipeline.gather, pipeline.build_tasks, lambda given: pipeline.store(given, tmp_path / "w.zarr")):
        with pytest.raises(pipeline.InputError, match="a plan is what plan_windows gives; got Matrix"):
            function(matrix)


def test_how_a_matrix_is_read_is_said_where_it_is_opened(samples):
    matrix = pipeline.open_matrix(samples / "F.zarr")
    for given in ({"check_reads": True}, {"missing_chunks": "fill"}):
        with pytest.raises(pipeline.InputError, match="'x' is open already"):
            pipeline.open_matrix({"x": matrix}, **given)


def test_a_result_is_no_group_of_matrices(samples, tmp_path):
    plan = pipeline.plan_windows(pipeline.open_matrix(samples / "F.zarr"), STARTS, length=LENGTH)
    pipeline.store(plan, tmp_path / "w.zarr")
    with pytest.raises(pipeline.OpenError, match="those of a result are windows; .* is a group with the arrays"):
        pipeline.open_matrix(tmp_path / "w.zarr")
    assert pipeline.open_matrix(tmp_path / "w.zarr" / "windows").rows == len(STARTS)


# Going on.


class StopError(Exception):
    """Ends a run where a test wants it to end."""


@dataclass(slots=True)
class StoppingWatch(Watch):
    """Raises once so many tasks are finished and noted."""

    after: int = -1
    numbers: list[int] = field(default_factory=list)

    def task_done(self, receipt: Any) -> None:
        Watch.task_done(self, receipt)
        self.numbers.append(receipt.number)
        if len(self.numbers) == self.after:
            raise StopError


def store(plan: Any, path: Path, watch: Watch, **given: Any) -> None:
    prepare_storing(plan, path, apply=None, order="request", **{"resume": False, "overwrite": False} | given).run(watch)


@pytest.mark.usefixtures("many_tasks")
@pytest.mark.parametrize("after", [1, 6, 15])
def test_a_run_goes_on_across_members(samples, tmp_path, after):
    plan = pipeline.plan_windows(pipeline.open_matrix(samples / "G.zarr"), STARTS, length=LENGTH)
    path = tmp_path / "w.zarr"
    with pytest.raises(StopError) as stopped:
        store(plan, path, StoppingWatch(after=after))
    assert f"{after} of 16 tasks" in stopped.value.__notes__[0]
    assert [each.name for each in tmp_path.iterdir()] == ["w.zarr.partial"]
    again = StoppingWatch()
    store(plan, path, again, resume=True)
    assert again.tasks == sum(each.chunk.tasks for each in plan.members.values()) == 16
    assert again.kept_tasks == after
    assert again.numbers == list(range(after, 16))
    assert again.units == again.done_units == 4 * len(STARTS)
    result = zarr.open_group(path, mode="r")
    check({name: result[name] for name in VALUES})
    assert pipeline.verify(path) == []
    finished = StoppingWatch()
    store(plan, path, finished, resume=True)
    assert finished.tasks == 0


@pytest.mark.usefixtures("many_tasks")
def test_a_run_of_other_members_is_another_request(samples, tmp_path):
    path = tmp_path / "w.zarr"
    group = pipeline.open_matrix(samples / "G.zarr")
    plan = pipeline.plan_windows(group, STARTS, length=LENGTH)
    with pytest.raises(StopError):
        store(plan, path, StoppingWatch(after=3))
    fewer = pipeline.plan_windows(pipeline.open_matrix(samples / "G.zarr", members=["codes"]), STARTS, length=LENGTH)
    with pytest.raises(pipeline.OutputExistsError, match="differs in .*arrays.*matrix of labels"):
        store(fewer, path, Watch(), resume=True)
    store(fewer, path, Watch(), resume=True, overwrite=True)
    check({"codes": zarr.open_group(path, mode="r")["codes"]}, names=["codes"])


def test_the_single_result_is_as_before(samples, tmp_path):
    """A group of one array is another request than that array alone, which keeps its names and facts."""
    plan = pipeline.plan_windows(pipeline.open_matrix(samples / "F.zarr"), STARTS, length=LENGTH)
    given: dict[str, Any] = {"apply": None, "order": "request", "resume": False, "overwrite": False}
    facts = prepare_storing(plan, tmp_path / "w.zarr", **given).request().facts
    assert {"kind", "matrix", "starts", "length", "order", "apply", "result", "layout"} <= set(facts)
    assert "arrays" not in facts
    group = pipeline.plan_windows(pipeline.open_matrix({"windows": samples / "F.zarr"}), STARTS, length=LENGTH)
    assert prepare_storing(group, tmp_path / "w.zarr", **given).request().differences(facts)


@pytest.mark.usefixtures("many_tasks")
def test_a_changed_member_ends_the_run(samples, tmp_path):
    for name in ("labels", "codes"):
        np.save(tmp_path / f"{name}.npy", VALUES[name])
    group = pipeline.open_matrix({name: tmp_path / f"{name}.npy" for name in ("labels", "codes")})
    plan = pipeline.plan_windows(group, STARTS, length=LENGTH)

    @dataclass(slots=True)
    class ChangingWatch(Watch):
        def task_done(self, receipt: Any) -> None:
            Watch.task_done(self, receipt)
            os.utime(tmp_path / "labels.npy", ns=(1, 1))

    with pytest.raises(pipeline.IntegrityError, match=r"labels\.npy"):
        store(plan, tmp_path / "w.zarr", ChangingWatch())
    assert not (tmp_path / "w.zarr").exists()


def test_a_killed_run_goes_on(samples, tmp_path):
    """The process is killed by its own hand in the midst of the second array."""
    np.save(tmp_path / "starts.npy", STARTS)
    script = f"""
import os, signal, sys
import pipeline.plan.plan as planning
import pipeline.runtime.report as reports
planning._LEAST_BLOCK_NBYTES, planning._FEWEST_TASKS = 1, 4
real, count = reports.Watch.task_done, [0]
def task_done(self, receipt):
    count[0] += 1
    if count[0] == {{}}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, receipt)
reports.Watch.task_done = task_done
import dask, pipeline
dask.config.set(scheduler="synchronous")
import numpy as np
plan = pipeline.plan_windows(pipeline.open_matrix({str(samples / "G.zarr")!r}), np.load("starts.npy"), length={LENGTH})
pipeline.store(plan, "w.zarr", resume=True)
print(count[0])
"""
    killed = subprocess.run([sys.executable, "-c", script.format(6)], cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "w.zarr").exists()
    done = subprocess.run(
        [sys.executable, "-c", script.format(-1)], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert int(done.stdout) == 10
    result = zarr.open_group(tmp_path / "w.zarr", mode="r")
    check({name: result[name] for name in VALUES})


def test_memory_buckets_take_groups(samples):
    """An object store: the same arrays and record; what another request left is refused until it is deleted."""
    url = "memory://groups/w.zarr"
    plan = pipeline.plan_windows(pipeline.open_matrix(samples / "G.zarr"), STARTS, length=LENGTH)
    with dask.config.set(scheduler="synchronous"):
        with pytest.raises(StopError):
            store(plan, url, StoppingWatch(after=3))  # type: ignore[arg-type]
        other = pipeline.plan_windows(pipeline.open_matrix({"x": samples / "F.zarr"}), STARTS, length=LENGTH)
        with pytest.raises(pipeline.OutputExistsError, match="w.zarr.partial"):
            store(other, url, Watch(), overwrite=True)  # type: ignore[arg-type]
        url = "memory://groups/other.zarr"
        store(other, url, Watch())  # type: ignore[arg-type]
        from pipeline.storage.locations import locate
        from pipeline.storage.stores import open_store

        made = zarr.open_group(open_store(locate(url), read_only=True), mode="r")
        assert set(made) == {"x", "starts"}
        np.testing.assert_array_equal(made["x"][:], cut(VALUES["features"]))
        assert pipeline.verify(url) == []
        result = pipeline.store(plan, "memory://groups/w.zarr", resume=True)
    check({name: result[name] for name in VALUES})


# The command line.


def test_the_verbs_take_a_group(samples, cli):
    path = samples / "G.zarr"
    told = cli("info", path, "--json", "--length", LENGTH).numbers
    assert (told["rows"], set(told["members"])) == (ROWS, set(VALUES))
    assert "4 that share 600 rows" in cli("info", path, "--length", LENGTH).out
    common = ["--count", 30, "--length", LENGTH]
    planned = cli("plan", path, *common, "--out", "w.zarr", "--json").numbers
    assert planned["result_shapes"]["codes"] == [30, LENGTH, 5, 3]
    ran = cli("run", path, *common, "--json").numbers
    assert ran["nbytes_delivered"] == 30 * LENGTH * sum(a[:1].nbytes for a in VALUES.values())
    outcome = cli("run", path, *common, "--out", "w.zarr")
    assert outcome.code == 0, outcome.err
    assert "labels (30, 9) int64" in outcome.out
    starts = pipeline.draw_starts(ROWS, length=LENGTH, count=30, seed=0)
    result = zarr.open_group("w.zarr", mode="r")
    check({name: result[name] for name in VALUES}, starts)
    assert cli("verify", "w.zarr", "-q").code == 0
    assert json.loads((Path("w.zarr") / "zarr.json").read_text())["attributes"]["random-windows"]["kind"] == "windows"


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("run {G} --member labels --member codes --out w.zarr", 0, ["labels", "codes"]),
        ("run {G}/labels --out w.zarr", 0, ["(30, 9) int64"]),
        ("run {G} --apply labels=apply_me:last --out w.zarr", 0, ["labels (30) int64"]),
        ("run {G} --apply apply_me:last", 2, ["NAME=MODULE:FUNCTION"]),
        ("run {G} --member features --columns 0:2 --out w.npy", 0, ["(30, 9, 2) float32", "w.npy"]),
        ("run {G} --member features --apply apply_me:last --out w.npy", 0, ["(30, 6) float32"]),
        ("run {G} --apply labels=apply_me:last,labels=apply_me:last", 2, ["NAME=MODULE:FUNCTION"]),
        ("run {G} --columns 0:2", 2, ["--columns is for one matrix", "--member"]),
        ("run {G} --member nothing", 2, ["has no 'nothing'", "codes, features, labels, signal"]),
        ("run {F} --member labels", 2, ["one matrix", "drop it"]),
        ("run {G} --out w.npy", 2, ["name it X.zarr"]),
        ("run {G} --memory 1MB", 5, ["4 arrays of 30 windows"]),
        ("info {G} --row-shape 3", 2, ["--row-shape is for raw binary"]),
        ("info {G} --length 601", 2, ["length 601"]),
    ],
)
def test_lines(samples, cli, tmp_path, line, code, words):
    (tmp_path / "apply_me.py").write_text("def last(block):\n    return block[:, -1]\n")
    given = line.format(G=samples / "G.zarr", F=samples / "F.zarr").split()
    more = [] if given[0] == "info" else ["--count", "30", "--length", str(LENGTH)]
    outcome = cli(*given, *more)
    assert outcome.code == code, outcome.err
    assert all(word in outcome.out + outcome.err for word in words), outcome.out + outcome.err
    assert Path("w.zarr").exists() == ("w.zarr" in line and code == 0)
