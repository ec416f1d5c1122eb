"""What the command line asks for, made ready: matrix, starts, plan and sink, before any cluster starts."""

from __future__ import annotations

import importlib.util
import re
import sys
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.cli.selection import select_starts
from pipeline.errors import InputError
from pipeline.matrix.opening import MatrixGroup, open_matrix
from pipeline.plan.group import GroupPlan, plan_windows
from pipeline.storage.locations import check_apart, locate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from pipeline.matrix.matrix import Matrix
    from pipeline.plan.plan import Plan
    from pipeline.sinks.gather import Gathering, GroupGathering
    from pipeline.sinks.store import Storing


_SELECTING = ("count", "seed", "stride", "split", "part", "split_by", "split_seed")


def prepare_request(
    *,
    matrix: str,
    dtype: str | None,
    row_shape: str | None,
    dataset: str | None,
    length: int,
    within: str | None,
    starts: str | None,
    out: str | None,
    columns: str | None,
    as_dtype: str | None,
    apply_name: str | None,
    order: str | None,
    memory: str | None,
    check_reads: bool,
    missing_chunks: str,
    members: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    **arguments: Any,
) -> tuple[Matrix | MatrixGroup, Gathering | GroupGathering | Storing]:
    """Do all of a run that comes before its cluster: open, draw, plan, check."""
    # Dask comes with the sinks: looking at a matrix needs none.
    from pipeline.runtime.tasks import check_order
    from pipeline.sinks.gather import prepare_gathering
    from pipeline.sinks.store import prepare_storing

    suffix = locate(out).suffix if out is not None else None
    if suffix not in (None, ".zarr", ".npy"):
        raise InputError(f"--out ends in .zarr or .npy; got {out!r}; rename it")
    if order is not None and suffix != ".zarr":
        raise InputError(f"--order is for --out X.zarr; got --order {order} with {out or 'no --out'}; drop it")
    reading: dict[str, Any] = {"check_reads": check_reads, "missing_chunks": missing_chunks}
    opened = open_named(matrix, dtype, row_shape, dataset, members=members, **reading)
    opened.check_length(length)
    read = [each for each in (starts, within) if each not in (None, "-", "parts")]
    if out is not None and read:
        check_apart(locate(out), read)
    windows = {name: arguments[name] for name in _SELECTING}
    chosen = select_starts(opened, matrix=matrix, length=length, within=within, starts=starts, **windows)
    part: dict[str, Any] = {"columns": parse_columns(columns), "dtype": as_dtype}
    if isinstance(opened, MatrixGroup):
        part = _part_of_one(opened, part)
    planned = plan_windows(opened, chosen, length=length, memory=memory, **part)
    function = None if apply_name is None else _load_functions(apply_name, planned)
    if resume and out is None:
        raise InputError("--resume goes on with an output; got no --out; name one, or drop it")
    replacing: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
    if out is not None and suffix == ".zarr":
        sequence = check_order(order or "request")
        return opened, prepare_storing(planned, out, apply=function, order=sequence, **replacing)
    return opened, prepare_gathering(planned, apply=function, out=out, **replacing)


def _part_of_one(group: MatrixGroup, part: dict[str, Any]) -> dict[str, Any]:
    """Give what is wanted of a row to the one array of a group; InputError where there are several."""
    given = {name: value for name, value in part.items() if value is not None}
    if given and len(group.members) > 1:
        flag = "--columns" if "columns" in given else "--as-dtype"
        raise InputError(f"{flag} is for one matrix; {group.path} has several; name one with --member, or use Python")
    return {name: dict.fromkeys(group.members, value) for name, value in given.items()}


def open_named(
    path: str,
    dtype: str | None,
    row_shape: str | None,
    dataset: str | None,
    *,
    members: tuple[str, ...] = (),
    **reading: Any,
) -> Matrix | MatrixGroup:
    """Open the matrix, or group, that a command line names; `reading`: how `open_matrix` is to read it."""
    shape = parse_shape(row_shape)
    opened: Matrix | MatrixGroup = open_matrix(
        path, dtype=dtype, row_shape=shape, dataset=dataset, members=members or None, **reading
    )
    if isinstance(opened, MatrixGroup) and len(members) == 1:
        # One array that was named is a matrix as any other.
        return opened.members[members[0]]
    return opened


