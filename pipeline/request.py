"""What the command line asks for, made ready: matrix, starts, plan and sink, before any cluster starts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.locations import locate
from pipeline.matrix import open_matrix
from pipeline.plan import plan_windows
from pipeline.staging import check_apart
from pipeline.starts import draw_starts, load_starts

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pipeline.collect import Gathering
    from pipeline.matrix import Matrix
    from pipeline.writeback import Storing


def prepare_request(
    *,
    matrix: str,
    dtype: str | None,
    row_shape: str | None,
    dataset: str | None,
    count: int,
    length: int,
    seed: int,
    within: str | None,
    starts: str | None,
    out: str | None,
    apply_name: str | None,
    order: str | None,
    memory: str | None,
    check_reads: bool,
    missing_chunks: str,
    resume: bool,
    overwrite: bool,
    **_: Any,
) -> tuple[Matrix, Gathering | Storing]:
    """Do all of a run that comes before its cluster: open, draw, plan, check."""
    # Dask comes with the sinks: looking at a matrix needs none.
    from pipeline.collect import prepare_gathering
    from pipeline.tasks import check_order
    from pipeline.writeback import prepare_storing

    suffix = locate(out).suffix if out is not None else None
    if suffix not in (None, ".zarr", ".npy"):
        raise InputError(f"--out ends in .zarr or .npy; got {out!r}; rename it")
    if order is not None and suffix != ".zarr":
        raise InputError(f"--order is for --out X.zarr; got --order {order} with {out or 'no --out'}; drop it")
    opened = open_named(matrix, dtype, row_shape, dataset, check_reads=check_reads, missing_chunks=missing_chunks)
    opened.check_length(length)
    if starts is not None:
        if out is not None and starts != "-":
            check_apart(locate(out), [starts])
        chosen = load_starts(starts)
    else:
        if within and opened.parts is None:
            raise InputError(f"--within parts is for a matrix of several sources; {matrix} has one; drop it")
        parts = opened.parts if within else None
        chosen = draw_starts(opened.rows, length=length, count=count, seed=seed, within=parts)
    planned = plan_windows(opened, chosen, length=length, memory=memory)
    function = None if apply_name is None else _load_function(apply_name)
    if resume and out is None:
        raise InputError("--resume goes on with an output; got no --out; name one, or drop it")
    replacing: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
    if out is not None and suffix == ".zarr":
        sequence = check_order(order or "request")
        return opened, prepare_storing(planned, out, apply=function, order=sequence, **replacing)
    return opened, prepare_gathering(planned, apply=function, out=out, **replacing)


def open_named(path: str, dtype: str | None, row_shape: str | None, dataset: str | None, **reading: Any) -> Matrix:
    """Open the matrix that a command line names; `reading`: how `open_matrix` is to read it."""
    return open_matrix(path, dtype=dtype, row_shape=parse_shape(row_shape), dataset=dataset, **reading)


def _load_function(name: str) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Import MODULE:FUNCTION, from the working directory, too."""
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise InputError(f"--apply is MODULE:FUNCTION; got {name!r}; write it such as features:mean")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"--apply names a module that can be imported; {module_name}: {type(error).__name__}: {error}; mend it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"--apply names a function; {module_name} has none called {function_name!r}; check its name")
    if Path(getattr(module, "__file__", None) or "/").resolve().parent == Path(folder).resolve():
        import cloudpickle

        # Worker processes do not share this folder's path: send the code itself.
        cloudpickle.register_pickle_by_value(module)
    loaded: Callable[[NDArray[Any]], NDArray[Any]] = function
    return loaded


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Shape of a row out of words such as 2000 or 64,64."""
    if text is None:
        return None
    words = text.strip("() ").rstrip(",").split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise InputError(f"--row-shape is whole numbers with commas; got {text!r}; write it such as 2000 or 64,64")
    return tuple(int(word) for word in words)
