"""Where a matrix can be made from: arrays in files, Zarr arrays, random numbers, and stacks of these, read by rows."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.arguments import check_dtype, check_flag, check_path, check_shape, check_text, check_whole, is_whole, show
from pipeline.errors import InputError, IntegrityError, NotFoundError, OpenError, find_shortage
from pipeline.matrix import formats, hdf5
from pipeline.matrix.arrays import (
    check_decodable,
    count_nbytes,
    local_folder,
    open_array,
    open_stored,
    read_present,
    reading_config,
)
from pipeline.matrix.attributes import array_labels
from pipeline.matrix.conventions import Labels, common_labels, decoding
from pipeline.storage.files import FileStamp, check_rows, read_runs
from pipeline.storage.locations import Url, is_store_failure, locate, name_store, plain, say_failure, store_error

if TYPE_CHECKING:
    import zarr
    from numpy.typing import DTypeLike, NDArray

RANDOM_ROWS = 1024
"""Rows that one key of the random generator serves; the values depend on it."""

_HDF5_SUFFIXES = {".h5", ".hdf5", ".he5", ".nc", ".nwb"}
FILE_SUFFIXES = _HDF5_SUFFIXES | {".npy", ".npz", ".mat"}
"""Of files that are no folder of Zarr."""
_RANDOM = "random:"


class Source(Protocol):
    """Rows that a matrix is made from. Picklable: files are opened where rows are read, by any number of threads."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape), whatever the axis in the file."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """A number or boolean in native byte order."""

    @property
    def chunk_rows(self) -> int:
        """Rows that reading one row decodes: 1 where rows can be read alone."""

    @property
    def nbytes(self) -> int:
        """Bytes that the data take where they are stored."""

    @property
    def labels(self) -> Labels:
        """What is said beside the values; the name of the rows is the first."""

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) as an array of the caller's own, not always in C order.

        Raises
        ------
        IntegrityError
            If the data are not, or no longer, what they were when the source was opened.
        IndexError
            If not ``0 <= start <= stop <= rows``.
        """


@dataclass(frozen=True, slots=True)
class FileSource:
    """Plain numbers at one offset of a file: `.npy`, raw binary, a contiguous HDF5 data set."""

    stamp: FileStamp
    offset: int
    """Byte of the file at which the numbers begin."""
    stored_shape: tuple[int, ...]
    """Shape of the array in the file."""
    stored_dtype: np.dtype[Any]
    """In the byte order of the file."""
    fortran: bool
    """The first index varies fastest."""
    axis: int
    """Axis of `stored_shape` that holds the rows; not negative."""
    alone: bool
    """The file should end where the numbers do."""
    stored_labels: Labels | None = field(default=None, compare=False)
    """What the file says beside the numbers; None where it has no place for that."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape)."""
        return _put_first(self.stored_shape, self.axis)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Native byte order."""
        return self.stored_dtype.newbyteorder("=")

    @property
    def chunk_rows(self) -> int:
        """1: rows can be read alone."""
        return 1

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize

    @property
    def labels(self) -> Labels:
        """What the file says; see `Source.labels`."""
        return _no_labels(self.shape) if self.stored_labels is None else self.stored_labels.first(self.axis)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop), read rather than mapped: a file that was cut is then an error, not the signal SIGBUS."""
        check_rows(start, stop, self.shape[0])
        self.stamp.check()
        # A Fortran array is a C array with its axes reversed.
        axes = len(self.stored_shape)
        on_disk = list(reversed(self.stored_shape) if self.fortran else self.stored_shape)
        axis = axes - 1 - self.axis if self.fortran else self.axis
        row_bytes = math.prod(on_disk[axis + 1 :]) * self.stored_dtype.itemsize
        runs = np.empty((math.prod(on_disk[:axis]), (stop - start) * row_bytes), np.uint8)
        try:
            with self.stamp.path.open("rb", buffering=0) as file:
                read_runs(file, runs, self.offset + start * row_bytes, self.shape[0] * row_bytes)
        except OSError as error:
            raise IntegrityError(
                f"a source must be readable; rows [{start}, {stop}) of {self.stamp.path}: {error.strerror}; "
                f"restore the file"
            ) from error
        on_disk[axis] = stop - start
        block = runs.reshape(-1).view(self.stored_dtype).reshape(on_disk)
        if not self.stored_dtype.isnative:
            block = block.byteswap(inplace=True).view(self.dtype)
        return np.moveaxis(block.T if self.fortran else block, self.axis, 0)


