"""What a function is: a digest of its code and of all that it carries, so that another one is told apart from it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import types
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def name_function(function: Callable[..., Any] | None) -> str:
    """Name a function, and digest its code, the file of its module, and what it is bound to or encloses.

    Equal in any process while nothing of this changes. Where something cannot be told, no two are equal: to refuse to
    go on is safe. What is imported from other modules counts by its name alone.
    """
    if function is None:
        return "none"
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    digest = hashlib.sha256()
    try:
        for part in _parts(function, {}):
            digest.update(len(part).to_bytes(8, "little") + part)
    except Exception:  # noqa: BLE001 (what is looked at raises what it likes)
        digest.update(uuid.uuid4().bytes)
    return f"{name} {digest.hexdigest()[:16]}"


def _parts(thing: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """Yield what tells a thing from another: `seen` holds those that are told already, and keeps them alive."""
    if isinstance(thing, types.CodeType):
        yield from _code_parts(thing, seen)
    elif isinstance(thing, types.ModuleType):
        yield thing.__name__.encode()
    elif not (callable(thing) or isinstance(thing, dict | list | tuple)):
        yield _pickled(thing)
    elif id(thing) not in seen:
        seen[id(thing)] = thing
        yield type(thing).__qualname__.encode()
        for each in _insides(thing):
            yield from _parts(each, seen)


def _insides(thing: Any) -> tuple[Any, ...]:  # noqa: PLR0911 (a table)
    """Return what a callable or a container is made of."""
    match thing:
        case functools.partial():
            return thing.func, thing.args, thing.keywords
        case types.MethodType():
            return thing.__func__, thing.__self__
        case types.FunctionType():
            cells = tuple(cell.cell_contents for cell in thing.__closure__ or ())
            own = (thing.__qualname__, thing.__code__, thing.__defaults__ or (), thing.__kwdefaults__ or {}, cells)
            used = {name: thing.__globals__[name] for name in _globals(thing.__code__, thing.__globals__)}
            return *own, _module_source(thing.__module__) or used
        case type():
            source = _module_source(thing.__module__)
            known = source or thing.__module__ == "builtins"
            return thing.__module__, thing.__qualname__, source if known else dict(vars(thing))
        case dict():
            return tuple(each for pair in sorted(thing.items(), key=lambda pair: str(pair[0])) for each in pair)
        case list() | tuple():
            return tuple(thing)
    return (type(thing), vars(thing)) if hasattr(thing, "__dict__") else (_pickled(thing),)


def _code_parts(code: types.CodeType, seen: dict[int, Any]) -> Iterator[bytes]:
    yield code.co_code
    yield repr((code.co_names, code.co_varnames, code.co_freevars)).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_parts(constant, seen)
        else:
            # The order within a set differs from process to process.
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode()


def _globals(code: types.CodeType, known: dict[str, Any]) -> list[str]:
    """Names of globals that a function and those within it use."""
    names = {name for name in code.co_names if name in known}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_globals(constant, known))
    return sorted(names)


def _module_source(name: str) -> bytes:
    """Return the file that a module came from; empty where there is none, as in a notebook."""
    module = sys.modules.get(name)
    try:
        path = inspect.getsourcefile(module) if module is not None else None
        return b"" if path is None else Path(path).read_bytes()
    except (OSError, TypeError):
        return b""


def _pickled(thing: Any) -> bytes:
    import cloudpickle

    pickled: bytes = cloudpickle.dumps(thing)
    return pickled
