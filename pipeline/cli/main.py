"""The command line: arguments in, the flow, one report out.

Zarr and distributed are imported inside the verbs, so that `--help` and mistakes in flags answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pipeline import __version__
from pipeline.cli.help import Verbs, answer_shell, complete_files
from pipeline.cli.options import (
    common,
    connecting,
    in_place,
    known_variables,
    member_option,
    memory_option,
    option,
    overwrite_option,
    progress_option,
    report_option,
    request,
    resume_option,
    tellers,
)
from pipeline.cli.summary import (
    Measures,
    add_measures,
    align_facts,
    report_creation,
    report_dry_run,
    report_matrix,
    report_plan,
    report_run,
    say_problems,
    say_scaling,
)
from pipeline.cluster.signals import Guard, Terminated
from pipeline.errors import InputError, IntegrityError, OpenError, PipelineError, find_shortage
from pipeline.formatting import count_of
from pipeline.memory import check_address_space
from pipeline.redaction import plain_lines, scrub

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipeline.matrix.matrix import Matrix
    from pipeline.matrix.opening import MatrixGroup
    from pipeline.runtime.report import Watch
    from pipeline.sinks.gather import Gathering, GroupGathering
    from pipeline.sinks.store import Storing

_EPILOG = """\b
First steps:
  pipeline demo                                        see it work
  pipeline create A.npy A.zarr                         a matrix of a file
  pipeline run A.zarr --count 10000 --length 16 --out windows.zarr

\b
Exit codes:
  0 done          3 cannot open or connect    6 incomplete: --resume goes on
  1 a bug of ours 4 data integrity            7 the output exists
  2 bad input     5 memory or disk            130, 143 interrupted

The environment variable PIPELINE_NAME sets an option, such as PIPELINE_MEMORY=8GB; not so --out, --overwrite, --order,
--dry-run and those that shape the report. One that sets none is an error.

\b
Completion:
  bash   eval "$(_PIPELINE_COMPLETE=bash_source pipeline)"
  zsh    eval "$(_PIPELINE_COMPLETE=zsh_source pipeline)"
  fish   _PIPELINE_COMPLETE=fish_source pipeline | source
"""


def main() -> None:
    """Run the command line, and turn every failure into one line and its exit code."""
    _occupy_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A path need not be UTF-8.
            stream.reconfigure(errors="backslashreplace")
    with Guard(_say) as guard:
        _answer(guard)


def _answer(guard: Guard) -> NoReturn:
    """Do what the command line asks for, and exit."""
    try:
        if sys.stdout is None:
            raise OpenError("data go to standard output; it is closed; name a file for it, such as /dev/null")  # noqa: TRY301
        answer_shell(cli)
        with cli.make_context("pipeline", sys.argv[1:]) as context:
            cli.invoke(context)
        sys.exit(0)
    except SystemExit:
        raise
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except BaseException as error:  # noqa: BLE001 (the last line of defence: no traceback reaches the user)
        error = guard.settle(error)
        guard.say(error)
        sys.exit(_explain(error)[0])


class _WrongError(IntegrityError):
    """What `verify` found."""

    def __init__(self, text: str, numbers: dict[str, Any]) -> None:
        super().__init__(text)
        self.numbers = numbers
        """Of the report, for `--json`: an error is one object, too."""


def _say(error: BaseException) -> None:
    """Say one line of a failure."""
    code, text = _explain(error)
    if "--debug" in sys.argv:
        _print(scrub("".join(traceback.format_exception(error))).rstrip("\n"), err=True)
    text = " ".join(scrub(text).split())
    if "--json" in sys.argv:
        with contextlib.suppress(OSError):
            _print(json.dumps(getattr(error, "numbers", {}) | {"error": text, "exit_code": code}))
    with contextlib.suppress(OSError):
        _print(f"error: {text}", err=True)


def _print(text: str, *, err: bool = False) -> None:
    """Print lines as they are to be read: names in them are those of files, arrays and hosts of others."""
    click.echo(plain_lines(text), err=err)


def _occupy_descriptors() -> None:
    """Point those of 0 to 2 that are closed at the null device: no file that is opened later may take their number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (it stays open)