@dataclass(frozen=True, slots=True, eq=False)
class ZarrSource:
    """Rows of a Zarr array."""

    array: zarr.Array[Any]
    axis: int
    """Axis of the array that holds the rows; not negative."""
    chunk_rows: int
    """Rows of what zarr reads and decodes in one go: an inner chunk of a shard, else a chunk."""
    nbytes: int
    """Bytes in the store."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape)."""
        return _put_first(self.array.shape, self.axis)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Native byte order."""
        return np.dtype(self.array.dtype).newbyteorder("=")

    @property
    def labels(self) -> Labels:
        """What the array says; see `Source.labels`."""
        return array_labels(self.array).first(self.axis)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop); a chunk that is absent is an error, not zeros."""
        check_rows(start, stop, self.shape[0])
        try:
            block = read_present(self.array, (slice(None),) * self.axis + (slice(start, stop),))
        except (MemoryError, IntegrityError):
            raise
        except Exception as error:  # noqa: BLE001 (a codec raises what it likes)
            name = name_store(self.array.store_path)
            if local_folder(self.array) is None and is_store_failure(error):
                raise store_error("a source can be read", f"rows [{start}, {stop}) of {name}", error) from plain(error)
            raise find_shortage(error) or IntegrityError(
                f"every chunk of a source must be there and readable; rows [{start}, {stop}) of {name} are not "
                f"({say_failure(error)}); restore the array, or write it again with write_empty_chunks=True"
            ) from plain(error)
        rows: NDArray[Any] = np.moveaxis(block, self.axis, 0).astype(self.dtype, copy=False)
        return rows


