"""Functions that may give other results have other names; the same one has the same name in any process."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys

import numpy as np
import pytest

from pipeline.runtime.identity import name_function


def scale(block, k=1):
    return block * k


def shift(block, k=1):
    return block + k


def make(k):
    return lambda block: block * k


class Scaler:
    def __init__(self, k):
        self.k = k

    def __call__(self, block):
        return block * self.k

    def times(self, block):
        return block * self.k


def decorated(k):
    @functools.wraps(scale)
    def inner(block):
        return scale(block, k)

    return inner


PAIRS = {
    "functions": (scale, shift),
    "partials of other values": (functools.partial(scale, k=1), functools.partial(scale, k=2)),
    "partials of other functions": (functools.partial(scale, k=1), functools.partial(shift, k=1)),
    "closures": (make(1), make(2)),
    "closures over arrays": (make(np.arange(3)), make(np.arange(3) + 1)),
    "instances": (Scaler(1), Scaler(2)),
    "methods": (Scaler(1).times, Scaler(2).times),
    "vectorized": (np.vectorize(scale), np.vectorize(shift)),
    "ufuncs": (np.negative, np.abs),
    "decorated": (decorated(1), decorated(2)),
    "constants": (eval("lambda block: block * 2"), eval("lambda block: block * 3")),
    "constants within": (eval("lambda b: [x * 2 for x in b]"), eval("lambda b: [x * 3 for x in b]")),
    "defaults": (eval("lambda block, k=2: k"), eval("lambda block, k=3: k")),
}


@pytest.mark.parametrize(("one", "other"), PAIRS.values(), ids=PAIRS)
def test_other_functions_have_other_names(one, other):
    assert name_function(one) != name_function(other)
    assert name_function(one) == name_function(one)


def test_what_a_notebook_defines():
    names = []
    for k, helper in ((1, "b + 1"), (2, "b + 1"), (1, "b + 2"), (1, "b + 1")):
        cell = {"__name__": "no_module"}
        exec(f"k = {k}\ndef help(b): return {helper}\ndef apply(b): return help(b) * k", cell)
        names.append(name_function(cell["apply"]))
    assert names[0] == names[3]
    assert len(set(names)) == 3


def test_what_cannot_be_told_is_never_equal():
    class Stubborn:
        def __init__(self):
            self.lock = __import__("threading").Lock()

        def __call__(self, block):
            return block

    stubborn = Stubborn()
    assert name_function(stubborn) != name_function(stubborn)


def test_a_module_that_was_edited(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "features_of_identity.py"
    path.write_text("SCALE = 1.0\ndef apply(block): return block * SCALE\n")
    features = importlib.import_module("features_of_identity")
    before = name_function(features.apply)
    path.write_text("SCALE = 1000.0\ndef apply(block): return block * SCALE\n")
    assert name_function(features.apply) != before


def test_the_same_in_any_process(tmp_path):
    (tmp_path / "features.py").write_text(
        "import functools, numpy as np\n"
        "NAMES = {'a', 'b', 'c'}\n"
        "class Scaler:\n    def __init__(self, k): self.k = k\n    def __call__(self, b): return b * self.k\n"
        "def mean(block): return block.mean(axis=1) if 'x' not in {'a', 'b', 'c', 'd'} else block\n"
        "half = functools.partial(np.multiply, 0.5)\n"
        "double = Scaler(2)\n"
        "closed = (lambda k: lambda b: b * k)(np.arange(4.0))\n"
    )
    code = "import features as f; from pipeline.runtime.identity import name_function as n; "
    code += "print(*map(n, (f.mean, f.half, f.double, f.closed)), sep='|')"
    said = {
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        for _ in range(3)
    }
    assert len(said) == 1
