"""Random windows out of a matrix that is larger than memory, as fast as the storage allows, on Dask."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cluster import connect
    from pipeline.collect import gather
    from pipeline.create import create_matrix
    from pipeline.errors import (
        BudgetError,
        DiskSpaceError,
        IncompleteError,
        InputError,
        IntegrityError,
        NotFoundError,
        OpenError,
        OutputExistsError,
        PipelineError,
    )
    from pipeline.matrix import Matrix, open_matrix
    from pipeline.plan import Plan, plan_windows
    from pipeline.recording import write_manifest
    from pipeline.starts import draw_starts
    from pipeline.tasks import build_tasks
    from pipeline.verification import verify
    from pipeline.writeback import store

_HOMES = {
    "BudgetError": "errors",
    "DiskSpaceError": "errors",
    "IncompleteError": "errors",
    "InputError": "errors",
    "IntegrityError": "errors",
    "Matrix": "matrix",
    "NotFoundError": "errors",
    "OpenError": "errors",
    "OutputExistsError": "errors",
    "PipelineError": "errors",
    "Plan": "plan",
    "build_tasks": "tasks",
    "connect": "cluster",
    "create_matrix": "create",
    "draw_starts": "starts",
    "gather": "collect",
    "open_matrix": "matrix",
    "plan_windows": "plan",
    "store": "writeback",
    "verify": "verification",
    "write_manifest": "recording",
}

__all__ = [
    "BudgetError",
    "DiskSpaceError",
    "IncompleteError",
    "InputError",
    "IntegrityError",
    "Matrix",
    "NotFoundError",
    "OpenError",
    "OutputExistsError",
    "PipelineError",
    "Plan",
    "build_tasks",
    "connect",
    "create_matrix",
    "draw_starts",
    "gather",
    "open_matrix",
    "plan_windows",
    "store",
    "verify",
    "write_manifest",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for (PEP 562), so that `pipeline --help` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pipeline.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
