"""Workers that cannot start: the error names what ended them, and a main script without a guard only where it is one."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest

from pipeline.cluster import startup
from pipeline.cluster.connect import connect
from pipeline.errors import InputError, OpenError, PipelineError

PROCESSES = {"processes": True, "n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
GUARD = "__main__"


def refusal(**kwargs):
    """What is said where a cluster of one process does not start."""
    with pytest.raises(PipelineError) as caught, connect(**PROCESSES | kwargs):
        pass
    said = str(caught.value)
    assert "\n" not in said
    del caught
    # Sockets that Dask drops when a start fails are found here, and not in another test.
    gc.collect()
    return said


@pytest.fixture
def preload(tmp_path):
    def preload(text):
        path = tmp_path / "setup_of_mine.py"
        path.write_text(text)
        return [str(path)]

    return preload


@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
class TestProcesses:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("1 / 0", "ZeroDivisionError: division by zero (setup_of_mine.py, line 1)"),
            ("import a_package_that_is_absent", "ModuleNotFoundError: No module named 'a_package_that_is_absent'"),
            ("def f():\n    raise ValueError('no licence')\nf()", "ValueError: no licence (setup_of_mine.py, line 2)"),
            # Which cannot travel to the nanny as it is.
            (
                "class MyError(Exception):\n    def __init__(self, a, b): super().__init__(a)\nraise MyError(1, lambda: 0)",
                "MyError: 1 (setup_of_mine.py, line 3)",
            ),
        ],
    )
    def test_a_preload_that_fails(self, preload, text, words):
        said = refusal(preload=preload(text))
        assert said.startswith(f"a worker could not start: {words}")
        assert GUARD not in said

    @pytest.mark.parametrize(
        ("number", "words"),
        [
            (signal.SIGKILL, "was killed by SIGKILL while it started, as the kernel does where memory is short"),
            (signal.SIGTERM, "was killed by SIGTERM while it started"),
        ],
    )
    def test_a_process_that_is_killed(self, preload, number, words):
        said = refusal(preload=preload(f"import os\nos.kill(os.getpid(), {int(number)})"))
        assert said.startswith(f"a worker process {words}")
        assert GUARD not in said

    def test_a_process_that_leaves(self, preload):
        said = refusal(preload=preload("import os\nos._exit(5)"))
        assert said.startswith("a worker process ended with exit code 5 while it started; check the kwargs of ")

    def test_an_interpreter_that_is_absent(self, monkeypatch):
        before = multiprocessing.spawn.get_executable()
        multiprocessing.set_executable("/no/such/python")
        try:
            said = refusal()
        finally:
            multiprocessing.set_executable(before)
        assert said.startswith("a worker process could not start: there is no interpreter /no/such/python")

    def test_a_local_directory_that_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        said = refusal(local_directory=str(tmp_path / "file" / "scratch"))
        assert "Not a directory" in said
        assert str(tmp_path / "file") in said

    @pytest.mark.parametrize("processes", [True, False])
    def test_a_port_that_is_taken(self, processes):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            said = refusal(processes=processes, scheduler_port=taken.getsockname()[1])
        assert "OSError: [Errno 98] Address already in use" in said
        assert GUARD not in said

    def test_a_preload_of_a_thread(self, preload):
        said = refusal(processes=False, preload=preload("raise ValueError('no licence')"))
        assert said.startswith(
            "the cluster did not start: ValueError: no licence (setup_of_mine.py, line 1); check the kwargs of "
        )

    def test_arguments_that_are_wrong_stay_bad_input(self):
        with pytest.raises(InputError), connect(**PROCESSES | {"memory_limit": "much"}):
            pass


def run_script(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)


CONNECTS = (
    "from pipeline.cluster.connect import connect\nfrom pipeline.errors import OpenError\n"
    "def main():\n"
    "    try:\n        with connect(n_workers=1, processes=True, dashboard_address=None): print('started')\n"
    "    except OpenError as error: print(error)\n"
)


class TestScripts:
    def test_without_a_guard(self, tmp_path):
        done = run_script(tmp_path, f"{CONNECTS}main()\n")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("\n") == 1
        assert "if __name__ == '__main__':" in done.stdout

    def test_another_start_of_processes_without_a_guard(self, tmp_path):
        """Python itself says what is wrong, on the stderr of the child."""
        text = f"{CONNECTS}import multiprocessing\nif __name__ == '__main__': main()\n"
        text += "else: multiprocessing.get_context('spawn').Process(target=print).start()\n"
        done = run_script(tmp_path, text)
        assert "if __name__ == '__main__':" in done.stdout

    def test_one_that_cannot_be_imported_again(self, tmp_path):
        """It has its guard, and fails above it, in the processes of workers alone."""
        text = f"{CONNECTS}if __name__ != '__main__': raise LookupError('gone')\nif __name__ == '__main__': main()\n"
        done = run_script(tmp_path, text)
        assert done.stdout.startswith(
            "a worker process ended with exit code 1 while it started: LookupError: gone; check the kwargs of "
        )
        assert GUARD not in done.stdout

    def test_from_the_shell(self, program, samples, tmp_path):
        (tmp_path / "setup_of_mine.py").write_text("raise ValueError('no licence')\n")
        (tmp_path / "my.yaml").write_text(
            "version: 1\nkwargs: {processes: true, n_workers: 1, preload: [setup_of_mine.py]}\n"
        )
        line = [program, "run", samples / "A.zarr", "--count", "10", "--cluster", "my.yaml"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 3
        assert done.stderr.startswith(
            "error: a worker could not start: ValueError: no licence (setup_of_mine.py, line 1)"
        )
        assert done.stderr.count("\n") == 1
        assert GUARD not in done.stderr


@pytest.mark.ssh
class TestHosts:
    @pytest.fixture
    def kwargs(self, ssh_service, tmp_path):
        """Of a file for two hosts on loopback."""
        file = tmp_path / "ssh.yaml"

        def kwargs(remote_python, preload=None):
            worker = {"nthreads": 1} | ({"preload": preload} if preload else {})
            file.write_text(
                "version: 1\nclass: SSHCluster\nkwargs:\n"
                f"  hosts: {list(ssh_service.hosts[:2])}\n"
                f"  connect_options: {{config: [{ssh_service.config}]}}\n"
                f"  remote_python: {remote_python}\n"
                f"  scheduler_options: {{port: 0, dashboard_address: null}}\n"
                f"  worker_options: {worker}\n"
            )
            return {"cluster": file}

        return kwargs

    def test_an_interpreter_that_is_absent(self, kwargs):
        with pytest.raises(OpenError, match=r"a process on a host ended before it was up: .*/no/such/python"):
            connect(**kwargs("/no/such/python")).__enter__()

    def test_a_preload_that_fails(self, kwargs, preload):
        code = "raise ValueError('no licence')\n"
        with pytest.raises(OpenError, match=r"a process on a host ended before it was up: ValueError: no licence"):
            connect(**kwargs(sys.executable, preload(code))).__enter__()


@pytest.mark.slurm
def test_jobs_that_end_at_once(slurm_service, tmp_path):
    kwargs = {"cores": 1, "memory": "1GB", "interface": "lo", "python": "/no/such/python"}
    kwargs |= {"log_directory": str(tmp_path / "logs"), "shared_temp_directory": str(tmp_path)}
    file = {"version": 1, "class": "SLURMCluster", "kwargs": kwargs, "scale": {"jobs": 1}}
    file["distributed"] = {"scheduler": {"no-workers-timeout": "15 s"}}
    (tmp_path / "my.yaml").write_text(json.dumps(file))
    with pytest.raises(OpenError, match=r"of the jobs \d+, the last of which says .*/no/such/python: No such file"):
        connect(tmp_path / "my.yaml").__enter__()


def test_lines_that_name_an_error():
    said = ["2026-11-01 12:00:00,1 - distributed.nanny - INFO - Start", "", "Traceback (most recent call last):"]
    said += ['  File "a.py", line 3, in b', "    c()", "zarr.errors.MyError", "2026-11-01 12:00:00,2 - INFO - ends"]
    assert startup.last_error(said) == "zarr.errors.MyError"
    assert startup.last_error([]) == startup.last_error(["", " "]) == ""
    assert startup.last_error(["one", "two"]) == "two"


def test_nothing_of_a_trial_stays(capfd):
    os.write(2, b"before\n")
    assert startup._try_start() == ""
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"
