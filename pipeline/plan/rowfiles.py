"""Rows of a matrix that a file names: starts of windows, or intervals."""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import InputError, NotFoundError, OpenError
from pipeline.storage.filesystem import open_regular
from pipeline.storage.trust import read_document

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_DIGITS = 40
"""More digits than any 64-bit number is written with."""
_SHOWN = 60
"""Characters of a line that a message repeats."""


@dataclass(frozen=True, slots=True)
class RowFile:
    """Starts (n,) or intervals (m, 2) that a file holds, and where each of them stands in it."""

    name: str
    values: NDArray[Any]
    text: str | None
    """None for a `.npy`."""

    def where(self, number: int) -> str:
        r"""Name the place of one of `values`: the line of a text file, from 1, as editors count.

        Examples
        --------
        >>> RowFile("s.txt", np.array([3, -1]), "3\n\n-1\n").where(1)
        "at line 3 of s.txt ('-1')"
        """
        if self.text is None:
            return f"at place {number} of {self.name}"
        left = number * math.prod(self.values.shape[1:])
        for line, text, words in _lines(self.text):
            left -= len(words)
            if left < 0:
                return f"at line {line} of {self.name} ({_shorten(text)})"
        raise IndexError(number)


def load_starts(path: str | Path) -> RowFile:
    """Read starts from a `.npy`, a text file of whole numbers, or `-`: such text on standard input.

    Raises
    ------
    NotFoundError
        If the file is not there.
    OpenError
        If it cannot be parsed; a pickled `.npy` is never loaded.
    """
    return _load(path, "starts", "one a line")


def load_intervals(path: str | Path) -> RowFile:
    """Read intervals (m, 2) from a `.npy`, or a text file of `first stop` a line; raises as `load_starts`."""
    form = "first stop a line"
    loaded = _load(path, "intervals", form)
    if loaded.text is None:
        return loaded
    for line, text, words in _lines(loaded.text):
        # In pairs across lines, the numbers of a file with a third column would be other intervals.
        if len(words) not in {0, 2}:
            raise OpenError(
                f"{loaded.name}, line {line}: {_shorten(text)} is not an interval of two numbers; write {form}"
            )
    if not loaded.values.size:
        raise OpenError(f"{loaded.name} has no intervals; write {form}")
    return replace(loaded, values=loaded.values.reshape(-1, 2))


def _load_npy(path: Path) -> NDArray[Any]:
    """Load an `.npy`; `numpy.load` would allocate whatever the header of a file says that was cut."""
    with open_regular(path) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        return np.fromfile(file, dtype).reshape(shape, order="F" if fortran else "C")


def _load(path: str | Path, what: str, form: str) -> RowFile:
    name = "standard input" if str(path) == "-" else str(path)
    path = Path(path)
    if str(path) != "-" and not os.path.lexists(path):
        raise NotFoundError(f"{what} come from a file that is there; nothing is at {path}; check the path")
    try:
        if str(path) == "-":
            # None where it is closed.
            text = "" if sys.stdin is None else sys.stdin.read()
        elif path.suffix == ".npy":
            return RowFile(name, _load_npy(path), None)
        else:
            text = read_document(path, follow=True).decode()
    except (OSError, ValueError, SyntaxError, TypeError, EOFError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OpenError(
            f"{what} come from a .npy or a text file; {name} cannot be read: {reason}; write it anew"
        ) from error
    values = []
    for line, whole, words in _lines(text):
        for word in words:
            if not re.fullmatch(r"[+-]?[0-9]+", word):
                raise OpenError(
                    f"{name}, line {line}: {_shorten(word)} is not a whole number{_in_line(word, whole)}; "
                    f"write {what} {form}"
                )
            # NumPy would turn what fits no 64-bit integer into objects or floats.
            if len(word) > _DIGITS or not -(2**63) <= int(word) < 2**63:
                raise InputError(
                    f"{name}, line {line}: {_shorten(word)} is no row of any matrix{_in_line(word, whole)}; "
                    f"correct the line"
                )
            values.append(int(word))
    return RowFile(name, np.array(values, dtype=np.int64), text)


def _lines(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Yield each line's number, from 1 as editors count, its text, and its words."""
    for number, line in enumerate(text.split("\n"), 1):
        yield number, line, line.split()


def _shorten(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")


def _in_line(word: str, line: str) -> str:
    """Repeat the line, where it has more than the word."""
    return "" if line.strip() == word else f" (the line is {_shorten(line)})"
