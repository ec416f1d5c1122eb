"""The flow: make the files, run the rounds, report."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.bench.rounds import Table, machine_facts, machine_words, run_rounds, table_lines
from pipeline.bench.scenarios import choose_scenarios
from pipeline.errors import InputError, IntegrityError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable


def run_bench(
    folder: Path,
    *,
    scenario: str,
    rows: int | None,
    rounds: int,
    cold: bool,
    limit: float,
    plot: Path | None,
    where: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    """Run a scenario, and return words for a person and numbers for a program.

    Parameters
    ----------
    folder
        Made if it is not there; files of an earlier run are used again.
    scenario
        `seed`, `compressed` or `small`.
    rows
        Rows of the matrix; None: the scenario's own.
    rounds, cold, limit, where
        As `run_rounds` takes them.
    plot
        Picture to write, one panel a table; its suffix is one that matplotlib knows.

    Raises
    ------
    InputError
        If matplotlib cannot write the picture, h5py is absent, or a value is out of its range.
    NotFoundError
        If the cluster file is absent.
    IntegrityError
        If this project itself gave a wrong value: a peer that does so is named in its table.
    BudgetError, DiskSpaceError
        If the results do not fit the memory, or the files the disk.
    """
    if plot is not None:
        _check_plot(plot)
    if "cluster" in where and not Path(where["cluster"]).exists():
        raise NotFoundError(f"a named cluster file is there; nothing is at {where['cluster']}; check the path")
    chosen = choose_scenarios(scenario, rows)
    if importlib.util.find_spec("h5py") is None and not all(each.compressed for each in chosen):
        raise InputError(
            f"the files of {scenario} need h5py; it is not installed; pip install h5py, or take --scenario compressed"
        )
    tables = []
    for each in chosen:
        made = each.make_files(folder, say)
        home = made.zarr.parent
        table = run_rounds(each, home, rounds=rounds, cold=cold, limit=limit, where=where, say=say)
        check_ours(table)
        tables.append(table)
    machine = machine_facts()
    if plot is not None:
        from pipeline.bench.picture import draw_tables

        draw_tables(tables, machine_words(machine), plot)
    lines = [machine_words(machine)]
    for table in tables:
        lines += ["", *table_lines(table)]
    lines += ["", *_NOTES]
    numbers = {"machine": machine, "rounds": rounds, "limit": limit, "tables": [table.numbers() for table in tables]}
    return "\n".join(lines), numbers


_NOTES = (
    "Timed: open, plan, allocate, read. Not timed: imports, start of the cluster, a first window. Each in its own",
    "process; rounds interleaved, the first thrown away; every value checked. Times ours: against this project on its",
    "cluster, round by round, the median. The memory is that of the whole process.",
)


def check_ours(table: Table) -> None:
    """Raise IntegrityError where this project gave a wrong value: no table of speeds is worth as much."""
    wrong = [s.contender.label for s in table.scores if s.contender.kind == "ours" and s.state == "wrong"]
    if wrong:
        raise IntegrityError(
            f"this project's windows equal the oracle's; in {table.scenario.name} those of {', '.join(wrong)} do not; "
            "report this as a bug"
        )


def _check_plot(plot: Path) -> None:
    """Refuse before the work what matplotlib would refuse after it."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise InputError("--plot needs matplotlib; it is not installed; pip install matplotlib") from None
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if plot.suffix.removeprefix(".") not in known:
        raise InputError(f"--plot ends in one of {', '.join(known)}; got {plot}; rename it")
    if not plot.absolute().parent.is_dir():
        raise InputError(f"--plot lies in a folder that is there; {plot.parent} is not; make it first")
