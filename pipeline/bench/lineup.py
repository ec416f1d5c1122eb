"""Contenders by name: who reads which files, in which scenarios."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.bench.contenders import h5py_loops, limits, memmap, ours, torch_loaders, zarr_arrays

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.job import Files, Job
    from pipeline.bench.scenarios import Scenario


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to read the windows, or one limit to compare with."""

    key: str
    label: str
    kind: Literal["peer", "ours", "limit"]
    files: Files
    """Files that it reads."""
    read: Callable[[Job, NDArray[np.int64]], Any]
    """A function as `pipeline.bench.contenders` describes them."""
    package: str | None = None
    """Optional package that it needs, besides h5py to read HDF5."""
    session: Callable[[Job], AbstractContextManager[Any]] = nullcontext
    """Context manager that is entered before the clock starts, such as a cluster."""
    tasks: tuple[str, ...] = ("gather",)
    """Tasks of the scenarios that it takes part in."""

    @property
    def packages(self) -> list[str]:
        """Optional packages that it needs."""
        return [name for name in ("h5py" if self.files == "hdf5" else None, self.package) if name]

    def reason_to_skip(self, scenario: Scenario, *, has_copy: bool = True, has_cluster: bool = True) -> str | None:
        """Say why it takes no part in a scenario of its tasks; None if it does.

        `has_copy`: whether the peers' Zarr array exists; `has_cluster`: whether the user named a cluster.
        """
        if scenario.compressed and self.files == "hdf5":
            return "reads plain files; these are compressed"
        if not scenario.compressed and self.files == "chunks":
            return "for compressed chunks"
        if not has_copy and self.files == "zarr":
            return "no room on the disk for another copy of the matrix"
        if not has_cluster and scenario.task == "clusters" and self.key == "ours_cluster":
            return "no --cluster FILE was given"
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


_STORE, _CREATE, _CLUSTERS, _BATCHES = ("store",), ("create",), ("clusters",), ("batches",)
_WITHOUT_CLUSTER, _ON_CLUSTER = ("gather", "clusters", "batches"), ("gather", "clusters")

LINEUP = (
    Contender("h5py_concatenate", "h5py, loop, concatenate", "peer", "hdf5", h5py_loops.concatenate),
    Contender("h5py_preallocated", "h5py, loop", "peer", "hdf5", h5py_loops.copy),
    Contender("h5py_read_direct", "h5py, read_direct", "peer", "hdf5", h5py_loops.read_direct),
    Contender("memmap_loop", "np.memmap, loop", "peer", "hdf5", memmap.loop),
    Contender("memmap_random", "np.memmap, loop, MADV_RANDOM", "peer", "hdf5", memmap.loop_random),
    Contender("memmap_gather", "np.memmap, one gather", "peer", "hdf5", memmap.gather),
    Contender("torch_loader", "torch DataLoader, np.memmap", "peer", "hdf5", torch_loaders.memmap, "torch"),
    Contender("zarr_loop", "zarr, loop", "peer", "zarr", zarr_arrays.zarr_loop),
    Contender("zarr_oindex", "zarr, oindex", "peer", "zarr", zarr_arrays.zarr_oindex),
    Contender("zarr_oindex_fused", "zarr, oindex, Fused pipeline", "peer", "zarr", zarr_arrays.zarr_oindex_fused),
    Contender("dask_indexing", "dask.array, indexing", "peer", "either", zarr_arrays.dask_indexing),
    Contender("tensorstore_batch", "tensorstore, ts.Batch", "peer", "zarr", zarr_arrays.ts_batch, "tensorstore"),
    Contender("tensorstore_index", "tensorstore, index array", "peer", "zarr", zarr_arrays.ts_index, "tensorstore"),
    Contender("zarrs_threads", "zarrs, loop on threads", "peer", "zarr", zarr_arrays.zarrs_threads, "zarrs"),
    Contender("zarrs_oindex", "zarrs, oindex", "peer", "zarr", zarr_arrays.zarrs_oindex, "zarrs"),
    Contender("ours_threads", "this project, threads", "ours", "matrix", ours.array, tasks=_WITHOUT_CLUSTER),
    Contender("ours_cluster", "this project, cluster", "ours", "matrix", ours.array, None, ours.cluster, _ON_CLUSTER),
    Contender("limit_storage", "storage: bare preadv", "limit", "hdf5", limits.storage),
    Contender("limit_decode", "decode each chunk once", "limit", "chunks", limits.decode),
    Contender("limit_memory", "memory: write the output", "limit", "nothing", limits.memory),
    Contender("ours_store", "this project, store", "ours", "matrix", ours.zarr, None, ours.cluster, _STORE),
    Contender("limit_store", "bare preadv, then one write", "limit", "hdf5", limits.store, tasks=_STORE),
    Contender("copy_file", "cp, then sync", "peer", "hdf5", memmap.copy_file, tasks=_CREATE),
    Contender("ours_create", "this project, create", "ours", "hdf5", ours.matrix, None, ours.warm_cluster, _CREATE),
    Contender(
        "ours_tls", "this project, 2 over TLS", "ours", "matrix", ours.array, "cryptography", ours.tls, _CLUSTERS
    ),
    Contender(
        "ours_processes", "this project, 2 processes", "ours", "matrix", ours.array, None, ours.processes, _CLUSTERS
    ),
    Contender(
        "ours_in_process", "this project, in process", "ours", "matrix", ours.array, None, ours.in_process, _CLUSTERS
    ),
    Contender("memmap_batches", "np.memmap, loop", "peer", "hdf5", memmap.batches, tasks=_BATCHES),
    Contender(
        "torch_dataset",
        "torch DataLoader, our data set",
        "ours",
        "matrix",
        torch_loaders.dataset,
        "torch",
        tasks=_BATCHES,
    ),
    Contender("ours_batches", "this project, batches", "ours", "matrix", ours.batches, tasks=_BATCHES),
)
"""Ratios are taken against the last of kind `ours` in a scenario."""
