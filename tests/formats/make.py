"""Write every document that this program leaves on a disk or an object store, as a folder of small files.

    python tests/formats/make.py tests/formats/v2

Run it only to add the folder of a new version, when a format changes on purpose. Never change or replace a folder that
is there: its files stand for results of users, and `tests/test_formats_on_disk.py` opens them for ever.

    matrices/   what `create` and `verify --write-manifest` write
    results/    finished results
    partial/    `OUT.partial` of runs that were killed, with their journals
    objects/    keys and bytes below one URL: a finished result, one that a killed run left; in v1 one that was being replaced, too
    batches/    state of a pass over batches, and the starts of the windows that follow

Only public functions are called. What names this machine or this moment is replaced by neutral values.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import ManagedMemoryStore

import pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

ROWS, WIDE, NARROW, LENGTH = 64, 32_768, 6, 8
KEPT = {"windows.zarr": 2, "claimed.zarr": 2, "matrix.zarr": 2, "windows.npy": 1}
"""Tasks in the journal of runs that were killed; those of an .npy are noted together after the first."""
KEPT_OBJECTS = 2
"""Tasks of which a killed run has left marks on an object store."""
STARTS = np.array([50, 3, 17, 44, 0, 56, 9, 31, 22, 38, 5, 48, 27, 12, 41, 19])
COLUMNS = slice(0, 3)
MATRIX = "memory://formats/A.zarr"
"""Where results read from: its fingerprint holds no path and no time."""
HOLDER = {"process": 4_000_000, "host": "elsewhere", "since": "2026-01-01 00:00:00"}
_stores: dict[str, ManagedMemoryStore] = {}


def wide_values() -> NDArray[np.int32]:
    """(64, 32768): rows so wide that a few windows are a task; zero from column 16, so that they compress well."""
    values = np.zeros((ROWS, WIDE), np.int32)
    values[:, :16] = 1 + np.arange(ROWS)[:, None] * 100 + np.arange(16)
    return values


def narrow_values() -> NDArray[np.float64]:
    """(64, 6), every value differs."""
    return np.arange(0.5, ROWS * NARROW).reshape(ROWS, NARROW)


def objects(host: str) -> dict[str, bytes]:
    """Everything below `memory://host`."""
    store = _open(host)

    async def collect() -> dict[str, bytes]:
        found = {}
        for key in sorted([key async for key in store.list()]):
            buffer = await store.get(key, default_buffer_prototype())
            assert buffer is not None
            found[key] = buffer.to_bytes()
        return found

    return asyncio.run(collect())


def put_objects(host: str, content: dict[str, bytes]) -> None:
    """Put objects below `memory://host`, in the place of all that is there."""
    store, buffers = _open(host), default_buffer_prototype().buffer

    async def put() -> None:
        await store.clear()
        for key, each in content.items():
            await store.set(key, buffers.from_bytes(each))

    asyncio.run(put())


def read_tree(root: Path) -> dict[str, bytes]:
    """Bytes of every file below a folder, by path with slashes."""
    return {each.relative_to(root).as_posix(): each.read_bytes() for each in sorted(root.rglob("*")) if each.is_file()}


def write_tree(root: Path, content: dict[str, bytes]) -> None:
    """Write such files."""
    for key, each in content.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(each)


def load_matrices(folder: Path) -> None:
    """Put matrices where results read from."""
    put_objects("formats", read_tree(folder))


def make(folder: Path) -> None:
    """Write all of it into a folder that is not there yet."""
    folder.mkdir(parents=True)
    with dask.config.set(scheduler="synchronous"), tempfile.TemporaryDirectory() as scratch:
        _make_matrices(folder / "matrices", Path(scratch))
        load_matrices(folder / "matrices")
        (folder / "results").mkdir()
        for name, write in _WRITERS.items():
            if name in ("windows.zarr", "sorted.zarr", "pair.zarr", "windows.npy"):
                write(folder / "results" / name)
        (folder / "partial").mkdir()
        for name in KEPT:
            _kill(folder, name)
        _make_objects(folder / "objects")
        _make_state(folder / "batches")
    for path in [each for each in folder.rglob("*") if each.is_file()]:
        path.write_bytes(_neutral(path, path.read_bytes()))


def _make_matrices(folder: Path, scratch: Path) -> None:
    folder.mkdir()
    np.save(scratch / "wide.npy", wide_values())
    pipeline.create_matrix(scratch / "wide.npy", folder / "A.zarr", shard_rows=16, chunk_rows=8, compress="zstd")
    labelled = zarr.create_array(
        zarr.storage.MemoryStore(),
        data=narrow_values(),
        chunks=(16, NARROW),
        attributes={"units": "m"},
        dimension_names=("time", "channel"),
    )
    pipeline.create_matrix(labelled, folder / "plain.zarr", shard_rows=0, chunk_rows=16)
    np.save(folder / "source.npy", narrow_values())
    for name in ("source.npy", "plain.zarr"):
        with _inside(folder):
            pipeline.write_manifest(name, f"{name}.json")


def _plan() -> Any:
    return pipeline.plan_windows(pipeline.open_matrix(MATRIX), STARTS, length=LENGTH, columns=COLUMNS)


def _store_windows(out: Any, **given: Any) -> None:
    pipeline.store(_plan(), out, progress=False, **given)


def _store_pair(out: Any) -> None:
    pair = pipeline.open_matrix({"x": MATRIX, "y": "memory://formats/plain.zarr"})
    columns = {"x": COLUMNS, "y": None}
    pipeline.store(pipeline.plan_windows(pair, STARTS, length=LENGTH, columns=columns), out, progress=False)


def _create_matrix(out: Path) -> None:
    pipeline.create_matrix(out.parent / "source.npy", out, shard_rows=16, chunk_rows=8, progress=False)


def _store_claimed(out: Path) -> None:
    """On a file system without locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = refuse
    _store_windows(out)


