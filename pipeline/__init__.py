"""Random windows out of a matrix that is larger than memory, as fast as the storage allows, on Dask.

>>> import numpy, pipeline
>>> folder = getfixture("tmp_path")
>>> numpy.save(folder / "A.npy", numpy.arange(20_000.0).reshape(1_000, 20))
>>> matrix = pipeline.create_matrix(folder / "A.npy", folder / "A.zarr")
>>> starts = pipeline.draw_starts(matrix.rows, length=16, count=100, seed=0)
>>> plan = pipeline.plan_windows(matrix, starts, length=16)
>>> with pipeline.connect(dashboard_address=None):
...     windows = pipeline.gather(plan)
>>> windows.shape
(100, 16, 20)

Where things are; imports point down this list only:

========== =====================================================================
cli        arguments in, one report out
bench      this project beside the other ways
sinks      `gather`, `store`, `create_matrix`, `iter_batches`, `WindowDataset`
outputs    an output is whole or not there: staged, journaled, published
integrity  what stored bytes should be and are: record, manifest, `verify`
runtime    tasks on Dask: built, run, bounded, retried, placed, counted
readers    windows into rows of a buffer: direct, ranged, decoded
plan       window starts to a frozen `Plan` with its cost
cluster    a `cluster.yaml` to a `distributed.Client`
matrix     what windows are read from: sources, opening, layout, fingerprint
storage    local files and object stores: locate, list, read, put, checksum
========== =====================================================================

Below the folders: `memory` (how much may be held), `process` (forks and exit), `formatting` (facts for people),
`arguments` (checks of parameters), `redaction` (what text may leave the process) and `errors` (every failure).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cluster.connect import connect
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
    from pipeline.integrity.recording import write_manifest
    from pipeline.integrity.verify import verify
    from pipeline.matrix.matrix import Matrix
    from pipeline.matrix.opening import MatrixGroup, open_matrix
    from pipeline.plan.group import GroupPlan, plan_windows
    from pipeline.plan.plan import Plan
    from pipeline.plan.split import split_rows
    from pipeline.plan.starts import draw_starts, grid_starts
    from pipeline.runtime.report import Report
    from pipeline.runtime.tasks import build_tasks
    from pipeline.sinks.batches import Batches, iter_batches
    from pipeline.sinks.create import create_matrix
    from pipeline.sinks.dataset import WindowDataset
    from pipeline.sinks.gather import gather
    from pipeline.sinks.sampler import ChunkBatchSampler
    from pipeline.sinks.store import store

__version__ = "0.1.0"

# Its hooks come before the first fork.
importlib.import_module("pipeline.process")

_HOMES = {
    "Batches": "sinks.batches",
    "BudgetError": "errors",
    "ChunkBatchSampler": "sinks.sampler",
    "DiskSpaceError": "errors",
    "GroupPlan": "plan.group",
    "IncompleteError": "errors",
    "InputError": "errors",
    "IntegrityError": "errors",
    "Matrix": "matrix.matrix",
    "MatrixGroup": "matrix.opening",
    "NotFoundError": "errors",
    "OpenError": "errors",
    "OutputExistsError": "errors",
    "PipelineError": "errors",
    "Plan": "plan.plan",
    "Report": "runtime.report",
    "WindowDataset": "sinks.dataset",
    "build_tasks": "runtime.tasks",
    "connect": "cluster.connect",
    "create_matrix": "sinks.create",
    "draw_starts": "plan.starts",
    "gather": "sinks.gather",
    "grid_starts": "plan.starts",
    "iter_batches": "sinks.batches",
    "open_matrix": "matrix.opening",
    "plan_windows": "plan.group",
    "split_rows": "plan.split",
    "store": "sinks.store",
    "verify": "integrity.verify",
    "write_manifest": "integrity.recording",
}

__all__ = [
    "Batches",
    "BudgetError",
    "ChunkBatchSampler",
    "DiskSpaceError",
    "GroupPlan",
    "IncompleteError",
    "InputError",
    "IntegrityError",
    "Matrix",
    "MatrixGroup",
    "NotFoundError",
    "OpenError",
    "OutputExistsError",
    "PipelineError",
    "Plan",
    "Report",
    "WindowDataset",
    "build_tasks",
    "connect",
    "create_matrix",
    "draw_starts",
    "gather",
    "grid_starts",
    "iter_batches",
    "open_matrix",
    "plan_windows",
    "split_rows",
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
    return sorted(__all__)
