"""Who takes part."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.bench.scenarios import Job, Task

Kind = Literal["peer", "ours", "limit"]
Reads = Literal["hdf5", "zarr", "matrix", "either", "nothing"]


class Reader(Protocol):
    """A file of `pipeline.bench.contenders`; it may have `session(job)`, a context manager held around the clock."""

    def read(self, job: Job, starts: NDArray[np.int64]) -> Any:
        """Return the windows at `starts` in request order, (n, length, columns); all of this is timed.

        An array, or what has the shape, dtype and slices of one: it is looked at after the clock.
        """


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to read the windows, or one limit to hold them against."""

    key: str
    """Name of its file in `pipeline.bench.contenders`."""
    label: str
    kind: Kind
    reads: Reads
    """Which files are warmed up or dropped for it; `either`: the HDF5 file, or Zarr where there is none."""
    needs: tuple[str, ...] = ()
    """Packages of others, loaded before the clock starts."""
    tasks: tuple[Task, ...] = ("gather",)
    """Scenarios of which it takes part in."""

    def why_not(self, *, compressed: bool, copied: bool = True, named: bool = True) -> str | None:
        """Say why it takes no part; None if it does.

        `copied`: whether the peers' copy in Zarr is there; `named`: whether a cluster was, beside those of the
        scenario.
        """
        if compressed and self.reads == "hdf5":
            return "reads plain files; these are compressed"
        if not compressed and self.key == "limit_decode":
            return "for compressed chunks"
        if not copied and self.reads == "zarr":
            return "no room on the disk for another copy of the matrix"
        if not named and self.key == "ours_cluster":
            return "no --cluster FILE was given"
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


LINEUP = (
    Contender("h5py_concatenate", "h5py, loop, concatenate", "peer", "hdf5", ("h5py",)),
    Contender("h5py_preallocated", "h5py, loop", "peer", "hdf5", ("h5py",)),
    Contender("h5py_read_direct", "h5py, read_direct", "peer", "hdf5", ("h5py",)),
    Contender("memmap_loop", "np.memmap, loop", "peer", "hdf5", ("h5py",)),
    Contender("memmap_random", "np.memmap, loop, MADV_RANDOM", "peer", "hdf5", ("h5py",)),
    Contender("memmap_gather", "np.memmap, one gather", "peer", "hdf5", ("h5py",)),
    Contender("torch_loader", "torch DataLoader, np.memmap", "peer", "hdf5", ("h5py", "torch")),
    Contender("zarr_loop", "zarr, loop", "peer", "zarr", ("zarr",)),
    Contender("zarr_oindex", "zarr, oindex", "peer", "zarr", ("zarr",)),
    Contender("zarr_oindex_fused", "zarr, oindex, Fused pipeline", "peer", "zarr", ("zarr",)),
    Contender("dask_indexing", "dask.array, indexing", "peer", "either", ("dask", "zarr")),
    Contender("tensorstore_batch", "tensorstore, ts.Batch", "peer", "zarr", ("tensorstore",)),
    Contender("tensorstore_index", "tensorstore, index array", "peer", "zarr", ("tensorstore",)),
    Contender("zarrs_threads", "zarrs, loop on threads", "peer", "zarr", ("zarrs",)),
    Contender("zarrs_oindex", "zarrs, oindex", "peer", "zarr", ("zarrs",)),
    Contender(
        "ours_threads", "this project, threads", "ours", "matrix", ("zarr", "dask"), ("gather", "clusters", "batches")
    ),
    Contender(
        "ours_cluster", "this project, cluster", "ours", "matrix", ("zarr", "distributed"), ("gather", "clusters")
    ),
    Contender("limit_storage", "storage: bare preadv", "limit", "hdf5", ("h5py",)),
    Contender("limit_decode", "decode each chunk once", "limit", "zarr"),
    Contender("limit_memory", "memory: write the output", "limit", "nothing"),
    Contender("ours_store", "this project, store", "ours", "matrix", ("zarr", "distributed"), ("store",)),
    Contender("limit_store", "bare preadv, then one write", "limit", "hdf5", ("h5py",), ("store",)),
    Contender("copy_file", "cp, then sync", "peer", "hdf5", ("h5py",), ("create",)),
    Contender("ours_create", "this project, create", "ours", "hdf5", ("zarr", "distributed", "h5py"), ("create",)),
    Contender("ours_tls", "this project, 2 over TLS", "ours", "matrix", ("cryptography", "distributed"), ("clusters",)),
    Contender("ours_processes", "this project, 2 processes", "ours", "matrix", ("zarr", "distributed"), ("clusters",)),
    Contender("ours_in_process", "this project, in process", "ours", "matrix", ("zarr", "distributed"), ("clusters",)),
    Contender("memmap_batches", "np.memmap, loop", "peer", "hdf5", ("h5py",), ("batches",)),
    Contender("torch_dataset", "torch DataLoader, our data set", "ours", "matrix", ("zarr", "torch"), ("batches",)),
    Contender("ours_batches", "this project, batches", "ours", "matrix", ("zarr", "dask"), ("batches",)),
)
"""The last of kind `ours` in a scenario is whom ratios are taken against."""


def contender(key: str) -> Contender:
    """Find a contender by its key."""
    return next(each for each in LINEUP if each.key == key)
