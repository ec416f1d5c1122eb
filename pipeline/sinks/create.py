"""A matrix from what people have: any source, streamed into shards, a Dask task for a run of whole shards."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.arguments import check_choice, check_flag, check_whole
from pipeline.errors import InputError
from pipeline.formatting import count_of, format_size, html_table, list_some, text_line
from pipeline.matrix.arrays import locate_array
from pipeline.matrix.attributes import Description
from pipeline.matrix.fingerprint import fingerprint_source
from pipeline.matrix.formats import open_source, referred_files
from pipeline.matrix.matrix import Matrix, open_single
from pipeline.memory import budget, parse_size
from pipeline.outputs.journal import Request
from pipeline.outputs.output import find_output
from pipeline.outputs.shards import Compression, Cut, cut_rows
from pipeline.plan.cost import slab_nbytes
from pipeline.runtime.preflight import survey_workers
from pipeline.runtime.progress import shown
from pipeline.runtime.resources import Footprint, active_client, count_threads, fit_memory
from pipeline.runtime.runner import open_run, run_tasks, writing
from pipeline.runtime.tasks import Receipt, name_tasks
from pipeline.storage.filesystem import say_refusals

if TYPE_CHECKING:
    from collections.abc import Mapping

    import zarr
    from numpy.typing import DTypeLike, NDArray

    from pipeline.matrix.fingerprint import Fingerprint
    from pipeline.matrix.sources import Source
    from pipeline.outputs.output import Output, Stage, Writer
    from pipeline.runtime.report import Watch
    from pipeline.storage.locations import Location, Url

_READ_SHARE = 0.25
"""Part of the memory budget that the rows of one task may take, where a source's chunks make long runs pay."""


