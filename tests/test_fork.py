"""Every public function in a child that was forked beside threads, clusters and runs of its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
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
PLAIN = signal.signal, (signal.SIGTERM, signal.SIG_DFL)
"""Lets `Pool.terminate` end its processes, which have the handler of these tests otherwise."""
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
    except Exception as error:  # noqa: BLE001
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


SITUATIONS = [without_client, with_closed_cluster, with_threads, with_client, with_processes]


@pytest.mark.parametrize("kind", ["pool", "executor"])
def test_pools_of_forked_processes_gather(samples, tmp_path, kind):
    context = multiprocessing.get_context("fork")
    assert creates(samples, tmp_path)
    if kind == "pool":
        with context.Pool(2, *PLAIN) as pool:
            assert pool.starmap_async(creates, [(samples, tmp_path)] * 4).get(SECONDS) == [True] * 4
    else:
        with ProcessPoolExecutor(2, context) as pool:
            futures = [pool.submit(connects, samples, tmp_path) for _ in range(4)]
            assert [future.result(SECONDS) for future in futures] == [True] * 4


def starts_processes(samples, folder):
    with pipeline.connect(n_workers=1, processes=True, dashboard_address=None):
        return gathers(samples, folder)


def test_forked_children_start_worker_processes(samples, tmp_path):
    assert in_child(starts_processes, samples, tmp_path)
    with multiprocessing.get_context("fork").Pool(1, *PLAIN) as pool:
        asked = pool.apply_async(starts_processes, (samples, tmp_path))
        with pytest.raises(pipeline.InputError, match="daemonic process.*ProcessPoolExecutor"):
            asked.get(SECONDS)


def test_a_child_forked_beside_a_run_works(samples, tmp_path):
    """Its parent's threads hold what they hold: the locks of a run, and the pool that Dask has for each thread."""
    begun, go_on, made = threading.Event(), threading.Event(), []

    def slow(block):
        begun.set()
        assert go_on.wait(SECONDS)
        return block

    def run():
        made.append(pipeline.gather(planned(samples), apply=slow))

    runner = threading.Thread(target=run)
    runner.start()
    try:
        assert begun.wait(SECONDS)
        for function in (gathers, stores, connects, batches):
            assert in_child(function, samples, tmp_path)
    finally:
        go_on.set()
        runner.join()
    assert is_right(samples, made[0])


def test_a_child_forked_by_a_thread_works(samples, tmp_path):
    made = []

    def fork():
        assert gathers(samples, tmp_path)
        made.extend(in_child(function, samples, tmp_path) for function in (gathers, connects, verifies))

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    assert made == [True] * 3


def held_locks():
    """Locks of this package and of Dask that another thread could hold at a fork, by name."""
    import dask.config
    import dask.threaded
    from distributed.utils import LoopRunner

    from pipeline import memory
    from pipeline.matrix import keys
    from pipeline.runtime import runner as runs
    from pipeline.storage import buckets

    return {
        "runs": runs._registry, "memory": memory._sharing, "buckets": buckets._memory, "keys": keys._indexes._lock,
        "settings": dask.config.config_lock, "pools": dask.threaded.pools_lock, "loops": LoopRunner._lock,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["runs", "memory", "buckets", "keys", "settings", "pools", "loops"])
def test_a_lock_held_at_a_fork_is_free_in_the_child(samples, tmp_path, name):
    assert connects(samples, tmp_path)
    lock, done = held_locks()[name], threading.Event()
    ready = threading.Event()

    def hold():
        with lock:
            ready.set()
            done.wait(SECONDS)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert ready.wait(SECONDS)
        assert in_child(is_free, name)
    finally:
        done.set()
        holder.join()


def is_free(name):
    with held_locks()[name]:
        return True