@contextlib.contextmanager
def _foreign_output_diverted() -> Iterator[None]:
    """Send to stderr what `apply` prints: here, in other libraries' C, and in worker processes, which inherit it."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _explain(error: BaseException) -> tuple[int, str]:  # noqa: PLR0911 (a table)
    """Exit code and words of a failure."""
    notes = getattr(error, "__notes__", [])
    if not isinstance(error, PipelineError) or isinstance(error, OpenError):
        error = find_shortage(error) or error
    match error:
        case PipelineError():
            return error.exit_code, "; ".join([str(error), *notes])
        case click.ClickException():
            verb = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "pipeline"
            return 2, f"the command line; {error.format_message().rstrip('.')}; see {verb} --help"
        case KeyboardInterrupt() | click.Abort():
            return 130, "; ".join(["interrupted", *(notes or ["no task was finished; run it again"])])
        case Terminated():
            return 143, "; ".join(["terminated", *(notes or ["no task was finished; run it again"])])
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            text = f"an output fits its disk; {error.filename or 'standard output'}: {error.strerror}; free some"
            return 5, "; ".join([text, *notes])
        case OSError():
            text = f"a file can be used; {error.filename or 'one'}: {error.strerror or error}; check it"
            return 3, "; ".join([text, *notes])
    text = f"a bug of ours; {type(error).__name__}: {error}; run it with --debug and report what it says"
    return 1, "; ".join([text, *notes])


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="pipeline")
@click.pass_context
def cli(context: click.Context) -> None:
    """Read random windows out of a matrix that is larger than memory, as fast as the storage allows, on Dask."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(
    examples=(
        "pipeline create A.npy A.zarr",
        "pipeline create monday.npy tuesday.npy week.zarr",
        "pipeline create A.h5::test A.zarr --compress zstd --length 16",
        "pipeline create A.bin A.zarr --dtype float32 --row-shape 2000 --dry-run",
    )
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, shell_complete=complete_files)
@click.argument("dest", metavar="DEST", shell_complete=complete_files)
@option("--dtype", help="Of raw binary, such as float32 or >i2; also of random:.")
@option("--row-shape", metavar="N[,N...]", help="Shape of a row of raw binary.")
@option("--dataset", help="Name of the HDF5 data set in each file.")
@option("--axis", type=int, default=0, show_default=True, help="Which axis of the source holds the rows.")
@option("--seed", type=int, default=0, show_default=True, help="Of random:.")
@option("--outside-files", is_flag=True, help="Allow HDF5 that takes values from files outside its folder.")
@option("--length", type=int, default=16, show_default=True, help="Rows of a window: what compressed chunks fit.")
@option("--shard-rows", type=int, help="Rows of a shard; 0 writes plain chunks. Default: about 64 MiB.")
@option("--chunk-rows", type=int, help="Rows of an inner chunk. Default: about 64 KiB.")
@option("--compress", type=click.Choice(["zstd", "blosc"]), help="Default: not compressed.")
@memory_option
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and write nothing.")
@resume_option
@overwrite_option
@report_option
@connecting
@progress_option
@common
def create(
    sources: tuple[str, ...],
    dest: str,
    *,
    row_shape: str | None,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    report: str | None,
    where: dict[str, Any],
    progress: bool | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    debug: bool,  # noqa: ARG001 (read by main)
    **settings: Any,
) -> None:
    """Make a matrix of what is there.

    SOURCE is an .npy, raw binary (with --dtype and --row-shape), HDF5 (A.h5::dataset, or --dataset), a Zarr array, or
    random:ROWSxCOLS. Several are stacked by rows. DEST is a path, or a URL such as s3://bucket/A.zarr.
    """
    begin = time.perf_counter()
    if not sources:
        raise InputError(f"create takes SOURCE... and DEST; got {dest} alone; name the destination, too")
    with _loading():
        from pipeline.cli.request import parse_shape
        from pipeline.memory import PeakMemory
        from pipeline.sinks.create import plan_creation

        creation = plan_creation(
            sources[0] if len(sources) == 1 else list(sources),
            dest,
            row_shape=parse_shape(row_shape),
            resume=resume,
            overwrite=overwrite,
            **settings,
        )
    if dry_run:
        _report(*report_dry_run(creation), as_json=as_json, quiet=quiet)
        return
    ready = time.perf_counter()
    apart = [dest, *(each.split("::")[0] for each in sources), *creation.referred]
    with (
        PeakMemory() as peak,
        _connected(where, quiet=quiet, verbose=verbose, report=report, apart=apart) as link,
    ):
        started = time.perf_counter()
        with _shown("rows", quiet=quiet, progress=progress) as watch:
            matrix = creation.run(watch)
        ended = time.perf_counter()
    measures = Measures(begin, ready, started, ended, peak.nbytes, link)
    _report(*report_creation(creation, matrix, watch, measures), as_json=as_json, quiet=quiet)


