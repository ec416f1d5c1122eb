"""The simulation of many tasks on many workers, small."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil

from pipeline.bench import scale


def test_a_simulated_run_counts_what_each_part_takes():
    numbers = scale.simulate_run(40, workers=3, task_windows=10)
    assert (numbers["tasks"], numbers["workers"], numbers["windows"]) == (40, 3, 400)
    assert 0 < numbers["first_seconds"] < numbers["seconds"]
    assert set(numbers["processor_seconds"]) == set(numbers["grown"]) == {"client", "scheduler", "workers"}
    assert numbers["processor_seconds"]["scheduler"] > 0
    left = [each.cmdline() for each in psutil.Process().children(recursive=True)]
    assert not [words for words in left if "pipeline.bench.scale" in words]


def test_parts_end_with_their_input():
    """Also where whoever started them was killed."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.bench.scale", "scheduler"],
        input="",
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.startswith("tcp://127.0.0.1:")


def test_its_command_prints_one_object(monkeypatch, capsys):
    monkeypatch.setattr(scale, "simulate_run", lambda tasks, **given: {"tasks": tasks, **given})
    monkeypatch.setattr(sys, "argv", ["scale", "--tasks", "7", "--workers", "2", "--windows", "5"])
    scale.main()
    assert json.loads(capsys.readouterr().out) == {"tasks": 7, "workers": 2, "task_windows": 5}
