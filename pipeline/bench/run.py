"""The flow of `pipeline bench`: write the files, run the rounds, report."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.bench.job import prepare_job
from pipeline.bench.report import describe_machine, machine_facts, report_text
from pipeline.bench.rounds import Table, run_rounds
from pipeline.bench.scenarios import choose_scenarios
from pipeline.errors import InputError, IntegrityError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable


def run_bench(
    folder: Path,
    *,
    scenario: str,
    rows: int | None,
    plot: Path | None,
    where: dict[str, Any],
    say: Callable[[str], None],
    **settings: Any,
) -> tuple[str, dict[str, Any]]:
    """Run a scenario, and return text for a person and numbers for a program.

    Parameters
    ----------
    folder
        Where files are written, unless an earlier run left them there; made if absent.
    scenario
        A key of `SCENARIOS`.
    rows
        Rows of the matrix; None: the default of the scenario.
    plot
        Picture to write, one panel a table, in a format of matplotlib.
    where
        Keywords of `connect`, which name the user's cluster.
    say
        Gets a line for each step.
    **settings
        `rounds`, `cold` and `limit` of `run_rounds`.

    Raises
    ------
    InputError
        If matplotlib cannot write the picture, h5py is absent, or a value is out of its range.
    NotFoundError
        If the cluster file is absent.
    IntegrityError
        If this project itself gave a wrong value; a peer that does so is named in its table.
    BudgetError, DiskSpaceError
        If the results do not fit in memory, or the files on the disk.
    """
    if plot is not None:
        _check_plot(plot)
    if "cluster" in where and not Path(where["cluster"]).exists():
        raise NotFoundError(f"cluster file {where['cluster']} does not exist; check the path")
    scenarios = choose_scenarios(scenario, rows)
    if importlib.util.find_spec("h5py") is None and not all(chosen.compressed for chosen in scenarios):
        raise InputError(
            f"h5py is not installed, which scenario {scenario} needs; pip install h5py, or give --scenario compressed"
        )
    tables = []
    for chosen in scenarios:
        job = replace(prepare_job(chosen, folder, say), where=where)
        tables.append(run_rounds(job, say=say, **settings))
        check_ours(tables[-1])
    machine = machine_facts()
    if plot is not None:
        from pipeline.bench.picture import draw_tables

        draw_tables(tables, describe_machine(machine), plot)
    numbers = {name: settings[name] for name in ("rounds", "limit")}
    numbers = {"machine": machine, **numbers, "tables": [table.numbers() for table in tables]}
    return report_text(machine, tables), numbers


def check_ours(table: Table) -> None:
    """Raise IntegrityError if this project gave a wrong value: its speed is then worth nothing."""
    labels = [
        score.contender.label for score in table.scores if score.contender.kind == "ours" and score.state == "wrong"
    ]
    if labels:
        raise IntegrityError(
            f"wrong values in scenario {table.scenario.name} from {', '.join(labels)}; report this as a bug"
        )


def _check_plot(plot: Path) -> None:
    """Refuse before the work what matplotlib would refuse after it."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise InputError("matplotlib is not installed, which --plot needs; pip install matplotlib") from None
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if plot.suffix.removeprefix(".") not in known:
        raise InputError(f"--plot {plot} has no format of matplotlib; end its name in one of {', '.join(known)}")
    if not plot.absolute().parent.is_dir():
        raise InputError(f"--plot {plot} is in a folder that does not exist; make {plot.parent} first")
