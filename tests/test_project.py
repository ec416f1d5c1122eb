"""The project's own files: the API reference, the changelog and the checks before a commit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pipeline

ROOT = Path(__file__).parents[1]


def test_the_reference_shows_every_public_name(tmp_path):
    """By the options of `.ci/run docs`, with numpydoc sections rendered."""
    options = re.search(r"pdoc (--docformat \w+) ", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))[1].split()
    command = [sys.executable, "-m", "pdoc", *options, "--output-directory", str(tmp_path), "pipeline"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    page = (tmp_path / "pipeline.html").read_text(encoding="utf-8")
    assert {name for name in pipeline.__all__ if f'id="{name}"' not in page} == set()
    assert ">Parameters</h6>" in page


def test_hooks_are_verbs_of_the_ci():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    verbs = re.findall(r"entry: \.ci/run (\w+)", hooks)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert verbs == ["lint", "format", "types", "spelling"]
    assert all(f"\n{verb}() {{" in script for verb in verbs)
    assert hooks.count("entry:") == hooks.count("language: system") == len(verbs)
