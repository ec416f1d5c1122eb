"""What a run's report says: what limited it, and what a block of Python did."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

import pipeline
from pipeline.runtime.report import Watch, name_limit, share_seconds, watched
from pipeline.runtime.tasks import Receipt


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ({"read_seconds": 3.6}, "storage"),
        ({"read_seconds": 1.0, "decode_seconds": 2.8}, "decode"),
        ({"read_seconds": 1.0, "apply_seconds": 2.8}, "apply"),
        ({"read_seconds": 0.5, "write_seconds": 3.0}, "write"),
        ({"read_seconds": 0.4, "done_tasks": 8}, "Dask"),
        ({"read_seconds": 1.5, "decode_seconds": 1.2, "write_seconds": 1.2}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_the_limit_is_what_took_most(seconds, limit):
    watch = Watch()
    for name, value in seconds.items():
        setattr(watch, name, value)
    assert name_limit(watch, threads=4, seconds=1.0, amplification=1.0, repetition=1.0)[0] == limit


def test_reads_that_are_slow_and_too_few_are_not_dasks_fault():
    """Two tasks for eight threads, which wait for the storage all the while."""
    watch = Watch()
    watch.begin(2, 200, 10**6)
    for number in range(2):
        watch.task_done(Receipt(number, 100, 10**6, 3.9))
    watch.started = watch.last - 4
    limit, advice = name_limit(watch, threads=8, seconds=4.0, amplification=1.0, repetition=1.0)
    assert limit == "storage"
    assert advice == "2 tasks for 8 threads, the longest 3.9 s: more windows make more tasks"


@pytest.mark.parametrize(
    ("receipts", "passed", "limit"),
    [
        # Cores that have nothing to do, for want of tasks, or since one is longer than the others.
        ([{"apply_seconds": 3.9}], 0, "tasks"),
        ([{"decode_seconds": 3.9}, *9 * [{"decode_seconds": 0.1}]], 0, "tasks"),
        ([{"read_seconds": 1.0, "decode_seconds": 1.4, "write_seconds": 1.4}], 0, "tasks"),
        ([{"write_seconds": 3.9}], 0, "write"),
        # Many tasks, each of which is short.
        (100 * [{"read_seconds": 0.01}], 0, "Dask"),
        # Before the first and after the last.
        (100 * [{"read_seconds": 0.05}], 3.0, "checks"),
    ],
)
def test_threads_that_wait_know_for_what(receipts, passed, limit):
    watch = Watch()
    watch.begin(len(receipts), len(receipts), 10**6)
    for number, seconds in enumerate(receipts):
        watch.task_done(Receipt(number, 1, 10**4, **{"read_seconds": 0.0} | seconds))
    watch.started = watch.last - 4 + passed
    named, advice = name_limit(watch, threads=8, seconds=4.0, amplification=1.0, repetition=1.0)
    assert named == limit
    assert advice
    assert "\n" not in advice


def test_a_short_run_says_nothing():
    assert name_limit(Watch(read_seconds=0.3), threads=4, seconds=0.1, amplification=1.0, repetition=1.0) == (
        "unknown",
        "",
    )


def test_wasted_reading_has_its_advice():
    assert "less" in name_limit(Watch(read_seconds=4), threads=4, seconds=1.0, amplification=9.0, repetition=1.0)[1]


@pytest.mark.parametrize("stage", ["read", "decode"])
def test_chunks_that_are_read_again_have_theirs(stage):
    watch = Watch(**{f"{stage}_seconds": 4.0})
    settings = {"threads": 4, "seconds": 1.0, "amplification": 9.0}
    assert "--order chunk" in name_limit(watch, **settings, repetition=3.0)[1]
    assert "--order chunk" not in name_limit(watch, **settings, repetition=1.1)[1]


def test_shares_are_those_of_the_tasks_time():
    watch = Watch(read_seconds=1.0, decode_seconds=2.0, write_seconds=1.0)
    assert share_seconds(watch) == {"read": 0.25, "decode": 0.5, "apply": 0.0, "write": 0.25}
    assert set(share_seconds(Watch()).values()) == {0.0}


def doing(plan, **options):
    with pipeline.Report() as report:
        pipeline.gather(plan, **options)
    return report


@pytest.fixture
def plan(samples):
    return pipeline.plan_windows(pipeline.open_matrix(samples / "A.zarr"), [5, 900, 1200], length=16)


def test_a_report_collects_what_its_block_did(plan, tmp_path):
    with pipeline.Report() as report:
        made = pipeline.create_matrix("random:300x4", tmp_path / "B.zarr", shard_rows=100)
        pipeline.gather(plan)
        pipeline.store(plan, tmp_path / "W.zarr")
        assert pipeline.verify(tmp_path / "W.zarr") == []
    pipeline.gather(plan)
    numbers = report.numbers()
    assert [run["verb"] for run in numbers["runs"]] == ["create_matrix", "gather", "store", "verify"]
    created, gathered, stored, verified = numbers["runs"]
    # Indexes and checksums, too.
    assert created["nbytes_delivered"] >= made.nbytes
    assert gathered["nbytes_delivered"] == stored["nbytes_delivered"] == plan.nbytes
    assert gathered["tasks"] == plan.chunk.tasks
    assert stored["write_seconds"] > 0
    assert verified["nbytes_read"] == verified["nbytes_delivered"] >= plan.nbytes
    assert numbers["nbytes_read"] == sum(run["nbytes_read"] for run in numbers["runs"])
    assert 0 < sum(run["seconds"] for run in numbers["runs"]) <= report.seconds == numbers["seconds"]
    assert report.peak_memory > 1e6
    json.dumps(numbers)
    assert all(name in repr(report) for name in ("gather", "store", "verify", "MB/s", "peak memory"))


def test_nothing_is_collected_outside(plan):
    report = doing(plan)
    assert len(report.runs) == 1
    pipeline.gather(plan)
    assert len(report.runs) == 1
    with watched("gather") as watch:
        assert type(watch) is Watch


def test_reports_nest_and_are_of_one_block(plan):
    with pipeline.Report() as outer:
        inner = doing(plan)
        pipeline.gather(plan)
        with pytest.raises(pipeline.InputError, match="make another Report"), outer:
            pass
        pipeline.gather(plan)
    assert (len(outer.runs), len(inner.runs)) == (3, 1)
    assert outer.runs[0] is inner.runs[0]
    assert list(outer.named()) == ["gather 1", "gather 2", "gather 3"]


def test_another_thread_has_reports_of_its_own(plan):
    with pipeline.Report() as mine, ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(doing, plan).result()
        pipeline.gather(plan)
    assert (len(mine.runs), len(theirs.runs)) == (1, 1)
    assert mine.runs[0] is not theirs.runs[0]


def test_a_failure_is_told_and_goes_on(plan):
    def fail(block):
        raise KeyError(len(block))

    with pytest.raises(pipeline.PipelineError), pipeline.Report() as report:
        pipeline.gather(plan, apply=lambda block: fail(block) if len(block) > 1 else block)
    (run,) = report.runs
    assert report.numbers()["runs"][0]["failed"] == run.failed != ""
    assert "failed after" in report.facts()["gather"]
    doing(plan)


def test_a_run_with_nothing_left(plan, tmp_path):
    pipeline.store(plan, tmp_path / "W.zarr")
    with pipeline.Report() as report:
        pipeline.store(plan, tmp_path / "W.zarr", resume=True)
    assert report.facts()["store"].startswith("nothing was left")
    assert report.numbers()["runs"][0]["bytes_per_second"] is None
    assert report.numbers()["nbytes_delivered"] == 0


def test_a_resumed_run_counts_its_own_windows_only():
    with pipeline.Report() as report, watched("store") as watch:
        watch.begin(4, 400, 4_000)
        watch.task_kept(100)
        watch.task_done(Receipt(1, 300, 9_000, 0.1))
    numbers = report.numbers()
    assert (numbers["nbytes_delivered"], numbers["runs"][0]["amplification"]) == (3_000, 3.0)
    assert "1 finished before" in report.facts()["tasks"]


def test_a_report_can_be_looked_at_before_and_within(plan):
    report = pipeline.Report()
    assert (report.seconds, report.numbers()["tasks"]) == (0, 0)
    assert "none" in repr(report)
    with report:
        pipeline.gather(plan)
        assert "MB/s" in repr(report)
        assert report.seconds > 0


def test_threads_that_wait_are_idle():
    with pipeline.Report() as report, watched("gather") as watch:
        watch.read_seconds = 0.0
    (run,) = report.runs
    assert run.stages()["idle"] == pytest.approx(run.threads * run.seconds)


def test_batches_are_a_run_too(plan):
    with pipeline.Report() as report:
        with pipeline.iter_batches(plan, 2) as batches:
            assert sum(len(batch) for batch in batches) == 3
        with pipeline.iter_batches(plan, 1) as batches:
            next(batches)
    whole, left_early = report.numbers()["runs"]
    assert (whole["verb"], whole["nbytes_delivered"], whole["failed"]) == ("iter_batches", plan.nbytes, None)
    assert left_early["failed"] is None


@pytest.mark.parametrize(("pulled", "limit"), [(False, "Dask"), (True, "caller")])
def test_reading_that_waits_for_its_caller(pulled, limit):
    with pipeline.Report() as report, watched("iter_batches", pulled=pulled):
        pass
    (run,) = report.runs
    run.read_seconds, run.ended = 0.01, run.entered + 1
    assert run.limit()[0] == limit


def test_several_arrays_that_share_rows(plan, samples):
    both = pipeline.open_matrix({"a": samples / "A.zarr", "b": samples / "A.npy"})
    group = pipeline.plan_windows(both, [5, 900, 1200], length=16)
    with pipeline.Report() as report:
        pipeline.gather(group)
        for _ in pipeline.iter_batches(group, 2):
            pass
    assert [run["nbytes_delivered"] for run in report.numbers()["runs"]] == [2 * plan.nbytes] * 2