@cli.command(
    examples=(
        "pipeline info A.zarr",
        "pipeline info A.h5::test --length 64",
    )
)
@click.argument("matrix", metavar="MATRIX", shell_complete=complete_files)
@in_place
@member_option
@option("--length", type=int, default=16, show_default=True, help="Rows of a window.")
@common
def info(
    matrix: str,
    dtype: str | None,
    row_shape: str | None,
    dataset: str | None,
    *,
    members: tuple[str, ...],
    length: int,
    as_json: bool,
    quiet: bool,
    **_: bool,
) -> None:
    """Say what a matrix is, and what a window costs.

    MATRIX is a Zarr array, or a group of arrays that share rows; or an .npy, raw binary (with --dtype and
    --row-shape) or HDF5 with a contiguous data set (A.h5::dataset, or --dataset), read in place.
    """
    with _loading():
        from pipeline.cli.request import open_named

        opened = open_named(matrix, dtype, row_shape, dataset, members=members)
        length = opened.check_length(length)
    _report(*report_matrix(opened, length), as_json=as_json, quiet=quiet)


@cli.command(examples=("pipeline plan A.zarr --count 10000 --length 16 --out windows.zarr",))
@request
def plan(*, as_json: bool, quiet: bool, **arguments: Any) -> None:
    """Say what `run` would do and cost.

    Reads no data, but for one window where --apply is given. MATRIX is as for `run`.
    """
    with _loading(), _foreign_output_diverted():
        _, sink = _prepare(**arguments)
    _report(*report_plan(sink), as_json=as_json, quiet=quiet)


@cli.command(
    examples=(
        "pipeline run A.zarr --count 10000 --length 16 --seed 0 --out windows.zarr",
        "pipeline run A.zarr --starts starts.txt --out windows.npy --memory 8GB --resume",
        "pipeline run A.npy --apply features:mean --out means.npy",
        "pipeline run s3://bucket/A.zarr --scheduler tls://host:8786 --out s3://bucket/windows.zarr",
    )
)
@request
@report_option
@connecting
@progress_option
def run(
    *,
    where: dict[str, Any],
    report: str | None,
    progress: bool | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **arguments: Any,
) -> None:
    """Read windows into an array, an .npy or Zarr.

    MATRIX is a Zarr array, or a group of arrays that share rows; or an .npy, raw binary (with --dtype and
    --row-shape) or HDF5 with a contiguous data set (A.h5::dataset, or --dataset), read in place. Without --out the
    windows are read and measured, and not kept.
    """
    begin = time.perf_counter()
    with _loading(), _foreign_output_diverted():
        from pipeline.memory import PeakMemory
        from pipeline.runtime.resources import active_client, count_threads

        matrix, sink = _prepare(**arguments)
    ready = time.perf_counter()
    apart = [*matrix.inputs(), *([] if sink.out is None else [arguments["out"]])]
    with (
        _foreign_output_diverted(),
        PeakMemory() as peak,
        _connected(where, quiet=quiet, verbose=verbose, report=report, apart=apart) as link,
    ):
        started = time.perf_counter()
        threads = count_threads(active_client())
        with _shown("windows", quiet=quiet, progress=progress) as watch:
            for line in say_scaling(matrix):
                watch.say(line)
            sink.run(watch)
        ended = time.perf_counter()
    measures = Measures(begin, ready, started, ended, peak.nbytes, link)
    _report(*report_run(matrix, sink, watch, measures, threads=threads), as_json=as_json, quiet=quiet)


