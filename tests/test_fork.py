"""Every public function in a child that was forked beside threads, clusters and runs of its parent."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import distributed
import numpy as np
import pytest

import pipeline

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # forking beside threads, which is the point
]

SECONDS = int(os.environ.get("FORK_SECONDS", "60"))
"""Until a child counts as one that hangs."""
STARTS = np.array([0, 700, 5, 1_984, 1_000, 250] * 4)


def planned(samples):
    return pipeline.plan_windows(pipeline.open_matrix(samples / "A.zarr"), STARTS, length=16)


def windows_of(samples):
    values = np.load(samples / "A.npy")
    return np.stack([values[start : start + 16] for start in STARTS])


def is_right(samples, windows):
    return bool(np.array_equal(windows, windows_of(samples)))


def opens(samples, folder):
    return pipeline.open_matrix(samples / "A.zarr").rows == 2_000


def creates(samples, folder):
    target = folder / f"created-{os.getpid()}.zarr"
    matrix = pipeline.create_matrix(samples / "A.npy", target, overwrite=True)
    plan = pipeline.plan_windows(matrix, STARTS, length=16)
    return is_right(samples, pipeline.gather(plan))


def draws(samples, folder):
    return len(pipeline.draw_starts(2_000, length=16, count=50, seed=0)) == 50


def plans(samples, folder):
    return len(planned(samples)) == len(STARTS)


def gathers(samples, folder):
    return is_right(samples, pipeline.gather(planned(samples)))


def applies(samples, folder):
    means = pipeline.gather(planned(samples), apply=mean)
    return bool(np.allclose(means, windows_of(samples).mean(axis=1)))


def mean(block):
    return block.mean(axis=1)


def stores(samples, folder):
    target = folder / f"stored-{os.getpid()}.zarr"
    pipeline.store(planned(samples), target, overwrite=True)
    whole = pipeline.plan_windows(pipeline.open_matrix(f"{target}/windows"), np.arange(len(STARTS)), length=1)
    return is_right(samples, pipeline.gather(whole)[:, 0])


def saves(samples, folder):
    return is_right(samples, pipeline.gather(planned(samples), out=folder / f"{os.getpid()}.npy", overwrite=True))


def computes(samples, folder):
    import dask

    tasks = pipeline.build_tasks(planned(samples))
    found = np.empty_like(windows_of(samples))
    for places, block in dask.compute(*tasks):
        found[places] = block
    return is_right(samples, found)


def batches(samples, folder):
    with pipeline.iter_batches(planned(samples), 4) as made:
        return is_right(samples, np.concatenate(list(made)))


def indexes(samples, folder):
    data = pipeline.WindowDataset(planned(samples))
    return is_right(samples, np.stack([data[place] for place in range(len(data))]))


def connects(samples, folder):
    with pipeline.connect(dashboard_address=None) as client:
        return client.submit(sum, [1, 2]).result() == 3 and gathers(samples, folder)


def verifies(samples, folder):
    return pipeline.verify(samples / "A.zarr") == []


def records(samples, folder):
    manifest = folder / f"{os.getpid()}.json"
    pipeline.write_manifest(samples / "A.zarr", manifest)
    return manifest.exists()


FUNCTIONS = [
    opens, creates, draws, plans, gathers, applies, stores, saves, computes, batches, indexes, connects, verifies,
    records,
]  # fmt: skip


def in_child(function, *arguments):
    """What a function gives in a forked child, or raises there; a child that hangs is killed."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, function, arguments))
    child.start()
    theirs.close()
    try:
        assert ours.poll(SECONDS), f"a forked child hangs in {function.__name__}"
        answer = ours.recv()
        child.join(SECONDS)
        assert child.exitcode == 0, f"a forked child does not end: {child.exitcode}"
    finally:
        child.kill()
        child.join()
        child.close()
        ours.close()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _answer(pipe, function, arguments):
    try:
        pipe.send(function(*arguments))
    except BaseException as error:
        pipe.send(error)


@contextmanager
def without_client(samples, folder):
    assert gathers(samples, folder)
    yield


@contextmanager
def with_closed_cluster(samples, folder):
    with pipeline.connect(dashboard_address=None):
        assert gathers(samples, folder)
    yield


@contextmanager
def with_threads(samples, folder):
    with pipeline.connect(dashboard_address=None):
        assert gathers(samples, folder)
        yield
        assert gathers(samples, folder)


@contextmanager
def with_client(samples, folder):
    with distributed.Client(processes=False, memory_limit=0, dashboard_address="127.0.0.1:0"):
        assert gathers(samples, folder)
        yield
        assert gathers(samples, folder)


@contextmanager
def with_processes(samples, folder):
    with pipeline.connect(n_workers=2, processes=True, threads_per_worker=1, dashboard_address=None) as client:
        assert gathers(samples, folder)
        before = client.run(os.getpid)
        yield
        assert gathers(samples, folder)
        assert client.run(os.getpid) == before, "workers of the parent were ended"


@contextmanager
def within(folder, samples, situation):
    with situation(samples, folder):
        yield


SITUATIONS = [without_client, with_closed_cluster, with_threads, with_client, with_processes]


@pytest.fixture(scope="module", params=SITUATIONS, ids=lambda situation: situation.__name__)
def parent(request, samples, tmp_path_factory):
    """Folder of a parent that has used what its children will use."""
    folder = tmp_path_factory.mktemp("fork")
    with request.param(samples, folder):
        for function in FUNCTIONS:
            if function is not connects:
                assert function(samples, folder)
        yield folder


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_public_functions_work_in_forked_children(parent, samples, function):
    assert in_child(function, samples, parent)