@dataclass(frozen=True, slots=True, repr=False)
class Creation:
    """How a source will become a matrix, and what that costs. Frozen; made by `plan_creation`."""

    source: Source
    output: Output
    cut: Cut
    compress: Compression | None
    task_rows: int
    """Rows of one task: whole shards; long enough that a source's chunk is decoded once, where memory allows."""
    memory: int | None
    resume: bool
    overwrite: bool

    @property
    def dest(self) -> Location:
        """Where the matrix goes, as it was named."""
        return self.output.location

    @property
    def rows(self) -> int:
        """Rows of the source."""
        return self.source.shape[0]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.source.shape[1:]) * self.source.dtype.itemsize

    @property
    def files(self) -> int:
        """Shards, or plain chunks, to be written."""
        return -(-self.rows // self.cut.file)

    @property
    def tasks(self) -> int:
        """Dask tasks."""
        return -(-self.rows // self.task_rows)

    @property
    def nbytes_read(self) -> int:
        """Bytes of the source that the tasks decode; rows of a chunk at the border of two tasks count twice."""
        unit = self.source.chunk_rows
        first = np.arange(self.tasks) * self.task_rows
        stop = np.minimum(first + self.task_rows, self.rows)
        return int((np.minimum(-(-stop // unit) * unit, self.rows) - first // unit * unit).sum()) * self.row_nbytes

    @property
    def nbytes_written(self) -> int:
        """Bytes of the matrix, its checksums and indexes, before compression; the last chunk is padded."""
        chunks = -(-self.rows // self.cut.chunk)
        index = self.files * (16 * (self.cut.file // self.cut.chunk) + 4) if self.cut.shard else 0
        return chunks * (self.cut.chunk * self.row_nbytes + 4) + index

    @property
    def task_nbytes(self) -> int:
        """Memory that one task holds."""
        rows = self.task_rows * self.row_nbytes
        file_nbytes, chunk_nbytes = self.cut.file * self.row_nbytes, self.cut.chunk * self.row_nbytes
        writing = self.output.writing_nbytes(file_nbytes, chunk_nbytes, plain=self.compress is None)
        if self.streams:
            return slab_nbytes(file_nbytes, chunk_nbytes) + writing
        return rows + writing + (self.source.chunk_rows * self.row_nbytes if self.source.chunk_rows > 1 else 0)

    @property
    def streams(self) -> bool:
        """Whether a task reads a few rows at a time while it writes: where they can be read alone."""
        return self.source.chunk_rows == 1 and self.compress is None

    def footprint(self) -> Footprint:
        """Memory of the run; BudgetError where not even one task fits."""
        threads = count_threads(active_client())
        return fit_memory(self.task_nbytes, self.memory, threads=threads, what="one task of create")

    def request(self, fingerprint: Fingerprint) -> Request:
        """What decides the bytes of the matrix."""
        facts = {
            "kind": "matrix",
            "source": fingerprint.digest,
            "shape": str(self.source.shape),
            "dtype": self.source.dtype.str,
            "layout": f"{self.cut} {self.compress}",
            **self._told.facts(),
        }
        return Request(facts)

    def run(self, watch: Watch) -> Matrix:
        """Write the matrix, telling `watch` of every task that is done."""
        self.footprint()
        fingerprint = fingerprint_source(self.source)
        request = self.request(fingerprint)
        if self.resume and self.output.is_finished(request):
            return self._open()
        given = {"resume": self.resume, "overwrite": self.overwrite}
        with self.output.stage(request, cut=self.task_rows, nbytes=self.least_nbytes, **given) as stage:
            self._write(stage, fingerprint, watch, replace(self, task_rows=stage.cut).footprint().fits)
            # Whatever changed while it was read, an exit 0 would call it a copy.
            fingerprint.check()
            ours: dict[str, Any] = {"kind": "matrix", "request": request.facts}
            parts = getattr(self.source, "parts", None)
            if parts is not None:
                ours["parts"] = parts.tolist()
            stage.seal(chain.from_iterable(stage.done.values()), ours)
        watch.lacking = say_refusals(self.output.place)
        return self._open()

    @property
    def _told(self) -> Description:
        """Attributes and names of dimensions that the matrix takes from its source, its rows' name the first."""
        attributes, names = self.source.labels
        return Description(attributes, tuple(name if names.count(name) == 1 else None for name in names))

    def _open(self) -> Matrix:
        """Open what was made, under the name that was given."""
        return replace(open_single(self.output.place), path=str(self.dest))

    def _write(self, stage: Stage, fingerprint: Fingerprint, watch: Watch, at_once: int) -> None:
        """Run the tasks that are not finished yet."""
        shape, rows, told = self.source.shape, stage.cut, self._told
        names = ["row", *(f"column_{axis}" for axis in range(len(shape) - 1))]
        writer = stage.create_array(
            None,
            shape=shape,
            dtype=self.source.dtype,
            cut=self.cut,
            compress=self.compress,
            dimension_names=[given or name for given, name in zip(told.names, names, strict=True)],
            attributes=told.attributes,
        )
        cuts = [(number, first, min(first + rows, shape[0])) for number, first in enumerate(range(0, shape[0], rows))]
        stage.expect(len(cuts))
        watch.begin(len(cuts), shape[0], self.nbytes_written)
        for number, first, stop in cuts:
            if number in stage.done:
                watch.task_kept(stop - first)
        survey = survey_workers((fingerprint.sample(), *writer.sights()), say=watch.say)
        with open_run() as run:
            arguments = ((self.source, writer, self.streams, *each, run) for each in cuts if each[0] not in stage.done)
            tasks = name_tasks("create", survey.guard(copy_rows), arguments)
            span = ("pipeline", "create", self.dest.name)
            for receipt in run_tasks(tasks, at_once=survey.bound(at_once), span=span, watch=watch):
                stage.finish((receipt.number, receipt.files))
                watch.task_done(receipt)
        stage.check_complete()

    @property
    def least_nbytes(self) -> int:
        """Disk that the matrix takes for certain: what compression will save is not known."""
        return 0 if self.compress else self.nbytes_written

    @property
    def referred(self) -> list[str]:
        """Files, beside those that were named, that HDF5 takes values from."""
        return list(map(str, referred_files(self.source)))

    def facts(self) -> dict[str, str]:
        """What a person wants to know, as words."""
        written = format_size(self.nbytes_written) + (" before compression" if self.compress else "")
        unit = f"{self.cut.chunk:,} rows ({format_size(self.cut.chunk * self.row_nbytes)})"
        return {
            "shape": f"({', '.join(f'{size:,}' for size in self.source.shape)}) {self.source.dtype.name}",
            "chunks": f"{unit} in shards of {self.cut.shard:,} rows" if self.cut.shard else unit,
            "codecs": "bytes" + (f" + {self.compress}" if self.compress else "") + " + crc32c",
            "reads": format_size(self.nbytes_read),
            "writes": f"{written} in {count_of(self.files, 'shard' if self.cut.shard else 'chunk')}",
            "tasks": f"{count_of(self.tasks, 'task')} of {self.task_rows:,} rows",
            "memory": f"{format_size(self.task_nbytes)} a task",
            **({"refers to": list_some(self.referred)} if self.referred else {}),
        }

    def __repr__(self) -> str:
        return text_line(f"Creation({str(self.dest)!r})", self.facts())

    def _repr_html_(self) -> str:
        return html_table(f"Creation of {self.dest}", self.facts())


def create_matrix(
    source: str | Path | Sequence[str | Path] | zarr.Array[Any],
    dest: str | Path,
    *,
    dtype: DTypeLike | None = None,
    row_shape: tuple[int, ...] | None = None,
    dataset: str | None = None,
    axis: int = 0,
    seed: int = 0,
    outside_files: bool = False,
    length: int = 16,
    shard_rows: int | None = None,
    chunk_rows: int | None = None,
    compress: Compression | None = None,
    memory: int | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Matrix:
    """Make a matrix from what is there; it appears only when it is complete.

    Tasks run on the active `distributed.Client`, else on Dask's threaded scheduler; the workers read and write.

    Parameters
    ----------
    source
        A path: `.npy`, raw binary, HDF5 (`file.h5::dataset`), Zarr; several, stacked by rows, whose borders are kept
        as `matrix.parts`; an open `zarr.Array`; or `"random:ROWSxCOLS"`, uniform in [0, 1).
    dest
        Folder to make, or URL of a place on an object store (`s3://`, `gs://`, `az://`); it ends in `.zarr`.
    dtype, row_shape
        Of raw binary, and of nothing else; `dtype` also of `random:`.
    dataset
        Name of the HDF5 data set, of each file.
    axis
        Which axis of the source holds the rows.
    seed
        Of `random:`; the same values whatever the layout and the number of workers.
    outside_files
        Whether an HDF5 file may take values from files outside its folder (by links, virtual data sets, external
        storage), which whoever wrote it has chosen.
    length
        Rows of the windows that will be read: what chunks fit that are compressed.
    shard_rows, chunk_rows
        Rows of a shard (0: plain chunks) and of an inner chunk. Default: about 64 MiB and 64 KiB.
    compress
        `"zstd"` or `"blosc"`. Default: not compressed, so that any run of rows can be read alone.
    memory
        Limit in bytes, or text such as "8GB", for all that the run holds.
    resume
        Whether to go on where an interrupted run of the same request ended; nothing is done where it is finished.
    overwrite
        Whether a local Zarr that this package wrote may be replaced. On an object store an output is written once.
    storage_options
        Of a URL of `dest`, for the library that writes there (obstore): region, endpoint, credentials. They go to the
        workers. What is not given, each worker takes from its environment.
    progress
        As of `gather`.

    Raises
    ------
    NotFoundError, OpenError
        If a source is absent, truncated or cannot be parsed.
    InputError
        If parts do not agree, or a value is out of its range.
    OutputExistsError
        If something is at `dest` already.
    BudgetError, DiskSpaceError
        If one task does not fit the memory, or the matrix the disk.

    Examples
    --------
    >>> import pipeline
    >>> folder = getfixture("tmp_path")
    >>> pipeline.create_matrix("random:1000x20", folder / "A.zarr", seed=1).shape
    (1000, 20)
    """
    creation = plan_creation(
        source,
        dest,
        dtype=dtype,
        row_shape=row_shape,
        dataset=dataset,
        axis=axis,
        seed=seed,
        outside_files=outside_files,
        length=length,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        compress=compress,
        memory=memory,
        resume=resume,
        overwrite=overwrite,
        storage_options=storage_options,
    )
    with shown("create_matrix", "rows", progress=progress) as watch:
        return creation.run(watch)


def plan_creation(
    source: str | Path | Sequence[str | Path] | zarr.Array[Any],
    dest: str | Path,
    *,
    dtype: DTypeLike | None,
    row_shape: tuple[int, ...] | None,
    dataset: str | None,
    axis: int,
    seed: int,
    length: int,
    shard_rows: int | None,
    chunk_rows: int | None,
    compress: Compression | None,
    memory: int | str | None,
    resume: bool,
    overwrite: bool,
    storage_options: Mapping[str, Any] | None = None,
    outside_files: bool = False,
) -> Creation:
    """Open the sources and decide everything about the matrix; nothing is created."""
    output = find_output(dest, storage_options)
    if output.location.suffix != ".zarr":
        raise InputError(f"a matrix is a Zarr array in a folder; got {output.location}; name it .zarr")
    if compress is not None:
        check_choice("compress", compress, ("zstd", "blosc"))
    check_flag("resume", resume)
    check_flag("overwrite", overwrite)
    length = check_whole("length", length, least=1)
    chunk_rows = None if chunk_rows is None else check_whole("chunk_rows", chunk_rows, least=1)
    shard_rows = None if shard_rows is None else check_whole("shard_rows", shard_rows, least=0)
    opened = open_source(
        source,
        dtype=dtype,
        row_shape=row_shape,
        dataset=dataset,
        axis=axis,
        seed=seed,
        outside_files=outside_files,
    )
    output.check_apart([*_inputs(source), *referred_files(opened)])
    if not resume:
        output.check(nbytes=0, overwrite=overwrite)
    row_nbytes = math.prod(opened.shape[1:]) * opened.dtype.itemsize
    cut = cut_rows(
        opened.shape[0], row_nbytes, length=length, compress=compress, chunk_rows=chunk_rows, shard_rows=shard_rows
    )
    limit = None if memory is None else parse_size(memory)
    # A source's chunk that spans many shards would be decoded for each of them: let a task write several.
    room = int(budget(limit).nbytes * _READ_SHARE)
    files = max(1, min(-(-opened.chunk_rows // cut.file), room // (cut.file * row_nbytes)))
    creation = Creation(opened, output, cut, compress, files * cut.file, limit, resume, overwrite)
    if not (resume and output.is_result(creation.request(fingerprint_source(opened)))):
        output.check(nbytes=creation.least_nbytes, resume=resume, overwrite=overwrite)
    creation.footprint()
    return creation


def _inputs(source: Any) -> list[str | Path | Url]:
    """Files, folders and URLs that a source names."""
    given = [source] if isinstance(source, str | Path) or not isinstance(source, Sequence) else source
    names = [str(each).split("::")[0] if isinstance(each, str | Path) else locate_array(each) for each in given]
    return [name for name in names if name is not None]


def copy_rows(source: Source, writer: Writer, streams: bool, number: int, first: int, stop: int, run: str) -> Receipt:
    """Read rows [first, stop) of a source, all before the first is written unless it streams, and write them."""
    begin = time.perf_counter()
    read_seconds = 0.0

    def read(start: int, end: int) -> NDArray[Any]:
        nonlocal read_seconds
        before = time.perf_counter()
        rows = source.read_rows(start, end)
        read_seconds += time.perf_counter() - before
        return rows

    rows = None if streams else read(first, stop)
    with writing(run):
        files = writer.write(first, stop, read if rows is None else lambda a, b: rows[a - first : b - first], number)
    nbytes = (stop - first) * math.prod(source.shape[1:]) * source.dtype.itemsize
    write_seconds = time.perf_counter() - begin - read_seconds
    return Receipt(number, stop - first, nbytes, read_seconds, write_seconds=write_seconds, files=tuple(files))
