"""The main job end to end: an `.npy`, a matrix, windows in an array and in Zarr, checked against plain NumPy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import IntegrityError
from pipeline.formatting import MIB, format_size
from pipeline.outputs.folder import check_destination, stage_output
from pipeline.outputs.journal import Request
from pipeline.outputs.npy import map_npy
from pipeline.plan.group import plan_windows
from pipeline.plan.starts import draw_starts
from pipeline.sinks.create import create_matrix
from pipeline.sinks.gather import gather
from pipeline.sinks.store import store
from pipeline.storage.filesystem import flush

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

ROWS, COLUMNS, LENGTH, COUNT = 67_108, 2_000, 16, 2_000
_STEP_ROWS = 4096


def run_demo(
    folder: Path, say: Callable[[str], None], *, progress: bool | None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Do the main job in `folder` on the active client, and return what a person and a program want to know.

    Parameters
    ----------
    folder
        Made if it is not there; gets `A.npy`, `A.zarr`, `windows.zarr`: about 2.6 GB.
    say
        Gets a line before each step.
    progress
        As of `gather`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, matrix_path, result_path = folder / "A.npy", folder / "A.zarr", folder / "windows.zarr"
    for path in (source, matrix_path, result_path):
        check_destination(path, nbytes=3 * ROWS * COLUMNS * 8, overwrite=False)
    seconds: dict[str, float] = {}

    def step(name: str, line: str, work: Callable[[], Any]) -> Any:
        say(line)
        begin = time.perf_counter()
        made = work()
        seconds[name] = time.perf_counter() - begin
        return made

    size = format_size(ROWS * COLUMNS * 8)
    step("write", f"1/5 write {source.name}: ({ROWS:,}, {COLUMNS:,}) float64, {size}", lambda: _write_source(source))
    matrix = step(
        "create", f"2/5 create {matrix_path.name} of it", lambda: create_matrix(source, matrix_path, progress=progress)
    )
    starts = draw_starts(matrix.rows, length=LENGTH, count=COUNT, seed=0)
    plan = plan_windows(matrix, starts, length=LENGTH)
    windows = step(
        "gather",
        f"3/5 gather {COUNT:,} windows of {LENGTH} rows into one array",
        lambda: gather(plan, progress=progress),
    )
    result = step("store", f"4/5 store them in {result_path.name}", lambda: store(plan, result_path, progress=progress))
    step("check", "5/5 check both against plain NumPy", lambda: _check(source, starts, windows, result))
    facts = {
        "matrix": f"{matrix_path}: ({ROWS:,}, {COLUMNS:,}) float64, {size}",
        "windows": f"({COUNT:,}, {LENGTH}, {COLUMNS:,}), {format_size(plan.nbytes)}, in memory and in {result_path}",
        "checked": "every value, of both, equal to plain NumPy's",
        "seconds": ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()),
        "gather": f"{plan.nbytes / seconds['gather'] / 1e6:,.0f} MB/s",
        "store": f"{plan.nbytes / seconds['store'] / 1e6:,.0f} MB/s",
    }
    numbers = {
        "matrix": str(matrix_path),
        "windows": str(result_path),
        "count": COUNT,
        "length": LENGTH,
        "nbytes_delivered": plan.nbytes,
        "checked": True,
        "seconds": seconds,
    }
    return facts, numbers


def _write_source(path: Path) -> None:
    generator = np.random.default_rng(0)
    request, nbytes = Request({"kind": "demo"}), ROWS * COLUMNS * 8
    with stage_output(path, request, cut=ROWS, nbytes=nbytes, resume=False, overwrite=False) as stage:
        header = {"descr": "<f8", "fortran_order": False, "shape": (ROWS, COLUMNS)}
        with stage.output.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, ROWS, _STEP_ROWS):
                file.write(generator.random((min(_STEP_ROWS, ROWS - first), COLUMNS)).data)
            file.flush()
            flush(file.fileno())


def _check(source: Path, starts: NDArray[np.int64], windows: NDArray[Any], result: Any) -> None:
    """Compare with windows that NumPy reads from the `.npy`, a few at a time."""
    rows = map_npy(source, "c")
    step = max(1, 64 * MIB // windows[0].nbytes)
    for first in range(0, len(starts), step):
        expected = np.stack([rows[start : start + LENGTH] for start in starts[first : first + step]])
        stored = result["windows"][first : first + step]
        if not (np.array_equal(windows[first : first + step], expected) and np.array_equal(stored, expected)):
            raise IntegrityError(f"windows equal NumPy's; those from place {first} on do not; report this as a bug")