@cli.command(
    examples=(
        "pipeline verify A.zarr",
        "pipeline verify A.npy --write-manifest A.json",
        "pipeline verify A.npy --manifest A.json --subset 10%",
    )
)
@click.argument("target", metavar="TARGET", shell_complete=complete_files)
@option("--subset", metavar="PART", help="Read a random part, such as 10%.  [default: all]")
@option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the part.")
@option("--manifest", metavar="FILE", help="Compare with what --write-manifest wrote.")
@click.option("--write-manifest", metavar="FILE", help="Record size and crc32 of every file; compare nothing.")
@report_option
@connecting
@progress_option
@common
def verify(
    target: str,
    *,
    subset: str | None,
    seed: int,
    manifest: str | None,
    write_manifest: str | None,
    report: str | None,
    where: dict[str, Any],
    progress: bool | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    debug: bool,  # noqa: ARG001 (read by main)
) -> None:
    """Compare every stored byte with its checksum.

    TARGET is what `create` or `run` wrote; a Zarr array or group whose codecs add a crc32c; or, with a manifest, any
    Zarr or file.
    """
    begin = time.perf_counter()
    with _loading():
        from pipeline.integrity.recording import prepare_recording
        from pipeline.integrity.verify import parse_subset, prepare_verification
        from pipeline.memory import PeakMemory

        if write_manifest is None:
            share = 1.0 if subset is None else parse_subset(subset)
            checking = prepare_verification(target, subset=share, seed=seed, manifest=manifest)
        else:
            if subset is not None or manifest is not None:
                other = "--manifest" if subset is None else "--subset"
                raise InputError(f"--write-manifest records all that is there; got {other}, too; drop one of the two")
            recording = prepare_recording(target, write_manifest)
    ready = time.perf_counter()
    problems = []
    with (
        PeakMemory() as peak,
        _connected(where, quiet=quiet, verbose=verbose, report=report, apart=[target]) as link,
    ):
        started = time.perf_counter()
        with _shown("ranges", quiet=quiet, progress=progress) as watch:
            if write_manifest is None:
                problems = checking.run(watch)
            else:
                recording.run(watch)
        ended = time.perf_counter()
    measures = Measures(begin, ready, started, ended, peak.nbytes, link)
    found = checking.report(watch, problems) if write_manifest is None else recording.report(watch)
    facts, numbers = add_measures(found, watch, measures)
    if not (problems and as_json):
        _report(facts, numbers, as_json=as_json, quiet=quiet)
    if not problems:
        return
    if not as_json:
        for line in say_problems(problems):
            _print(line)
    wrong = f"{numbers['wrong_files']:,} of {count_of(numbers['files'], 'file')} are wrong"
    raise _WrongError(f"stored bytes are what was written; those of {target} are not; {wrong}", numbers)


@cli.command()
@click.argument("directory", metavar="[DIR]", required=False, shell_complete=complete_files)
@connecting
@progress_option
@common
def demo(
    directory: str | None,
    *,
    where: dict[str, Any],
    progress: bool | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **_: bool,
) -> None:
    """Do the main job end to end, and check it.

    Makes an .npy of 1 GiB and a matrix of it, reads windows into memory and into Zarr, and compares both with plain
    NumPy. Takes about 3 GiB of disk in DIR, where the files stay; without DIR, in a temporary folder that is removed.
    """
    with _loading():
        from pipeline.cli.demo import run_demo

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if directory is None else directory
        say = (lambda _: None) if quiet else functools.partial(_print, err=True)
        stack.enter_context(_connected(where, quiet=quiet, verbose=verbose))
        facts, numbers = run_demo(Path(folder), say, progress=False if quiet else progress)
    _report(facts, numbers, as_json=as_json, quiet=quiet)