@dataclass(frozen=True, slots=True)
class RandomSource:
    """Uniform numbers in [0, 1) that depend on seed and place alone, not on how they are read.

    Examples
    --------
    >>> source = open_source("random:5000x3", seed=7)
    >>> bool((source.read_rows(0, 5000)[1020:1030] == source.read_rows(1020, 1030)).all())
    True
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    seed: int

    @property
    def chunk_rows(self) -> int:
        """1: rows can be made alone."""
        return 1

    @property
    def nbytes(self) -> int:
        """0: nothing is stored."""
        return 0

    @property
    def labels(self) -> Labels:
        """Nothing is said of it."""
        return _no_labels(self.shape)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop), drawn straight into the result."""
        check_rows(start, stop, self.shape[0])
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        dtype: type[np.float32 | np.float64] = np.float32 if self.dtype == np.float32 else np.float64
        # One step of Philox's counter makes 32 bytes.
        numbers = 32 // self.dtype.itemsize
        for block in range(start // RANDOM_ROWS, -(-stop // RANDOM_ROWS)):
            first, last = max(start, block * RANDOM_ROWS), min(stop, (block + 1) * RANDOM_ROWS)
            skipped = (first - block * RANDOM_ROWS) * math.prod(self.shape[1:])
            bits = np.random.Philox(key=np.array([self.seed, block], np.uint64))
            bits.advance(skipped // numbers)
            generator = np.random.Generator(bits)
            generator.random(skipped % numbers, dtype=dtype)
            generator.random(out=out[first - start : last - start], dtype=dtype)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class StackedSource:
    """Sources of one row shape and dtype, one below the other."""

    sources: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows of all parts, *row_shape)."""
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Native byte order."""
        return self.sources[0].dtype

    @property
    def chunk_rows(self) -> int:
        """The largest of all parts."""
        return max(source.chunk_rows for source in self.sources)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(source.nbytes for source in self.sources)

    @property
    def labels(self) -> Labels:
        """What all parts say alike."""
        return common_labels([source.labels for source in self.sources])

    @property
    def parts(self) -> NDArray[np.int64]:
        """(m, 2) rows [first, stop) of each part."""
        stops = np.cumsum([source.shape[0] for source in self.sources], dtype=np.int64)
        return np.stack([np.concatenate([[0], stops[:-1]]), stops], axis=1)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop), from as many parts as they lie in."""
        check_rows(start, stop, self.shape[0])
        parts = self.parts
        touched: list[int] = np.flatnonzero((parts[:, 0] < stop) & (parts[:, 1] > start)).tolist()
        if len(touched) == 1:
            first = int(parts[touched[0], 0])
            return self.sources[touched[0]].read_rows(start - first, stop - first)
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for i in touched:
            first, last = (int(row) for row in np.clip(parts[i], start, stop))
            offset = int(parts[i, 0])
            out[first - start : last - start] = self.sources[i].read_rows(first - offset, last - offset)
        return out


def open_source(
    source: str | os.PathLike[str] | zarr.Array[Any] | Sequence[str | os.PathLike[str] | zarr.Array[Any]],
    *,
    dtype: DTypeLike | None = None,
    row_shape: Sequence[int] | None = None,
    dataset: str | None = None,
    axis: int = 0,
    seed: int = 0,
    outside_files: bool = False,
) -> Source:
    """Open what a matrix is made from; no data are read, and nothing is created.

    Parameters
    ----------
    source
        ``.npy``; HDF5, also as ``file.h5::dataset``; the folder or URL of a Zarr array, or a `zarr.Array`; any other
        file is raw binary; ``random:ROWSxCOLS`` is uniform in [0, 1). A sequence of them is stacked by rows. What a
        file holds decides, not its name: archives, netCDF-3 and other formats are named and refused, those that four
        bytes or more tell also where `dtype` and `row_shape` are given.
    dtype
        Of raw binary, such as ``">f4"``; of random numbers float64 (the default) or float32.
    row_shape
        Shape of one row of raw binary; ``()`` where a row is one number.
    dataset
        The data set in each HDF5 file; not needed where a file holds only one.
    axis
        Axis of each source that holds the rows; negative ones count from the last.
    seed
        Of random numbers, in [0, 2**64).
    outside_files
        Whether an HDF5 file may take values from files outside its folder: links, virtual data sets, external storage.

    Returns
    -------
    Source
        A `StackedSource`, which has `parts`, exactly if `source` is a sequence.

    Raises
    ------
    InputError
        If an argument does not fit the source, the array has no numbers or no rows, or parts differ: in their shape,
        dtype, or scaling.
    NotFoundError
        If a file or data set is not there, or one that HDF5 takes values from.
    OpenError
        If a file cannot be opened or is cut off, holds pickles, or more than one array.
    IntegrityError
        If a file that HDF5 takes values from is too short, or its data set too small.

    Examples
    --------
    >>> open_source("random:2000000x2000").shape
    (2000000, 2000)
    """
    if not is_whole(axis):
        raise InputError(f"axis is a whole number; got {show(axis)}; give 0 for the first")
    if dataset is not None:
        check_text("dataset", dataset)
    seed = check_whole("seed", seed, least=0)
    options = _Options(dtype, row_shape, dataset, int(axis), seed, check_flag("outside_files", outside_files))
    if isinstance(source, str | os.PathLike) or not isinstance(source, Sequence):
        return _open_one(source, options)
    if not source:
        raise InputError("a source must have at least one part; got an empty list; name a file")
    sources = tuple(_open_one(part, options) for part in source)
    meanings = [decoding(each.labels.attributes, each.dtype) for each in sources]
    for part, opened, meaning in zip(source, sources, meanings, strict=True):
        for what, first, other in (
            ("row shape", sources[0].shape[1:], opened.shape[1:]),
            ("dtype", sources[0].dtype, opened.dtype),
        ):
            if first != other:
                raise InputError(
                    f"parts must agree in row shape and dtype; {_name(source[0])} has {what} {first}, {_name(part)} "
                    f"has {what} {other}; convert one of them"
                )
        for name in sorted(meaning.items() ^ meanings[0].items()):
            raise InputError(
                f"{_name(part)} has {name[0]} {meaning.get(name[0], 'not')}, {_name(source[0])} "
                f"{meanings[0].get(name[0], 'not')}: their numbers mean different values; convert one of them"
            )
    return StackedSource(sources)


def referred_files(source: Source) -> list[Path]:
    """List the files, beside those that were named, that a source takes values from, in the order of their paths."""
    parts = source.sources if isinstance(source, StackedSource) else (source,)
    found = (part.data.references for part in parts if isinstance(part, hdf5.Hdf5Source))
    return sorted({reference.stamp.path.resolve() for references in found for reference in references})


@dataclass(frozen=True, slots=True)
class _Options:
    dtype: DTypeLike | None
    row_shape: Sequence[int] | None
    dataset: str | None
    axis: int
    seed: int
    outside_files: bool

    def refuse(self, source: str, kind: str, *names: str) -> None:
        """Raise `InputError` if one of the options is given for a kind of source that has its own, or none."""
        refuse_options(source, kind, **{name: getattr(self, name) for name in names})

    def parse_dtype(self) -> np.dtype[Any]:
        dtype = check_dtype(self.dtype)
        if dtype.hasobject:
            raise InputError(f"a dtype must be of numbers; got {show(self.dtype)}; write float32 or >f4")
        return dtype


def refuse_options(source: str, kind: str, **options: Any) -> None:
    """Raise `InputError` if one of `dtype`, `row_shape`, `dataset` is given for a kind of source that has its own."""
    for name, value in options.items():
        if value is not None:
            owner = "HDF5" if name == "dataset" else "raw binary"
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is for {owner}; {source} is {kind}; leave {flag} out")


def _open_one(source: str | os.PathLike[str] | zarr.Array[Any], options: _Options) -> Source:
    if not isinstance(source, str | os.PathLike):
        return _open_zarr(source, options)
    text = os.fspath(check_path("a source", source))
    if text.startswith(_RANDOM) and not Path(text).exists():
        return _open_random(text, options)
    location = locate(source)
    if isinstance(location, Url):
        return _open_url(location, options)
    path, name = split_name(str(location))
    try:
        return _open_path(path, name, options)
    except FileNotFoundError as error:
        if isinstance(error, NotFoundError):
            raise
        raise NotFoundError(f"a source must exist; there is no {path}; give the name of a file or folder") from error
    except OSError as error:
        if isinstance(error, OpenError):
            raise
        raise OpenError(f"a source must be readable; {path}: {error.strerror}; check its permissions") from error


def _open_url(url: Url, options: _Options) -> ZarrSource:
    from pipeline.storage.stores import open_store

    if url.suffix.lower() in FILE_SUFFIXES or "::" in url.name or options.dtype is not None:
        raise OpenError(f"what a URL names is a Zarr array; {url} is a file; copy it to a local disk first")
    return _open_zarr(open_stored(open_store(url, read_only=True), str(url)), options)


def _open_path(path: Path, name: str | None, options: _Options) -> Source:
    if path.is_dir():
        if name is not None:
            raise InputError(f"FILE::NAME is for HDF5; {path} is a folder; write {path / name.lstrip('/')}")
        return _open_zarr(open_array(path), options)
    # Opening a pipe would wait for a writer.
    if path.exists() and not path.is_file():
        raise OpenError(f"a source must be a file or a folder; {path} is neither; copy it to a file")
    with path.open("rb") as file:
        is_npy, user_block, foreign = formats.is_npy(file), formats.find_hdf5(file), formats.recognize(file)
    # An archive of an HDF5 file has a superblock where a user block would end.
    if foreign is not None and foreign.is_sure:
        raise _foreign(path, foreign)
    if not is_npy and (user_block is not None or path.suffix.lower() in _HDF5_SUFFIXES):
        return _open_hdf5(path, name, options)
    if name is not None:
        raise InputError(f"FILE::NAME is for HDF5; {path} is not HDF5; leave ::{name} out")
    if is_npy or path.suffix.lower() == ".npy":
        return _open_npy(path, options)
    if foreign is not None and (options.dtype is None or options.row_shape is None):
        raise _foreign(path, foreign)
    return _open_raw(path, options)


def _foreign(path: Path, foreign: formats.Format) -> OpenError:
    return OpenError(f"{path} is {foreign.name}, not plain numbers; {foreign.way_out}")


def _open_npy(path: Path, options: _Options) -> FileSource:
    options.refuse(str(path), "a .npy file", "dtype", "row_shape", "dataset")
    stamp = FileStamp.take(path)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"format version {version} is for structured dtypes")  # noqa: TRY301
            shape, fortran, dtype = readers[version](file)
        except (ValueError, SyntaxError, TypeError) as error:
            raise OpenError(
                f"a .npy file must have a whole header; {path}: {_first_line(error)}; write it again with numpy.save"
            ) from error
        offset = file.tell()
    axis = _check_array(str(path), shape, dtype, options.axis)
    source = FileSource(stamp, offset, shape, dtype, fortran, axis, alone=True)
    _check_size(source)
    return source


def _open_raw(path: Path, options: _Options) -> FileSource:
    if options.dtype is None or options.row_shape is None:
        raise InputError(
            f"raw binary needs a dtype and the shape of a row; {path} is no .npy, HDF5 or Zarr; "
            f"add --dtype and --row-shape, such as --dtype float32 --row-shape 2000"
        )
    options.refuse(str(path), "raw binary", "dataset")
    dtype = options.parse_dtype()
    row_shape = check_shape("row_shape", options.row_shape)
    _check_array(str(path), (1, *row_shape), dtype, 0)
    stamp = FileStamp.take(path)
    rows, remainder = divmod(stamp.size, math.prod(row_shape) * dtype.itemsize)
    if remainder:
        raise OpenError(
            f"raw binary must hold whole rows; {path} has {stamp.size} bytes, {rows} rows of {row_shape} {dtype} and "
            f"{remainder} bytes more; check --dtype and --row-shape"
        )
    shape = (rows, *row_shape)
    axis = _check_array(str(path), shape, dtype, options.axis)
    return FileSource(stamp, 0, shape, dtype, fortran=False, axis=axis, alone=True)


def _open_hdf5(path: Path, name: str | None, options: _Options) -> FileSource | hdf5.Hdf5Source:
    options.refuse(str(path), "HDF5", "dtype", "row_shape")
    if name is not None and options.dataset is not None:
        raise InputError(f"a data set is named once; got {path}::{name} and --dataset {options.dataset}; drop one")
    name = name if name is not None else options.dataset
    data = hdf5.describe(path, name, outside_files=options.outside_files)
    axis = _check_array(f"{path}::{data.name}", data.shape, data.dtype, options.axis)
    if data.offset is None:
        return hdf5.Hdf5Source(data, axis)
    source = FileSource(
        data.stamp,
        data.offset,
        data.shape,
        data.dtype,
        fortran=False,
        axis=axis,
        alone=False,
        stored_labels=data.labels,
    )
    _check_size(source)
    return source


def _open_zarr(array: zarr.Array[Any], options: _Options) -> ZarrSource:
    import zarr

    if not isinstance(array, zarr.Array):
        raise InputError(
            f"a source is a path, a zarr.Array or a list of them; got {type(array).__name__}; save it first"
        )
    name = name_store(array.store_path)
    options.refuse(name, "a Zarr array", "dtype", "row_shape", "dataset")
    axis = _check_array(name, array.shape, np.dtype(array.dtype), options.axis)
    array = reading_config(array)
    chunk_rows = min(check_decodable(array, name)[axis], array.shape[axis])
    return ZarrSource(array, axis, chunk_rows, count_nbytes(array))


def _open_random(text: str, options: _Options) -> RandomSource:
    spec = text.removeprefix(_RANDOM)
    if not re.fullmatch(r"[0-9]{1,18}(x[0-9]{1,18})*", spec):
        raise InputError(f"random numbers are written random:ROWSxCOLS; got {text!r}; write random:100000x500")
    options.refuse(text, "random", "row_shape", "dataset")
    if options.axis != 0:
        raise InputError(f"random numbers have their rows first; got axis {options.axis}; leave --axis out")
    if not 0 <= options.seed < 2**64:
        raise InputError(f"a seed must lie in [0, 2**64); got {show(options.seed)}; choose another")
    dtype = np.dtype(np.float64) if options.dtype is None else options.parse_dtype()
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise InputError(f"random numbers are float64 or float32; got {dtype}; choose one of them")
    shape = tuple(int(n) for n in spec.split("x"))
    _check_array(text, shape, dtype, 0)
    return RandomSource(shape, dtype, options.seed)


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Whether values are numbers that a matrix can hold: Zarr has no name for floats of more than 64 bits."""
    return dtype.kind in "biufc" and dtype.itemsize <= (16 if dtype.kind == "c" else 8)


