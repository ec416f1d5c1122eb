"""Options that verbs share, and how the environment sets them."""

from __future__ import annotations

import difflib
import functools
import os
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pipeline.cli.help import complete_files
from pipeline.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


_PREFIX = "PIPELINE_"
_FOREIGN = frozenset({"PIPELINE_WORKSPACE"})
"""Variables of others: Azure Pipelines sets this one in every job."""


class _Option(click.Option):
    """An option that the environment variable PIPELINE_NAME sets, too; not so where it lets files be replaced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.name not in (None, "overwrite", "out", "order"):
            self.envvar = f"{_PREFIX}{self.opts[0].removeprefix('--').replace('-', '_')}".upper()


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """Make an option as `click.option` does, that the environment may set."""
    return click.option(*names, cls=_Option, **settings)


def common(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every verb has; a verb refuses variables of the environment that set none."""

    @functools.wraps(function)
    def verb(**arguments: Any) -> None:
        _refuse_variables(os.environ)
        function(**arguments)

    options = [
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of words."),
        click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors; --json is printed."),
        click.option("-v", "--verbose", is_flag=True, help="Dask's own log lines, too."),
        click.option("--debug", is_flag=True, help="Tracebacks of failures."),
    ]
    return functools.reduce(lambda made, add: add(made), reversed(options), verb)


def known_variables() -> set[str]:
    """Return the environment variables that set an option of some verb."""
    return {str(each.envvar) for each in _all_options() if each.envvar}


def _all_options() -> list[click.Parameter]:
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    return [each for verb in group.commands.values() for each in verb.params]


def _refuse_variables(environment: Mapping[str, str]) -> None:
    """Raise InputError where a variable of ours sets no option: the run would not be what was meant."""
    known = known_variables()
    for name in sorted(environment):
        if not name.startswith(_PREFIX) or name in known or name in _FOREIGN:
            continue
        flag = f"--{name.removeprefix(_PREFIX).lower().replace('_', '-')}"
        near = difflib.get_close_matches(name.upper(), known, 1)
        hint = f"did you mean {near[0]}? unset it" if near else "unset it"
        if any(flag in each.opts and not each.envvar for each in _all_options()):
            hint = f"{flag} is for the command line alone; unset it"
        raise InputError(f"the environment variable {name} sets no option; {hint}")