_WRITERS: dict[str, Any] = {
    "windows.zarr": _store_windows,
    "sorted.zarr": lambda out: _store_windows(out, order="chunk"),
    "pair.zarr": _store_pair,
    "windows.npy": lambda out: pipeline.gather(_plan(), out=out, progress=False),
    "matrix.zarr": _create_matrix,
    "claimed.zarr": _store_claimed,
}


def _kill(folder: Path, name: str) -> None:
    """Leave `NAME.partial` of a process that is killed as it is about to note one task more."""
    ran = subprocess.run(
        [sys.executable, __file__, "--killed", str(folder), name], capture_output=True, text=True, check=False
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    (folder / "partial" / "source.npy").unlink(missing_ok=True)


def _run_killed(folder: Path, name: str) -> None:
    load_matrices(folder / "matrices")
    out = folder / "partial" / name
    shutil.copy(folder / "matrices" / "source.npy", out.parent)
    journal = Path(f"{out}.partial", "journal")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[2], int) or not arguments[2] & os.O_APPEND:
            return
        with suppress(OSError):
            if journal.read_bytes().count(b"\n") > KEPT[name]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with dask.config.set(scheduler="synchronous"):
        _WRITERS[name](out)


class KilledError(BaseException):
    """The process is gone: nothing that it asks of the store happens any more."""


@contextmanager
def _dying(is_last: Any) -> Iterator[None]:
    """Let no object change any more once `is_last(key, what was put before)` is true of one that is to be put."""
    real, seen = ManagedMemoryStore.set, {"dead": False, "marks": 0}

    async def change(self: Any, key: str, value: Any) -> None:
        seen["dead"] = seen["dead"] or is_last(key, seen)
        if seen["dead"]:
            raise KilledError
        await real(self, key, value)
        seen["marks"] += "/done-" in key

    async def refuse(*_: object) -> None:
        raise KilledError

    delete = ManagedMemoryStore.delete
    ManagedMemoryStore.set = change
    ManagedMemoryStore.delete = lambda self, key: refuse() if seen["dead"] else delete(self, key)
    try:
        with suppress(KilledError):
            yield
        assert seen["dead"]
    finally:
        ManagedMemoryStore.set = real
        ManagedMemoryStore.delete = delete


def _make_objects(folder: Path) -> None:
    host, out = "formats-out", "memory://formats-out/out.zarr"
    put_objects(host, {})
    with _dying(lambda key, seen: seen["marks"] == KEPT_OBJECTS):
        _store_windows(out)
    write_tree(folder / "unfinished", objects(host))
    put_objects(host, {})
    _store_windows(out, order="chunk")
    write_tree(folder / "finished", objects(host))
    put_objects(host, {})


def open_batches() -> Any:
    """Batches whose state is kept."""
    return pipeline.iter_batches(_plan(), 4, shuffle=True, seed=7)


def read_starts(batches: Any) -> list[int]:
    """Starts of the windows of a pass, as their first values say."""
    return [int(window[0, 0] - 1) // 100 for batch in batches for window in batch]


def _make_state(folder: Path) -> None:
    folder.mkdir()
    with open_batches() as batches:
        batches.set_epoch(1)
        passed = iter(batches)
        next(passed)
        state = batches.state_dict()
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "rest.json").write_text(json.dumps(read_starts(passed)))


def _neutral(path: Path, content: bytes) -> bytes:
    """Replace what a document says of this machine and this moment."""
    if path.name == "holder" or path.name.startswith("claim-"):
        return json.dumps(_without_names(json.loads(content))).encode()
    if path.name == "request.json":
        document = json.loads(content)
        return json.dumps(document | {"holder": _without_names(document["holder"])}, indent=1).encode()
    if path.name == "journal":
        first, rest = content.split(b"\n", 1)
        header = json.loads(first)
        if "source" in header["request"]:
            # The fingerprint of a file holds its path, and the time of its last change.
            header["request"]["source"] = "0" * 64
        return json.dumps(header).encode() + b"\n" + rest
    return content


def _without_names(holder: dict[str, Any]) -> dict[str, Any]:
    """Replace what names a process, but for its keys and kinds, which tests compare."""
    plain = HOLDER | {"place": "", "born": ""}
    return {key: plain[key] if type(plain.get(key)) is type(value) else value for key, value in holder.items()}


def _open(host: str) -> ManagedMemoryStore:
    # Zarr forgets a store that nobody holds.
    return _stores.setdefault(host, ManagedMemoryStore(host))


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    if sys.argv[1] == "--killed":
        _run_killed(Path(sys.argv[2]), sys.argv[3])
    else:
        make(Path(sys.argv[1]))