def _check_array(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], axis: int) -> int:
    """Refuse what a matrix cannot be made from; return `axis` as a number that is not negative."""
    if dtype.hasobject and dtype.kind != "T":
        raise OpenError(
            f"a source must hold numbers; {name} holds objects, refused, never unpickled; save plain numbers"
        )
    if not is_numeric(dtype):
        raise InputError(
            f"a source must hold booleans, integers, floats of up to 64 bits or complex numbers of them; {name} has "
            f"dtype {dtype}; convert it"
        )
    if not shape:
        raise InputError(f"a source must have at least one axis; {name} is a single number; name another")
    if not all(n > 0 for n in shape):
        raise InputError(f"a source must have rows, and rows values; {name} has shape {shape}; name another")
    if math.prod(shape) * dtype.itemsize >= 2**63:
        raise InputError(f"a source must have less than 2**63 bytes; {name} has shape {shape}; make it smaller")
    if not -len(shape) <= axis < len(shape):
        raise InputError(
            f"--axis must lie in [{-len(shape)}, {len(shape) - 1}]; {name} has shape {shape}, got {show(axis)}; "
            "change it"
        )
    return axis % len(shape)


def _check_size(source: FileSource) -> None:
    path, size, end = source.stamp.path, source.stamp.size, source.offset + source.nbytes
    if size < end:
        raise OpenError(f"a file must be as long as its header says; {path} has {size} of {end} bytes; copy it again")
    if source.alone and size > end:
        with path.open("rb") as file:
            file.seek(end)
            what = "a second array" if file.read(len(formats.NPY_MAGIC)) == formats.NPY_MAGIC else "something else"
        raise OpenError(
            f"{path} has {size} bytes, {size - end} more than its header says: behind its array there is {what}; save "
            "each array in a file of its own"
        )


def split_name(text: str) -> tuple[Path, str | None]:
    """Split ``FILE::NAME``, unless a file of the full name is there.

    Examples
    --------
    >>> split_name("A.h5::/group/data")
    (PosixPath('A.h5'), '/group/data')
    """
    path, colons, name = text.rpartition("::")
    return (Path(path), name) if colons and path and name and not Path(text).exists() else (Path(text), None)


def _no_labels(shape: tuple[int, ...]) -> Labels:
    return Labels({}, (None,) * len(shape))


def _put_first(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (shape[axis], *shape[:axis], *shape[axis + 1 :])


def _name(source: Any) -> str:
    return (
        os.fspath(source)
        if isinstance(source, str | os.PathLike)
        else name_store(getattr(source, "store_path", source))
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
