"""The bench: every contender gives the windows, what is wrong is not timed, what is absent is named."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from pipeline.bench import lineup, page_cache, report, rounds, scenarios, worker
from pipeline.bench.job import Job, prepare_job
from pipeline.bench.run import check_ours
from pipeline.errors import BudgetError, InputError, IntegrityError

TINY = {
    scenario.name: scenario
    for scenario in (
        replace(scenarios.SCENARIOS["seed"][0], rows=3000, columns=40, count=60, chunk_rows=4, shard_rows=512),
        replace(scenarios.SCENARIOS["small"][0], rows=4000, count=300, chunk_rows=64, shard_rows=1024),
        replace(scenarios.SCENARIOS["compressed"][0], rows=2000, columns=50, count=60),
        replace(scenarios.SCENARIOS["compressed"][1], rows=9000, columns=20, count=60),
        replace(scenarios.SCENARIOS["store"][0], rows=3000, columns=40, count=60),
        replace(scenarios.SCENARIOS["create"][0], rows=3000, columns=40, count=60),
        replace(scenarios.SCENARIOS["clusters"][0], rows=3000, columns=40, count=60),
        replace(scenarios.SCENARIOS["batches"][0], rows=3000, columns=40, count=700),
    )
}
LINEUP = {each.key: each for each in lineup.LINEUP}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return {name: prepare_job(scenario, folder, lambda _: None) for name, scenario in TINY.items()}


def never():
    raise AssertionError("over the limit")


def counted(scenario):
    """Values as plain Python counts them."""
    numbers = np.array([[r * scenario.columns + c + 1 for c in range(scenario.columns)] for r in range(scenario.rows)])
    return numbers.astype("f8") if scenario.dtype == "float64" else numbers.astype("u4").view("f4")


@pytest.mark.parametrize("name", ["seed", "small"])
def test_files_hold_values_that_all_differ(jobs, name):
    job = jobs[name]
    with h5py.File(job.hdf5) as file:
        dataset = file["A"]
        assert dataset.chunks is None
        values = dataset[:]
    assert values.tobytes() == counted(job.scenario).tobytes()
    assert len(np.unique(values.view(f"u{values.itemsize}"))) == values.size
    for path in (job.zarr, job.matrix):
        assert zarr.open_array(path, mode="r")[:].tobytes() == values.tobytes()
    assert np.asarray(job.memmap()).tobytes() == values.tobytes()


@pytest.mark.parametrize("name", ["compressed-chunks", "compressed-shards"])
def test_compressed_values_are_exact_and_rows_differ(jobs, name):
    job = jobs[name]
    array = zarr.open_array(job.zarr, mode="r")
    values = array[:]
    assert values.dtype == np.float32
    assert (values == np.round(values)).all()
    assert values.max() < 2**24
    assert len(np.unique(values, axis=0)) == job.scenario.rows
    stored = sum(path.stat().st_size for path in job.zarr.rglob("*") if path.is_file())
    assert 1.5 < values.nbytes / stored < 6
    assert job.matrix == job.zarr
    assert not job.hdf5.exists()
    assert (array.chunks[0], array.shards) == ((256, None) if "chunks" in name else (32, (8192, 20)))


def fitting():
    """Each scenario with each contender that is meant for it, installed or not."""
    for name, key in itertools.product(TINY, LINEUP):
        reason = LINEUP[key].reason_to_skip(TINY[name], has_cluster=True)
        if TINY[name].task not in LINEUP[key].tasks:
            continue
        if reason is None or reason.startswith("not installed"):
            yield name, key


@pytest.mark.parametrize(("name", "key"), list(fitting()))
def test_every_contender_gives_every_window(jobs, name, key, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    job, who = jobs[name], LINEUP[key]
    if reason := who.reason_to_skip(job.scenario):
        pytest.skip(reason)
    result = worker.run_once(who, job, cold=False, limit=60, over=never)
    assert result["state"] == "timed"
    assert result["seconds"] > 0
    assert result["cached"] == (1.0 if who.files != "nothing" else 0.0)
    assert not list(job.zarr.parent.glob("written-*"))
    if who.kind != "limit":
        # Once more against an oracle that shares nothing with the bench.
        rows = zarr.open_array(job.zarr, mode="r")[:] if job.scenario.compressed else counted(job.scenario)
        starts = job.scenario.starts()
        expected = np.stack([rows[start : start + 16] for start in starts])
        windows = who.read(replace(job, scratch=tmp_path), starts)
        windows = np.concatenate(windows) if isinstance(windows, list) else windows[:]
        assert windows.tobytes() == expected.tobytes()


def test_cold_reads_are_right(jobs):
    result = worker.run_once(LINEUP["h5py_read_direct"], jobs["seed"], cold=True, limit=60, over=never)
    assert result["state"] == "timed"
    assert 0 <= result["cached"] <= 1


def test_drop_and_warm(tmp_path):
    path, empty = tmp_path / "a", tmp_path / "b"
    path.write_bytes(bytes(10_000_000))
    empty.touch()
    page_cache.drop_files([path, empty])
    page_cache.warm_files([path, empty])
    assert page_cache.cached_share([path, empty]) == 1.0
    assert page_cache.cached_share([]) == page_cache.cached_share([empty]) == 0.0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda windows: windows[::-1],
        lambda windows: windows[:-1],
        lambda windows: windows.astype("f4"),
        lambda windows: np.where(np.arange(windows.size).reshape(windows.shape) == windows.size - 1, 0, windows),
        lambda windows: np.roll(windows, 1, axis=1),
    ],
)
def test_wrong_values_are_not_timed(jobs, spoil):
    right = LINEUP["memmap_loop"]
    wrong = replace(right, read=lambda job, starts: spoil(right.read(job, starts)))
    result = worker.run_once(wrong, jobs["seed"], cold=False, limit=60, over=never)
    assert result["state"] == "wrong"
    assert "seconds" not in result


@pytest.mark.parametrize(
    "spoil",
    [
        lambda batches: batches[::-1],
        lambda batches: batches[:-1],
        lambda batches: [*batches[:-1], batches[-1][:-1]],
        lambda batches: [*batches, batches[0][:1]],
        lambda batches: [batches[0].astype("f4"), *batches[1:]],
    ],
)
def test_wrong_batches_are_not_timed(jobs, spoil):
    right = LINEUP["memmap_batches"]
    wrong = replace(right, read=lambda job, starts: spoil(right.read(job, starts)))
    result = worker.run_once(wrong, jobs["batches"], cold=False, limit=60, over=never)
    assert result["state"] == "wrong"


def test_what_takes_too_long_is_stopped(jobs):
    right, stopped = LINEUP["memmap_loop"], threading.Event()

    def slow(job, starts):
        if len(starts) > 1:
            assert stopped.wait(60)
        return right.read(job, starts)

    worker.run_once(replace(right, read=slow), jobs["seed"], cold=False, limit=0.05, over=stopped.set)
    assert stopped.is_set()


def test_worker_process_says_one_json_object(jobs, tmp_path):
    scenario = TINY["seed"]
    order = {
        "scenario": asdict(scenario),
        "folder": str(jobs["seed"].zarr.parent),
        "contender": "ours_cluster",
        "cold": False,
        "limit": 60,
        "where": {},
    }
    command = [sys.executable, "-P", "-m", "pipeline.bench.worker"]
    done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout).keys() == {"state", "seconds", "peak_memory", "cached"}


def run_faked(monkeypatch, answers, *, count=3, copied=True, scenario="seed"):
    """Rounds without processes: `answers` maps keys to what a worker says; others take one second."""
    calls = []

    def answer(order):
        calls.append(order["contender"])
        given = answers.get(order["contender"], {"state": "timed", "seconds": 1.0, "peak_memory": 7, "cached": 1.0})
        return given.pop(0) if isinstance(given, list) else given

    monkeypatch.setattr(rounds, "_run_worker", answer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if copied:
            (folder / "plain.zarr").mkdir()
        settings = {"rounds": count, "cold": False, "limit": 9, "say": lambda _: None}
        return rounds.run_rounds(Job(TINY[scenario], folder), **settings), calls


def timed(*seconds):
    return [{"state": "timed", "seconds": value, "peak_memory": 1, "cached": 1.0} for value in seconds]


def test_rounds_are_interleaved_and_the_first_is_thrown_away(monkeypatch):
    answers = {"ours_cluster": timed(100, 1, 2, 4), "h5py_preallocated": timed(100, 3, 4, 40)}
    table, calls = run_faked(monkeypatch, answers)
    once = [each.key for each in lineup.LINEUP if "gather" in each.tasks and not each.reason_to_skip(TINY["seed"])]
    assert calls == once * 4
    score = next(score for score in table.scores if score.contender.key == "h5py_preallocated")
    assert score.seconds == [3, 4, 40]
    assert score.median == 4
    assert table.ratio(score) == 3  # Of 3/1, 4/2 and 40/4: pairs of one round, not 4/2 of the medians.
    assert table.ranked()[-1] is score


def test_who_reads_a_copy_that_the_disk_did_not_hold_is_skipped(monkeypatch):
    table, calls = run_faked(monkeypatch, {}, copied=False)
    skipped = {score.contender.key: score.reason for score in table.untimed()}
    assert {key for key, reason in skipped.items() if "no room on the disk" in reason} == {
        each.key for each in lineup.LINEUP if each.files == "zarr"
    }
    assert {"ours_cluster", "h5py_preallocated", "dask_indexing", "limit_storage"} <= set(calls)


def test_wrong_slow_and_failed_are_named_and_left_out(monkeypatch):
    answers = {
        "zarr_loop": {"state": "over"},
        "memmap_loop": [*timed(1, 1), {"state": "wrong"}],
        "zarr_oindex": {"state": "failed", "reason": "ValueError: no"},
    }
    table, calls = run_faked(monkeypatch, answers)
    assert (calls.count("zarr_loop"), calls.count("memmap_loop"), calls.count("zarr_oindex")) == (1, 3, 1)
    states = {score.contender.key: (score.state, score.reason) for score in table.untimed()}
    assert states["zarr_loop"] == ("over", "over 9 s")
    assert states["memmap_loop"] == ("wrong", "gave wrong values")
    assert states["zarr_oindex"] == ("failed", "ValueError: no")
    assert not states.keys() & {score.contender.key for score in table.ranked()}
    row = next(row for row in table.numbers()["contenders"] if row["key"] == "memmap_loop")
    assert "median" not in row
    text = "\n".join(report.table_lines(table))
    assert "np.memmap, loop               wrong: gave wrong values" in text
    assert "skipped, for compressed chunks: decode each chunk once" in text


def test_our_own_wrong_values_are_an_error(monkeypatch):
    table, _ = run_faked(monkeypatch, {"ours_cluster": [*timed(1, 1), {"state": "wrong"}]})
    with pytest.raises(IntegrityError, match="this project, cluster"):
        check_ours(table)
    check_ours(run_faked(monkeypatch, {"memmap_loop": {"state": "wrong"}})[0])


def test_ours_untimed_gives_no_ratio(monkeypatch):
    table, _ = run_faked(monkeypatch, {"ours_cluster": {"state": "wrong"}})
    assert {table.ratio(score) for score in table.ranked()} == {None}
    assert report.table_lines(table)


def test_what_is_not_installed_is_skipped(monkeypatch):
    find = lineup.importlib.util.find_spec
    gone = {"tensorstore", "torch"}
    monkeypatch.setattr(lineup.importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    table, calls = run_faked(monkeypatch, {})
    assert not {"tensorstore_batch", "tensorstore_index", "torch_loader"} & set(calls)
    reasons = {score.contender.key: score.reason for score in table.untimed()}
    assert reasons["tensorstore_batch"] == "not installed: tensorstore"
    assert reasons["torch_loader"] == "not installed: torch"


def test_a_worker_that_dies_is_a_score(tmp_path):
    result = rounds._run_worker({"contender": "no such one", "limit": 1})
    assert result["state"] == "failed"
    assert "KeyError" in result["reason"]


def test_too_large_for_memory(monkeypatch):
    huge = replace(TINY["seed"], count=10**12)
    with pytest.raises(BudgetError, match="not enough memory: seed needs 3 results"):
        rounds.run_rounds(Job(huge, Path()), rounds=1, cold=False, limit=1, say=print)


def test_sizes():
    for name, full in scenarios.SCENARIOS.items():
        rows = full[0].rows
        assert [each.count for each in scenarios.choose_scenarios(name, rows)] == [each.count for each in full]
        assert all(each.count == 500 for each in scenarios.choose_scenarios(name, 100))
        with pytest.raises(InputError, match="--rows 15 is less than one window of 16 rows"):
            scenarios.choose_scenarios(name, 15)
    assert scenarios.choose_scenarios("seed", 500_000)[0].count == 2500
    for name, rows in (("small", 66_846_720), ("compressed", 2**20)):
        with pytest.raises(InputError, match=f"--rows {rows} is too many .*; give at most {rows - 1}"):
            scenarios.choose_scenarios(name, rows)
        scenarios.choose_scenarios(name, rows - 1)


def test_command_line(cli, tmp_path, monkeypatch):
    few = [LINEUP[key] for key in ("h5py_read_direct", "torch_loader", "ours_cluster")]
    monkeypatch.setattr(rounds, "LINEUP", few)
    done = cli("bench", tmp_path / "data", "--rows", "600", "--rounds", "1", "--cold", "--json", "--plot", "a.png")
    assert done.code == 0, done.err
    assert done.numbers.keys() == {"machine", "rounds", "limit", "tables"}
    assert done.numbers["machine"].keys() == {"cpu", "cores", "memory", "system", "python", "versions"}
    (table,) = done.numbers["tables"]
    assert (table["scenario"], table["cold"], table["shape"], table["windows"]) == ("seed", True, [600, 2000], 500)
    rows = {row["key"]: row for row in table["contenders"]}
    assert list(rows) == [each.key for each in few]
    for key in ("h5py_read_direct", "ours_cluster"):
        row = rows[key]
        assert row["state"] == "timed", row
        assert len(row["seconds"]) == 1
        assert row["least"] == row["median"] == row["most"]
    assert rows["ours_cluster"]["ratio"] == 1
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "round 0 of 1" in done.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--plot", "a.doc"), "--plot a.doc has no format of matplotlib"),
        (("--plot", "no/a.png"), "--plot no/a.png is in a folder that does not exist"),
        (("--rows", "3"), "--rows 3 is less than one window of 16 rows"),
        (("--scenario", "huge"), "'huge' is not one of"),
        (("--rounds", "0"), "0 is not in the range"),
    ],
)
def test_bad_flags(cli, flags, words):
    done = cli("bench", *flags)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1


def test_without_h5py_there_are_no_plain_files(cli, monkeypatch):
    find = lineup.importlib.util.find_spec
    monkeypatch.setattr(lineup.importlib.util, "find_spec", lambda name: None if name == "h5py" else find(name))
    done = cli("bench")
    assert done.code == 2
    assert "h5py is not installed, which scenario seed needs" in done.err


@pytest.mark.parametrize("name", TINY)
def test_every_scenario_has_a_picture(monkeypatch, tmp_path, name):
    from pipeline.bench.picture import draw_tables

    table, _ = run_faked(monkeypatch, {}, scenario=name)
    draw_tables([table], "a machine", tmp_path / "a.svg")
    assert all(score.contender.label in (tmp_path / "a.svg").read_text() for score in table.limits())


def test_picture_of_compressed_has_two_panels(monkeypatch, tmp_path):
    from pipeline.bench.picture import draw_tables

    answers = {"zarr_loop": {"state": "over"}, "h5py_preallocated": timed(1, 50, 60, 70)}
    table, _ = run_faked(monkeypatch, answers)
    draw_tables([table, table], "a machine", tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 10_000
