"""The README's commands and Python run as they stand, on a matrix of 2000 rows where it speaks of 2,000,000."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli.main import cli as commands

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n+)+")

PYTHON = [body for language, body in FENCED.findall(TEXT) if language == "python"]
SHELL = [body for language, body in FENCED.findall(TEXT) if language in ("sh", "bash", "console")]
SHELL += [
    body for text in INDENTED.findall(FENCED.sub("", TEXT)) if (body := textwrap.dedent(text)).startswith(("pip", "uv"))
]

SMALLER = {"2000000x2000": "2000x20", "2_000_000": "2_000", "10_000": "50", "10000": "50", "8GB": "2GB"}


def shrink(text):
    for big, small in SMALLER.items():
        text = text.replace(big, small)
    return text


def lines(block):
    """Commands of a block: continued lines joined, prompts and comments gone."""
    joined = block.replace("\\\n", " ").splitlines()
    return [words for line in joined if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def steps(words):
    """Commands that `&&` joins, without `uv run` and `exec`."""
    found = [[]]
    for word in words:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    found = [step[1:] if step[0] == "exec" else step for step in found]
    return [_without_uv(step) for step in found]


def _without_uv(step):
    if step[:2] != ["uv", "run"]:
        return step
    return step[3:] if step[2] == "--no-dev" else step[2:]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working directory with the files that the README takes for granted."""
    np.save(tmp_path / "A.npy", np.arange(40_000.0).reshape(2000, 20))
    (tmp_path / "starts.txt").write_text("1984\n0\n77\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_name_only_what_exists():
    """Of every command, also of those that are too large to run here: the verb and its flags exist."""
    named = [step for block in SHELL for words in lines(block) for step in steps(words)]
    assert ["pipeline", "demo"] in named
    assert ["pytest"] in named
    for tool, *rest in named:
        assert tool in ("pip", "pipeline", "pytest"), tool
        if tool == "pipeline":
            flags = {flag for option in commands.commands[rest[0]].params for flag in option.opts}
            assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= flags


def test_commands_run(folder):
    """One after the other in one folder; the demo has a test of its own, and pytest runs already."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    named = [step for block in SHELL for words in lines(shrink(block)) for step in steps(words)]
    for step in named:
        if step[0] == "pipeline" and step[1] != "demo":
            done = subprocess.run(step, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_python_runs(folder):
    """Later blocks find the names of earlier ones."""
    names = {"__name__": "__main__"}
    for block in PYTHON:
        exec(compile(shrink(block), "README.md", "exec"), names)
