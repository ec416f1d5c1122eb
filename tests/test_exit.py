"""What is left open when Python ends makes no noise: nothing on stderr that the user's own script did not cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import pipeline

BEGIN = """
import os, pickle, signal, sys, multiprocessing, threading
import numpy as np
import pipeline

def plan_all():
    return pipeline.plan_windows(pipeline.open_matrix("A.npy"), np.arange(0, 1900), length=16)

def open_pass(**how):
    global batches, one_pass
    batches = pipeline.iter_batches(plan_all(), 10, shuffle=True, **how)
    one_pass = iter(batches)
    next(one_pass)
    hold(batches, one_pass)

def pickle_dataset():
    dataset = pipeline.WindowDataset(plan_all(), apply=lambda block: block.sum(axis=2))
    again = pickle.loads(pickle.dumps(dataset))
    again[[0, 1]]
    hold(dataset, again)

def hold(*things):
    # Extension modules, and what they refer to, outlive the variables of all others.
    np.held = [*getattr(np, "held", []), *things]

def main():
"""
END = """
if __name__ == "__main__":
    main()
"""
CLIENTS = {
    "threads": "",
    "in process": """
    import distributed
    hold(distributed.Client(processes=False, n_workers=1, dashboard_address=":0", memory_limit=0))
""",
    "connected": """
    context = pipeline.connect(dashboard_address=None)
    context.__enter__()
    hold(context)
""",
    "processes": """
    context = pipeline.connect(n_workers=1, processes=True, dashboard_address=None)
    context.__enter__()
    hold(context)
""",
}
ALL = """
    open_pass()
    open_pass(prefetch=0)
    open_pass(apply=lambda block: block * 2)
    pickle_dataset()
"""


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "A.npy", np.arange(2000 * 20.0).reshape(2000, 20))
    return tmp_path


def start(folder, body):
    (folder / "script.py").write_text(BEGIN + body + END)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "script.py"], cwd=folder, env=environment, **pipes)


def run(folder, body):
    process = start(folder, body)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("client", "left"),
    [
        ("threads", "    open_pass()\n"),
        ("threads", ALL),
        ("in process", ALL),
        ("connected", ALL),
        ("connected", "    pass\n"),
        ("processes", ALL),
    ],
)
def test_what_is_left_open(folder, client, left):
    assert run(folder, CLIENTS[client] + left) == (0, "", "")


@pytest.mark.parametrize("client", ["threads", "connected", "processes"])
def test_what_an_exception_leaves_open(folder, client):
    code, out, err = run(folder, CLIENTS[client] + ALL + "    raise SystemError('mine')\n")
    assert (code, out, err.count("Traceback"), err.splitlines()[-1]) == (1, "", 1, "SystemError: mine")


@pytest.mark.parametrize("client", ["threads", "connected", "processes"])
def test_what_ctrl_c_leaves_open(folder, client):
    """Pressed while a batch is waited for, of tasks that wait for ever."""
    body = """
    def wait(block):
        if len(block) > 1:
            print("waiting", flush=True)
            threading.Event().wait(SECONDS)
        return block
    open_pass(apply=wait)
"""
    # Threads cannot be ended: those of this process return after a while, those of others end with them.
    process = start(folder, CLIENTS[client] + body.replace("SECONDS", "2" if client != "processes" else "None"))
    if client == "processes":
        # What a worker process prints is its own: the first task may have been begun or not.
        process.stdout.readline()
    else:
        assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGINT
    assert (err.count("Exception ignored"), err.splitlines()[-1]) == (0, "KeyboardInterrupt")


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_processes_of_a_loader(folder, method):
    """They get a data set, perhaps while a pass is open, read, and end."""
    body = f"""
    open_pass()
    dataset = pipeline.WindowDataset(plan_all(), apply=half)
    hold(dataset)
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        assert [float(window[0, 0]) for window in pool.map(dataset.__getitem__, range(5))] == [0, 10, 20, 30, 40]
"""
    assert run(folder, body + "\ndef half(block):\n    return block / 2\n") == (0, "", "")


def test_a_forked_process_that_ends_as_its_parent_does(folder):
    body = """
    open_pass()
    if not (child := os.fork()):
        sys.exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    rest = sum(len(batch) for batch in one_pass)
    assert rest == 1890, rest
"""
    code, out, err = run(folder, body)
    # Python itself warns of a fork beside threads.
    assert (code, out, [line for line in err.splitlines() if "fork" not in line.lower()]) == (0, "", [])


def test_a_thread_that_outlives_the_main_one_hears_that_its_pass_has_ended(folder):
    """A pass that is cut short is no pass that has no more batches."""
    body = """
    open_pass()
    ended = threading.main_thread().join
    def train():
        ended()
        try:
            for batch in one_pass: pass
        except pipeline.PipelineError as error:
            print(type(error).__name__, "main thread" in str(error), flush=True)
    threading.Thread(target=train).start()
"""
    assert run(folder, body) == (0, "IncompleteError True\n", "")


def test_a_pass_is_not_sent_to_another_process(folder):
    import pickle

    import cloudpickle

    plan = pipeline.plan_windows(pipeline.open_matrix(folder / "A.npy"), [5, 3], length=16)
    with pipeline.iter_batches(plan, 1) as batches:
        again = pickle.loads(pickle.dumps(batches))
        assert len(list(again)) == 2
        under_way = iter(batches)
        for dump in (pickle.dumps, cloudpickle.dumps):
            for thing in (under_way, batches):
                with pytest.raises(pipeline.InputError, match="a pass"):
                    dump(thing)
        assert len(list(under_way)) == 2