def connecting(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say where tasks run; the verb gets keywords of `connect` as `where`."""

    @functools.wraps(function)
    def verb(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in _CONNECTING}
        function(
            **arguments, where=_winners({name: value for name, value in given.items() if value not in (None, False)})
        )

    options = [
        option(
            "--cluster",
            metavar="FILE",
            shell_complete=complete_files,
            help="Cluster file. Default: ./cluster.yaml if it is there, else this machine's cores.",
        ),
        option("--scheduler", "scheduler_address", metavar="ADDRESS", help="A Dask scheduler that runs already."),
        option(
            "--scheduler-file",
            metavar="FILE",
            shell_complete=complete_files,
            help="The same, by the file that `dask scheduler` wrote.",
        ),
        option("--workers", type=click.IntRange(min=1), help="How many; two or more on this machine are processes."),
        option("--threads", type=click.IntRange(min=1), help="Tasks at once on a worker."),
        option("--insecure", is_flag=True, help="Allow connections without TLS, which others can use."),
    ]
    return functools.reduce(lambda made, add: add(made), reversed(options), verb)


def tellers(context: click.Context) -> Iterator[tuple[str, str]]:
    """Yield the name of each parameter that was given, and its flag or environment variable."""
    for parameter in context.command.params:
        match parameter.name and context.get_parameter_source(parameter.name):
            case ParameterSource.COMMANDLINE:
                yield str(parameter.name), parameter.opts[0]
            case ParameterSource.ENVIRONMENT:
                yield str(parameter.name), str(parameter.envvar)


_RUNNING = ("scheduler_address", "scheduler_file")
_STARTED = ("workers", "threads")
_CONNECTING = ("cluster", *_RUNNING, *_STARTED, "insecure")


def _winners(given: dict[str, Any]) -> dict[str, Any]:
    """Drop what the environment says of a cluster where the command line names another."""
    context = click.get_current_context()
    flags = {name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    lost = set()
    if flags & {"cluster", *_RUNNING}:
        lost |= {*_RUNNING} - flags
    if flags & {*_RUNNING}:
        lost |= {*_STARTED} - flags
    elif flags & {*_STARTED}:
        lost |= {*_RUNNING}
    return {name: value for name, value in given.items() if name not in lost}


report_option = click.option(
    "--performance-report",
    "report",
    metavar="FILE",
    shell_complete=complete_files,
    help="Dask's performance report, one .html that needs no network.",
)
progress_option = option(
    "--progress/--no-progress",
    default=None,
    help="A bar on a terminal, else a line every ten seconds.  [default: progress]",
)
memory_option = option(
    "--memory", metavar="SIZE", help="Most that the run may hold, such as 8GB; a number alone is bytes."
)
member_option = option(
    "--member", "members", metavar="NAME", multiple=True, help="An array of a Zarr group; repeat it.  [default: all]"
)
resume_option = option(
    "--resume", is_flag=True, help="Go on where an interrupted run of the same request ended; a fresh run without one."
)
overwrite_option = option(
    "--overwrite", is_flag=True, help="Replace a local output that this program wrote; URLs are written once."
)


def in_place(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a matrix that is a file read in place."""
    options = [
        option("--dtype", help="Of raw binary, such as float32."),
        option("--row-shape", metavar="N[,N...]", help="Shape of a row of raw binary."),
        option("--dataset", help="Name of the data set in an HDF5 file."),
    ]
    return functools.reduce(lambda made, add: add(made), reversed(options), function)


def request(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that `run` and `plan` share."""
    options: list[Callable[[Any], Any]] = [
        click.argument("matrix", metavar="MATRIX", shell_complete=complete_files),
        in_place,
        member_option,
        option("--count", type=int, default=10_000, show_default=True, help="Windows to draw."),
        option("--length", type=int, default=16, show_default=True, help="Rows of a window."),
        option("--seed", type=int, default=0, show_default=True, help="Of the starts."),
        option("--stride", metavar="N", type=int, help="A window every N rows, in place of --count and --seed."),
        option(
            "--within",
            metavar="parts|FILE",
            shell_complete=complete_files,
            help="No window crosses the border of two source files; or of the intervals of rows that a .npy or a text "
            "file lists, first and stop a line.",
        ),
        option(
            "--split",
            metavar="F,F[,F...]",
            help="Fractions of the rows, such as 0.8,0.1,0.1: windows of one part share no row with another's.",
        ),
        option(
            "--part",
            metavar="NAME",
            help="The part of --split to take: train, validation, test, or the beginning of one, such as val; or its "
            "number from 0.",
        ),
        option(
            "--split-by",
            type=click.Choice(["blocks", "intervals", "order"]),
            help="Deal blocks of rows or whole intervals of --within at random, or the rows in order.  "
            "[default: blocks]",
        ),
        option(
            "--split-seed",
            metavar="N",
            type=int,
            help="Of the split alone: any --seed of one part stays apart from the others, where --length, --within "
            "and --split are the same.  [default: 0]",
        ),
        option(
            "--starts",
            metavar="FILE",
            shell_complete=complete_files,
            help="Starts from a .npy, a text file, or - for standard input.",
        ),
        option(
            "--out",
            metavar="PATH",
            shell_complete=complete_files,
            help="X.zarr (workers write) or X.npy. Default: an array that is not kept.",
        ),
        option(
            "--columns",
            metavar="A:B[:S]|N,N...",
            help="Part of each row: a slice of its first axis, which stays within the row, or indices, in any order; "
            "negative ones from the end.",
        ),
        option("--as-dtype", metavar="DTYPE", help="Deliver values as this dtype, of their own kind, such as float32."),
        option("--apply", "apply_name", metavar="MODULE:FUNCTION", help="Run on each block; only its result travels."),
        option("--order", type=click.Choice(["request", "chunk"]), help="Order of X.zarr.  [default: request]"),
        option("--check-reads", is_flag=True, help="Read whole chunks, and check them against their checksums."),
        option(
            "--missing-chunks",
            type=click.Choice(["error", "fill"]),
            default="error",
            show_default=True,
            help="What absent chunks of a Zarr array are: an error, or its fill value.",
        ),
        memory_option,
        resume_option,
        overwrite_option,
        common,
    ]
    return functools.reduce(lambda made, add: add(made), reversed(options), function)