@cli.command()
@click.argument("directory", metavar="[DIR]", required=False, shell_complete=complete_files)
@option(
    "--scenario",
    type=click.Choice(["seed", "compressed", "small", "store", "create", "clusters", "batches"]),
    default="seed",
    show_default=True,
    help="The seed's windows into an array; compressed; many small ones; into Zarr; a matrix of a file; the seed's "
    "windows by this project alone, on several clusters; batches.",
)
@option(
    "--rows",
    type=click.IntRange(min=1),
    help="Of the matrix. Default: 125,000; compressed and small: the full size.",
)
@option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="One more is thrown away.")
@option("--cold", is_flag=True, help="Drop the files' pages before each read; needs no root.")
@option("--limit", type=click.FloatRange(min=0.1), default=120, show_default=True, help="Seconds of one read.")
@option("--plot", metavar="FILE", help="A picture, such as bench.png.")
@connecting
@common
def bench(directory: str | None, *, plot: str | None, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Time this project beside the other ways to read windows.

    These are h5py, np.memmap, zarr, dask, tensorstore and zarrs. Each reads the same windows, in a process of its own;
    every value is checked. Opening and allocating are timed;
    imports, a first window and the start of a cluster are not. Files of about three times the matrix go to DIR, where
    they stay and are used again; without DIR, to a temporary folder that is removed.
    """
    with _loading():
        from pipeline.bench.run import run_bench

    for name in ("verbose", "debug"):
        settings.pop(name)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if directory is None else directory
        say = (lambda _: None) if quiet else functools.partial(_print, err=True)
        words, numbers = run_bench(Path(folder), plot=None if plot is None else Path(plot), say=say, **settings)
    if as_json or not quiet:
        _print(json.dumps(numbers) if as_json else words)


@cli.command()
@connecting
@memory_option
@common
def config(*, where: dict[str, Any], memory: str | None, as_json: bool, quiet: bool, **_: bool) -> None:
    """Show every value in force, and where it came from.

    Keys, passwords and tokens are not shown. Starts no cluster.
    """
    with _loading():
        from pipeline.cli.config import collect_settings, report_settings

    told = {name: teller for name, teller in tellers(click.get_current_context()) if name in {*where, "memory"}}
    settings = collect_settings(where, told, memory=memory, variables=known_variables())
    _report(*report_settings(settings), as_json=as_json, quiet=quiet)


def _prepare(**arguments: Any) -> tuple[Matrix | MatrixGroup, Gathering | GroupGathering | Storing]:
    """Do all of a run that comes before its cluster."""
    from pipeline.cli.request import prepare_request

    if arguments["starts"] is not None:
        _refuse_given("count", "seed", "stride", "within", "split", "part", "split_by", "split_seed", beside="--starts")
    if arguments["stride"] is not None:
        _refuse_given("count", "seed", beside="--stride")
    return prepare_request(**arguments)


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Import and open without the garbage collector, which would search in vain what stays until the process ends.

    Frozen, that is not searched when the interpreter exits, either: together a fifth of a small run. A process that has
    NumPy already is a caller's own, whose garbage is left alone.
    """
    if "numpy" in sys.modules:
        yield
        return
    check_address_space()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _refuse_given(*names: str, beside: str) -> None:
    """Refuse options that would be ignored."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise InputError(f"{beside} names every window; got --{name.replace('_', '-')}, too; drop one of the two")


@contextlib.contextmanager
def _connected(
    where: dict[str, Any], *, quiet: bool, verbose: bool, report: str | None = None, apart: Iterable[str | Path] = ()
) -> Iterator[str | None]:
    """Connect to the cluster, and yield the dashboard's address; save a report that lies apart from what is named."""
    from pipeline.cli.performance import check_report, performance_report
    from pipeline.cluster.connect import connect, dashboard_link

    place = None if report is None else check_report(report, apart)
    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            client = stack.enter_context(connect(**where | ({"silence_logs": False} if verbose else {})))
        link = dashboard_link(client)
        stack.enter_context(performance_report(place))
        yield link


@contextlib.contextmanager
def _shown(unit: str, *, quiet: bool, progress: bool | None) -> Iterator[Watch]:
    from pipeline.runtime.progress import ShownWatch

    with ShownWatch(unit, quiet=quiet, progress=progress) as watch:
        yield watch


def _report(facts: dict[str, str], numbers: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    """Print what a verb found: one JSON object, or words in two columns unless all is to be quiet."""
    if as_json:
        _print(json.dumps(numbers))
    elif not quiet:
        _print(align_facts(facts))
