"""Rows of a matrix that a file names: starts of windows, or intervals."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import InputError, NotFoundError, OpenError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIGITS = 40
"""More digits than any 64-bit number is written with."""


def load_starts(path: str | Path) -> NDArray[Any]:
    """Read starts from a `.npy`, a text file of one whole number a line, or `-`: such text on standard input.

    Raises
    ------
    NotFoundError
        If the file is not there.
    OpenError
        If it cannot be parsed; a pickled `.npy` is never loaded.
    """
    return _load(path, "starts", "one a line")


def load_intervals(path: str | Path) -> NDArray[Any]:
    """Read intervals (m, 2) from a `.npy`, or a text file of `first stop` a line; raises as `load_starts`."""
    loaded = _load(path, "intervals", "first stop a line")
    if Path(path).suffix == ".npy":
        return loaded
    if loaded.size % 2 or not loaded.size:
        name = "standard input" if str(path) == "-" else str(path)
        raise OpenError(f"intervals are pairs, first stop a line; {name} has {loaded.size} numbers; mend it")
    return loaded.reshape(-1, 2)


def _load(path: str | Path, what: str, form: str) -> NDArray[Any]:
    name = "standard input" if str(path) == "-" else str(path)
    path = Path(path)
    if str(path) != "-" and not os.path.lexists(path):
        raise NotFoundError(f"{what} come from a file that is there; nothing is at {path}; check the path")
    try:
        if str(path) == "-":
            # None where it is closed.
            text = "" if sys.stdin is None else sys.stdin.read()
        elif path.suffix == ".npy":
            # Mapped first: reading would allocate whatever the header of a file says that was cut.
            return np.array(np.lib.format.open_memmap(path, mode="r"))
        else:
            text = path.read_text(encoding="utf-8")
    except (OSError, ValueError, SyntaxError, TypeError, EOFError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OpenError(
            f"{what} come from a .npy or a text file; {name} cannot be read: {reason}; write it anew"
        ) from error
    values = []
    for number, word in enumerate(text.split()):
        if not re.fullmatch(r"[+-]?[0-9]+", word):
            raise OpenError(f"{what} are whole numbers, {form}; {name} has {word[:40]!r} at place {number}; mend it")
        # NumPy would turn what fits no 64-bit integer into objects or floats.
        if len(word) > _DIGITS or not -(2**63) <= int(word) < 2**63:
            raise InputError(f"{what} are rows of the matrix; {name} has {word[:40]} at place {number}; mend it")
        values.append(int(word))
    return np.array(values, dtype=np.int64)