def _load_functions(text: str, planned: Plan | GroupPlan) -> Any:
    """Import MODULE:FUNCTION, or, for a group, NAME=MODULE:FUNCTION of each array that is named."""
    if not isinstance(planned, GroupPlan):
        return _load_function(text)
    named = [each.partition("=") for each in text.split(",")]
    if len({name for name, _, _ in named}) < len(named) or not all(all(each) for each in named):
        raise InputError(
            f"--apply of several arrays is NAME=MODULE:FUNCTION[,...]; got {text!r}; write it such as "
            f"{next(iter(planned.members))}=features:mean"
        )
    return {name: _load_function(function) for name, _, function in named}


def _load_function(name: str) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Import MODULE:FUNCTION, of the working directory where no installed module has that name."""
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise InputError(f"--apply is MODULE:FUNCTION; got {name!r}; write it such as features:mean")
    function = getattr(_import_module(module_name), function_name, None)
    if not callable(function):
        raise InputError(f"--apply names a function; {module_name} has none called {function_name!r}; check its name")
    loaded: Callable[[NDArray[Any]], NDArray[Any]] = function
    return loaded


def _import_module(name: str) -> ModuleType:
    """Import a module with the working directory last on the path, so that no file there replaces an installed module.

    The path is as before when this returns. Worker processes get the code of what came from the working directory, not
    its path.
    """
    folder, known = str(Path.cwd()), set(sys.modules)
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        _check_not_hidden(name.partition(".")[0], folder)
        module = importlib.import_module(name)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(
            f"--apply names a module that can be imported; {name}: {type(error).__name__}: {error}; mend it"
        ) from error
    finally:
        if added:
            with suppress(ValueError):
                sys.path.remove(folder)
    _send_by_value({name.partition(".")[0]} | (sys.modules.keys() - known), folder)
    return module


def _check_not_hidden(name: str, folder: str) -> None:
    """Raise InputError where an installed module takes the place of one in `folder`, whose function was perhaps meant.

    Importing neither: this runs no code.
    """
    beside = PathFinder.find_spec(name, [folder]) if name else None
    if beside is None or beside.origin is None:
        return
    found = importlib.util.find_spec(name)
    origin = (found and found.origin) or "Python itself"
    if Path(origin).resolve() != Path(beside.origin).resolve():
        raise InputError(
            f"{beside.origin} has the name of an installed module, {origin}; rename it to use it in --apply"
        )


def _send_by_value(names: Iterable[str], folder: str) -> None:
    """Have the code of modules that lie in `folder` sent to worker processes; submodules go with their package."""
    import cloudpickle

    for name in names:
        module = sys.modules.get(name)
        if "." in name or not isinstance(module, ModuleType):
            continue
        places = [*getattr(module, "__path__", ())] or [getattr(module, "__file__", None) or "/"]
        if Path(folder).resolve() in {Path(place).resolve().parent for place in places}:
            cloudpickle.register_pickle_by_value(module)


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Shape of a row out of words such as 2000 or 64,64."""
    if text is None:
        return None
    words = text.strip("() ").rstrip(",").split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise InputError(f"--row-shape is whole numbers with commas; got {text!r}; write it such as 2000 or 64,64")
    return tuple(int(word) for word in words)


def parse_columns(text: str | None) -> slice | list[int] | None:
    """Columns out of words such as 0:100, ::4 or 3,5,7.

    Examples
    --------
    >>> parse_columns("0:100"), parse_columns("::4"), parse_columns("3,5,-1")
    (slice(0, 100, None), slice(None, None, 4), [3, 5, -1])
    """
    if text is None:
        return None
    sliced = ":" in text
    words = [word.strip() for word in (text.split(":") if sliced else text.rstrip(", ").split(","))]
    sound = all(re.fullmatch("-?[0-9]{1,18}", word) or (sliced and not word) for word in words)
    if not sound or (sliced and len(words) > 3):
        raise InputError(
            f"--columns is a slice or a list of whole numbers; got {text!r}; write it such as 0:100 or 3,5"
        )
    return slice(*(int(word) if word else None for word in words)) if sliced else [int(word) for word in words]