@pytest.mark.parametrize("setting", ["threads", "pool", "client"])
def test_settings_of_the_parent_that_are_dead_do_not_bind_a_child(samples, tmp_path, setting):

    import dask

    with ThreadPoolExecutor(2) as pool, pipeline.connect(dashboard_address=None) as client:
        assert gathers(samples, tmp_path)
        list(pool.map(abs, range(8)))
        choice = {"threads": {"scheduler": "threads"}, "pool": {"scheduler": "threads", "pool": pool}}
        with dask.config.set(choice.get(setting, {"scheduler": client})):
            for function in (gathers, computes, stores):
                assert in_child(function, samples, tmp_path)


LATER = """
import os, sys
import dask, distributed
if sys.argv[1] == "pool":
    dask.compute(*[dask.delayed(abs)(n) for n in range(8)])
else:
    client = distributed.Client(processes=False, dashboard_address=None)
child = os.fork()
if child == 0:
    import pipeline
    plan = pipeline.plan_windows(pipeline.open_matrix(sys.argv[2]), [0, 700, 5], length=16)
    os._exit(pipeline.gather(plan)[:, 0, 0].tolist() != [1, 14_001, 101])
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("threads", ["pool", "client"])
def test_a_child_that_imports_the_package_after_the_fork_works(samples, tmp_path, threads):
    """What its parent had of Dask is known by threads that are not there."""
    command = [sys.executable, "-W", "ignore", "-c", LATER, threads, str(samples / "A.zarr")]
    done = subprocess.run(command, cwd=tmp_path, timeout=SECONDS, check=False)
    assert done.returncode == 0


@pytest.mark.s3
def test_object_stores_are_refused_where_their_threads_are_the_parents(samples, tmp_path, bucket):
    url = f"{bucket.url}/A.zarr"
    matrix = pipeline.create_matrix(samples / "A.npy", url)
    for function, argument in ((reads_url, url), (reads_url, matrix), (creates_url, url)):
        with pytest.raises(pipeline.InputError, match=r"s3://.*forked.*get_context\('spawn'\)"):
            in_child(function, samples, argument)
    assert reads_url(samples, matrix)


def reads_url(samples, matrix):
    matrix = pipeline.open_matrix(matrix) if isinstance(matrix, str) else matrix
    return is_right(samples, pipeline.gather(pipeline.plan_windows(matrix, STARTS, length=16)))


def creates_url(samples, url):
    pipeline.create_matrix(samples / "A.npy", url, overwrite=True)


SCRIPT = """
    import os, signal, sys, time, warnings
    import numpy as np
    import pipeline

    def main():
        warnings.simplefilter("ignore", DeprecationWarning)
        matrix = pipeline.open_matrix(sys.argv[1])
        plan = pipeline.plan_windows(matrix, np.arange(50), length=4)
        with pipeline.connect(dashboard_address=None, n_workers=2, processes=sys.argv[2] == "processes") as client:
            right = pipeline.gather(plan)
            pids = client.run(os.getpid)
            folders = client.run(lambda dask_worker: dask_worker.local_directory)
            child = os.fork()
            if not child:
                assert np.array_equal(pipeline.gather(plan), right)
                # Leaves the block, and ends as Python does: what the parent has is none of its business.
                sys.exit(7)
            assert os.waitpid(child, 0)[1] == 7 << 8
            assert all(os.path.isdir(folder) for folder in folders.values())
            assert np.array_equal(pipeline.gather(plan), right)
            assert client.run(os.getpid) == pids
        print("healthy")

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_child_that_ends_closes_nothing_of_its_parent(samples, tmp_path, kind):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, script, samples / "A.zarr", kind]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=2 * SECONDS, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "healthy\n", "")


@pytest.fixture(scope="module", params=SITUATIONS, ids=lambda situation: situation.__name__)
def parent(request, samples, tmp_path_factory):
    """Folder of a parent that has used what its children will use; its cluster is active until this module ends."""
    folder = tmp_path_factory.mktemp("fork")
    with request.param(samples, folder):
        for function in FUNCTIONS:
            if function is not connects:
                assert function(samples, folder)
        yield folder


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_public_functions_work_in_forked_children(parent, samples, function):
    assert in_child(function, samples, parent)
